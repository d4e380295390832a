"""Invariant: host memory counts as page-locked exactly where it was allocated or registered so, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

DEVICE = "vram"
KIB = 1 << 10


@pytest.fixture
def memory(vram: ModuleType) -> Iterator[Tensor]:
    """64 KiB of ordinary host memory; whatever of it a test registers at KiB 0, 8, 16, .. is given back."""
    tensor = torch.arange(64 * KIB, dtype=torch.int64).to(torch.uint8)
    yield tensor
    for offset in range(0, 64 * KIB, 8 * KIB):
        vram.host_unregister(tensor.data_ptr() + offset)


def pinned(vram: ModuleType) -> int:
    return int(vram.counters()["pinned"])


def at(vram: ModuleType, memory: Tensor, offset: int) -> bool:
    """Whether the byte there is page-locked. A tensor of its own, since torch asks about the start of a storage."""
    return torch.frombuffer(memory.numpy(), dtype=torch.uint8, count=1, offset=offset).is_pinned()


def test_a_registered_range_is_pinned_to_the_byte(vram: ModuleType, memory: Tensor) -> None:
    before = pinned(vram)
    assert not memory.is_pinned()
    assert vram.host_register(memory.data_ptr() + 8 * KIB, 16 * KIB) is True
    assert pinned(vram) == before + 16 * KIB
    assert vram.counters()["pinned_peak"] == before + 16 * KIB
    places = [0, 8 * KIB - 1, 8 * KIB, 24 * KIB - 1, 24 * KIB]
    assert [at(vram, memory, place) for place in places] == [False, False, True, True, False]
    assert vram.host_unregister(memory.data_ptr() + 8 * KIB) is True
    assert not any(at(vram, memory, place) for place in places)
    assert pinned(vram) == before
    vram.reset_peak_memory_stats()
    assert vram.counters()["pinned_peak"] == before


def test_views_of_a_registered_storage_are_pinned(vram: ModuleType, memory: Tensor) -> None:
    assert vram.host_register(memory.data_ptr(), memory.nbytes)
    for view in (memory, memory[5:], memory[8 * KIB : 16 * KIB].view(torch.float32).view(32, 64)[3, 5:]):
        assert view.is_pinned()
        assert view.pin_memory() is view
    assert vram.host_unregister(memory.data_ptr())
    assert not memory[5:].is_pinned()


@pytest.mark.parametrize(
    ("begin", "end", "is_pinned"),
    [(8, 24, True), (12, 16, True), (0, 24, False), (8, 25, False), (23, 25, False), (24, 32, False)],
)
def test_a_pinned_copy_lies_wholly_inside(
    vram: ModuleType, memory: Tensor, begin: int, end: int, is_pinned: bool
) -> None:
    assert vram.host_register(memory.data_ptr() + 8 * KIB, 16 * KIB)
    part = memory[begin * KIB : end * KIB]
    target = torch.empty(len(part), dtype=torch.uint8, device=DEVICE)
    for non_blocking in (True, False):
        target.copy_(part, non_blocking=non_blocking)
        part.copy_(target, non_blocking=non_blocking)
    vram.synchronize()
    assert [copy.pinned for copy in vram.copy_log()] == [is_pinned] * 4
    assert torch.equal(target.cpu(), part)


def test_two_ranges_that_touch_are_two(vram: ModuleType, memory: Tensor) -> None:
    """CUDA refuses a copy across two registrations; here it is a pageable one, which holds the host."""
    assert vram.host_register(memory.data_ptr(), 8 * KIB)
    assert vram.host_register(memory.data_ptr() + 8 * KIB, 8 * KIB)
    memory[4 * KIB : 12 * KIB].to(DEVICE)
    memory[8 * KIB : 16 * KIB].to(DEVICE)
    assert [copy.pinned for copy in vram.copy_log()] == [False, True]


@pytest.mark.parametrize(("offset", "nbytes"), [(8, 8), (0, 9), (15, 8), (0, 64), (10, 1)])
def test_overlap_is_refused(vram: ModuleType, memory: Tensor, offset: int, nbytes: int) -> None:
    assert vram.host_register(memory.data_ptr() + 8 * KIB, 8 * KIB)
    before = pinned(vram), vram.host_clock()
    assert vram.host_register(memory.data_ptr() + offset * KIB, nbytes * KIB) is False
    assert (pinned(vram), vram.host_clock()) == before
    assert vram.host_register(memory.data_ptr() + 16 * KIB, 8 * KIB)
    assert vram.host_register(memory.data_ptr(), 8 * KIB)


def test_pinned_allocations_are_not_registered_again(vram: ModuleType) -> None:
    owned = torch.empty(4 * KIB, dtype=torch.uint8, pin_memory=True)
    assert not vram.host_register(owned.data_ptr(), 4 * KIB)
    assert not vram.host_unregister(owned.data_ptr())
    assert owned.is_pinned()


def test_unregistering_wants_the_start(vram: ModuleType, memory: Tensor) -> None:
    assert not vram.host_unregister(memory.data_ptr())
    assert vram.host_register(memory.data_ptr(), 8 * KIB)
    assert not vram.host_unregister(memory.data_ptr() + 1)
    assert vram.host_unregister(memory.data_ptr())
    assert not vram.host_unregister(memory.data_ptr())


def test_registering_costs_what_pinned_allocation_costs(vram: ModuleType, memory: Tensor) -> None:
    vram.configure(host_memcpy=KIB)
    vram.reset_clock()
    assert vram.host_register(memory.data_ptr(), 8 * KIB)
    assert vram.host_clock() == 8
    owned = torch.empty(8 * KIB, dtype=torch.uint8, pin_memory=True)
    assert vram.host_clock() == 16
    assert vram.host_unregister(memory.data_ptr())
    assert vram.host_clock() == 16
    del owned


@pytest.mark.parametrize(("address", "nbytes"), [(0, 1), (-1, 1), (4096, 0), (4096, -1)])
def test_what_cannot_be_a_range_is_an_error(vram: ModuleType, address: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match=str(min(address, nbytes))):
        vram.host_register(address, nbytes)


def test_the_limit_counts_both_kinds(vram: ModuleType, memory: Tensor) -> None:
    before = pinned(vram)
    vram.configure(pin_limit=before + 16 * KIB)
    owned = torch.empty(8 * KIB, dtype=torch.uint8, pin_memory=True)
    assert not vram.host_register(memory.data_ptr(), 8 * KIB + 1)
    assert vram.host_register(memory.data_ptr(), 8 * KIB)
    with pytest.raises(RuntimeError, match="out of memory: cannot page-lock 1 bytes") as refusal:
        torch.empty(1, dtype=torch.uint8, pin_memory=True)
    assert type(refusal.value) is torch.AcceleratorError  # what a failed cudaHostAlloc raises
    with pytest.raises(RuntimeError, match="cannot page-lock 4096 bytes"):
        torch.zeros(4096, dtype=torch.uint8).pin_memory()
    assert pinned(vram) == before + 16 * KIB
    del owned
    assert torch.empty(8 * KIB, dtype=torch.uint8, pin_memory=True).is_pinned()
    vram.configure(pin_limit=0)
    assert torch.zeros(4096, dtype=torch.uint8).pin_memory().is_pinned()


def test_unregistering_under_a_copy_is_a_race(vram: ModuleType, memory: Tensor) -> None:
    assert vram.host_register(memory.data_ptr(), 8 * KIB)
    memory[: 8 * KIB].to(DEVICE, non_blocking=True)
    assert vram.host_unregister(memory.data_ptr())
    assert vram.races() == 1
    assert "8192 bytes of host memory unregistered while a copy still uses them" in vram.last_race()
    vram.clear_races()
    assert vram.host_register(memory.data_ptr(), 8 * KIB)
    memory[: 8 * KIB].to(DEVICE, non_blocking=True)
    vram.synchronize()
    assert vram.host_unregister(memory.data_ptr())
    assert vram.races() == 0


def test_stale_registrations_give_way_to_the_allocator(vram: ModuleType) -> None:
    """Memory that was freed while registered may come back as a pinned allocation: it is counted once."""
    vram.configure(ghost=1)  # mapped memory: the same place is handed out again
    size = 64 << 20
    first = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    address, before = first.data_ptr(), pinned(vram) - size
    del first
    assert vram.host_register(address + 4096, 4096)
    second = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    if second.data_ptr() != address:
        vram.host_unregister(address + 4096)
        pytest.skip("the system mapped the second allocation elsewhere")
    assert pinned(vram) == before + size
    assert not vram.host_unregister(address + 4096)
    del second
    assert pinned(vram) == before
