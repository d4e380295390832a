"""The telemetry of a run that is open. Invariant: read by another thread than the one that runs, so it asks the device
for nothing and waits for nothing; memory figures are those that the run's own thread took last.

Nothing is put together while nobody asked. Points and nodes that ended are taken from the track by the watcher alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .comfyui_runs_nodes import NodeRow, Point, in_short

if TYPE_CHECKING:
    from .comfyui_run import Run

ONCE = ("points", "stages", "ended")  # rows that one message alone carries
VRAM = ("weights", "activations", "others", "free", "high", "low", "peak", "total")


class Totals:
    """Bytes of all weights on the device by component, kept between calls: adding them up takes long. The table is
    replaced and never changed, as the watcher and the server use it at once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, int]] = {}  # name -> the component, and its bytes

    def of(self, components: Mapping[str, Any]) -> dict[str, int]:
        """The bytes of each of these."""
        known = self._known
        found: dict[str, tuple[Any, int]] = {}
        for name, managed in components.items():
            kept, component = known.get(name), managed.component
            if kept is None or kept[0] is not component:
                kept = component, component.device_bytes
            found[name] = kept
        self._known = found
        return {name: nbytes for name, (_, nbytes) in found.items()}


class Live:
    """`figures`: the telemetry as it was last taken. `take` is the watcher's; `now` anybody's."""

    def __init__(self) -> None:
        self.figures = snapshot(None)
        self._totals = Totals()
        self._ended: list[NodeRow] = []  # their last mark has not been passed yet
        self._of: Run | None = None

    def take(self, run: Run | None, wanted: bool = False) -> None:
        """Put the next message together, with what has happened since the last one; nothing where it is not wanted."""
        if run is None:
            self.figures = snapshot(None, self.figures)
            return
        track = run.track
        run.closely = track.closely = wanted
        if not wanted:
            track.points.clear()
            track.ended.clear()
            return
        if run is not self._of:
            self._of, self._ended = run, []
        self.figures = snapshot(run, totals=self._totals) | _points(run) | {"ended": self._endings(run)}

    def now(self, run: Run | None) -> dict[str, Any]:
        """The figures for somebody who asks once; those of the last message while messages are sent, without what is
        said once."""
        if run is not None and not run.closely:
            self.figures = snapshot(run, totals=self._totals)
        return self.figures | {name: [] for name in ONCE}

    def _endings(self, run: Run) -> list[dict[str, Any]]:
        """Nodes that ended, as the list of runs has them, as soon as the device has passed their last mark."""
        self._ended += _taken(run.track.ended)
        if not run.open:
            self._ended = []
        record = run.ledger._record
        ready = [row for row in self._ended if row.last_mark < 0 or record.time_of(row.last_mark) is not None]
        self._ended = [row for row in self._ended if row not in ready]
        return [in_short(run.track.entry(row, record, moves_known=run._ours)) for row in ready]


def snapshot(run: Run | None, before: dict[str, Any] | None = None, totals: Totals | None = None) -> dict[str, Any]:
    """`offload.telemetry` now, without points. Without a run: no prompt, and the memory figures as they were last seen.

    totals: what adding up a component's weights came to, kept between calls.
    """
    nothing: dict[str, Any] = {
        "v": 1,
        "prompt_id": None,
        "node": None,
        "type": None,
        "t": None,
        "device": None,
        "step": None,
        "steps": None,
        "vram": dict.fromkeys(VRAM),
        "step_ms": None,
        "stall_ms": None,
        "moved": None,
        "components": None,
        **{name: [] for name in ONCE},
    }
    if run is None:
        return nothing | {key: before[key] for key in ("device", "vram", "components") if before is not None}
    track, ours = run.track, run._ours
    components = _components(run, totals or Totals()) if ours else None
    return nothing | {
        "prompt_id": run.prompt_id,
        "node": track.display,
        "type": track.type,
        "t": perf_counter() - run.opened,
        "device": run.backend.name,
        "step": track.step,
        "steps": track.steps,
        "vram": _vram(run, components),
        "step_ms": _milli(track.step_s),
        "stall_ms": _milli(track.stall_s) if ours else None,
        "moved": run.ledger._record.bytes_h2d if ours else None,
        "components": components,
    }


def _points(run: Run) -> dict[str, Any]:
    """What was left since the last message: `points` at the ends of steps, `stages` at the begin and end of nodes."""
    ours = run._ours
    taken = [_point(point, run.opened, ours) for point in _taken(run.track.points)]
    return {
        "points": [point for point in taken if point["step"] is not None],
        "stages": [point for point in taken if point["step"] is None],
    }


def _point(point: Point, opened: float, ours: bool) -> dict[str, Any]:
    """Where the host moves the weights, what our ledger counts of them is not what happened."""
    return {
        "t": point.at - opened,
        "node": point.node,
        "type": point.type,
        "step": point.step,
        "steps": point.steps,
        "step_ms": _milli(point.step_s),
        "stall_ms": _milli(point.stall_s) if ours else None,
        "moved": point.moved if ours else None,
        "weights": point.weights if ours else None,
        "allocated": point.allocated,
    }


def _taken(kept: Any) -> list[Any]:
    """What the executing thread has put there, taken away; it may put more meanwhile."""
    taken: list[Any] = []
    with contextlib.suppress(IndexError):
        for _ in range(kept.maxlen):
            taken.append(kept.popleft())
    return taken


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def _components(run: Run, totals: Totals) -> list[dict[str, Any]] | None:
    """Bytes on the device by component, and of how many; None while the worker changes the table."""
    assert run.session is not None
    with contextlib.suppress(RuntimeError):
        components = dict(run.session.components)
        total = totals.of(components)
        return [
            {"name": name, "bytes": managed.engine.device_bytes, "total": total[name]}
            for name, managed in components.items()
        ]
    return None


def _vram(run: Run, components: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Weights, activations (with what torch's cache holds), others and free add up to the total.

    The weights are those of now, the rest is as the run's thread saw it last: what came to the device since then, and
    is more than the allocator held, was taken from what was free.
    """
    figures: dict[str, Any] = dict.fromkeys(VRAM)
    session, memory, record = run.session, run.memory, run.ledger._record
    peaks = [run.peak_device, record.peak_allocated]
    if session is not None and run._ours:
        figures |= {"high": session.resolved.high, "low": session.resolved.low}
        figures["total"] = session.machine.vram_total
        peaks.append(session.stages.peak_allocated or None)
        if components is not None:
            figures["weights"] = sum(row["bytes"] for row in components)
    figures["peak"] = max((peak for peak in peaks if peak is not None), default=None)
    if memory is not None:
        figures |= {"others": memory.others, "free": memory.free, "total": memory.total}
        if figures["weights"] is not None:
            left = memory.reserved - figures["weights"]
            figures["activations"] = max(0, left)
            figures["free"] = max(0, memory.free + min(0, left))
    return figures
