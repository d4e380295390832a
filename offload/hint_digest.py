"""What a hint is judged by. Invariant: a figure that is missing, null or no figure becomes None, and nothing raises.

A digest is taken of an `offload-report/1` that may come without its long lists (moves, segments, vram_track, residency,
steps) and from another version. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MOST = 1 << 62  # bytes or seconds beyond it are no figures
_NAME_MOST = 48
# How an event says that two were in force; others of its kind say what a policy did.
_POLICIES = ("More than one policy in this run", "two policies on clones of one model")
_WATCHERS = ("OffloadPolicy", "VRAMReport")  # nodes of ours that compute nothing, and run when only the policy changed


@dataclass(frozen=True)
class Row:
    """A row of `by_component`. `ahead`: copies inside steps, issued before their use; `blocking`: those waited for."""

    component: str
    weight: int | None = None
    resident: int | None = None
    left: int | None = None
    bytes_h2d: int | None = None
    avoidable: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)  # bytes by reason
    onload_s: float | None = None
    stall_s: float | None = None
    ahead: int | None = None
    ahead_s: float | None = None
    blocking: int | None = None
    blocking_s: float | None = None

    @property
    def outside_steps(self) -> int | None:
        """Bytes copied up that no step streamed: what `onload_s` was spent on."""
        if self.bytes_h2d is None:
            return None
        return max(0, self.bytes_h2d - (self.ahead or 0) - (self.blocking or 0))


@dataclass(frozen=True)
class Stage:
    name: str
    components: tuple[str, ...]
    t0: float | None
    t1: float | None
    need: int | None
    peak: int | None


@dataclass(frozen=True)
class StepDown:
    """Memory ran out at `t`, and `step` was taken."""

    t: float
    step: str | None


@dataclass(frozen=True)
class Digest:
    """One run, in the figures that the rules compare."""

    complete: bool = False
    workload: str | None = None
    gpu: str | None = None
    rung: str | None = None
    world: str | None = None
    host_pages: bool = False  # the host has a pager of its own
    ran: frozenset[str] | None = None  # nodes that were not taken from the host's cache
    wall_s: float | None = None
    onload_s: float | None = None
    stall_s: float | None = None
    evict_s: float | None = None
    moved: int | None = None  # copies and evictions
    dropped: int | None = None  # bytes evicted
    policy: Mapping[str, Any] = field(default_factory=dict)
    mixed: bool = False  # several policies were in force, and `policy` is only the last one
    mode: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    high: int | None = None
    low_always: bool = False
    never: frozenset[str] = frozenset()
    weights: int | None = None
    activations: int | None = None
    available: int | None = None
    fits: bool = False
    vram_total: int | None = None
    ram_total: int | None = None
    pinned_ram: int | None = None  # that may be page-locked
    pinned: int | None = None  # that is
    rows: tuple[Row, ...] = ()
    stages: tuple[Stage, ...] = ()
    step_downs: tuple[StepDown, ...] = ()
    steps: int | None = None
    classes: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # component -> class, role

    @property
    def blocked_s(self) -> float | None:
        """Seconds for which moves held the run."""
        parts = (self.onload_s, self.stall_s, self.evict_s)
        return None if None in parts else sum(part for part in parts if part is not None)

    def row(self, component: str) -> Row | None:
        return next((row for row in self.rows if row.component == component), None)


def digest(report: object) -> Digest:
    """The figures of a report; of anything else an empty digest, of which no rule makes a hint."""
    top = _section(report)
    totals, resolved, policy = _section(top.get("totals")), _section(top.get("resolved")), _section(top.get("policy"))
    vram, host, env = _section(top.get("vram")), _section(top.get("host")), _section(top.get("env"))
    rows = tuple(found for found in map(_row, _list(top.get("by_component"))) if found is not None)
    known = [row.weight for row in rows if row.weight is not None]
    counted = _bytes(resolved.get("weight_bytes"))
    moves, drops = _bytes(totals.get("move_count")), _bytes(totals.get("drop_count"))
    return Digest(
        complete=top.get("complete") is True,
        workload=_text(top.get("workload")),
        gpu=_text(host.get("gpu")),
        rung=_text(top.get("rung")),
        world=_text(top.get("world")),
        host_pages=env.get("dynamic_vram") is True,
        ran=_ran(_list(top.get("nodes"))),
        wall_s=seconds_of(totals.get("wall_s")),
        onload_s=seconds_of(totals.get("onload_s")),
        stall_s=seconds_of(totals.get("stall_s")),
        evict_s=seconds_of(totals.get("evict_s")),
        moved=None if moves is None or drops is None else moves + drops,
        dropped=_bytes(totals.get("bytes_dropped")),
        policy={key: value for key, value in policy.items() if isinstance(key, str)},
        mixed=_mixed(top),
        mode=_text(resolved.get("mode")),
        sources={key: value for key, value in _section(resolved.get("sources")).items() if isinstance(value, str)},
        high=_bytes(resolved.get("high")),
        low_always=resolved.get("low_always") is True,
        never=_names(resolved.get("never")),
        weights=max((n for n in (counted, sum(known) if known else None) if n is not None), default=None),
        activations=_bytes(resolved.get("activation_peak")),
        available=next((n for n in (_bytes(resolved.get("available")), _bytes(vram.get("available"))) if n), None),
        fits=top.get("fits") is True,
        vram_total=_bytes(vram.get("total")),
        ram_total=_bytes(host.get("ram_total")),
        pinned_ram=_bytes(resolved.get("pinned_ram")),
        pinned=_bytes(_section(top.get("ram")).get("pinned")),
        rows=rows,
        stages=tuple(found for found in map(_stage, _list(top.get("stages"))) if found is not None),
        step_downs=tuple(found for found in map(_step_down, _list(top.get("events"))) if found is not None),
        steps=_steps(_list(top.get("steps"))),
        classes=_classes(_list(top.get("components"))),
    )


def short(name: str) -> str:
    """A name from a file or a caller, fit for a sentence: one line, and not longer than one can read."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= _NAME_MOST else name[: _NAME_MOST - 3] + "..."


