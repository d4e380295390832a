"""The hint of a run, among those of its process. Invariant: made once, when the run ends, of it and of those before it;
the log, the report and the page show the same sentence.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from ..hints import Digest, digest, find

RUNS = 16
"""Runs that a hint is made of, at most."""

_log = logging.getLogger(__name__)


class Advice:
    """Knows the last runs in short."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a run ends on the thread that drives the device, or on one that looks after it
        self._before: deque[tuple[str | None, Digest]] = deque(maxlen=RUNS)  # by prompt

    def look(self, report: Mapping[str, Any]) -> tuple[tuple[dict[str, Any], ...], str | None]:
        """(the report's `hints`, its `hint_note`) of a run that has ended; of a report without its long lists.

        Costs about a millisecond; never raises.
        """
        try:
            now, prompt_id = digest(report), report.get("prompt_id")
            if prompt_id is not None:
                self.forget(prompt_id)  # a run is no proof of itself
            with self._lock:
                found = find(now, [known for _, known in self._before])
                self._before.append((prompt_id, now))
        except Exception:
            _log.warning("Balanced Offload: no hint could be looked for", exc_info=True)
            return (), None
        return () if found.hint is None else (found.hint.to_json(),), found.note

    def forget(self, prompt_id: str) -> None:
        """How this run ended is known otherwise now: it is none to compare with."""
        with self._lock:
            for known in [known for known in self._before if known[0] == prompt_id]:
                self._before.remove(known)
