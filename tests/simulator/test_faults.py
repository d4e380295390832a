"""Invariant: a fault that was asked for strikes once, exactly where it was asked for; without one nothing fails."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

DEVICE = "vram"
N = 1000


@pytest.fixture
def source(vram: ModuleType) -> Tensor:
    return torch.ones(N, dtype=torch.uint8, pin_memory=True)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_one_copy_is_slow(vram: ModuleType, source: Tensor, after: int) -> None:
    target = torch.zeros(N, dtype=torch.uint8, device=DEVICE)
    vram.configure(copy_lat=1, h2d_pinned=N, d2h_pageable=1)  # 2 s each way up, 2 s for item()
    vram.clear_copy_log()
    vram.delay_copy(after, 10)
    target.copy_(source, non_blocking=True)
    target[0].item()
    for _ in range(4):
        target.copy_(source, non_blocking=True)
    lasted = [round(copy.t1 - copy.t0, 9) for copy in vram.copy_log()]
    assert lasted == [20 if i == after else 2 for i in range(6)]
    assert vram.counters()["faults"] == 1
    assert torch.equal(target.cpu(), source)


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("ghost", [0, 1])
def test_one_allocation_is_refused(vram: ModuleType, after: int, ghost: int) -> None:
    x = torch.ones(N, device=DEVICE)
    vram.configure(ghost=ghost)
    before, ooms = vram.memory_allocated(), vram.memory_stats()["num_ooms"]
    vram.refuse_allocation(after)
    kept = []
    for i in range(8):
        make = (lambda: torch.empty(N, device=DEVICE)) if i % 2 else (lambda: x + 1)
        if i == after:
            with pytest.raises(torch.OutOfMemoryError, match=r"4000 bytes.*Refused on request \(refuse_allocation\)"):
                make()
        else:
            kept.append(make())
    assert vram.memory_allocated() == before + 7 * 4096
    assert vram.memory_stats()["num_ooms"] == ooms + 1
    assert vram.counters()["faults"] == 1
    del kept
    assert vram.memory_allocated() == before


def test_a_real_shortage_does_not_say_that_it_was_asked_for(vram: ModuleType) -> None:
    with pytest.raises(torch.OutOfMemoryError) as shortage:
        torch.empty(9 << 30, dtype=torch.uint8, device=DEVICE)
    assert "on request" not in str(shortage.value)
    assert vram.counters()["faults"] == 0


@pytest.mark.parametrize("after", [0, 1, 2])
def test_one_page_lock_is_refused(vram: ModuleType, after: int) -> None:
    """Registrations and allocations are counted together; the refused one leaves nothing behind."""
    memory = torch.zeros(4 * 4096, dtype=torch.uint8)
    before = vram.counters()["pinned"]
    vram.refuse_pinning(after)
    done = [vram.host_register(memory.data_ptr(), 4096)]
    if after == 1:
        with pytest.raises(torch.AcceleratorError, match="cannot page-lock 4096 bytes"):
            torch.empty(4096, dtype=torch.uint8, pin_memory=True)
    else:
        assert torch.empty(4096, dtype=torch.uint8, pin_memory=True).is_pinned()
    done += [vram.host_register(memory.data_ptr() + 4096 * i, 4096) for i in (1, 2)]
    assert done == [after != 0, after != 2, True]
    assert vram.counters()["pinned"] == before + 4096 * sum(done)
    assert vram.counters()["faults"] == 1
    assert [vram.host_unregister(memory.data_ptr() + 4096 * i) for i in range(3)] == done


def test_a_refused_overlap_does_not_use_the_fault_up(vram: ModuleType, source: Tensor) -> None:
    vram.refuse_pinning(0)
    assert not vram.host_register(source.data_ptr(), N)
    assert vram.counters()["faults"] == 0
    with pytest.raises(RuntimeError, match="page-lock"):
        torch.empty(N, pin_memory=True)


def test_resetting_the_clock_disarms(vram: ModuleType, source: Tensor) -> None:
    vram.delay_copy(0, 10)
    vram.refuse_allocation(0)
    vram.refuse_pinning(0)
    vram.reset_clock()
    target = source.to(DEVICE, non_blocking=True)
    (copy,) = vram.copy_log()
    assert copy.t1 - copy.t0 < 1e-4
    assert torch.empty(N, pin_memory=True).is_pinned()
    assert vram.counters()["faults"] == 0
    del target


def test_arming_again_replaces(vram: ModuleType) -> None:
    vram.refuse_allocation(0)
    vram.refuse_allocation(1)
    first = torch.empty(N, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(N, device=DEVICE)
    del first


@pytest.mark.parametrize("name", ["delay_copy", "refuse_allocation", "refuse_pinning"])
def test_negative_counts_are_refused(vram: ModuleType, name: str) -> None:
    arguments = (-1, 2.0) if name == "delay_copy" else (-1,)
    with pytest.raises(ValueError, match="-1"):
        getattr(vram, name)(*arguments)
    with pytest.raises(ValueError, match=r"-0\.5"):
        vram.delay_copy(0, -0.5)
