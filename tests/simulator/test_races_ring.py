"""Invariant: units that pass through one ring race exactly when a wait is missing, however their tensors are made."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

DEVICE = "vram"
GAP = 512  # bytes to which the tensors of a unit are aligned
UNITS = ((3, 1), (2, 2), (4, 1), (1, 1), (2, 3))  # tensors of a unit, in multiples of GAP
STARTS = (0, 4, 0, 5, 0)  # where a unit lies in a ring of 8: units 0, 2 and 4 share places, so do 1 and 3 and 2
STEPS = 3

Bind = Callable[[Tensor, int, int], Tensor]


def by_slice(ring: Tensor, offset: int, nbytes: int) -> Tensor:
    return ring[offset : offset + nbytes].view(torch.float32)


def by_storage(ring: Tensor, offset: int, nbytes: int) -> Tensor:
    """As weights are rebound: a new tensor on the ring's storage, which knows nothing of the ring tensor."""
    return torch.empty(0, device=DEVICE).set_(ring.untyped_storage(), offset // 4, (nbytes // 4,))


def by_shared_memory(ring: Tensor, offset: int, nbytes: int) -> Tensor:
    """Through a parameter whose data was replaced, reshaped and transposed."""
    parameter = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    parameter.data = by_storage(ring, offset, nbytes).view(-1, 4).t()
    return parameter


class Walk:
    """Units copied into their places on one stream and used on another; any one wait can be left out."""

    def __init__(self, vram: ModuleType, bind: Bind) -> None:
        self.vram = vram
        self.ring = torch.empty(8 * GAP, dtype=torch.uint8, device=DEVICE)
        self.copies, self.main = vram.Stream(), vram.current_stream()
        self.copies.wait_stream(self.main)
        self.slots, self.weights = [], []
        for start, parts in zip(STARTS, UNITS, strict=True):
            self.slots.append(self.ring[start * GAP : (start + sum(parts)) * GAP])
            ends = [start + sum(parts[:i]) for i in range(len(parts))]
            self.weights.append([bind(self.ring, at * GAP, n * GAP) for at, n in zip(ends, parts, strict=True)])
        self.masters = [torch.zeros(slot.nbytes, dtype=torch.uint8, pin_memory=True) for slot in self.slots]
        self.loaded = [torch.Event(DEVICE) for _ in UNITS]
        self.released = [torch.Event(DEVICE) for _ in UNITS]

    def run(self, skip: tuple[str, int, int] | None = None) -> list[tuple[int, int]]:
        """Walks all steps and returns where races were found. ``skip`` is ("loaded" or "free", step, unit)."""
        found = []
        for step in range(STEPS):
            for unit in range(len(UNITS)):
                before = self.vram.races()
                if (step, unit) != (0, 0) and skip != ("free", step, unit):
                    self.copies.wait_event(self.released[unit - 1])
                with self.vram.stream(self.copies):
                    self.slots[unit].copy_(self.masters[unit], non_blocking=True)
                    self.loaded[unit].record()
                if skip != ("loaded", step, unit):
                    self.main.wait_event(self.loaded[unit])
                for weight in self.weights[unit]:
                    weight + 1
                self.released[unit].record()
                if self.vram.races() > before:
                    found.append((step, unit))
        self.vram.synchronize()
        return found


BINDS = [by_slice, by_storage, by_shared_memory]


@pytest.mark.parametrize("ghost", [0, 1])
@pytest.mark.parametrize("bind", BINDS)
def test_a_ring_with_all_its_waits_is_clean(vram: ModuleType, bind: Bind, ghost: int) -> None:
    vram.configure(ghost=ghost)
    assert Walk(vram, bind).run() == []


@pytest.mark.parametrize("bind", BINDS)
@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("unit", range(len(UNITS)))
def test_each_use_without_its_copy_is_found(vram: ModuleType, bind: Bind, step: int, unit: int) -> None:
    """The unit whose copy was not awaited is used at once: that is where the race is."""
    assert (step, unit) in Walk(vram, bind).run(("loaded", step, unit))
    assert "memory written on stream" in vram.last_race() or "still read" in vram.last_race()


@pytest.mark.parametrize("bind", BINDS)
@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("unit", range(len(UNITS)))
def test_each_copy_without_its_release_is_found(vram: ModuleType, bind: Bind, step: int, unit: int) -> None:
    """Exactly where the unit before shares bytes with this one; where it lies elsewhere nothing is missing."""
    walk = Walk(vram, bind)
    places = [set(range(start, start + sum(parts))) for start, parts in zip(STARTS, UNITS, strict=True)]
    shares = (step, unit) != (0, 0) and bool(places[unit] & places[unit - 1])
    assert walk.run(("free", step, unit)) == ([(step, unit)] if shares else [])
    if shares:
        assert "overwrites memory still read on stream 0" in vram.last_race()


def test_two_storages_of_one_block_are_one(vram: ModuleType) -> None:
    """Tensors of different dtypes and storages' views that share bytes; a byte apart they share none."""
    ring, side = torch.zeros(4096, dtype=torch.uint8, device=DEVICE), vram.Stream()
    side.wait_stream(vram.current_stream())
    storage = ring.untyped_storage()
    half = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (512,))
    double = torch.empty(0, dtype=torch.float64, device=DEVICE).set_(storage, 128, (8,))  # bytes 1024 to 1088
    assert half.untyped_storage().data_ptr() == double.untyped_storage().data_ptr()
    with vram.stream(side):
        half.add_(1)
    double.add_(1)
    assert vram.races() == 0
    ring[1023:1024].add_(1)
    assert vram.races() == 1


def test_long_rings_stay_fast(vram: ModuleType) -> None:
    """300 units for 40 steps: the last steps cost as the first ones, with and without a host that ever waits."""
    count, nbytes = 300, 1024
    vram.configure(copy_log=0)
    ring = torch.zeros(count * nbytes, dtype=torch.uint8, device=DEVICE)
    side, main = vram.Stream(), vram.current_stream()
    side.wait_stream(main)
    source = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    slots = list(ring.split(nbytes))
    weights = [[by_storage(ring, i * nbytes + j, 256) for j in (0, 512)] for i in range(count)]
    x = torch.ones(64, device=DEVICE)
    loaded, released = ([torch.Event(DEVICE) for _ in range(count)] for _ in range(2))

    def step() -> float:
        begun = time.process_time()
        for i in range(count):
            side.wait_event(released[i])
            with vram.stream(side):
                slots[i].copy_(source, non_blocking=True)
                loaded[i].record()
            main.wait_event(loaded[i])
            for weight in weights[i]:
                x.mul_(weight)
            released[i].record()
        return time.process_time() - begun

    step()
    for waits in (False, True):
        took = []
        for _ in range(20):
            took.append(step())
            if waits:
                vram.synchronize()
        assert min(took[-6:]) < 1.5 * min(took[:6])
    assert vram.races() == 0
