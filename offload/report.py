"""The report of a run, `offload-report/1`. Invariant: what is not known is null and named, what is summed was measured.

Every null is listed in `unknown`, and every group of figures names where it comes from in `sources`. Lists are capped,
their rest aggregated so that sums over a list stay exact; with `full=True` (for the file) nothing is aggregated.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from .breakdown import by_component, residency
from .record import CATEGORIES, Kind, RunRecord, StepRow

SCHEMA = "offload-report/1"
VERDICTS = ("resident", "partial", "streamed", "oom_recovered", "oom", "error")

HOST = ("gpu", "vram_total", "driver", "os", "ram_total")
ENV = ("pack", "comfyui", "torch", "dynamic_vram", "flags")
VRAM = ("total", "available", "peak", "peak_device", "peak_torch", "others_start", "high_crossings", "spill_suspected")
PEAKS = ("peak_torch", "peak_device", "peak_noted")
RAM = ("peak_rss", "pinned")
PREDICTION = ("step_s", "bound_s")

# A null here says something else than "not known": outside a step, no error, no cap, the planner decides.
# A turn of several components, and what lies outside every stage, have no weights of their own.
_MEANT = (
    *("policy", "resolved", "error", "moves[].step", "events[].data", "hints[].action", "hint_note", "workload"),
    *(f"by_component[].{name}" for name in ("weight_bytes", "resident_bytes", "left_bytes", "peak")),
)

_SOURCES = {
    "bytes": "the ledger: storages of weights, counted when the copy was issued",
    "overhead_ms": "host clock around the ledger's own work",
    "totals.host_s": "host clock",
    "vram.total": "driver",
    "vram.peak": "the highest of peak_device, peak_torch and peak_noted",
    "vram.peak_device": "driver",
    "vram.peak_torch": "torch's allocator",
    "vram.peak_noted": "the session's own count at every move",
    "ram.peak_rss": "operating system",
    "ram.pinned": "the session's own count",
}


def build_report(
    record: RunRecord,
    *,
    host: Mapping[str, Any],
    env: Mapping[str, Any],
    policy_json: Mapping[str, Any],
    resolved_json: Mapping[str, Any],
    vram: Mapping[str, Any],
    ram: Mapping[str, Any],
    rung: str,
    world: str = "module",
    prediction: Mapping[str, Any] | None = None,
    components: Sequence[Mapping[str, Any]] = (),
    hints: Sequence[Mapping[str, Any]] = (),
    hint_note: str | None = None,
    workload: str | None = None,
    nodes: Sequence[Mapping[str, Any]] = (),
    output_neutral: bool | None = None,
    fits: bool | None = None,
    verdict: str | None = None,
    sources: Mapping[str, str] | None = None,
    full: bool = False,
    lists: bool = True,
) -> dict[str, Any]:
    """The report as JSON types. Sizes are bytes, times seconds.

    host, env, vram, ram, prediction: what the caller knows; keys it leaves out become null. `vram["peak_torch"]` is
    `Backend.peak_allocated()`. rung: gpu, simulated or cpu. world: static, dynamic, module or pipeline. fits: taken
    from `resolved_json` where not given. verdict: derived where not given. sources: adds to and replaces the defaults.
    components: {"name", "weight_bytes"} of what is managed. workload: equal for runs that can be compared, whatever
    their policy. lists: False leaves the long ones empty (steps, moves, segments, vram_track, residency), for a digest.

    Raises:
        ValueError: an unknown verdict.
    """
    if verdict is not None and verdict not in VERDICTS:
        raise ValueError(f"verdict: got {verdict!r}, allowed is one of {', '.join(VERDICTS)}")
    cap = None if full else record.cap
    vram = {"peak_noted": record.peak_allocated, "peak_weights": record.peak_resident, **vram}
    vram["peak"] = max((vram[key] for key in PEAKS if vram.get(key) is not None), default=None)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "prompt_id": _clean(record.prompt_id),
        "created": record.created,
        "complete": record.complete,
        "error": _clean(_error(record)),
        "host": _section(host, HOST),
        "env": _section(env, ENV),
        "rung": rung,
        "world": world,
        "policy": _clean(policy_json),
        "resolved": _clean({"mode": None, "sources": {}, "sentence": "", **resolved_json}),
        "output_neutral": output_neutral,
        "vram": _section(vram, VRAM),
        "ram": _section(ram, RAM),
        "totals": _totals(record),
        "stages": _clean(_stages(record, cap)),
        "nodes": _clean(nodes),
        "steps": _steps(record, cap) if lists else [],
        "moves": _moves(record, cap) if lists else [],
        "segments": _segments(record, cap) if lists else [],
        "vram_track": _vram_track(record, cap) if lists else [],
        "by_component": _clean(by_component(record, components)),
        "residency": _clean(residency(record, cap)) if lists else [],
        "events": _clean(record.events),
        "events_dropped": record.events_dropped,
        "hints": _clean(hints),
        "hint_note": hint_note,
        "workload": workload,
        "prediction": _section(prediction or {}, PREDICTION),
        "verdict": verdict or derive_verdict(record, resolved_json),
        "fits": fits if fits is not None else resolved_json.get("fits"),
        "overhead_ms": record.overhead_s * 1e3,
    }
    report["sources"] = {**_SOURCES, "times": record.clock, **(sources or {})}
    report["unknown"] = sorted(set(_nulls(report)))
    return report


def derive_verdict(record: RunRecord, resolved_json: Mapping[str, Any]) -> str:
    """What happened, in one word: an error first, then a recovered OOM, then how the weights were placed."""
    if record.oom:
        return "oom"
    if record.error_type is not None or not record.complete:
        return "error"
    if any(event["kind"] == "oom" for event in record.events):
        return "oom_recovered"
    if resolved_json.get("mode") == "sequential":
        return "streamed"
    moves = record.moves
    into_steps = any(moves.step[i] >= 0 and moves.kinds[moves.kind[i]][1] == "h2d" for i in range(len(moves)))
    return "partial" if into_steps else "resident"


def save_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write UTF-8 JSON, whole or not at all: a reader never sees half a file. OSError when it cannot be written."""
    return save_json(report, path)


