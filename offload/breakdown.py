"""A run by component. Invariant: the rows add up to the run's totals, to the byte and to the mark.

Bytes belong to the component that was moved. Times belong to the stage in which they passed: components that take turns
within one stage have a row of their own, named "a+b", and a row without a name is what lay outside every stage.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .record import RunRecord

OUTSIDE = ""
_TIMES = ("onload_s", "stall_s", "evict_s", "compute_s")


@dataclass
class _Row:
    """Of one component: bytes, counts and seconds. `dropped_for`: bytes evicted, by reason."""

    component: str
    moves: int = 0
    bytes_h2d: int = 0
    bytes_d2h: int = 0
    drops: int = 0
    bytes_dropped: int = 0
    avoidable_bytes: int = 0
    step_bytes: int = 0  # copied inside steps from page-locked memory, so ahead of their use
    step_copy_s: float | None = 0.0
    blocking_bytes: int = 0  # copied inside steps from other memory, which holds the host
    blocking_copy_s: float | None = 0.0
    dropped_for: dict[str, int] = field(default_factory=dict)
    peak: int | None = None
    seconds: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(_TIMES, 0.0))


def by_component(record: RunRecord, components: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The report's `by_component`. Bytes and seconds.

    components: what the caller knows of those it manages: {"name", "weight_bytes"}; they come first, in this order.
    """
    weights = {str(known["name"]): known.get("weight_bytes") for known in components}
    rows = {name: _Row(name) for name in weights}
    _add_moves(record, rows)
    _add_times(record, rows)
    residency = record.residency
    return [
        {
            "component": row.component,
            "weight_bytes": weights.get(row.component),
            "resident_bytes": residency.most.get(row.component),
            "left_bytes": residency.last.get(row.component),
            "moves": row.moves,
            "bytes_h2d": row.bytes_h2d,
            "bytes_d2h": row.bytes_d2h,
            "drops": row.drops,
            "bytes_dropped": row.bytes_dropped,
            "dropped_for": row.dropped_for,
            "avoidable_bytes": row.avoidable_bytes,
            **row.seconds,
            "step_bytes": row.step_bytes,
            "step_copy_s": row.step_copy_s,
            "blocking_bytes": row.blocking_bytes,
            "blocking_copy_s": row.blocking_copy_s,
            "peak": row.peak,
        }
        for row in rows.values()
        if row.component != OUTSIDE or any(row.seconds.values())
    ]


def _add_moves(record: RunRecord, rows: dict[str, _Row]) -> None:
    for total in record.moves.sums:
        component, direction, reason, avoidable, _ = total.kind
        row = rows.setdefault(component, _Row(component))
        if direction == "drop":
            row.drops += total.count
            row.bytes_dropped += total.nbytes
            row.dropped_for[reason] = row.dropped_for.get(reason, 0) + total.nbytes
            continue
        row.moves += total.count
        if direction == "d2h":
            row.bytes_d2h += total.nbytes
            continue
        row.bytes_h2d += total.nbytes
        row.avoidable_bytes += total.nbytes if avoidable else 0
        # a copy that nobody timed leaves the sum unknown: a part of it would pass for the whole
        seconds = total.dur_s if total.timed_bytes == total.nbytes else None
        if total.in_step and total.pinned:
            row.step_copy_s = _plus(row.step_copy_s, seconds)
            row.step_bytes += total.nbytes
        elif total.in_step:
            row.blocking_copy_s = _plus(row.blocking_copy_s, seconds)
            row.blocking_bytes += total.nbytes


def _plus(sum_s: float | None, seconds: float | None) -> float | None:
    return None if sum_s is None or seconds is None else sum_s + seconds


def _add_times(record: RunRecord, rows: dict[str, _Row]) -> None:
    if record.clock_error is not None:
        for row in rows.values():
            row.seconds = dict.fromkeys(_TIMES)
        for stage in record.stages:
            row = rows.setdefault(stage.component, _Row(stage.component, seconds=dict.fromkeys(_TIMES)))
            row.peak = max((peak for peak in (row.peak, stage.peak) if peak is not None), default=None)
        return
    marks = record.marks
    columns = dict(zip(_TIMES, (marks.onloaded, marks.stalled, marks.evicted, marks.busy), strict=True))
    outside = rows.setdefault(OUTSIDE, _Row(OUTSIDE))
    upto = 0  # mark from which on no stage has been seen
    last = len(marks.t) - 1
    for stage in record.stages:
        a, b = min(stage.first_mark, last), min(stage.last_mark, last)
        row = rows.setdefault(stage.component, _Row(stage.component))
        row.peak = max((peak for peak in (row.peak, stage.peak) if peak is not None), default=None)
        if a < 0 or b < a:
            continue
        _add(row, columns, a, b)
        _add(outside, columns, upto, a)
        upto = b
    _add(outside, columns, upto, last)


def _add(row: _Row, columns: Mapping[str, array[float]], a: int, b: int) -> None:
    if b <= a:
        return
    for name, column in columns.items():
        before = row.seconds[name]
        row.seconds[name] = (before or 0.0) + column[b] - column[a]


def residency(record: RunRecord, cap: int | None) -> list[dict[str, Any]]:
    """The report's `residency`: bytes of each component on the device, wherever they changed.

    Over the cap time is cut into windows, and of each the most bytes and the last are kept, by component.
    """
    log = record.residency
    if cap is None or len(log) <= cap:
        rows: Iterator[tuple[int, int]] = ((i, log.nbytes[i]) for i in range(len(log)))
    else:
        rows = iter(_thinned(record, cap))
    return [
        {"t": record.time_of(log.at[i]), "component": log.names[log.code[i]], "bytes": nbytes} for i, nbytes in rows
    ]


def _thinned(record: RunRecord, cap: int) -> list[tuple[int, int]]:
    log = record.residency
    size = -(-len(log) // max(1, cap // (2 * len(log.names))))
    kept = []
    for start in range(0, len(log), size):
        most: dict[int, int] = {}  # component -> row of its most bytes in the window
        last: dict[int, int] = {}
        for i in range(start, min(start + size, len(log))):
            code = log.code[i]
            if code not in most or log.nbytes[i] > log.nbytes[most[code]]:
                most[code] = i
            last[code] = i
        kept += [(i, log.nbytes[i]) for i in sorted({*most.values(), *last.values()})]
    return kept
