"""Invariant: units in the order in which a step runs them; every byte and every FLOP of the step is in one of them.

One forward on the meta device, where nothing is computed and nothing is stored. Units are numbered as `units` numbers
them. Work without weights (attention, activations, sums) counts to the unit before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..schedule import Piece
from ..units import aligned
from .build import meta_denoiser
from .counting import CountOps, FuseAttention
from .inputs import denoiser_inputs, parse_resolution

SHORTEST_KERNEL = 2e-6  # s: no kernel on a GPU is done sooner
TRACED = "counted from shapes in one forward"


@dataclass(frozen=True)
class UnitCost:
    """One unit where the walk passes it.

    `operations` are (FLOP, bytes of memory traffic) from the start of its forward until the next unit's starts;
    the first `own_operations` of them are within its own forward.
    """

    name: str
    index: int  # Unit.index
    nbytes: int  # device bytes, each storage aligned
    tensors: int  # storages: copies where they are not packed
    block: str | None  # the element of the model's lists of layers that it is part of
    operations: tuple[tuple[float, int], ...] = ()
    own_operations: int = 0
    flows: bool = True  # may be streamed: a leaf, whose storages are its own, which runs once

    @property
    def flops(self) -> float:
        """FLOP until the next unit starts."""
        return sum(flops for flops, _ in self.operations)

    @property
    def traffic_bytes(self) -> int:
        """Bytes read from and written to the device's memory until the next unit starts."""
        return sum(traffic for _, traffic in self.operations)

    def seconds(self, flops: float, hbm: float | None, *, own: bool = False) -> float:
        """Time of the operations at `flops` FLOP/s and `hbm` bytes/s: each is bound by one of them (roofline).

        Without `hbm` the arithmetic alone, for a rate that was measured over a whole step.
        """
        chosen = self.operations[: self.own_operations] if own else self.operations
        if hbm is None:
            return sum(work for work, _ in chosen) / flops
        return sum(max(work / flops, traffic / hbm, SHORTEST_KERNEL) for work, traffic in chosen)


@dataclass(frozen=True)
class ModelWalk:
    """The units of a model in running order. `unused` are those that the forward does not pass; they never move."""

    model: str
    resolution: str | None
    units: tuple[UnitCost, ...]
    unused: tuple[UnitCost, ...] = ()
    source: str = TRACED
    notes: tuple[str, ...] = field(default=())
    activations: int | None = None  # the most bytes that results took at one time; None: not known

    @property
    def weights(self) -> int:
        """Device bytes of all units, each once."""
        return sum({unit.index: unit.nbytes for unit in (*self.units, *self.unused)}.values())

    @property
    def flops(self) -> float:
        """FLOP of one forward."""
        return sum(unit.flops for unit in self.units)

    @property
    def traffic_bytes(self) -> int:
        """Bytes through the device's memory in one forward."""
        return sum(unit.traffic_bytes for unit in self.units)

    @property
    def largest(self) -> UnitCost:
        """The unit with the most bytes."""
        return max((*self.units, *self.unused), key=lambda unit: unit.nbytes)


def walk(
    model: str | nn.Module,
    resolution: str | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tiny: bool = False,
    inputs: Mapping[str, Any] | None = None,
) -> ModelWalk:
    """The walk of a model that is named in `NAMES`, or of any module with the `inputs` of its forward.

    The module is left as it is: its parameters and inputs are replaced by meta tensors while it runs. A module with
    tensors that are neither parameters nor buffers has to take them to its inputs' device itself.

    Raises:
        ValueError: no such model or resolution, a module without inputs, or one without weights.
    """
    if isinstance(model, str):
        return _named(model, str(parse_resolution(model, resolution, tiny=tiny)), dtype, tiny)
    if inputs is None:
        raise ValueError("inputs: got none, allowed: the keyword arguments of the module's forward; pass them")
    return _trace(type(model).__name__, resolution, model, inputs)


def pieces(walked: ModelWalk, tflops: float, hbm: float | None = None, *, launch: float = 0.0) -> list[Piece]:
    """What the schedule takes: seconds at `tflops` TFLOP/s and `hbm` bytes/s (None: the arithmetic alone).

    `launch`: host seconds per operation.
    """
    flops = tflops * 1e12
    return [
        Piece(
            nbytes=unit.nbytes,
            compute_s=unit.seconds(flops, hbm),
            index=unit.index,
            host_s=launch * len(unit.operations),
            own_s=unit.seconds(flops, hbm, own=True),
            tensors=unit.tensors,
        )
        for unit in walked.units
    ]