def save_json(document: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """As `save_report`, for any JSON document of ours."""
    target = Path(path)
    text = _dump(document)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the report from the host's web server
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def _dump(document: Mapping[str, Any]) -> str:
    """One line per field and one per row: 80,000 moves stay readable, and diffable, at a third of the size."""
    dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    fields = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            fields.append(f"{dump(key)}: [\n  " + ",\n  ".join(map(dump, value)) + "\n ]")
        else:
            fields.append(f"{dump(key)}: {dump(value)}")
    return "{\n " + ",\n ".join(fields) + "\n}\n"


@cache
def schema(name: str = "offload-report-1") -> dict[str, Any]:
    """A JSON schema of ours by file name without ".json"."""
    text = (Path(__file__).parent / "schemas" / f"{name}.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def validate(document: Mapping[str, Any], name: str = "offload-report-1") -> None:
    """jsonschema.ValidationError when `document` does not keep to the schema. Needs the [dev] extra."""
    import jsonschema

    jsonschema.Draft202012Validator(schema(name)).validate(document)


# --- parts


def _section(given: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    section: dict[str, Any] = _clean({**dict.fromkeys(keys), **given})
    return section


def _error(record: RunRecord) -> dict[str, str] | None:
    if record.error_type is not None:
        return {"type": record.error_type, "message": (record.error_text or "")[:4000]}
    if record.clock_error is not None:
        return {"type": "clock", "message": record.clock_error[:4000]}
    return None


def _totals(record: RunRecord) -> dict[str, Any]:
    totals: dict[str, Any] = {"wall_s": record.wall_s}
    for category in CATEGORIES:
        totals[f"{category}_s"] = record.seconds.get(category)
    return totals | {
        "overlapped_s": record.overlapped_s,
        "bytes_h2d": record.bytes_h2d,
        "bytes_d2h": record.bytes_d2h,
        "move_count": record.move_count,
        "bytes_dropped": record.bytes_dropped,
        "drop_count": record.drop_count,
        "host_s": record.host_s,
    }


def _stages(record: RunRecord, cap: int | None) -> list[dict[str, Any]]:
    names = ("name", "component", "t0", "t1", "need", "have", "peak")
    rows = record.stages
    keep = len(rows) if cap is None or len(rows) <= cap else cap - 1
    stages = [{name: getattr(row, name) for name in names} for row in rows[:keep]]
    if rest := rows[keep:]:
        last: dict[str, Any] = {"name": "several", "component": "several", "t0": rest[0].t0, "t1": rest[-1].t1}
        last["need"] = max((row.need for row in rest if row.need is not None), default=None)
        last["have"] = min((row.have for row in rest if row.have is not None), default=None)
        last["peak"] = max((row.peak for row in rest if row.peak is not None), default=None)
        stages.append(last | {"count": len(rest), "aggregated": True})
    return stages


def _sum(values: Iterable[float | None]) -> float | None:
    """None as soon as one is not known: a partial sum would pass for the whole."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _steps(record: RunRecord, cap: int | None) -> list[dict[str, Any]]:
    def row(group: Sequence[StepRow]) -> dict[str, Any]:
        return {
            "node": None,
            "i": group[0].i,
            "t0": group[0].t0,
            "t1": group[-1].t1,
            "compute_s": _sum(step.compute_s for step in group),
            "stall_s": _sum(step.stall_s for step in group),
            "overlapped_s": _sum(step.overlapped_s for step in group),
            "bytes_h2d": sum(step.bytes_h2d for step in group),
        }

    steps = record.steps
    if cap is None or len(steps) <= cap:
        return [row([step]) for step in steps]
    rest = steps[cap - 1 :]
    return [row([step]) for step in steps[: cap - 1]] + [row(rest) | {"count": len(rest), "aggregated": True}]


def _moves(record: RunRecord, cap: int | None) -> list[dict[str, Any]]:
    log = record.moves
    kinds = [(_clean(component), *rest) for component, *rest in log.kinds]  # names come from callers

    def row(i: int) -> dict[str, Any]:
        component, direction, reason, avoidable, overlapped = kinds[log.kind[i]]
        t, dur, step = log.t[i], log.dur[i], log.step[i]
        return {
            "t": None if math.isnan(t) else t,
            "dur_s": None if math.isnan(dur) else dur,
            "component": component,
            "dir": direction,
            "bytes": log.nbytes[i],
            "reason": reason,
            "step": None if step < 0 else step,
            "avoidable": avoidable,
            "overlapped": overlapped,
            "count": log.count[i],
        }

    if cap is None or len(log) <= cap:
        return [row(i) for i in range(len(log))]
    # One aggregate per kind of move; where kinds are too many for the cap, one per direction and reason.
    keys = [_fine(kind) for kind in log.kinds]
    if len(set(keys)) > cap // 2:
        keys = [_coarse(kind) for kind in log.kinds]
    keep = max(0, cap - len(set(keys)))
    groups: dict[Any, dict[str, Any]] = {}
    for i in range(keep, len(log)):
        key, dur = keys[log.kind[i]], log.dur[i]
        total = groups.get(key)
        if total is None:
            groups[key] = row(i) | {"step": None, "aggregated": True}
            continue
        component, _, _, avoidable, overlapped = kinds[log.kind[i]]
        if component != total["component"]:
            total["component"] = "several"
        total["dur_s"] = None if math.isnan(dur) or total["dur_s"] is None else total["dur_s"] + dur
        total["bytes"] += log.nbytes[i]
        total["count"] += log.count[i]
        total["avoidable"] &= avoidable
        total["overlapped"] &= overlapped
    return [row(i) for i in range(keep)] + list(groups.values())


def _fine(kind: Kind) -> tuple[Any, ...]:
    component, direction, reason, avoidable, _ = kind
    return component, direction, reason, avoidable


def _coarse(kind: Kind) -> tuple[Any, ...]:
    return kind[1], kind[2]


def _segments(record: RunRecord, cap: int | None) -> list[dict[str, Any]]:
    """The time line as windows of {t, dur_s, by{category: s}}; over the cap neighbours share a window."""
    rows = list(record.marks.segments())
    size = 1 if cap is None else max(1, math.ceil(len(rows) / cap))
    windows = []
    for i in range(0, len(rows), size):
        by: dict[str, float] = {}
        for _, dur, category in rows[i : i + size]:
            by[category] = by.get(category, 0.0) + dur
        t, end = rows[i][0], rows[min(i + size, len(rows)) - 1]
        windows.append({"t": t, "dur_s": end[0] + end[1] - t, "by": by})
    return windows


def _vram_track(record: RunRecord, cap: int | None) -> list[dict[str, Any]]:
    """What the session said was on the device; over the cap the highest of each window."""
    at, allocated, resident = record.vram_at, record.vram_allocated, record.vram_resident
    size = 1 if cap is None else max(1, math.ceil(len(at) / cap))
    track = []
    for i in range(0, len(at), size):
        j = min(i + size, len(at))
        track.append({"t": record.time_of(at[i]), "allocated": max(allocated[i:j]), "resident": max(resident[i:j])})
    return track


def _clean(value: Any) -> Any:
    """JSON types only: what callers hand in may hold tuples, NaN, paths or half of a surrogate pair."""
    kind = type(value)
    if value is None or kind is int or kind is bool or (kind is str and value.isascii()):
        return value  # most are one of these, and asking for abstract types costs ten times as much
    if isinstance(value, Enum):
        return _clean(value.value)
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_clean(item) for item in value), key=str)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _nulls(value: Any, path: str = "") -> Iterator[str]:
    if path in _MEANT:
        return
    if value is None:
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _nulls(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, dict):
                yield from _nulls(item, f"{path}[]")
                continue
            for key, part in item.items():  # not by recursion: there may be 100,000 rows
                if part is None or isinstance(part, (dict, list)):
                    yield from _nulls(part, f"{path}[].{key}")
