"""A report as a Chrome trace, for ui.perfetto.dev. Invariant: on each lane slices follow or contain one another.

Built in whole nanoseconds and written in microseconds, as the format wants: two slices that meet at a float would
otherwise overlap by a rounding error, and the viewer would nest one in the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import save_json

_PID = 1
_STAGES, _STEPS, _COMPUTE, _COPY = 1, 2, 3, 10  # thread ids: one lane each; further copy lanes count on from _COPY
_VERB = {"h2d": "onload", "d2h": "copy down", "drop": "evict"}


def build_trace(report: Mapping[str, Any]) -> dict[str, Any]:
    """{"traceEvents": [...]} of an `offload-report/1`: stages, steps, categories, copies, VRAM counter, notices.

    Best made of a full report: aggregated rows of a capped one have no place in time and are left out.
    """
    events: list[dict[str, Any]] = []
    lanes = {_STAGES: "stages", _STEPS: "steps", _COMPUTE: "compute stream (exclusive)", _COPY: "copies"}

    timed = [row for row in report["stages"] if row["t0"] is not None and row["t1"] is not None]
    for row, start, end in _in_turn([(row, row["t0"], row["t1"]) for row in timed if not row.get("aggregated")]):
        args = {key: row[key] for key in ("component", "need", "have", "peak")}
        events.append(_slice(_STAGES, f"{row['name']}: {row['component']}", start, end, args))

    timed = [row for row in report["steps"] if row.get("t0") is not None and row.get("t1") is not None]
    for row, start, end in _in_turn([(row, row["t0"], row["t1"]) for row in timed if not row.get("aggregated")]):
        args = {key: row[key] for key in ("compute_s", "stall_s", "overlapped_s", "bytes_h2d")}
        events.append(_slice(_STEPS, f"step {row['i']}", start, end, args))

    rows = [(row, row["t"], row["t"] + row["dur_s"]) for row in report.get("segments", ())]
    for row, start, end in _in_turn(rows):
        by = sorted(row["by"].items(), key=lambda item: -item[1])
        events.append(_slice(_COMPUTE, " + ".join(name for name, _ in by), start, end, {f"{k}_s": v for k, v in by}))

    free_from: list[int] = []  # per copy lane, the nanosecond from which it is free
    moves = [row for row in report["moves"] if row["t"] is not None and not row.get("aggregated")]
    for row in sorted(moves, key=lambda row: float(row["t"])):
        name = f"{_VERB[row['dir']]} {row['component']}"
        args = {key: row[key] for key in ("bytes", "reason", "step", "avoidable") if row[key] is not None}
        start = max(0, _ns(row["t"]))
        if row["dur_s"] is None:
            events.append(
                {"ph": "i", "s": "t", "pid": _PID, "tid": _COPY, "name": name, "ts": start / 1e3, "args": args}
            )
            continue
        end = max(start, _ns(row["t"] + row["dur_s"]))
        lane = next((i for i, free in enumerate(free_from) if free <= start + 1), len(free_from))
        if lane == len(free_from):
            free_from.append(0)
            lanes[_COPY + lane] = "copies" if lane == 0 else f"copies {lane + 1}"
        start = max(start, free_from[lane])
        free_from[lane] = end = max(start, end)
        events.append(_slice(_COPY + lane, name, start, end, args))

    for row in report.get("vram_track", ()):
        if row["t"] is not None:
            args = {"weights": row["resident"], "activations": max(0, row["allocated"] - row["resident"])}
            events.append(
                {"ph": "C", "pid": _PID, "tid": 0, "name": "VRAM bytes", "ts": _ns(row["t"]) / 1e3} | _a(args)
            )
    for row in report.get("events", ()):
        if row["t"] is not None:
            mark = {"ph": "i", "s": "p", "pid": _PID, "tid": _STAGES, "name": f"{row['kind']}: {row['text']}"}
            events.append(mark | {"ts": _ns(row["t"]) / 1e3} | _a(dict(row.get("data", {}))))

    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    gpu = report["host"].get("gpu") or "device"
    named = [_meta("process_name", 0, {"name": f"{gpu} ({report['rung']})"})]
    for tid, lane_name in sorted(lanes.items()):
        named += [_meta("thread_name", tid, {"name": lane_name}), _meta("thread_sort_index", tid, {"sort_index": tid})]
    other = {"schema": report["schema"], "verdict": report["verdict"], "created": report["created"]}
    return {"traceEvents": named + events, "displayTimeUnit": "ms", "otherData": other}


def save_trace(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write `build_trace(report)` as JSON, whole or not at all."""
    return save_json(build_trace(report), path)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _in_turn(rows: list[tuple[Any, float, float]]) -> list[tuple[Any, int, int]]:
    """(row, start, end) in nanoseconds, each cut where the next begins."""
    ordered = sorted(((row, max(0, _ns(a)), max(0, _ns(b))) for row, a, b in rows), key=lambda item: item[1:])
    turns, after = [], 2**63
    for row, start, end in reversed(ordered):
        turns.append((row, start, min(end, after)))
        after = start
    return turns[::-1]


def _slice(tid: int, name: str, start: int, end: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "pid": _PID, "tid": tid, "name": name, "ts": start / 1e3, "dur": (end - start) / 1e3} | _a(args)


def _a(args: dict[str, Any]) -> dict[str, Any]:
    return {"args": {key: value for key, value in args.items() if value is not None}}


def _meta(name: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": _PID, "tid": tid, "name": name, "ts": 0, "args": args}
