"""Invariant: a prompt has one row, the same in the event at its end and in the list of runs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from ..offload.adapters.comfyui_runs_nodes import in_short
from ..offload.adapters.comfyui_runs_report import text_of
from ..offload.adapters.comfyui_store import KEEP

NODES = 256  # of a row; those that took longest, the rest is in the report
_AS_IT_IS = ("prompt_id", "created", "ended", "complete", "error", "world", "verdict", "fits", "output_neutral")
_WHERE_KNOWN = ("totals", "vram", "overhead_ms", "line", "workload", "hints", "hint_note")


def row_of(report: dict[str, Any]) -> dict[str, Any]:
    """One row of `/offload/runs`: the report without its lists, and its nodes in short."""
    return {key: report.get(key) for key in (*_AS_IT_IS, *_WHERE_KNOWN)} | {
        "mode": report["resolved"].get("mode"),
        "text": text_of(report),
        "nodes": _nodes(report.get("nodes") or ()),
    }


def _nodes(entries: Any) -> list[dict[str, Any]]:
    rows = [in_short(entry) for entry in entries]
    if len(rows) <= NODES:
        return rows
    longest = sorted(range(len(rows)), key=lambda i: rows[i]["wall_s"] or 0.0, reverse=True)[:NODES]
    return [rows[i] for i in sorted(longest)]


class Rows:
    """The rows of the last prompts that ended: a report of thousands of moves is not put together again for each look
    at the list. Written by the watcher, read by the server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def keep(self, report: dict[str, Any]) -> dict[str, Any]:
        """The row of a report that is final."""
        row = row_of(report)
        with self._lock:
            self._rows[report["prompt_id"]] = row
            self._rows.move_to_end(report["prompt_id"])
            while len(self._rows) > KEEP:
                self._rows.popitem(last=False)
        return row

    def get(self, prompt_id: str) -> dict[str, Any] | None:
        """The row of a prompt that ended, None where it is not kept."""
        with self._lock:
            return self._rows.get(prompt_id)
