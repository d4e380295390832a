"""Guards: progress goes to standard error alone, so that standard output can be read by a program.

A terminal gets a bar that is redrawn in place; a file or a pipe gets one line per part that is done.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 28
REDRAW_S = 0.1


class Progress:
    """A bar over `total` ticks, in named parts."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = max(1, total)
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._done = 0
        self._part = ""
        self._begun = self._drawn = time.monotonic()
        self._part_begun = self._begun

    def begin(self, part: str) -> None:
        """A new part starts."""
        self._part, self._part_begun = part, time.monotonic()
        self._draw(force=True)

    def tick(self, ticks: int = 1) -> None:
        """Some of the work is done."""
        self._done = min(self._total, self._done + ticks)
        self._draw()

    def end(self, text: str) -> None:
        """The part is done; `text` says how it went."""
        self._say(f"{self._part}: {text} ({time.monotonic() - self._part_begun:.1f} s)")

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._say(text)

    def close(self) -> None:
        """Take the bar away."""
        if self._live:
            self._write("\r\033[K")

    def _say(self, text: str) -> None:
        self._write(("\r\033[K" if self._live else "") + text + "\n")
        self._draw(force=True)

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self._live or (now - self._drawn < REDRAW_S and not force):
            return
        self._drawn = now
        share = self._done / self._total
        filled = int(share * WIDTH)
        bar = "#" * filled + "." * (WIDTH - filled)
        self._write(f"\r\033[K[{bar}] {share:4.0%}  {now - self._begun:4.0f} s  {self._part}")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
