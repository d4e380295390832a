"""Invariant: virtual time is exact arithmetic on the options, and the same program takes the same time each run."""

from __future__ import annotations

import time
from types import ModuleType

import pytest
import torch

DEVICE = "vram"
UNIT = dict(launch=0, copy_lat=0, sync_lat=0, query_lat=0, kernel_min=1, hbm=1e30, flops16=1e30, flops32=1e30)
"""Every kernel takes one second; copies are set by the tests, at bytes per second."""


def prefetched(vram: ModuleType, overlap: bool, layers: int = 6) -> float:
    """Seconds for a chain of layers whose weights come over the bus, loaded ahead on a side stream or not."""
    vram.reset_clock()
    side, main = vram.Stream(), vram.current_stream()
    weights = [torch.empty(512, 512, pin_memory=True) for _ in range(layers)]
    x = torch.ones(512, 512, device=DEVICE)

    def load(index: int) -> tuple[torch.Tensor, torch.Event | None]:
        if not overlap:
            return weights[index].to(DEVICE), None
        with vram.stream(side):
            return weights[index].to(DEVICE, non_blocking=True), side.record_event()

    following = load(0)
    for i in range(layers):
        weight, loaded = following
        if overlap and i + 1 < layers:
            following = load(i + 1)
        if loaded is not None:
            main.wait_event(loaded)
        for _ in range(4):
            x @ weight
        weight.record_stream(main)
        if not overlap and i + 1 < layers:
            following = load(i + 1)
    vram.synchronize()
    return float(vram.clock())


def test_prefetch_hides_copies_and_is_deterministic(vram: ModuleType) -> None:
    first = prefetched(vram, overlap=False), prefetched(vram, overlap=True)
    second = prefetched(vram, overlap=False), prefetched(vram, overlap=True)
    assert first[1] < first[0]
    assert first == second
    assert vram.races() == 0


def test_kernel_and_copy_overlap_exactly(vram: ModuleType) -> None:
    """A copy of 3 s beside kernels of 1 s each: two kernels hide, the third waits for the copy and ends at 4 s."""
    target = torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    source = torch.zeros(3, dtype=torch.uint8, pin_memory=True)
    side = vram.Stream()
    vram.reset_clock()
    vram.configure(**UNIT, h2d_pinned=1)
    other = torch.zeros(3, dtype=torch.uint8, device=DEVICE)  # kernel 1
    with vram.stream(side):
        target.copy_(source, non_blocking=True)
        done = side.record_event()
    other.add_(1)  # kernel 2
    assert vram.clock() == 3
    assert vram.host_clock() == 0
    vram.current_stream().wait_event(done)
    target.add_(1)
    vram.synchronize()
    assert vram.clock() == vram.host_clock() == 4


