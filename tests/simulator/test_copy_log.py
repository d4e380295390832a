"""Invariant: every byte between host and device is in the log, under the storage that it left or entered."""

from __future__ import annotations

from types import ModuleType

import torch

DEVICE = "vram"


def test_a_copy_up_and_down(vram: ModuleType) -> None:
    source = torch.zeros(256, pin_memory=True)
    target = torch.empty(256, device=DEVICE)
    vram.clear_copy_log()
    target.copy_(source)
    back = target.cpu()
    up, down = vram.copy_log()
    serial = vram.storage_serial(target)
    assert serial > 0
    assert (up.direction, up.nbytes, up.storage, up.offset, up.pinned) == ("h2d", 1024, serial, 0, True)
    assert up.host_ptr == source.data_ptr()
    assert (down.direction, down.nbytes, down.storage, down.offset, down.pinned) == ("d2h", 1024, serial, 0, False)
    assert down.host_ptr == back.data_ptr()
    assert up.t0 < up.t1 <= down.t0 < down.t1
    assert not up.ghost
    assert vram.copy_totals() == {"h2d": 1, "d2h": 1, "h2d_bytes": 1024, "d2h_bytes": 1024}


def test_slots_are_told_apart_by_offset_and_stream(vram: ModuleType) -> None:
    ring, side = torch.empty(4096, dtype=torch.uint8, device=DEVICE), vram.Stream()
    source = torch.zeros(256, pin_memory=True)
    vram.clear_copy_log()
    ring[:1024].view(torch.float32).copy_(source, non_blocking=True)
    with vram.stream(side):
        ring[2048:3072].view(torch.float32).copy_(source, non_blocking=True)
    first, second = vram.copy_log()
    assert first.storage == second.storage == vram.storage_serial(ring)
    assert (first.offset, second.offset) == (0, 2048)
    assert (first.stream, second.stream) == (0, side.stream_id)


def test_item_is_a_copy_down(vram: ModuleType) -> None:
    t = torch.arange(4, dtype=torch.float64, device=DEVICE)
    vram.clear_copy_log()
    assert t[2].item() == 2
    (copy,) = vram.copy_log()
    assert (copy.direction, copy.nbytes, copy.storage, copy.offset) == ("d2h", 8, vram.storage_serial(t), 16)


def test_serials_are_never_used_twice(vram: ModuleType) -> None:
    serials = [vram.storage_serial(torch.empty(64, device=DEVICE)) for _ in range(50)]
    assert len(set(serials)) == 50
    assert serials == sorted(serials)


def test_views_and_results_have_the_serial_of_their_storage(vram: ModuleType) -> None:
    t = torch.zeros(8, device=DEVICE)
    assert vram.storage_serial(t[2:]) == vram.storage_serial(t) != vram.storage_serial(t + 1)
    assert vram.storage_serial(t.add_(1)) == vram.storage_serial(t)
    assert vram.storage_serial(torch.zeros(8)) == 0
    assert vram.storage_serial(torch.empty(0, device=DEVICE)) == 0


def test_were_weights_ever_copied_down(vram: ModuleType) -> None:
    """The question that the log exists for: dropping a device copy is free, moving it back is not."""
    module = torch.nn.Linear(16, 16)
    masters = {name: p.data for name, p in module.named_parameters()}
    vram.clear_copy_log()
    for p in module.parameters():
        p.data = p.data.to(DEVICE)
    weights = {vram.storage_serial(p) for p in module.parameters()}
    module(torch.zeros(1, 16, device=DEVICE)).cpu()
    for name, p in module.named_parameters():
        p.data = masters[name]
    assert {c.storage for c in vram.copy_log() if c.direction == "h2d"} == weights
    assert [c for c in vram.copy_log() if c.direction == "d2h" and c.storage in weights] == []

    module.to(DEVICE)
    weights = {vram.storage_serial(p) for p in module.parameters()}
    module.to("cpu")
    down = [c for c in vram.copy_log() if c.direction == "d2h" and c.storage in weights]
    assert sum(c.nbytes for c in down) == sum(p.nbytes for p in module.parameters())


def test_a_cast_on_the_way_counts_what_crosses(vram: ModuleType) -> None:
    """Up, the CPU casts first; down, the device's own bytes cross."""
    target = torch.empty(64, dtype=torch.float16, device=DEVICE)
    vram.clear_copy_log()
    target.copy_(torch.zeros(64, dtype=torch.float32))
    torch.empty(64, dtype=torch.float32).copy_(target)
    assert [copy.nbytes for copy in vram.copy_log()] == [128, 128]


def test_the_log_outlives_a_clock_reset_and_is_bounded(vram: ModuleType) -> None:
    target, source = torch.empty(4, device=DEVICE), torch.zeros(4)
    vram.configure(copy_log_limit=3)
    vram.clear_copy_log()
    for _ in range(5):
        target.copy_(source)
    vram.reset_clock()
    assert vram.counters()["h2d"] == 0
    assert len(vram.copy_log()) == 3
    assert vram.counters()["copies_dropped"] == 2
    assert vram.copy_totals()["h2d"] == 5
    assert vram.copy_totals()["h2d_bytes"] == 80
    vram.clear_copy_log()
    assert vram.copy_log() == []
    assert vram.copy_totals()["h2d"] == 0


def test_switched_off_only_totals_remain(vram: ModuleType) -> None:
    target = torch.empty(4, device=DEVICE)
    vram.configure(copy_log=0)
    vram.clear_copy_log()
    target.copy_(torch.zeros(4))
    assert vram.copy_log() == []
    assert vram.copy_totals()["h2d_bytes"] == 16
