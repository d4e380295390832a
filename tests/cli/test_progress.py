"""Invariant: a terminal gets one bar that is redrawn in place, anything else gets whole lines only."""

from __future__ import annotations

import io

from balanced_offload.offload.demo import progress
from balanced_offload.offload.demo.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_one_line_per_part():
    stream = io.StringIO()
    bar = Progress(4, stream)
    bar.begin("none")
    for _ in range(4):
        bar.tick()
    bar.end("4 pictures")
    bar.close()
    assert stream.getvalue().startswith("none: 4 pictures (")
    assert stream.getvalue().count("\n") == 1
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_a_bar_that_fills_and_is_taken_away(monkeypatch):
    monkeypatch.setattr(progress, "REDRAW_S", 0.0)
    stream = Terminal()
    bar = Progress(4, stream)
    bar.begin("balanced")
    bar.tick()
    assert f"[{'#' * 7}{'.' * 21}]  25%" in stream.getvalue()
    bar.tick(9)
    assert f"[{'#' * 28}] 100%" in stream.getvalue()
    assert "balanced" in stream.getvalue()
    bar.close()
    assert stream.getvalue().endswith("\r\033[K")
