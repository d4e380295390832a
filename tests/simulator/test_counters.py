"""Invariant: `host_syncs` counts the calls in which the host waits, `allocations` the device storages made."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

DEVICE = "vram"


def counted(vram: ModuleType, name: str, call: Callable[[], object]) -> int:
    """By how much one call raises a counter; what it returns lives until after the count."""
    before = vram.counters()[name]
    result = call()
    after = vram.counters()[name]
    del result
    return int(after - before)


@pytest.fixture
def x(vram: ModuleType) -> Tensor:
    return torch.arange(64.0, device=DEVICE)


@pytest.fixture
def host(vram: ModuleType) -> Tensor:
    return torch.ones(64, pin_memory=True)


WAITS: dict[str, Callable[[ModuleType, Tensor, Tensor], object]] = {
    "device": lambda vram, x, host: vram.synchronize(),
    "accelerator": lambda vram, x, host: torch.accelerator.synchronize(),
    "stream": lambda vram, x, host: vram.current_stream().synchronize(),
    "event": lambda vram, x, host: vram.current_stream().record_event().synchronize(),
    "blocking copy up": lambda vram, x, host: x.copy_(host),
    "blocking copy down": lambda vram, x, host: host.copy_(x),
    "pageable copy up": lambda vram, x, host: x.copy_(torch.ones(64), non_blocking=True),
    "pageable copy down": lambda vram, x, host: torch.ones(64).copy_(x, non_blocking=True),
    "to the host": lambda vram, x, host: x.cpu(),
    "item": lambda vram, x, host: x[3].item(),
    "float": lambda vram, x, host: float(x[3]),
    "tolist": lambda vram, x, host: x.tolist(),
    "truth": lambda vram, x, host: bool(x[3]),
    "equal": lambda vram, x, host: torch.equal(x, x),
    "nonzero": lambda vram, x, host: x.nonzero(),
    "indexing with a mask": lambda vram, x, host: x[x > 3],
    "writing values through a mask": lambda vram, x, host: x.index_put_((x < 3,), torch.ones(3, device=DEVICE)),
}

WAITS_NOT: dict[str, Callable[[ModuleType, Tensor, Tensor], object]] = {
    "kernel": lambda vram, x, host: x + 1,
    "copy up": lambda vram, x, host: x.copy_(host, non_blocking=True),
    "copy down": lambda vram, x, host: host.copy_(x, non_blocking=True),
    "copy on the device": lambda vram, x, host: x.clone(),
    "a copy between host tensors": lambda vram, x, host: host.clone(),
    "query of a stream": lambda vram, x, host: vram.current_stream().query(),
    "query of an event": lambda vram, x, host: vram.current_stream().record_event().query(),
    "wait of a stream": lambda vram, x, host: vram.Stream().wait_stream(vram.current_stream()),
    "wait for an event": lambda vram, x, host: vram.Stream().wait_event(vram.current_stream().record_event()),
    "event never recorded": lambda vram, x, host: vram.Event().synchronize(),
    "filling through a mask": lambda vram, x, host: x.index_put_((x < 3,), torch.tensor(1.0, device=DEVICE)),
    "indexing with numbers": lambda vram, x, host: x[torch.tensor([1, 2], device=DEVICE)],
    "figures": lambda vram, x, host: (vram.memory_allocated(), vram.mem_get_info(), vram.clock()),
    "pinning": lambda vram, x, host: torch.empty(64, pin_memory=True),
    "cache": lambda vram, x, host: vram.empty_cache(),
}


@pytest.mark.parametrize("how", WAITS)
def test_calls_that_wait(vram: ModuleType, x: Tensor, host: Tensor, how: str) -> None:
    assert counted(vram, "host_syncs", lambda: WAITS[how](vram, x, host)) == 1
    vram.synchronize()


def test_indices_made_on_the_host_come_up_by_a_blocking_copy(vram: ModuleType, x: Tensor) -> None:
    assert counted(vram, "host_syncs", lambda: torch.tensor([1, 2], device=DEVICE)) == 1


@pytest.mark.parametrize("how", WAITS_NOT)
def test_calls_that_do_not(vram: ModuleType, x: Tensor, host: Tensor, how: str) -> None:
    made_on_host = {"filling through a mask", "indexing with numbers"}  # their operand comes up first
    assert counted(vram, "host_syncs", lambda: WAITS_NOT[how](vram, x, host)) == (how in made_on_host)
    vram.synchronize()


def test_waiting_for_memory_in_use_is_a_wait(vram: ModuleType) -> None:
    vram.configure(kernel_min=1)
    side = vram.Stream()
    with vram.stream(side):
        held = torch.empty(4096, dtype=torch.uint8, device=DEVICE)
    vram.current_stream().wait_stream(side)
    held.add_(1)
    held.record_stream(vram.current_stream())
    vram.set_memory_cap(vram.memory_reserved())
    del held
    assert counted(vram, "host_syncs", lambda: torch.empty(4096, dtype=torch.uint8, device=DEVICE)) == 1


ALLOCATIONS: dict[str, tuple[int, Callable[[Tensor, Tensor], object]]] = {
    "empty": (1, lambda x, host: torch.empty(3, device=DEVICE)),
    "nothing": (0, lambda x, host: torch.empty(0, device=DEVICE)),
    "zeros": (1, lambda x, host: torch.zeros(3, device=DEVICE)),
    "onload": (1, lambda x, host: host.to(DEVICE, non_blocking=True)),
    "copy into": (0, lambda x, host: x.copy_(host)),
    "result": (1, lambda x, host: x + 1),
    "two results": (2, lambda x, host: x.view(8, 8).max(0)),
    "in place": (0, lambda x, host: x.add_(1)),
    "out": (0, lambda x, host: torch.add(x, 1, out=x)),
    "view": (0, lambda x, host: x.view(8, 8).t()[2:].chunk(2)),
    "host": (0, lambda x, host: x.cpu()),
    "set": (0, lambda x, host: torch.empty(0, device=DEVICE).set_(x.untyped_storage(), 2, (3,))),
}


@pytest.mark.parametrize("ghost", [0, 1])
@pytest.mark.parametrize("how", ALLOCATIONS)
def test_allocations(vram: ModuleType, x: Tensor, host: Tensor, how: str, ghost: int) -> None:
    expected, call = ALLOCATIONS[how]
    vram.configure(ghost=ghost)
    assert counted(vram, "allocations", lambda: call(x, host)) == expected


@pytest.mark.parametrize("name", ["host_syncs", "allocations", "faults"])
def test_counts_restart_with_the_clock(vram: ModuleType, x: Tensor, name: str) -> None:
    vram.refuse_allocation(1)
    vram.synchronize()
    torch.empty(3, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(3, device=DEVICE)
    assert vram.counters()[name] > 0
    vram.reset_clock()
    assert vram.counters()[name] == 0
