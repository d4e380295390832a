"""Invariant: the schedule's figures are those of the machine it describes, and never below its bound."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_offload.offload.schedule import Piece, Rates, Schedule, predict_step

from . import reference
from .walks import flux, random_rates, random_walk

SLOW_LINK = Rates(10e9, 5e9, copy_latency=0.0)


def mb(*sizes_and_ms: tuple[int, float]) -> list[Piece]:
    """Pieces of (10 MB, ms): 10 MB take a millisecond on the slow link."""
    return [Piece(size * 10_000_000, ms * 1e-3, i) for i, (size, ms) in enumerate(sizes_and_ms)]


# ---------------------------------------------------------------------- by hand
def test_all_resident_is_compute() -> None:
    step = predict_step(mb((1, 2), (3, 4)), {0, 1}, 0, SLOW_LINK)
    assert step.step_s == step.compute_s == step.bound_s == pytest.approx(6e-3)
    assert (step.stall_s, step.copied_bytes) == (0.0, 0)


def test_one_slot_is_additive() -> None:
    """Two units through a ring of one: copy 1, run 2, copy 3, run 4; over the boundary too."""
    walk = mb((1, 2), (3, 4))
    for wrap in (True, False):
        step = predict_step(walk, frozenset(), 30_000_000, SLOW_LINK, wrap=wrap)
        assert step.step_s == pytest.approx(10e-3)
        assert step.stall_s == pytest.approx(4e-3)
        assert step.bound_s == pytest.approx(6e-3)
        assert step.copied_bytes == 40_000_000


def test_two_slots_overlap_and_wrap_hides_the_first_copy() -> None:
    """Units of 2 ms copy and 3 ms compute, two slots: compute never waits but for the first one of a cold step."""
    walk = mb(*[(2, 3.0)] * 4)
    assert predict_step(walk, frozenset(), 40_000_000, SLOW_LINK).step_s == pytest.approx(12e-3)
    assert predict_step(walk, frozenset(), 40_000_000, SLOW_LINK, wrap=False).step_s == pytest.approx(14e-3)


def test_transfer_bound_is_the_copies() -> None:
    walk = mb(*[(3, 1.0)] * 6)
    step = predict_step(walk, frozenset(), 60_000_000, SLOW_LINK)
    # a slot is free 1 ms after its unit began, and the unit begins when its copy is there: the copy engine waits
    # only where both slots are taken, which with compute below a copy is never
    assert step.step_s == step.bound_s == pytest.approx(18e-3)


def test_a_resident_unit_gives_its_time_to_the_copies() -> None:
    walk = mb((4, 1), (9, 6), (4, 1), (9, 6))
    step = predict_step(walk, {1, 3}, 80_000_000, SLOW_LINK)
    assert step.step_s == pytest.approx(14e-3) and step.copied_bytes == 80_000_000


def test_the_release_is_at_the_end_of_the_units_own_forward() -> None:
    """One slot: the next copy begins behind the unit's own 1 ms, and hides behind the 3 ms that follow."""
    late = [Piece(10_000_000, 4e-3, 0), Piece(10_000_000, 4e-3, 1)]
    early = [Piece(10_000_000, 4e-3, i, own_s=1e-3) for i in range(2)]
    assert predict_step(late, frozenset(), 10_000_000, SLOW_LINK).step_s == pytest.approx(10e-3)
    assert predict_step(early, frozenset(), 10_000_000, SLOW_LINK).step_s == pytest.approx(8e-3)


def test_the_hosts_time_is_a_bound_too() -> None:
    walk = [Piece(1_000_000, 1e-4, i, host_s=5e-4) for i in range(8)]
    resident = predict_step(walk, set(range(8)), 0, SLOW_LINK)
    assert resident.step_s == pytest.approx(4e-3)
    hooked = predict_step(walk, frozenset(), 8_000_000, Rates(10e9, 5e9, 0.0, hook=1e-4))
    assert hooked.step_s == pytest.approx(4.8e-3)
    assert hooked.stall_s == pytest.approx(0.0)


def test_pageable_copies_hold_the_host() -> None:
    """The host can not launch while it copies: 1 ms of copy and then 2 ms of launches, per unit."""
    walk = [Piece(5_000_000, 1e-4, i, host_s=2e-3, pinned=False) for i in range(4)]
    step = predict_step(walk, frozenset(), 20_000_000, SLOW_LINK)
    assert step.step_s == pytest.approx(12e-3)


def test_a_ring_below_the_largest_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="ring has 20000000"):
        predict_step(mb((3, 1)), frozenset(), 20_000_000, SLOW_LINK)


def test_units_without_bytes_need_no_ring() -> None:
    assert predict_step([Piece(0, 1e-3, 0)], frozenset(), 0, SLOW_LINK).step_s == 1e-3


