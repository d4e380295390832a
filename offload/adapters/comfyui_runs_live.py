"""The telemetry of a run that is open. Invariant: read by another thread than the one that runs, so it asks the device
for nothing and waits for nothing; memory figures are those that the run's own thread took last.
"""

from __future__ import annotations

import contextlib
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comfyui_run import Run

VRAM = ("weights", "activations", "others", "free", "high", "low", "peak")


def snapshot(run: Run | None, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """`offload.telemetry` now. Without a run: no prompt, and the memory figures as they were last seen."""
    nothing: dict[str, Any] = {
        "v": 1,
        "prompt_id": None,
        "node": None,
        "t": None,
        "device": None,
        "step": None,
        "steps": None,
        "vram": dict.fromkeys(VRAM),
        "step_ms": None,
        "stall_ms": None,
        "moved": None,
    }
    if run is None:
        return nothing | {key: before[key] for key in ("device", "vram") if before is not None}
    track = run.track
    return nothing | {
        "prompt_id": run.prompt_id,
        "node": track.node,
        "t": perf_counter() - run.opened,
        "device": run.backend.name,
        "step": track.step,
        "steps": track.steps,
        "vram": _vram(run),
        "step_ms": _milli(track.step_s),
        "stall_ms": _milli(track.stall_s) if run.session is not None else None,
        "moved": run.ledger._record.bytes_h2d if run.session is not None else None,
    }


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def _vram(run: Run) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys(VRAM)
    session = run.session
    if session is not None:
        figures["high"], figures["low"] = session.resolved.high, session.resolved.low
        with contextlib.suppress(RuntimeError):  # the worker changed a table while it was read: the next one will do
            figures["weights"] = sum(m.engine.device_bytes for m in list(session.components.values()))
    memory = run.memory
    if memory is not None:
        figures |= {"others": memory.others, "free": memory.free, "peak": run.peak_device}
        if figures["weights"] is not None:
            figures["activations"] = max(0, memory.allocated - figures["weights"])
    return figures