def seconds_of(value: object) -> float | None:
    """A finite number that is not negative, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST:  # NaN is neither
        return None
    return float(value)


def _bytes(value: object) -> int | None:
    found = seconds_of(value)
    return None if found is None or not math.isfinite(found) else int(found)


def _section(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, (list, tuple)) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _names(value: object) -> frozenset[str]:
    return (
        frozenset(item for item in value if isinstance(item, str)) if isinstance(value, (list, tuple)) else frozenset()
    )


def _row(row: Mapping[str, Any]) -> Row | None:
    name = _text(row.get("component"))
    if name is None:  # what lay outside every stage
        return None
    dropped = {str(reason): _bytes(nbytes) for reason, nbytes in _section(row.get("dropped_for")).items()}
    return Row(
        name,
        weight=_bytes(row.get("weight_bytes")),
        resident=_bytes(row.get("resident_bytes")),
        left=_bytes(row.get("left_bytes")),
        bytes_h2d=_bytes(row.get("bytes_h2d")),
        avoidable=_bytes(row.get("avoidable_bytes")),
        dropped={reason: nbytes for reason, nbytes in dropped.items() if nbytes},
        onload_s=seconds_of(row.get("onload_s")),
        stall_s=seconds_of(row.get("stall_s")),
        ahead=_bytes(row.get("step_bytes")),
        ahead_s=seconds_of(row.get("step_copy_s")),
        blocking=_bytes(row.get("blocking_bytes")),
        blocking_s=seconds_of(row.get("blocking_copy_s")),
    )


def _stage(row: Mapping[str, Any]) -> Stage | None:
    name, component = _text(row.get("name")), _text(row.get("component"))
    if name is None or component is None:
        return None
    times = seconds_of(row.get("t0")), seconds_of(row.get("t1"))
    return Stage(name, tuple(component.split("+")), *times, _bytes(row.get("need")), _bytes(row.get("peak")))


def _step_down(event: Mapping[str, Any]) -> StepDown | None:
    t = seconds_of(event.get("t"))
    if event.get("kind") not in ("oom", "step_down") or t is None:
        return None
    return StepDown(t, _text(_section(event.get("data")).get("step")))


def _mixed(top: Mapping[str, Any]) -> bool:
    """An event says so, or components that ran have not the same mode; others may be left over from other graphs."""
    told = [_text(event.get("text")) or "" for event in _list(top.get("events")) if event.get("kind") == "policy"]
    if any(words in text for text in told for words in _POLICIES):
        return True
    stages = [stage for stage in map(_stage, _list(top.get("stages"))) if stage is not None]
    ran = {name for stage in stages for name in stage.components}
    all_of_them = not ran or any(stage.name == "several" for stage in stages)
    rows = _list(top.get("components"))
    modes = {_text(row.get("mode")) for row in rows if all_of_them or _text(row.get("name")) in ran}
    return len(modes - {None}) > 1


def _ran(nodes: list[Mapping[str, Any]]) -> frozenset[str] | None:
    """None where nodes are not known, or not whether one of them was cached."""
    ran = []
    for node in nodes:
        if not isinstance(node.get("cached"), bool) or _text(node.get("id")) is None:
            return None
        if not node["cached"] and node.get("type") not in _WATCHERS:
            ran.append(f"{node['id']} {node.get('type')}")
    return frozenset(ran) if nodes else None


def _steps(rows: list[Mapping[str, Any]]) -> int | None:
    counts = [_bytes(row.get("count", 1)) for row in rows]
    return None if not counts or None in counts else sum(n for n in counts if n is not None)


def _classes(rows: list[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    found = {}
    for row in rows:
        if (name := _text(row.get("name"))) is not None:
            found[name] = (_text(row.get("class")) or "", _text(row.get("role")) or "other")
    return found
