"""Invariant: two slots in use never overlap, and no copy goes into bytes that a queued kernel still reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from balanced_offload.offload.ring import Ring, Slot
from balanced_offload.offload.units import ALIGNMENT, aligned


class Clock:
    """A backend that counts: an event is the moment at which it was recorded."""

    def __init__(self) -> None:
        self.now = 0
        self.allocations = 0

    def empty(self, nbytes: int) -> torch.Tensor:
        self.allocations += 1
        return torch.zeros(nbytes, dtype=torch.uint8)

    def current_stream(self) -> str:
        return "compute"

    def record(self, stream: Any, timed: bool = False) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def ring_of(clock: Clock, slots: int) -> Ring:
    return Ring(clock, slots * ALIGNMENT)  # type: ignore[arg-type]


def release(ring: Ring, slot: Slot, clock: Clock) -> int:
    event = clock.record("compute")
    ring.release(slot, event)
    return event


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_random_walks_keep_to_the_rules(clock: Clock, seed: int, in_order: bool) -> None:
    """Random sizes, reserved and given back: bytes in use are disjoint, and every copy waits for what it replaces."""
    rng = random.Random(seed)
    capacity = rng.randrange(1, 24) * ALIGNMENT
    ring = Ring(clock, capacity)  # type: ignore[arg-type]
    live: list[Slot] = []
    freed_at = [0] * (capacity // ALIGNMENT)  # by block: when it was last given back
    refused = granted = 0
    for _ in range(600):
        if rng.random() < 0.55:
            nbytes = rng.randrange(1, capacity + ALIGNMENT)
            slot = ring.reserve(nbytes)
            if slot is None:
                refused += 1
                assert live or aligned(nbytes) > capacity, "an empty ring refused what fits"
                continue
            granted += 1
            assert slot.start % ALIGNMENT == slot.end % ALIGNMENT == 0
            assert slot.nbytes == nbytes and nbytes <= slot.end - slot.start == aligned(nbytes)
            assert 0 <= slot.start < slot.end <= capacity
            for other in live:
                assert slot.end <= other.start or other.end <= slot.start, "two slots in use overlap"
            for block in range(slot.start // ALIGNMENT, slot.end // ALIGNMENT):
                assert ring.reusable_after >= freed_at[block], "a copy may start before its bytes were given back"
            live.append(slot)
        elif live:
            slot = live.pop(0 if in_order else rng.randrange(len(live)))
            event = release(ring, slot, clock)
            for block in range(slot.start // ALIGNMENT, slot.end // ALIGNMENT):
                freed_at[block] = event
            if in_order:
                assert ring.in_use == len(live)
        assert ring.in_use >= len(live)
    for slot in live:
        release(ring, slot, clock)
    assert ring.in_use == 0
    assert ring.reserve(capacity) is not None, "an empty ring holds a slot of its whole size"
    assert granted > 20 and refused > 5
    assert clock.allocations == 1


@pytest.mark.parametrize("seed", range(10))
def test_it_is_as_good_as_a_fifo_can_be(clock: Clock, seed: int) -> None:
    """A refusal is always justified: the slot fits neither behind the newest nor before the oldest one in use."""
    rng = random.Random(seed)
    capacity = rng.randrange(2, 16) * ALIGNMENT
    ring = Ring(clock, capacity)  # type: ignore[arg-type]
    live: list[Slot] = []
    for _ in range(500):
        if rng.random() < 0.6:
            nbytes = rng.randrange(1, capacity + 1)
            slot = ring.reserve(nbytes)
            if slot is not None:
                live.append(slot)
                continue
            oldest, newest, size = live[0], live[-1], aligned(nbytes)
            if newest.start < oldest.start:  # wrapped
                assert newest.end + size > oldest.start
            else:
                assert newest.end + size > capacity and size > oldest.start
        elif live:
            release(ring, live.pop(0), clock)


def test_slots_are_handed_out_and_given_back_in_order(clock: Clock) -> None:
    ring = ring_of(clock, 4)
    first, second, third = (ring.reserve(ALIGNMENT) for _ in range(3))
    assert first and second and third
    assert [s.start // ALIGNMENT for s in (first, second, third)] == [0, 1, 2]
    release(ring, second, clock)
    assert ring.in_use == 3, "the oldest slot is in use, so the one behind it cannot be handed out"
    assert ring.reserve(2 * ALIGNMENT) is None
    release(ring, first, clock)
    assert ring.in_use == 1


def test_a_full_ring_refuses_until_the_oldest_goes(clock: Clock) -> None:
    ring = ring_of(clock, 3)
    slots = [ring.reserve(ALIGNMENT) for _ in range(3)]
    assert all(slots) and ring.reserve(1) is None
    assert slots[0] is not None
    release(ring, slots[0], clock)
    again = ring.reserve(1)
    assert again is not None and again.start == 0
    assert ring.reserve(1) is None


def test_a_slot_never_lies_across_the_end(clock: Clock) -> None:
    ring = ring_of(clock, 5)
    first, second = ring.reserve(2 * ALIGNMENT), ring.reserve(2 * ALIGNMENT)
    assert first and second
    release(ring, first, clock)
    wrapped = ring.reserve(2 * ALIGNMENT)
    assert wrapped is not None and wrapped.start == 0
    assert ring.reserve(1) is None, "the block at the end lies behind the newest slot, and is lost for this round"


def test_larger_than_the_ring_is_refused(clock: Clock) -> None:
    ring = ring_of(clock, 2)
    assert ring.reserve(2 * ALIGNMENT + 1) is None
    assert ring.reserve(2 * ALIGNMENT) is not None


def test_capacity_is_rounded_up_and_views_are_where_the_slot_is(clock: Clock) -> None:
    ring = Ring(clock, 3 * ALIGNMENT - 5)  # type: ignore[arg-type]
    assert ring.capacity == 3 * ALIGNMENT == ring.buffer.numel()
    ring.reserve(ALIGNMENT)
    slot = ring.reserve(100)
    assert slot is not None
    view = ring.view(slot, 16, 32)
    assert view.numel() == 32
    assert view.data_ptr() - ring.buffer.data_ptr() == ALIGNMENT + 16


def test_given_back_out_of_order_waits_for_the_later_of_both(clock: Clock) -> None:
    """The inner of two nested units is given back first; the outer one's bytes are still read after that."""
    ring = ring_of(clock, 2)
    outer, inner = ring.reserve(ALIGNMENT), ring.reserve(ALIGNMENT)
    assert outer and inner
    early = release(ring, inner, clock)
    late = release(ring, outer, clock)
    assert early < late
    assert ring.reserve(ALIGNMENT) is not None
    assert ring.reusable_after == late


def test_the_first_copy_waits_for_whoever_had_the_bytes_before(clock: Clock) -> None:
    """The allocator may hand out bytes that queued kernels still read; a copy into the ring must come behind them.

    Told by the event alone: the simulator looks for races within a storage, not between two that lie in one place.
    """
    queued = [clock.record("compute") for _ in range(5)][-1]
    ring = ring_of(clock, 2)
    assert ring.reserve(ALIGNMENT) is not None
    assert ring.reusable_after > queued
