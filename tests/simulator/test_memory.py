"""Invariant: device memory is counted to the byte, never exceeds the capacity, and an out-of-memory changes nothing."""

from __future__ import annotations

import threading
from types import ModuleType

import pytest
import torch

DEVICE = "vram"
MIB = 1 << 20


def test_stats_are_exact(vram: ModuleType) -> None:
    before = vram.memory_allocated()
    t = torch.empty(MIB, device=DEVICE)
    assert vram.memory_allocated() == before + 4 * MIB
    assert vram.max_memory_allocated() == before + 4 * MIB
    del t
    assert vram.memory_allocated() == before
    assert vram.max_memory_allocated() == before + 4 * MIB
    vram.reset_peak_memory_stats()
    assert vram.max_memory_allocated() == before


@pytest.mark.parametrize(("nbytes", "counted"), [(1, 512), (512, 512), (513, 1024), (4096, 4096), (0, 0)])
def test_storages_count_in_steps_of_512(vram: ModuleType, nbytes: int, counted: int) -> None:
    before = vram.memory_stats()
    t = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    after = vram.memory_stats()

    def rise(key: str) -> int:
        return int(after[f"{key}.all.current"] - before[f"{key}.all.current"])

    assert rise("allocated_bytes") == rise("active_bytes") == rise("reserved_bytes") == counted
    assert rise("requested_bytes") == nbytes
    assert rise("allocation") == rise("active") == (1 if nbytes else 0)
    del t


def test_views_share_their_storage(vram: ModuleType) -> None:
    before = vram.memory_allocated()
    t = torch.empty(MIB, device=DEVICE)
    view = t[10:]
    assert vram.memory_allocated() == before + 4 * MIB
    del t
    assert vram.memory_allocated() == before + 4 * MIB
    del view
    assert vram.memory_allocated() == before


def test_results_are_counted_once(vram: ModuleType) -> None:
    t = torch.ones(MIB, device=DEVICE)
    before = vram.memory_allocated()
    total = t + 1
    assert vram.memory_allocated() == before + 4 * MIB
    total.add_(1)
    parts = total.chunk(4)
    assert vram.memory_allocated() == before + 4 * MIB
    del total, parts
    assert vram.memory_allocated() == before


def test_allocation_past_the_cap(vram: ModuleType) -> None:
    vram.set_memory_cap(vram.memory_allocated() + MIB)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 4194304 bytes"):
        torch.empty(MIB, device=DEVICE)
    assert vram.memory_stats()["num_ooms"] >= 1


def test_a_kernel_result_past_the_cap(vram: ModuleType) -> None:
    before = vram.memory_allocated()
    t = torch.ones(MIB // 8, device=DEVICE)
    vram.set_memory_cap(before + MIB)
    with pytest.raises(torch.OutOfMemoryError):
        t.repeat(16)
    assert vram.memory_allocated() == before + MIB // 2
    assert torch.equal((t + 1).cpu(), torch.full((MIB // 8,), 2.0))


def test_exactly_the_cap_fits(vram: ModuleType) -> None:
    vram.set_memory_cap(vram.memory_allocated() + MIB)
    t = torch.empty(MIB, dtype=torch.uint8, device=DEVICE)
    assert vram.mem_get_info() == (0, vram.memory_cap())
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1, dtype=torch.uint8, device=DEVICE)
    del t


def test_others_lower_free_not_total(vram: ModuleType) -> None:
    vram.set_memory_cap(8 * MIB)
    used = vram.memory_allocated()
    assert vram.mem_get_info() == (8 * MIB - used, 8 * MIB)
    vram.set_others(6 * MIB)
    assert vram.others() == 6 * MIB
    assert vram.mem_get_info() == (2 * MIB - used, 8 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match="taken by other programs 6291456"):
        torch.empty(3 * MIB, dtype=torch.uint8, device=DEVICE)
    vram.set_others(16 * MIB)
    assert vram.mem_get_info() == (0, 8 * MIB)
    vram.set_others(0)
    assert torch.empty(3 * MIB, dtype=torch.uint8, device=DEVICE).nbytes == 3 * MIB


@pytest.mark.parametrize("setter", ["set_memory_cap", "set_others"])
def test_negative_sizes_are_refused(vram: ModuleType, setter: str) -> None:
    with pytest.raises(ValueError, match="-1"):
        getattr(vram, setter)(-1)


def test_a_full_card_waits_for_recorded_streams_before_it_gives_up(vram: ModuleType) -> None:
    """As CUDA's allocator: memory in use by a recorded stream comes back by waiting, which costs time but no OOM."""
    vram.configure(kernel_min=1)
    side = vram.Stream()
    with vram.stream(side):
        held = torch.empty(MIB, dtype=torch.uint8, device=DEVICE)
    vram.current_stream().wait_stream(side)
    held.add_(1)
    held.record_stream(vram.current_stream())
    vram.set_memory_cap(vram.memory_reserved() + MIB // 2)
    del held
    retries = vram.memory_stats()["num_alloc_retries"]
    before = vram.host_clock()
    fits = torch.empty(MIB, dtype=torch.uint8, device=DEVICE)
    assert vram.memory_stats()["num_alloc_retries"] == retries + 1
    assert vram.host_clock() >= before + 0.9
    assert vram.races() == 0
    del fits


def test_threads_share_the_device(vram: ModuleType) -> None:
    before = vram.memory_allocated()
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for i in range(50):
                if (torch.full((64,), float(seed), device=DEVICE) + i).sum().item() != 64 * (seed + i):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert vram.memory_allocated() == before


def test_cycles_leave_nothing_behind(vram: ModuleType) -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    x = torch.randn(2, 64)
    expected = module(x)
    before, pinned = vram.memory_allocated(), vram.counters()["pinned"]
    for _ in range(30):
        module.to(DEVICE)
        assert torch.equal(module(x.to(DEVICE)).cpu(), expected)
        vram.set_memory_cap(vram.memory_allocated())
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(MIB, device=DEVICE)
        vram.set_memory_cap(8 << 30)
        module.to("cpu")
        vram.Stream()
    assert vram.memory_allocated() == before
    assert vram.counters()["pinned"] == pinned
    assert vram.counters()["streams"] <= 33


def test_cards(vram: ModuleType) -> None:
    assert len(vram.CARDS) >= 8
    for key, card in vram.CARDS.items():
        assert vram.use_card(key) is card is vram.card()
        assert vram.memory_cap() == card.vram
        assert vram.mem_get_info()[1] == card.vram
        options = vram.configuration()
        assert {name: options[name] for name in card.options()} == card.options()
        assert card.h2d_pageable < card.h2d_pinned
        assert card.flops32 < card.flops16
        assert vram.get_device_name() == card.device_name == vram.get_device_properties().name
        assert "imulated" in card.device_name


def test_the_default_card_is_what_loading_gives(vram: ModuleType, default_options: dict[str, float]) -> None:
    card = vram.CARDS["generic-8g"]
    assert {name: default_options[name] for name in card.options()} == card.options()


def test_a_faster_link_copies_faster(vram: ModuleType) -> None:
    source = torch.zeros(24_000_000, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(24_000_000, dtype=torch.uint8, device=DEVICE)
    vram.use_card("rtx4090-24g")  # 24 GB/s pinned
    vram.configure(copy_lat=0, launch=0)
    vram.reset_clock()
    target.copy_(source)
    assert vram.clock() == 24_000_000 / 24e9


def test_unknown_card(vram: ModuleType) -> None:
    with pytest.raises(KeyError, match="rtx3070-8g"):
        vram.use_card("rtx9999")