@pytest.mark.parametrize(
    ("pinned", "non_blocking", "seconds", "host_waits"),
    [(True, True, 2, False), (True, False, 2, True), (False, True, 4, True), (False, False, 4, True)],
)
def test_pinned_and_pageable_copies(
    vram: ModuleType, pinned: bool, non_blocking: bool, seconds: int, host_waits: bool
) -> None:
    source = torch.zeros(8, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(8, dtype=torch.uint8, device=DEVICE)
    vram.reset_clock()
    vram.configure(**UNIT, h2d_pinned=4, h2d_pageable=2)
    target.copy_(source, non_blocking=non_blocking)
    assert vram.clock() == seconds
    assert vram.host_clock() == (seconds if host_waits else 0)


def test_a_strided_pinned_source_is_staged(vram: ModuleType) -> None:
    """The copy engine moves one run of bytes; CUDA gathers anything else into an unpinned temporary first."""
    source = torch.zeros(8, 2, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(8, dtype=torch.uint8, device=DEVICE)
    target.copy_(source[:, 0], non_blocking=True)
    (copy,) = vram.copy_log()
    assert not copy.pinned


def test_roofline(vram: ModuleType) -> None:
    vram.configure(launch=0, kernel_min=1, hbm=1e30, flops16=512, flops32=256)
    a, b = torch.zeros(8, 16, device=DEVICE), torch.zeros(16, 4, device=DEVICE)
    vram.reset_clock()
    a @ b  # 2 * 8 * 16 * 4 = 1024 FLOP in fp32
    assert vram.counters()["flops"] == 1024
    assert vram.clock() == 4
    a, b = a.half(), b.half()
    vram.reset_clock()
    a @ b
    assert vram.clock() == 2
    vram.configure(hbm=64)
    vram.reset_clock()
    a @ b  # (8*16 + 16*4 + 8*4) * 2 bytes = 448
    assert vram.clock() == 7
    assert vram.counters()["busy_compute"] == 7


def test_flops_of_conv_and_attention(vram: ModuleType) -> None:
    x, w = torch.zeros(1, 3, 8, 8, device=DEVICE), torch.zeros(5, 3, 3, 3, device=DEVICE)
    vram.reset_clock()
    torch.nn.functional.conv2d(x, w)
    assert vram.counters()["flops"] == 2 * (5 * 6 * 6) * (3 * 3 * 3)
    q, kv = torch.zeros(1, 2, 16, 8, device=DEVICE), torch.zeros(1, 2, 32, 8, device=DEVICE)
    vram.reset_clock()
    torch.nn.functional.scaled_dot_product_attention(q, kv, kv)
    assert vram.counters()["flops"] == 2 * (2 * 2 * 16 * 32 * 8)


def test_device_to_device_copy_is_a_kernel(vram: ModuleType) -> None:
    a, b = torch.zeros(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    vram.reset_clock()
    vram.clear_copy_log()
    b.copy_(a)
    counters = vram.counters()
    assert (counters["ops"], counters["h2d"], counters["d2h"]) == (1, 0, 0)
    assert vram.copy_log() == []


def test_views_cost_nothing(vram: ModuleType) -> None:
    t = torch.zeros(4, 8, device=DEVICE)
    vram.reset_clock()
    t.view(-1)[3:9].unsqueeze(0).expand(2, 6).t().detach()
    t.view(torch.int32).flatten().chunk(2)[1].reshape(4, 4).permute(1, 0).select(0, 1).squeeze()
    t.data.narrow(0, 1, 2).movedim(0, 1).unbind()
    assert vram.counters()["ops"] == 0
    assert vram.clock() == 0


@pytest.mark.parametrize("kind", ["module", "generic"])
def test_events_give_exact_milliseconds(vram: ModuleType, kind: str) -> None:
    def make() -> torch.Event:
        made = vram.Event() if kind == "module" else torch.Event(device=DEVICE, enable_timing=True)
        assert isinstance(made, torch.Event)
        return made

    t = torch.zeros(4, device=DEVICE)
    vram.reset_clock()
    vram.configure(**UNIT)
    begin, middle, end = make(), make(), make()
    begin.record()
    t.add_(1)
    middle.record()
    t.add_(1)
    t.add_(1)
    end.record()
    vram.synchronize()
    assert begin.elapsed_time(middle) == 1000
    assert middle.elapsed_time(end) == 2000


def test_events_need_timing_and_completion(vram: ModuleType) -> None:
    t = torch.zeros(4, device=DEVICE)
    begin, end = vram.Event(), vram.Event()
    begin.record()
    vram.configure(kernel_min=1)
    t.add_(1)
    end.record()
    with pytest.raises(RuntimeError, match="completed"):
        begin.elapsed_time(end)
    untimed = torch.Event(device=DEVICE)
    untimed.record()
    vram.synchronize()
    with pytest.raises(ValueError, match="enable_timing"):
        begin.elapsed_time(untimed)


def test_query_is_true_once_the_host_is_there(vram: ModuleType) -> None:
    t = torch.zeros(4, device=DEVICE)
    vram.synchronize()
    vram.configure(kernel_min=1)
    event = vram.Event()
    assert event.query()  # never recorded
    t.add_(1)
    event.record()
    assert not event.query()
    vram.advance_host(0.5)
    assert not event.query()
    vram.synchronize()
    assert event.query()


def test_polling_makes_progress(vram: ModuleType) -> None:
    t = torch.zeros(4, device=DEVICE)
    vram.configure(kernel_min=1e-3, query_lat=1e-4)
    event = vram.Event()
    t.add_(1)
    event.record()
    polls = 0
    while not event.query():
        polls += 1
        assert polls < 20
    assert polls > 0


def test_a_reset_completes_older_events(vram: ModuleType) -> None:
    t = torch.zeros(4, device=DEVICE)
    vram.configure(kernel_min=100)
    event = vram.Event()
    t.add_(1)
    event.record()
    vram.reset_clock()
    assert vram.clock() == 0
    assert event.query()
    vram.current_stream().wait_event(event)
    assert vram.clock() == 0


def test_item_waits_for_the_stream(vram: ModuleType) -> None:
    t = torch.zeros(1, device=DEVICE)
    vram.reset_clock()
    vram.configure(**UNIT, d2h_pageable=4)
    t.add_(1)
    assert t.item() == 1
    assert vram.host_clock() == 2  # 1 s of kernel, 4 bytes at 4 bytes/s


def test_trace_names_what_ran(vram: ModuleType) -> None:
    source = torch.zeros(4, pin_memory=True)
    vram.configure(trace=1)
    vram.reset_clock()
    t = source.to(DEVICE, non_blocking=True)
    t.add_(1)
    entries = vram.trace()
    assert [entry.name for entry in entries] == ["h2d_pinned", "aten::add"]
    assert [entry.nbytes for entry in entries] == [16, 32]
    assert entries[0].t1 <= entries[1].t0 < entries[1].t1
    vram.reset_clock()
    assert vram.trace() == []


def test_python_time_is_off_by_default_and_counts_when_on(vram: ModuleType) -> None:
    def spin() -> float:
        """Burns 20 ms of this thread's CPU time and returns by how much the host clock moved."""
        before = float(vram.host_clock())
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return float(vram.host_clock()) - before

    assert spin() == 0
    vram.configure(python_time=1)
    assert 0.02 <= spin() < 0.2
    vram.configure(python_scale=10)
    assert 0.2 <= spin() < 2
    vram.configure(python_time=0)
    assert spin() == 0


def test_python_time_leaves_the_kernels_out(vram: ModuleType) -> None:
    """The CPU's arithmetic stands in for the device, so its duration is not Python's."""
    a = torch.ones(400, 400, device=DEVICE)
    a @ a
    vram.configure(python_time=1)
    started, before = time.thread_time(), vram.host_clock()
    for _ in range(20):
        a @ a
    spent, moved = time.thread_time() - started, vram.host_clock() - before
    assert moved < spent / 2


def test_unknown_option(vram: ModuleType) -> None:
    with pytest.raises(KeyError, match="h2d_pinned"):
        vram.configure(speed=1)