@lru_cache(maxsize=16)
def _named(name: str, resolution: str, dtype: torch.dtype, tiny: bool) -> ModelWalk:
    inputs = denoiser_inputs(name, resolution, dtype=dtype, device="meta", tiny=tiny)
    return _trace(name, resolution, meta_denoiser(name, dtype, tiny), inputs)


class _Recorder:
    """Which unit runs, and what it cost so far."""

    def __init__(self) -> None:
        self.order: list[UnitCost] = []
        self.operations: list[list[tuple[float, int]]] = []
        self.own: dict[int, int] = {}  # position in the order -> operations within its own forward
        self._open: dict[int, list[int]] = {}  # Unit.index -> positions whose forward has not ended
        self._before: list[tuple[float, int]] = []  # ahead of the first unit

    def charge(self, flops: float, traffic: int) -> None:
        (self.operations[-1] if self.operations else self._before).append((flops, traffic))

    def start(self, unit: UnitCost) -> None:
        self._open.setdefault(unit.index, []).append(len(self.order))
        self.order.append(unit)
        self.operations.append(self._before)
        self._before = []

    def end(self, unit: UnitCost) -> None:
        position = self._open[unit.index].pop()
        self.own[position] = len(self.operations[position])

    def units(self) -> tuple[UnitCost, ...]:
        runs = Counter(unit.index for unit in self.order)
        return tuple(
            replace(u, operations=tuple(ops), own_operations=self.own[position], flows=u.flows and runs[u.index] == 1)
            for position, (u, ops) in enumerate(zip(self.order, self.operations, strict=True))
        )


def _trace(name: str, resolution: str | None, module: nn.Module, inputs: Mapping[str, Any]) -> ModelWalk:
    units = _units(name, module)
    if not units:
        raise ValueError(f"{name}: got a {type(module).__name__} without weights, allowed: a model with some")
    recorder = _Recorder()
    state = {key: _on_meta(tensor) for key, tensor in _state(module)}
    counter = CountOps(recorder.charge)
    with _hooks(units, recorder), torch.no_grad(), counter, FuseAttention(recorder.charge):
        torch.func.functional_call(module, state, args=(), kwargs=_on_meta(dict(inputs)), tie_weights=True)
    passed = {unit.index for unit in recorder.order}
    unused = tuple(unit for _, unit in units if unit.index not in passed)
    return ModelWalk(name, resolution, recorder.units(), unused, activations=counter.peak)


def _units(name: str, module: nn.Module) -> list[tuple[nn.Module, UnitCost]]:
    """The units as `units.build_component` cuts them, by the identity of storages, as meta ones have no address."""
    found: list[tuple[nn.Module, UnitCost]] = []
    owned: dict[int, int] = {}  # storage -> the unit that brings it
    tied: set[int] = set()
    lists = {path for path, child in module.named_modules() if isinstance(child, (nn.ModuleList, nn.Sequential))}
    for path, child in module.named_modules():
        storages: dict[int, int] = {}
        touched = False
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is None or tensor.numel() == 0:
                continue
            touched = True
            raw = tensor.untyped_storage()
            owner = owned.setdefault(raw._cdata, len(found))
            if owner != len(found):
                tied |= {owner, len(found)}
            elif raw._cdata not in storages:
                storages[raw._cdata] = raw.nbytes()
        if touched:
            cost = sum(map(aligned, storages.values()))
            leaf = child is not module and next(child.children(), None) is None
            unit = UnitCost(path or name, len(found), cost, len(storages), _block(path, lists), flows=leaf)
            found.append((child, unit))
    return [(child, replace(unit, flows=unit.flows and unit.index not in tied)) for child, unit in found]


def _block(path: str, lists: set[str]) -> str | None:
    """The outermost list's element on the way to the module, for example "transformer_blocks.3"."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        if ".".join(parts[:depth]) in lists:
            return ".".join(parts[: depth + 1])
    return None


@contextmanager
def _hooks(units: Sequence[tuple[nn.Module, UnitCost]], recorder: _Recorder) -> Iterator[None]:
    handles = []
    for module, unit in units:
        handles.append(module.register_forward_pre_hook(lambda *_, unit=unit: recorder.start(unit)))
        handles.append(module.register_forward_hook(lambda *_, unit=unit: recorder.end(unit)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (
            value
            if value.is_meta
            else torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        )
    if isinstance(value, dict):
        return {key: _on_meta(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_on_meta(inner) for inner in value)
    return value
