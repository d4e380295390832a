"""One strategy on one case. Invariant: a fresh module, the same warm-ups and steps, and the device empty afterwards.

A step is one forward, begun when the one before has been queued, as in a denoising loop: nothing is waited for between
two steps. Three forwards go first: libraries trace the order in the first one, ours measures in it and plans again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from .places import Counts, Place
from .strategies import Applied, Apply, Room, Strategy
from .subjects import Inputs, Subject, on_device, output_tensor

WARM_UPS = 4
SLOW_S = 1.0
ERROR_MAX = 300


@dataclass(frozen=True)
class Setting:
    """What all strategies of a case have in common. `real` is whether values are computed, so that bits compare."""

    subject: Subject
    resolution: str | None
    tiny: bool = False
    real: bool = True
    steps: int = 3
    python_time: bool = False

    def module(self) -> nn.Module:
        return self.subject.build(tiny=self.tiny, values=self.real)

    def inputs(self, device: torch.device) -> Inputs:
        return on_device(self.subject.inputs(self.resolution, self.tiny), device)


@dataclass(frozen=True)
class Baseline:
    """The whole model on the device without a cap. Bytes and seconds; `counts` are of one step."""

    compute_s: float
    host_s: float
    weights: int
    activations: int
    counts: Counts
    output: torch.Tensor | None  # on the CPU, where values are computed


class LeftBehind(RuntimeError):
    """A strategy was dropped, and device memory of it is still allocated."""


class Bench:
    """A module made to run by a strategy, and its inputs; `with` gives the device back empty.

    Raises on leaving:
        LeftBehind: after a run without error, device bytes are still allocated.
    """

    def __init__(self, place: Place, setting: Setting, apply: Apply, room: Room) -> None:
        self._place, self._setting, self._apply, self._room = place, setting, apply, room

    def __enter__(self) -> Bench:
        self.before = self._place.allocated()
        self.pinned_before = self._place.pinned()
        self._place.reset_peak()
        self.applied: Applied | None = None
        try:
            self.inputs = self._setting.inputs(self._place.device)
            module = self._setting.module()
            self.applied = self._apply(module, self._room)
        except BaseException:
            self._drop()
            raise
        return self

    def step(self) -> torch.Tensor:
        """One forward; what it returns is the sample."""
        assert self.applied is not None
        with torch.no_grad():
            return output_tensor(self.applied.module(**self.inputs))

    def pinned(self) -> int | None:
        """Page-locked bytes that the strategy holds."""
        now = self._place.pinned()
        return None if now is None or self.pinned_before is None else max(0, now - self.pinned_before)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._drop()
        if kind is None:
            self._place.clean()
            left = self._place.allocated() - self.before
            if left > 0:
                raise LeftBehind(f"{left} device bytes are still allocated after it was given back")

    def _drop(self) -> None:
        applied, self.applied, self.inputs = self.applied, None, {}
        if applied is not None:
            applied.close()
            forget_cached(applied.module)


def forget_cached(module: nn.Module) -> None:
    """Empty the `lru_cache`s of methods in the model's classes: some hold tensors on the device (Qwen's positions)."""
    for kind in {type(part) for part in module.modules()}:
        for attribute in vars(kind).values():
            inside = [cell.cell_contents for cell in getattr(attribute, "__closure__", None) or ()]
            for cached in (attribute, *inside):  # diffusers wraps the cached function once more
                clear = getattr(cached, "cache_clear", None)
                if clear is not None:
                    clear()


def run_baseline(place: Place, setting: Setting) -> Baseline:
    """Time the whole model without a cap, on the clock that everything is compared by; the cap is lifted."""
    place.use(None, None)
    weights = 0

    def whole(module: nn.Module, room: Room) -> Applied:
        nonlocal weights
        before = place.allocated()
        applied = Applied(module.to(room.device))
        weights = place.allocated() - before
        return applied

    with Bench(place, setting, whole, Room(place.device, None, 0, 0)) as bench:
        output = bench.step().to("cpu", copy=True) if setting.real else None
        for _ in range(WARM_UPS - 1):
            bench.step()
            place.synchronize()
        place.reset_peak()
        times = [place.time(bench.step, setting.steps) for _ in range(place.timed_blocks)]
        # everything beside the weights: activations, and the inputs
        activations = place.peak() - weights - bench.before
        counts = merged(times[-1][1], place.count(bench.step))
        host_s = place.python_seconds(bench.step, 1)
    if output is not None and not bool(output.isfinite().all()):
        raise ValueError(f"{setting.subject.name}: its output is not finite, so outputs cannot be compared")
    return Baseline(median(seconds for seconds, _ in times), host_s, weights, activations, counts, output)


def merged(timed: Counts, counted: Counts) -> Counts:
    """What was counted while timing, and beside it."""

    def pick(first: float | None, second: float | None) -> float | None:
        return first if first is not None else second

    return Counts(
        pick(timed.bytes_h2d, counted.bytes_h2d),
        pick(timed.bytes_d2h, counted.bytes_d2h),
        pick(timed.host_syncs, counted.host_syncs),
        pick(timed.allocations, counted.allocations),
    )


def room_of(place: Place, cap: int | None, baseline: Baseline) -> Room:
    """What the strategies of a case are told."""
    return Room(place.device, cap, baseline.weights, baseline.activations, place.reserve, place.ram)


def empty_result(strategy: Strategy) -> dict[str, Any]:
    """A result of which nothing is known yet."""
    names = ("step_s", "host_s", "peak_vram", "pinned_ram", "bytes_h2d", "bytes_d2h", "host_syncs", "allocations")
    result: dict[str, Any] = {"name": strategy.name, "ours": strategy.ours, "completed": False}
    result |= {"equal": None, "equal_on": None, **dict.fromkeys(names)}
    more = ("step_python_s", "races", "predicted_s", "error")
    return result | {**dict.fromkeys(more), "samples": []}


def measure(
    place: Place, strategy: Strategy, setting: Setting, cap: int | None, baseline: Baseline, card: str | None = None
) -> dict[str, Any]:
    """Run one strategy under `cap` and say what happened; an error of its own is part of the result."""
    result = empty_result(strategy)
    for number, apply in enumerate((strategy.apply, *strategy.fallbacks)):
        place.use(card, cap)
        failure = guarded(lambda apply=apply: _measured(place, apply, setting, cap, baseline, result))  # type: ignore[misc]
        result["error"] = failure.text
        result["completed"] = failure.text is None
        if not failure.out_of_memory or number == len(strategy.fallbacks):
            break
    return result


def _measured(
    place: Place, apply: Apply, setting: Setting, cap: int | None, baseline: Baseline, result: dict[str, Any]
) -> None:
    with Bench(place, setting, apply, room_of(place, cap, baseline)) as bench:
        equal = True
        for _ in range(WARM_UPS - 1):
            output = bench.step()
            equal = equal and same(output, baseline.output)
            del output
            place.synchronize()
        begin = time.perf_counter()
        bench.step()
        place.synchronize()
        # on a GPU a slow strategy is slow in every step: its blocks need not be long
        steps = 1 if place.rung == "gpu" and time.perf_counter() - begin > SLOW_S else setting.steps
        times = [place.time(bench.step, steps) for _ in range(place.timed_blocks)]
        result["peak_vram"] = place.peak() - bench.before
        result["pinned_ram"] = bench.pinned()
        counts = merged(times[-1][1], place.count(bench.step)).less(baseline.counts)
        result |= counts.__dict__
        result["samples"] = [seconds for seconds, _ in times]
        result["step_s"] = median(result["samples"])
        if baseline.output is not None:
            result["equal"] = equal and same(bench.step(), baseline.output)
        assert bench.applied is not None
        result |= bench.applied.facts()
        if result["pinned_ram"] is not None and not place.sees_registered:
            result["pinned_ram"] += result.get("registered", 0)
        result["races"] = place.races()
        # last, since it changes the clock by which a strategy may plan
        if setting.python_time:
            result["step_python_s"] = place.time_with_python(bench.step, setting.steps)
        result["host_s"] = place.python_seconds(bench.step, 1) - baseline.host_s


def same(output: torch.Tensor, reference: torch.Tensor | None) -> bool:
    """Bit for bit; True where there is nothing to compare with."""
    return reference is None or torch.equal(output.to("cpu"), reference)


@dataclass(frozen=True)
class Failure:
    """How a guarded piece of work ended; `text` None is well."""

    text: str | None = None
    out_of_memory: bool = False


def guarded(work: Callable[[], Any]) -> Failure:
    """Run it; an exception becomes a sentence. Its traceback, and the tensors that it kept alive, are gone after."""
    try:
        work()
    except Exception as error:
        short = " ".join(str(error).split())[:ERROR_MAX]
        failure = Failure(f"{type(error).__name__}: {short}", isinstance(error, torch.OutOfMemoryError))
    else:
        return Failure()
    gc.collect()
    return failure
