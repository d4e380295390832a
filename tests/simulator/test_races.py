"""Invariant: two accesses to the same bytes that nothing orders are reported; anything ordered or disjoint is not."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

DEVICE = "vram"
N = 1024  # floats per slot


def load(vram: ModuleType, stream: torch.Stream, source: Tensor, target: Tensor) -> torch.Event:
    """Copies a pinned source into the target on the stream, as a prefetch does."""
    with vram.stream(stream):
        target.copy_(source, non_blocking=True)
        event: torch.Event = stream.record_event()
    return event


@pytest.fixture
def source() -> Tensor:
    return torch.ones(N, pin_memory=True)


def test_use_without_wait_is_a_race(vram: ModuleType, source: Tensor) -> None:
    target = torch.empty(N, device=DEVICE)
    load(vram, vram.Stream(), source, target)
    target + 1
    assert vram.races() == 1
    assert "aten::add on stream 0 reads memory written on stream" in vram.last_race()
    assert vram.counters()["races"] == 1
    vram.clear_races()
    assert vram.races() == 0 and vram.last_race() == ""


def test_use_after_wait_is_none(vram: ModuleType, source: Tensor) -> None:
    target = torch.empty(N, device=DEVICE)
    event = load(vram, vram.Stream(), source, target)
    vram.current_stream().wait_event(event)
    target + 1
    assert vram.races() == 0


@pytest.mark.parametrize("how", ["event", "stream", "device", "query"])
def test_the_host_orders_too(vram: ModuleType, source: Tensor, how: str) -> None:
    target, stream = torch.empty(N, device=DEVICE), vram.Stream()
    event = load(vram, stream, source, target)
    if how == "event":
        event.synchronize()
    elif how == "stream":
        stream.synchronize()
    elif how == "device":
        vram.synchronize()
    else:
        vram.advance_host(1.0)
        assert event.query()
    target + 1
    assert vram.races() == 0


def test_a_query_answered_no_orders_nothing(vram: ModuleType, source: Tensor) -> None:
    target = torch.empty(N, device=DEVICE)
    event = load(vram, vram.Stream(), source, target)
    assert not event.query()
    target + 1
    assert vram.races() == 1


def test_overwriting_what_is_still_read_is_a_race(vram: ModuleType, source: Tensor) -> None:
    target, stream = torch.zeros(N, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    target + 1  # on the compute stream
    load(vram, stream, source, target)
    assert vram.races() == 1
    assert "overwrites memory still read on stream 0" in vram.last_race()


def test_two_readers_are_no_race(vram: ModuleType) -> None:
    target, stream = torch.zeros(N, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    with vram.stream(stream):
        a = target + 1
    b = target + 2
    vram.synchronize()
    assert vram.races() == 0
    del a, b


def test_slots_of_one_buffer_belong_to_different_streams(vram: ModuleType, source: Tensor) -> None:
    """Slot 1 is loaded while slot 0 computes: disjoint bytes of one storage, no wait between them."""
    ring, stream = torch.zeros(4 * N, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    ring[:N] + 1
    event = load(vram, stream, source, ring[N : 2 * N])
    ring[:N].add_(1)
    assert vram.races() == 0
    vram.current_stream().wait_event(event)
    ring[N : 2 * N] + 1
    assert vram.races() == 0


@pytest.mark.parametrize(("begin", "end"), [(N, 2 * N), (2 * N - 1, 3 * N), (0, N + 1), (N + 5, N + 6), (0, 4 * N)])
def test_overlapping_ranges_are_caught(vram: ModuleType, source: Tensor, begin: int, end: int) -> None:
    ring, stream = torch.zeros(4 * N, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    load(vram, stream, source, ring[N : 2 * N])
    ring[begin:end] + 1
    assert vram.races() == 1


@pytest.mark.parametrize(("begin", "end"), [(0, N), (2 * N, 4 * N)])
def test_touching_ranges_do_not_overlap(vram: ModuleType, source: Tensor, begin: int, end: int) -> None:
    ring, stream = torch.zeros(4 * N, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    load(vram, stream, source, ring[N : 2 * N])
    ring[begin:end] + 1
    assert vram.races() == 0


def test_ranges_are_bytes_not_elements(vram: ModuleType) -> None:
    """The same bytes through views of another dtype."""
    ring, stream = torch.zeros(4 * N, dtype=torch.uint8, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    load(vram, stream, torch.ones(N // 4, pin_memory=True), ring[N : 2 * N].view(torch.float32))
    ring[: N - 1] + 1
    ring[2 * N :].view(torch.int64) + 1
    assert vram.races() == 0
    ring[2 * N - 4 :].view(torch.float32) + 1
    assert vram.races() == 1


def test_a_partial_overwrite_keeps_the_rest(vram: ModuleType, source: Tensor) -> None:
    """After the middle was overwritten in order, both ends of the racing write are still known."""
    ring, stream, other = torch.zeros(3 * N, device=DEVICE), vram.Stream(), vram.Stream()
    stream.wait_stream(vram.current_stream())
    event = load(vram, stream, torch.ones(3 * N, pin_memory=True), ring)
    other.wait_event(event)
    load(vram, other, source, ring[N : 2 * N])
    vram.current_stream().wait_stream(other)
    ring + 1
    assert vram.races() == 0  # other came after stream, and we came after other
    with vram.stream(stream):
        ring[2 * N :].zero_()
    assert vram.races() == 1  # reads of the last third are not ordered before it


def test_a_write_hides_only_what_it_covers(vram: ModuleType, source: Tensor) -> None:
    ring, stream = torch.zeros(3 * N, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    load(vram, stream, torch.ones(3 * N, pin_memory=True), ring)
    ring[N : 2 * N].zero_()
    assert vram.races() == 1
    ring[N : 2 * N] + 1
    assert vram.races() == 1
    ring[:N] + 1
    assert vram.races() == 2
    ring[2 * N :] + 1
    assert vram.races() == 3


def test_many_slots_stay_exact(vram: ModuleType, source: Tensor) -> None:
    """More ranges than the trimming threshold, none of them seen by the host."""
    slots = 300
    ring, stream = torch.zeros(slots * N, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    for i in range(0, slots, 2):
        load(vram, stream, source, ring[i * N : (i + 1) * N])
    for i in range(1, slots, 2):
        ring[i * N : (i + 1) * N].add_(1)
    assert vram.races() == 0
    for i in range(0, slots, 2):
        ring[i * N : (i + 1) * N].add_(1)
    assert vram.races() == slots // 2


def test_free_in_use_by_another_stream_is_a_race(vram: ModuleType, source: Tensor) -> None:
    stream = vram.Stream()
    with vram.stream(stream):
        target = source.to(DEVICE, non_blocking=True)
    vram.current_stream().wait_stream(stream)
    target + 1
    del target  # allocated on stream, read on 0, and stream may reuse it at once
    assert vram.races() == 1
    assert "freed while used on stream 0" in vram.last_race()


def test_free_with_record_stream_waits(vram: ModuleType, source: Tensor) -> None:
    vram.configure(kernel_min=1e-3)
    stream = vram.Stream()
    with vram.stream(stream):
        target = source.to(DEVICE, non_blocking=True)
    vram.current_stream().wait_stream(stream)
    result = target + 1
    target.record_stream(vram.current_stream())
    before = vram.memory_reserved()
    del target
    assert vram.races() == 0
    assert vram.memory_reserved() == before
    vram.synchronize()
    assert vram.memory_reserved() == before - source.nbytes
    del result


def test_free_after_the_owner_waited_is_none(vram: ModuleType, source: Tensor) -> None:
    stream = vram.Stream()
    with vram.stream(stream):
        target = source.to(DEVICE, non_blocking=True)
    vram.current_stream().wait_stream(stream)
    target + 1
    stream.wait_stream(vram.current_stream())
    del target
    assert vram.races() == 0


def test_strict_races_raise_at_the_operation(vram: ModuleType, source: Tensor) -> None:
    vram.configure(strict_races=1)
    target = torch.empty(N, device=DEVICE)
    load(vram, vram.Stream(), source, target)
    with pytest.raises(RuntimeError, match="race: aten::add on stream 0 reads memory written on stream"):
        target + 1
    vram.synchronize()
    assert torch.equal((target + 1).cpu(), torch.full((N,), 2.0))


def test_views_of_an_input_are_no_writes(vram: ModuleType) -> None:
    base, stream = torch.zeros(4, N, device=DEVICE), vram.Stream()
    stream.wait_stream(vram.current_stream())
    base[0] + 1
    with vram.stream(stream):
        base.t()[:3].reshape(-1).sum()
    assert vram.races() == 0
