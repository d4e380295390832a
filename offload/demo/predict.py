"""Guards: a predicted figure is computed from sizes, and never looks like one that was measured.

Where no accelerator can be had, not even a simulated one, the demo still says what each mode would move under the cap:
bytes from the sizes of the real components and the planner's own plans, times from the rates of one card's class. One
compute stream and one copy stream; a copy hides behind the compute of its own stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..plan import sequential_plan, stream_plan
from ..profiles import profile_for
from ..units import Component, aligned
from .checks import ModeRun

# The class values of the simulator's generic card, so that both tables speak of the same machine.
COPY_RATE = 25e9  # bytes/s, pinned memory over PCIe 4.0 x16
COPY_LATENCY = 8e-6  # s per copy
FLOP_RATE = 20e12  # FLOP/s in fp32
LAUNCH = 5e-6  # s per operation
LIVE = 4  # tensors of the largest size that live at once


@dataclass(frozen=True)
class Part:
    """One component in one generation. `calls` forwards; `activations` in bytes; `compute_s` over all its calls."""

    component: Component
    calls: int
    activations: int
    compute_s: float

    @property
    def weights(self) -> int:
        """Bytes of weights."""
        return self.component.weight_bytes

    @property
    def gaps(self) -> int:
        """Bytes between the weights of a unit, which go along when it is copied whole from its slab."""
        return sum(aligned(s.nbytes) - s.nbytes for unit in self.component.units for s in unit.storages[:-1])

    @property
    def copies(self) -> int:
        """Copies that bring it up whole."""
        return len(self.component.storages)


class Meter:
    """Counts calls, operations and FLOP per component while a pipeline runs on the CPU, and the largest results."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.calls = dict.fromkeys(modules, 0)
        self.compute_s = dict.fromkeys(modules, 0.0)
        self.activations = dict.fromkeys(modules, 0)
        self._modules = modules
        self._restore: list[Callable[[], None]] = []

    def __enter__(self) -> Meter:
        for name, module in self._modules.items():
            for entry in ("decode", "encode") if hasattr(module, "decode") else ("forward",):
                self._wrap(name, module, entry)
        return self

    def __exit__(self, *error: object) -> None:
        for restore in self._restore:
            restore()

    def _wrap(self, name: str, module: nn.Module, entry: str) -> None:
        method = getattr(module, entry)

        def metered(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as flops, _Operations() as operations:
                result = method(*args, **kwargs)
            self.calls[name] += 1
            self.compute_s[name] += flops.get_total_flops() / FLOP_RATE + operations.count * LAUNCH
            self.activations[name] = max(self.activations[name], LIVE * operations.largest)
            return result

        module.__dict__[entry] = metered
        self._restore.append(lambda: module.__dict__.pop(entry))


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations and the largest result, bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.count += not func.is_view
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def needed_by_model(parts: Sequence[Part]) -> int:
    """The smallest cap under which the largest stage holds its component whole, bytes."""
    return max(part.component.device_bytes + part.activations for part in parts)


def predict(mode: str, parts: Sequence[Part], generations: int, cap: int, high: int) -> ModeRun:
    """One mode's row under `cap` bytes, balanced with `high`; the largest component is the one that streams."""
    whole = sum(part.weights for part in parts)
    on_device = sum(part.component.device_bytes for part in parts)
    most = max(part.activations for part in parts)
    fits = on_device + most <= cap
    resolved = mode if mode != "auto" else "none" if fits else profile_for(cap).mode.value
    run = ModeRun(mode, resolved, cap=None if mode == "none" else cap, predicted=True, bytes_d2h=0)
    compute = generations * sum(part.compute_s for part in parts)
    if resolved == "none":
        run.bytes_h2d, run.moves = whole, sum(part.copies for part in parts)
        run.resident_peak, run.peak_vram, run.stall_s = on_device, on_device + most, 0.0
        run.time_s = compute + _copy(run.bytes_h2d, run.moves)
    elif resolved == "model":
        run.bytes_h2d = generations * (whole + sum(part.gaps for part in parts))  # what moves again lies in slabs
        run.moves = generations * sum(part.copies for part in parts)
        run.resident_peak = max(part.component.device_bytes for part in parts)
        run.peak_vram, run.stall_s = needed_by_model(parts), 0.0
        run.time_s = compute + _copy(run.bytes_h2d, run.moves)
    elif resolved == "sequential":
        run.bytes_h2d = generations * sum(part.calls * part.weights for part in parts)
        run.moves = generations * sum(part.calls * part.copies for part in parts)
        rings = {part.component.name: sequential_plan(part.component).ring_bytes for part in parts}
        run.resident_peak = max(rings.values())
        run.peak_vram = max(rings[part.component.name] + part.activations for part in parts)
        waits = (_copy(part.calls * part.weights, part.calls * part.copies) - part.compute_s for part in parts)
        run.stall_s = generations * sum(max(0.0, wait) for wait in waits)
        run.time_s = compute + run.stall_s
    else:
        _balanced(run, parts, generations, cap, high)
    return run


def _balanced(run: ModeRun, parts: Sequence[Part], generations: int, cap: int, high: int) -> None:
    largest = max(parts, key=lambda part: part.weights)
    rest = [part for part in parts if part is not largest]
    run.high = high
    plan = stream_plan(largest.component, min(high, cap - largest.activations))
    flowing = [u for u in largest.component.units if u.index not in plan.resident]
    streamed = sum(unit.nbytes for unit in flowing)
    copies = sum(len(unit.storages) for unit in flowing)
    others = sum(part.component.device_bytes for part in rest)
    # What has to make room for the largest stage comes back for its own, once per generation.
    displaced = max(0, plan.device_bytes + others + largest.activations - cap)
    once = largest.weights - streamed + sum(part.weights for part in rest)
    through = generations * largest.calls
    run.bytes_h2d = once + through * streamed + (generations - 1) * min(displaced, others)
    run.moves = sum(part.copies for part in parts) - copies + through * copies
    run.resident_peak = plan.device_bytes + max(0, others - displaced)
    run.peak_vram = min(cap, run.resident_peak + largest.activations)
    run.stall_s = generations * max(0.0, _copy(largest.calls * streamed, largest.calls * copies) - largest.compute_s)
    onload = _copy(once + (generations - 1) * min(displaced, others), sum(part.copies for part in parts))
    run.time_s = generations * sum(part.compute_s for part in parts) + run.stall_s + onload


def _copy(nbytes: int, copies: int) -> float:
    return nbytes / COPY_RATE + copies * COPY_LATENCY
