"""The hint of a prompt, and its line in the log. Invariant: a hint is made of this run and those before it in this
process, once, when the run ends; the log, the report and the page show the same sentence.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from ..hints import Digest, digest, find
from .comfyui_runs_report import RunReport

RUNS = 16
"""Runs that a hint is made of, at most."""

_log = logging.getLogger(__name__)


class Advice:
    """Knows the last runs in short. `advise` is called by the thread that ends a run, `tell` by the watcher's."""

    def __init__(self) -> None:
        self._before: deque[tuple[str | None, Digest]] = deque(maxlen=RUNS)  # by prompt

    def advise(self, result: RunReport) -> RunReport:
        """The same run, with its hint where there is one. Costs about a millisecond; never raises."""
        entered = perf_counter()
        try:
            now = digest(result.report(lists=False))
            found = find(now, [known for _, known in self._before])
            self._before.append((result.record.prompt_id, now))
        except Exception:
            _log.warning("Balanced Offload: no hint could be looked for", exc_info=True)
            return result
        hints = () if found.hint is None else (found.hint.to_json(),)
        spent = result.overhead_s + perf_counter() - entered
        return dataclasses.replace(result, hints=hints, hint_note=found.note, overhead_s=spent)

    def amended(self, prompt_id: str) -> None:
        """The host says otherwise how this run ended than was known: it is none to compare with."""
        for known in [known for known in self._before if known[0] == prompt_id]:
            self._before.remove(known)


def tell(report: Mapping[str, Any]) -> None:
    """The generation line and the hint, in the log; of a prompt that uses nothing of ours, nothing."""
    if report["worlds"] == ["observe"] and not report["file"]:
        return
    _log.info("Balanced Offload: %s", report["line"])
    for hint in report["hints"]:
        _log.info("Balanced Offload: hint: %s", hint["sentence"])
