"""Invariant: a copy never goes into bytes whose unit may still run, and waits for nothing that waits for it.

The layout is held against a plain list of who had each byte last; the ring against the device's own addresses.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_offload.offload import Session
from balanced_offload.offload.backend import open_backend
from balanced_offload.offload.layout import Layout, lay_out
from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.pinning import Pinner
from balanced_offload.offload.ring import Ring
from balanced_offload.offload.stream import Order, Stream
from balanced_offload.offload.units import ALIGNMENT, build_component
from balanced_offload.offload.weights import Weights, share_out

from .toys import DEVICE, Chain, build, clone, policy, tokens

STEPS = 3


@st.composite
def walks(draw: st.DrawFn) -> tuple[list[int], int]:
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=24))
    return sizes, draw(st.integers(max(sizes), max(sizes) * 4 + 3))


def tenants(sizes: list[int], layout: Layout) -> list[set[int]]:
    """For each place of STEPS steps: the places that had one of its bytes right before it."""
    owner = [-1] * layout.capacity
    found = []
    for step in range(STEPS):
        for at, size in enumerate(sizes):
            mine = range(layout.starts[at], layout.starts[at] + size)
            found.append({owner[byte] for byte in mine} - {-1})
            for byte in mine:
                owner[byte] = step * len(sizes) + at
    return found


@settings(max_examples=300, deadline=None)
@given(walks())
def test_a_copy_waits_for_all_that_lay_in_its_bytes(walk: tuple[list[int], int]) -> None:
    sizes, capacity = walk
    layout = lay_out(sizes, capacity)
    count = len(sizes)
    assert all(start >= 0 and start + size <= capacity for start, size in zip(layout.starts, sizes, strict=True))
    waits = [step * count + after for step in range(STEPS) for after in layout.after]
    for place, before in enumerate(tenants(sizes, layout)):
        assert waits[place] < place, "it waits for itself, or for what comes later"
        assert all(other <= waits[place] for other in before), "bytes are overwritten before they were given back"
        assert place == 0 or waits[place] >= waits[place - 1] or place % count == 0
    assert list(layout.after) == sorted(layout.after), "copies run in order: a later one never waits for less"


@settings(max_examples=200, deadline=None)
@given(walks())
def test_a_copy_waits_for_no_more_than_it_has_to(walk: tuple[list[int], int]) -> None:
    sizes, capacity = walk
    layout = lay_out(sizes, capacity)
    count, before = len(sizes), tenants(sizes, layout)
    for at in range(count):
        place = count + at  # the second step: everything has a tenant before it
        needed = max((tenant for other in before[count : place + 1] for tenant in other), default=0)
        assert layout.after[at] + count <= max(needed, 0), "it waits although the bytes are free"


def test_addresses_recur_and_the_walk_starts_at_the_front() -> None:
    layout = lay_out([3, 3, 3], 7)
    assert layout.starts == (0, 3, 0)
    assert layout.after == (-1, -1, 0)
    assert lay_out([2, 2], 9).after == (-2, -1), "a ring with room for all waits for the step before"
    with pytest.raises(ValueError, match="unit 1 takes 8 bytes, and the ring has 7"):
        lay_out([1, 8], 7)
    assert lay_out([], 7) == Layout(7, (), ())


# ---------------------------------------------------------------------- slabs
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 200))
def test_slabs_hold_what_the_budget_allows(sizes: list[int], budget: int) -> None:
    pairs = list(enumerate(sizes))
    groups = share_out(pairs, budget)
    taken = [index for group in groups for index in group]
    assert taken == sorted(taken) and len(set(taken)) == len(taken)
    assert sum(sizes[index] for index in taken) <= budget
    if sum(sizes) <= budget:
        assert taken == [index for index, size in pairs if size], "there was room for all of them"


def test_what_stays_out_of_the_budget_is_spread() -> None:
    groups = share_out([(index, 4) for index in range(40)], 80)
    assert [index for group in groups for index in group] == list(range(0, 40, 2))


# ---------------------------------------------------------------------- on the device
def stream_of(net: torch.nn.Module, ring_bytes: int) -> Stream:
    backend = open_backend(DEVICE)
    component = build_component("net", net)
    weights = Weights(component, backend, Pinner(backend, 1 << 30))
    weights.pin(component.units)
    stream = Stream(component, weights, backend, Ledger(backend), backend.new_stream())
    stream.resize(ring_bytes)
    return stream


def run(stream: Stream, order: Order, units: list[int], wrap: bool = True) -> list[int]:
    """One forward over `units`; where each was found in the ring."""
    found = []
    stream.open(order, wrap, frozenset(u.index for u in stream.component.units))
    for index in units:
        unit = stream.component.units[index]
        stream.take(unit)
        weight = unit.module.weight
        assert torch.equal(
            weight.cpu(), stream._weights.masters[unit.storages[0].index].view(torch.float32).view(64, 64)
        )
        found.append(weight.data_ptr())
        stream.give(unit)
    stream.close()
    return found


def test_a_unit_has_one_address_and_one_copy(sim: ModuleType) -> None:
    net = build(Chain)
    stream = stream_of(net, 3 * (64 * 64 * 4 + 512))
    assert stream.ring is not None
    order, units = Order(), [u.index for u in stream.component.units]
    with torch.no_grad():
        run(stream, order, units)
        second = run(stream, order, units)
        sim.clear_copy_log()
        third = run(stream, order, units)
        fourth = run(stream, order, units)
    assert second == third == fourth
    assert len(set(second)) == 3 and min(second) == stream.ring.buffer.data_ptr()
    ups = [entry for entry in sim.copy_log() if entry.direction == "h2d"]
    assert len(ups) == 2 * len(units), "weight and bias lie behind each other: one copy"
    assert {entry.nbytes for entry in ups} == {64 * 64 * 4 + 256}
    stream.drop()


@pytest.mark.parametrize("wrap", [True, False])
def test_copies_run_past_the_end_of_a_forward_only_if_told(sim: ModuleType, wrap: bool) -> None:
    net = build(Chain)
    stream = stream_of(net, 3 * (64 * 64 * 4 + 512))
    order, units = Order(), [u.index for u in stream.component.units]
    with torch.no_grad():
        for _ in range(3):
            run(stream, order, units, wrap)
        sim.clear_copy_log()
        run(stream, order, units, wrap)
        assert stream.walk.issued - stream.walk.base == (3 if wrap else 0)
        assert sim.copy_totals()["h2d"] == len(units)
    stream.drop()


@pytest.mark.parametrize("order", [[0, 1, 3, 4, 5], [0, 2, 1, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1], [2, 2, 2, 3]])
def test_any_other_order_runs_right(sim: ModuleType, order: list[int]) -> None:
    """Skipped, swapped, backwards, cut short, repeated; then the usual order again."""
    net = build(Chain)
    stream = stream_of(net, 3 * (64 * 64 * 4 + 512))
    traced, usual = Order(), [u.index for u in stream.component.units]
    assert len(usual) == 6
    with torch.no_grad():
        for units in (usual, usual, order, order, usual, usual, order, usual):
            run(stream, traced, units)
        assert run(stream, traced, usual) == run(stream, traced, usual)
    assert not stream.busy
    stream.drop()
    assert {p.device.type for p in net.parameters()} == {"cpu"}


def test_a_ring_of_one_leaf_and_one_that_holds_all(sim: ModuleType) -> None:
    leaf = 64 * 64 * 4 + 512
    for ring in (leaf, 2 * leaf, 6 * leaf, 9 * leaf):
        stream = stream_of(build(Chain), ring)
        order, units = Order(), [u.index for u in stream.component.units]
        with torch.no_grad():
            for _ in range(4):
                run(stream, order, units)
        assert stream.most_beside == 0, "everything fits into the ring, from the first forward on"
        stream.drop()


def test_a_nested_unit_given_back_first_holds_up_the_copies(sim: ModuleType) -> None:
    """While the outer unit is bound, nothing may be copied over it, though units behind it were given back."""
    sim.configure(flops32=1e9)
    net = build(Chain)
    stream = stream_of(net, 3 * (64 * 64 * 4 + 512))
    units = stream.component.units
    order = Order()
    everything = frozenset(u.index for u in units)
    x = tokens().to(DEVICE)
    with torch.no_grad():
        for _ in range(4):
            stream.open(order, True, everything)
            stream.take(units[0])
            for unit in units[1:]:
                stream.take(unit)
                unit.module(x)
                stream.give(unit)
            units[0].module(x)  # read again, after all the others
            stream.give(units[0])
            stream.close()
    assert sim.races() == 0
    stream.drop()


def test_the_first_copy_waits_for_whoever_had_the_bytes_before(sim: ModuleType) -> None:
    """The allocator may hand out bytes that queued kernels still read; the first copies come behind those kernels."""
    sim.configure(flops32=1e8, trace=1)
    stream = stream_of(build(Chain), 3 * (64 * 64 * 4 + 512))
    x = torch.randn(64, 64).to(DEVICE)
    sim.reset_clock()
    x @ x
    order, units = Order(), [u.index for u in stream.component.units]
    with torch.no_grad():
        for index in units[:1]:
            stream.open(order, True, frozenset(units))
            stream.take(stream.component.units[index])
            stream.give(stream.component.units[index])
            stream.close()
    trace = sim.trace()
    kernel = next(t for t in trace if t.flops > 0)
    copy = next(t for t in trace if t.name.startswith("h2d"))
    assert copy.t0 >= kernel.t1
    stream.drop()


def test_capacity_is_rounded_up(sim: ModuleType) -> None:
    ring = Ring(open_backend(DEVICE), 3 * ALIGNMENT - 5)
    assert ring.capacity == 3 * ALIGNMENT == ring.buffer.numel()


def test_a_write_to_a_streamed_weight_comes_down_once(sim: ModuleType) -> None:
    net = build(Chain)
    twin = clone(net)

    def edit(module: Any, *_: Any) -> None:
        with torch.no_grad():
            module.weight.mul_(2)

    with Session(policy("sequential"), device=DEVICE) as session, torch.no_grad():
        session.add("net", net)
        for _ in range(3):
            net(tokens().to(DEVICE))
        handles = [m.layers[2].register_forward_pre_hook(edit) for m in (net, twin)]
        sim.clear_copy_log()
        for seed in range(3):
            assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed)))
        assert session.ledger.total_bytes_d2h == 3 * (64 * 64 * 4 + 0)
        for handle in handles:
            handle.remove()


def test_a_write_between_two_forwards_is_seen_by_the_very_next_one(sim: ModuleType) -> None:
    """Copies have run ahead past the end of a forward by then: they are of the weights before."""
    net = build(Chain)
    twin = clone(net)
    with Session(policy("balanced", high="80KiB"), device=DEVICE) as session, torch.no_grad():
        session.add("net", net)
        for seed in range(5):
            assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed)))
        assert session.components["net"].engine.stream.walk.issued > session.components["net"].engine.stream.walk.base
        for seed in range(3):
            for module in (net, twin):
                for layer in module.layers:
                    if layer.weight.device.type == "cpu":
                        layer.weight.mul_(1.5)
            streamed = [i for i, layer in enumerate(net.layers) if layer.weight.device.type == "cpu"]
            for i, (mine, plain) in enumerate(zip(net.layers, twin.layers, strict=True)):
                plain.weight.copy_(mine.weight.cpu())
                assert i in streamed or mine.weight.device.type == DEVICE
            assert 0 < len(streamed) < len(net.layers)
            assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed))), seed
        assert session.ledger.total_bytes_d2h == 0