def test_near_its_bound_the_steady_state_is_exact() -> None:
    """Copies a thousandth faster than compute: a run of steps would need hundreds of them to settle."""
    walk = mb(*[(10, 10.01)] * 20)
    assert predict_step(walk, frozenset(), 500_000_000, SLOW_LINK).step_s == pytest.approx(20 * 10.01e-3, rel=1e-12)


# ---------------------------------------------------------------------- against the reference
@pytest.mark.parametrize("seed", range(150))
def test_as_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    walk = random_walk(rng, rng.randrange(1, 25), host=seed % 3 == 0, pageable=seed % 4 == 0)
    rates = random_rates(rng, hook=seed % 3 == 0)
    resident = {i for i in range(len(walk)) if rng.random() < rng.choice([0.0, 0.3, 0.7])}
    largest = max((p.nbytes for i, p in enumerate(walk) if i not in resident), default=0)
    ring = int(largest * rng.choice([1, 1.3, 2, 3, 5, 20]))
    assert predict_step(walk, resident, ring, rates, wrap=False).step_s == pytest.approx(
        reference.cold(walk, resident, ring, rates), rel=1e-9
    )
    assert predict_step(walk, resident, ring, rates).step_s == pytest.approx(
        reference.steady(walk, resident, ring, rates), rel=1e-6
    )


@pytest.mark.parametrize("every", [1, 2, 3])
def test_as_the_reference_on_flux(every: int) -> None:
    walk = flux(58.0, 1024)
    resident = {i for i in range(len(walk)) if i % every}
    rates = Rates(24e9, 8e9)
    for ring in (120 << 20, 400 << 20):
        found = predict_step(walk, resident, ring, rates).step_s
        assert found == pytest.approx(reference.steady(walk, resident, ring, rates, 12, 6), rel=1e-6)


# ---------------------------------------------------------------------- properties
@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Piece], set[int], int, Rates]:
    count = draw(st.integers(1, 14))
    time = st.floats(0, 1e-2, allow_nan=False)
    walk = []
    for i in range(count):
        compute = draw(time)
        own = draw(st.none() | st.floats(0, 1).map(lambda share, c=compute: share * c))  # type: ignore[misc]
        walk.append(
            Piece(draw(st.integers(0, 1 << 28)), compute, i, draw(st.just(0.0) | time), draw(st.booleans()), own)
        )
    resident = draw(st.sets(st.integers(0, count - 1)))
    largest = max((p.nbytes for i, p in enumerate(walk) if i not in resident), default=0)
    ring = largest + draw(st.integers(0, 1 << 29))
    h2d = draw(st.floats(1e9, 1e11))
    rates = Rates(h2d, h2d * draw(st.floats(0.1, 1)), draw(st.floats(0, 1e-4)), draw(st.floats(0, 1e-4)))
    return walk, resident, ring, rates


@settings(max_examples=200, deadline=None)
@given(cases())
def test_never_below_the_bound(case: tuple[list[Piece], set[int], int, Rates]) -> None:
    walk, resident, ring, rates = case
    compute = sum(p.compute_s for p in walk)
    streamed = sum(p.nbytes for i, p in enumerate(walk) if i not in resident)
    warm, cold = (predict_step(walk, resident, ring, rates, wrap=w) for w in (True, False))
    for step in (warm, cold):
        assert step.step_s >= max(compute, streamed / rates.h2d) * (1 - 1e-12)
        assert step.step_s >= step.bound_s
        assert step.stall_s >= 0 and step.copied_bytes == streamed
    if all(p.pinned for p in walk):  # a pageable copy of the next step holds the host in this one
        assert warm.step_s <= cold.step_s * (1 + 1e-9), "running ahead over the boundary never hurts"


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(1.0, 4.0))
def test_faster_links_are_never_slower(case: tuple[list[Piece], set[int], int, Rates], factor: float) -> None:
    walk, resident, ring, rates = case
    fast = Rates(rates.h2d * factor, rates.h2d_pageable * factor, rates.copy_latency, rates.hook)
    for wrap in (True, False):
        slow_s = predict_step(walk, resident, ring, rates, wrap=wrap).step_s
        assert predict_step(walk, resident, ring, fast, wrap=wrap).step_s <= slow_s * (1 + 1e-9)


def test_a_prediction_of_500_units_takes_milliseconds() -> None:
    import time

    schedule = Schedule(flux(58.0), Rates(24e9, 8e9, hook=2e-5))
    taken = []
    for _ in range(9):
        begun = time.thread_time()
        schedule.predict(frozenset(), 400 << 20)
        taken.append(time.thread_time() - begun)
    assert sorted(taken)[4] < 0.03
