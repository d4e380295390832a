"""The reports of the last prompts. Invariant: what is kept has a bound, in number and in bytes per report.

A run's record is kept as it was measured, in columns, and becomes JSON when it is asked for; most never are. Long ones
are kept as compressed JSON with their lists capped, which takes a twentieth.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..report import save_report
from .comfyui_runs_report import RunReport

KEEP = 64  # prompts
ROWS = 2000  # of each list of a report that is asked for
LONG = 4000  # rows from which a record is packed
_SAFE = re.compile(r"[0-9A-Za-z_-]{1,64}")


class ReportStore:
    """prompt_id -> report, the newest last; any thread."""

    def __init__(self, keep: int = KEEP, long: int = LONG) -> None:
        self._keep, self._long = keep, long
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, RunReport | bytes] = OrderedDict()

    def put(self, prompt_id: str, result: RunReport) -> None:
        """Keep a report in place of the prompt's former one; the oldest goes."""
        kept = result if result.rows <= self._long else _pack(result.report(cap=ROWS))
        with self._lock:
            self._kept[prompt_id] = kept
            self._kept.move_to_end(prompt_id)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)

    def get(self, prompt_id: str) -> dict[str, Any] | None:
        """The report, None where it is not kept (any more)."""
        with self._lock:
            kept = self._kept.get(prompt_id)
        if isinstance(kept, bytes):
            report: dict[str, Any] = json.loads(zlib.decompress(kept))
            return report
        return None if kept is None else kept.report(cap=ROWS)

    def recent(self, limit: int) -> list[str]:
        """Ids of the last prompts, the newest first."""
        with self._lock:
            return list(reversed(self._kept))[: max(0, limit)]


def _pack(report: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(report, ensure_ascii=False, allow_nan=False).encode(), 1)


def file_name(prompt_id: str) -> str:
    """The report's file. A prompt's id is the client's own text: what could be more than a name becomes its hash."""
    plain = prompt_id if _SAFE.fullmatch(prompt_id) else hashlib.sha256(prompt_id.encode(errors="replace")).hexdigest()
    return f"offload-report_{plain}.json"


def write(report: Mapping[str, Any], folder: Path | None, name: str) -> str | None:
    """Write the file; None, or why it could not be written, in words."""
    if folder is None:
        return "the host names no output folder"
    try:
        save_report(report, folder / name)
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"
    return None
