"""The reports of the last prompts. Invariant: what is kept has a bound, in number and in bytes per report.

Kept as compressed JSON: a report as Python objects takes twenty times as much, and most are never asked for.
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

KEEP = 64  # prompts
_SAFE = re.compile(r"[0-9A-Za-z_-]{1,64}")


class ReportStore:
    """prompt_id -> report, the newest last; any thread."""

    def __init__(self, keep: int = KEEP) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._packed: OrderedDict[str, bytes] = OrderedDict()

    def put(self, prompt_id: str, report: Mapping[str, Any]) -> None:
        """Keep a report in place of the prompt's former one; the oldest goes."""
        packed = zlib.compress(json.dumps(report, ensure_ascii=False, allow_nan=False).encode(), 1)
        with self._lock:
            self._packed[prompt_id] = packed
            self._packed.move_to_end(prompt_id)
            while len(self._packed) > self._keep:
                self._packed.popitem(last=False)

    def text(self, prompt_id: str) -> bytes | None:
        """The report as JSON in UTF-8."""
        with self._lock:
            packed = self._packed.get(prompt_id)
        return None if packed is None else zlib.decompress(packed)

    def get(self, prompt_id: str) -> dict[str, Any] | None:
        """The report, None where it is not kept (any more)."""
        text = self.text(prompt_id)
        if text is None:
            return None
        report: dict[str, Any] = json.loads(text)
        return report

    def recent(self, limit: int) -> list[str]:
        """Ids of the last prompts, the newest first."""
        with self._lock:
            return list(reversed(self._packed))[: max(0, limit)]


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
