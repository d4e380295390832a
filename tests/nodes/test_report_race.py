"""Invariant tested: a prompt is closed once, by whichever thread comes first, so that no run is proof of itself."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from balanced_offload.offload.adapters.comfyui_runs import PromptRuns
from balanced_offload.offload.adapters.hinting import Advice

from .report_prompts import Node, Prompts


def test_a_watcher_that_is_late_closes_nothing_again(
    prompts: Prompts, runs: PromptRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read which run is open, was held up while it sent telemetry, and meanwhile the prompt ended."""
    looks: list[tuple[str, str]] = []
    original = Advice.look

    def look(self: Advice, report: dict[str, Any]) -> Any:
        looks.append((report["prompt_id"], threading.current_thread().name))
        return original(self, report)

    monkeypatch.setattr(Advice, "look", look)
    inside, ended = threading.Event(), threading.Event()

    def slow(figures: dict[str, Any]) -> None:
        inside.set()
        ended.wait(5)

    def work() -> None:
        runs.touch("observe")
        assert inside.wait(5)

    runs.on_sample(slow, lambda: True)
    prompts.run(Node("1", "KSampler", work), prompt_id="p")
    ended.set()
    until = time.monotonic() + 5
    while (runs.report("p") or {}).get("ended") is not True and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)  # the watcher goes on from where it was held up
    assert [prompt for prompt, _ in looks] == ["p"]
    assert [prompt for prompt, _ in runs._advice._before] == ["p"]
