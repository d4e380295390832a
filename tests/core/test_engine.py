"""Invariant: an engine decides where weights are and never what comes out; hooks are where weights are not.

Everything is compared with an untouched copy on the plain CPU, to the bit; bytes with the device's own copy log.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from balanced_offload.offload import Session
from balanced_offload.offload.units import Component, aligned

from .toys import (
    DEVICE,
    MODES,
    NETS,
    Attention,
    Chain,
    Containers,
    Counter,
    LateWeight,
    Low,
    Noisy,
    Replaces,
    Skips,
    Statistics,
    Tied,
    TurnsToWeight,
    build,
    clone,
    copied,
    device_bytes,
    hooks,
    must_work,
    policy,
    results,
    same_values,
    state_of,
    storages,
    tokens,
    values_of,
    weight_bytes,
    weights_up,
)

OFFLOADING = ("balanced", "model", "sequential")


def session_for(net: nn.Module, mode: str, **fields: Any) -> Session:
    session = Session(policy(mode, **fields), device=DEVICE)
    session.add("net", net)
    return session


# ---------------------------------------------------------------------- equality
@pytest.mark.parametrize("name", NETS)
def test_ten_runs_equal_the_plain_cpu(sim: ModuleType, name: str) -> None:
    make, inputs = NETS[name]
    expected = results(build(make), inputs, 10, "cpu")
    assert not torch.equal(expected[0], expected[1]), "the result does not depend on the input, and proves nothing"
    for mode in MODES:
        net = build(make)
        before, values = state_of(net), values_of(net)
        session = session_for(net, mode)
        with torch.no_grad():
            for run, (drawn, plain) in enumerate(zip(results(net, inputs, 10, DEVICE), expected, strict=True)):
                assert torch.equal(drawn, plain), f"{mode}, run {run}"
        if mode in ("balanced", "sequential"):
            assert session.device_bytes["net"] < session.components["net"].component.device_bytes
        session.detach()
        assert state_of(net) == before, mode
        if name != "counter":
            assert same_values(values, net), mode
    assert device_bytes(sim) == 0


@pytest.mark.parametrize("grad", ["inference", "no_grad", "enabled", "parameters"])
def test_every_grad_mode(sim: ModuleType, grad: str) -> None:
    """`parameters`: with parameters that want gradients, though nobody asks for them."""
    contexts: dict[str, Callable[[], Any]] = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    context = contexts.get(grad, torch.enable_grad)
    names = ("chain", "attention", "encoder layer", "tied", "own tensors")
    for mode, name in itertools.product(MODES, names):
        make, inputs = NETS[name]
        net = build(make).requires_grad_(grad == "parameters")
        with context():
            expected = [y.detach() for y in results(clone(net), inputs, 3, "cpu")]
        before = state_of(net)
        session = session_for(net, mode)
        with context():
            drawn = [y.detach() for y in results(net, inputs, 3, DEVICE)]
        for run in range(3):
            assert torch.equal(drawn[run], expected[run]), f"{name}, run {run}"
        session.detach()
        assert state_of(net) == before


@pytest.mark.parametrize("mode", MODES)
def test_grad_modes_may_change_from_call_to_call(sim: ModuleType, mode: str) -> None:
    """A run under inference mode leaves no inference tensors: guidance may want a gradient of the input later."""
    net = build(Chain)
    twin = clone(net)
    x = tokens()
    session = session_for(net, mode)
    with torch.inference_mode():
        net(x.to(DEVICE))
        net(x.to(DEVICE))
    assert not [name for name, p in net.named_parameters() if p.is_inference()]
    mine = x.to(DEVICE).requires_grad_()
    theirs = x.clone().requires_grad_()
    out = net(mine)
    assert torch.equal(out.detach().cpu(), twin(theirs).detach())
    with torch.inference_mode():
        again = net(x.to(DEVICE)).cpu()
    assert torch.equal(again, twin(x).detach())
    del out, mine
    session.detach()
    theirs = x.clone().requires_grad_()
    net(theirs).sum().backward()
    assert theirs.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_counters_that_the_model_writes_survive(sim: ModuleType, mode: str) -> None:
    net = build(Counter)
    twin = clone(net)
    session = session_for(net, mode)
    for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with grad():
            for seed in range(3):
                assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed)))
    session.free()
    session.policy = policy("sequential")
    with torch.no_grad():
        assert torch.equal(net(tokens(9).to(DEVICE)).cpu(), twin(tokens(9)))
    session.detach()
    assert net.calls.item() == twin.calls.item() == 10
    assert torch.equal(net.tally.sum, twin.tally.sum)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_that_a_kernel_writes_survive(sim: ModuleType, mode: str) -> None:
    net = build(Statistics)
    twin = clone(net)
    session = session_for(net, mode)
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed))), f"run {seed}"
    session.detach()
    assert torch.equal(net.norm.running_mean, twin.norm.running_mean)
    assert net.norm.num_batches_tracked.item() == 4


@pytest.mark.parametrize("mode", MODES)
def test_buffers_that_the_model_replaces_survive(sim: ModuleType, mode: str) -> None:
    net = build(Replaces)
    twin = clone(net)
    session = session_for(net, mode)
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed))), f"run {seed}"
    session.detach()
    assert net.calls.item() == twin.calls.item() == 4


@pytest.mark.parametrize("make", [LateWeight, TurnsToWeight])
@pytest.mark.parametrize("mode", MODES)
def test_a_weight_used_past_its_module_late(sim: ModuleType, mode: str, make: Callable[[], nn.Module]) -> None:
    net = build(make)
    expected = results(clone(net), tokens, 8, "cpu")
    with session_for(net, mode), torch.no_grad():
        for seed in range(8):
            with must_work():
                drawn = net(tokens(seed).to(DEVICE)).cpu()
            assert torch.equal(drawn, expected[seed]), f"run {seed}"


@pytest.mark.parametrize("mode", MODES)
def test_parts_called_outside_forward(sim: ModuleType, mode: str) -> None:
    """A host may call a layer, a stack of layers, or use a weight's neighbour, with no entry point involved."""
    net = build(Tied)
    twin = clone(net)
    session = session_for(net, mode)
    x = torch.tensor([[3, 4]])
    with torch.no_grad():
        for turn in range(3):
            assert torch.equal(net.embed(x.to(DEVICE)).cpu(), twin.embed(x)), turn
            assert torch.equal(net.body(tokens().to(DEVICE)).cpu(), twin.body(tokens())), turn
            assert torch.equal(net.head(tokens().to(DEVICE)).cpu(), twin.head(tokens())), turn
            assert torch.equal(net(x.to(DEVICE)).cpu(), twin(x)), turn
    session.detach()
    assert device_bytes(sim) == 0


@pytest.mark.parametrize("mode", OFFLOADING)
def test_a_part_that_raised_outside_forward_leaves_it_clean(sim: ModuleType, mode: str) -> None:
    net = build(Chain)
    twin = clone(net)
    session = session_for(net, mode)
    with torch.no_grad():
        net(tokens().to(DEVICE))
        net(tokens().to(DEVICE))
        normal = copied(sim, lambda: net(tokens(2).to(DEVICE)))
        with pytest.raises(RuntimeError):
            net.layers[2](torch.ones(3, device=DEVICE))
        for seed in range(3):
            assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed)))
        assert copied(sim, lambda: net(tokens(2).to(DEVICE))) == normal
        assert not session.components["net"].engine.stream.busy
    session.detach()
    assert device_bytes(sim) == 0


@pytest.mark.parametrize("mode", MODES)
def test_containers_are_handed_on_untouched(sim: ModuleType, mode: str) -> None:
    net = build(Containers)
    session = session_for(net, mode)
    states, extra, x = [tokens().to(DEVICE)], {"k": (1, [2])}, tokens().to(DEVICE)
    with torch.no_grad():
        for _ in range(3):
            out = net(x, states, extra=extra)
            assert net.seen[0] is x and net.seen[1] is states and net.seen[2] is extra
            assert out["states"] is states and out["extra"] is extra
    net.seen = []
    assert extra == {"k": (1, [2])} and len(states) == 1
    session.detach()


@pytest.mark.parametrize("mode", MODES)
def test_random_numbers_are_the_plain_ones(sim: ModuleType, mode: str) -> None:
    net = build(Noisy)
    drawn = []
    for subject in (clone(net).to(DEVICE), net):
        with session_for(net, mode) if subject is net else contextlib.nullcontext(), torch.no_grad():
            torch.manual_seed(3)
            drawn.append([subject(tokens().to(DEVICE)).cpu() for _ in range(4)])
    for plain, ours in zip(*drawn, strict=True):
        assert torch.equal(plain, ours)
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_random_numbers_are_the_same_after_running_out_of_memory(sim: ModuleType) -> None:
    net = build(Noisy)
    expected = []
    with torch.no_grad():
        plain = clone(net).to(DEVICE)
        torch.manual_seed(3)
        expected = [plain(tokens().to(DEVICE)).cpu() for _ in range(4)]
    del plain
    net.layers[4].fail = True

    def once(module: nn.Module, args: Any) -> None:
        if net.layers[4].__dict__.pop("fail", False):
            raise torch.OutOfMemoryError("as the test wants it")

    handle = net.layers[4].register_forward_pre_hook(once)
    with session_for(net, "balanced", high="1GiB") as session, torch.no_grad():
        torch.manual_seed(3)
        with session.run():
            drawn = [net(tokens().to(DEVICE)).cpu() for _ in range(4)]
        assert session.record is not None
        assert [event["kind"] for event in session.record.events] == ["oom"]
    handle.remove()
    for plain, ours in zip(expected, drawn, strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("mode", MODES)
def test_pageable_masters_draw_the_same(sim: ModuleType, mode: str) -> None:
    net = build(Low)
    expected = results(clone(net), tokens, 4, "cpu")
    with session_for(net, mode, pinned_ram=0) as session, torch.no_grad():
        assert session.components["net"].weights.pinned == 0
        for drawn, plain in zip(results(net, tokens, 4, DEVICE), expected, strict=True):
            assert torch.equal(drawn, plain)


# ---------------------------------------------------------------------- hooks
@pytest.mark.parametrize("mode", ["none", "auto"])
def test_a_run_that_fits_has_no_hook_anywhere(sim: ModuleType, mode: str) -> None:
    for make, inputs in NETS.values():
        net = build(make)
        before = {path: sorted(child.__dict__) for path, child in net.named_modules()}
        session = session_for(net, mode)
        with torch.no_grad():
            net(inputs(0).to(DEVICE))
        assert hooks(net) == []
        if mode == "none":
            assert {path: sorted(child.__dict__) for path, child in net.named_modules()} == before
            with session.run():
                net(inputs(0).to(DEVICE))
            assert hooks(net) == []
            assert {path: sorted(child.__dict__) for path, child in net.named_modules()} == before
        session.detach()


@pytest.mark.parametrize("name", NETS)
def test_resident_leaves_have_no_hook(sim: ModuleType, name: str) -> None:
    """Looked at from inside the forward too: where the weights lie is read off the tensors."""
    make, inputs = NETS[name]
    net = build(make)
    session = session_for(net, "balanced", high="80KiB")
    with torch.no_grad():
        for seed in range(3):
            net(inputs(seed).to(DEVICE))
    resident = {
        path
        for path, child in net.named_modules()
        if not [*child.children()] and [*child._parameters.values(), *child._buffers.values()]
        if all(
            t.device.type == DEVICE for t in (*child._parameters.values(), *child._buffers.values()) if t is not None
        )
    }
    if name not in ("tied views", "attention", "encoder layer"):  # one storage, or one layer, over the mark
        assert resident, "nothing is resident, so nothing is shown"
    assert not resident & set(hooks(net))
    session.detach()
    assert hooks(net) == []


# ---------------------------------------------------------------------- bytes
def once_per_forward(sim: ModuleType, net: nn.Module, session: Session, x: torch.Tensor) -> list[int]:
    """How often each weight storage went up in one forward, smallest and largest, and what the log adds up to."""
    before = session.ledger.total_bytes_h2d
    x = x.to(DEVICE)
    sim.synchronize()
    sim.clear_copy_log()
    net(x)
    sim.synchronize()
    log = [entry for entry in sim.copy_log() if entry.direction == "h2d"]
    ups = list(weights_up(sim, session))
    assert len(ups) == len(log), "something besides weights went up"
    assert sum(e.nbytes for e in ups) == session.ledger.total_bytes_h2d - before, "the ledger differs from the log"
    assert sim.copy_totals()["d2h"] == 0
    # a copy may bring several storages, that lie one behind the other
    return sorted(
        sum(e.host_ptr <= m.data_ptr() and m.data_ptr() + m.numel() <= e.host_ptr + e.nbytes for e in ups)
        for m in session.components["net"].weights.masters
    )


def padding(component: Component) -> int:
    """Bytes between the storages of a unit, each of which starts on an aligned address; they are copied along."""
    return sum(aligned(s.nbytes) - s.nbytes for u in component.units for s in u.storages[:-1])


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("counter", "skips", "late call", "twice", "nested")])
def test_sequential_moves_each_storage_once_per_forward(sim: ModuleType, name: str) -> None:
    make, inputs = NETS[name]
    net = build(make)
    total = weight_bytes(net)
    with session_for(net, "sequential") as session, torch.no_grad():
        for run in range(5):
            before = session.ledger.total_bytes_h2d
            counts = once_per_forward(sim, net, session, inputs(run))
            assert counts == [1] * len(counts), f"forward {run}"
            moved = session.ledger.total_bytes_h2d - before
            assert total <= moved <= total + padding(session.components["net"].component)
        assert session.ledger.total_bytes_d2h == 0


@pytest.mark.parametrize("name", ["twice", "nested"])
def test_sequential_moves_a_layer_that_runs_twice_once(sim: ModuleType, name: str) -> None:
    """From the second forward on: that it runs twice is found out by running it."""
    make, inputs = NETS[name]
    net = build(make)
    with session_for(net, "sequential") as session, torch.no_grad():
        net(inputs(0).to(DEVICE))
        for run in range(3):
            counts = once_per_forward(sim, net, session, inputs(run))
            assert counts == [1] * len(counts), f"forward {run}"


def test_a_layer_left_out_or_put_in_costs_a_ring_at_most(sim: ModuleType) -> None:
    net = build(Skips)
    with session_for(net, "sequential") as session, torch.no_grad():
        for run in range(8):
            counts = once_per_forward(sim, net, session, tokens(run))
            assert counts[-1] <= 2 and sum(counts) >= len(counts) - 2, f"forward {run}: {counts}"
            assert sum(counts) <= len(counts) + 2 * 3, f"forward {run}: more than a ring was copied in vain: {counts}"


@pytest.mark.parametrize("name", [n for n in NETS if n != "counter"])
def test_model_moves_each_component_once_per_use(sim: ModuleType, name: str) -> None:
    make, inputs = NETS[name]
    first, second = build(make), build(Chain, seed=1)
    sizes = (weight_bytes(first), weight_bytes(second))
    with Session(policy("model"), device=DEVICE) as session, torch.no_grad():
        session.add("first", first)
        session.add("second", second)
        for _ in range(3):
            for net, x, size in ((first, inputs(0), sizes[0]), (second, tokens(0), sizes[1])):
                x = x.to(DEVICE)

                def use(net: nn.Module = net, x: torch.Tensor = x) -> None:
                    net(x)
                    net(x)

                before = session.ledger.total_bytes_h2d
                moved = copied(sim, use)
                assert moved["h2d_bytes"] == session.ledger.total_bytes_h2d - before
                over = padding(session.components["first" if net is first else "second"].component)
                assert size <= moved["h2d_bytes"] <= size + over
                assert moved["d2h"] == 0
                resident = [n for n, nbytes in session.device_bytes.items() if nbytes]
                assert resident == ["first" if net is first else "second"]


@pytest.mark.parametrize("mode", OFFLOADING)
def test_a_written_buffer_is_all_that_comes_down(sim: ModuleType, mode: str) -> None:
    net = build(Counter)
    with session_for(net, mode) as session, torch.no_grad():
        for _ in range(3):
            x = tokens().to(DEVICE)

            def use(x: torch.Tensor = x) -> None:
                net(x)
                session.free()

            assert copied(sim, use)["d2h_bytes"] == 4 + 64 * 4


def test_mode_none_runs_after_its_memory_was_asked_for(sim: ModuleType) -> None:
    net = build(NETS["functional"][0])
    expected = clone(net)(tokens())
    with session_for(net, "none") as session, torch.no_grad():
        net(tokens().to(DEVICE))
        session.free()
        with must_work():
            drawn = net(tokens().to(DEVICE)).cpu()
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("mode", MODES)
def test_masters_never_move_and_never_change(sim: ModuleType, mode: str) -> None:
    net = build(Attention)
    session = session_for(net, mode)
    with torch.no_grad():
        for seed in range(2):  # what moves a second time is page-locked then, once and for all
            net(tokens(seed).to(DEVICE))
            if mode != "none":
                session.free()
        masters = [(m.data_ptr(), m.clone()) for m in session.components["net"].weights.masters]
        for seed in range(5):
            net(tokens(seed).to(DEVICE))
            if mode != "none":
                session.free()
    for master, (pointer, content) in zip(session.components["net"].weights.masters, masters, strict=True):
        assert master.data_ptr() == pointer and torch.equal(master, content)
    session.detach()


# ---------------------------------------------------------------------- time
def wide() -> nn.Module:
    return Chain(depth=16, width=256)


def virtual(sim: ModuleType, net: nn.Module, x: torch.Tensor) -> float:
    """Seconds of one forward on the virtual clock, once its order is known."""
    for _ in range(3):
        net(x)
    sim.synchronize()
    begun = sim.clock()
    net(x)
    sim.synchronize()
    return float(sim.clock() - begun)


@pytest.mark.parametrize("mode", ["sequential", "balanced"])
def test_copies_run_behind_compute(sim: ModuleType, mode: str) -> None:
    """One leaf ahead at least: most copies begin before the layer in front of theirs has ended."""
    sim.configure(flops32=4e11, launch=1e-7, copy_lat=1e-6)
    net, x = build(wide), torch.randn(64, 256).to(DEVICE)
    with session_for(net, "none"), torch.no_grad():
        compute = virtual(sim, net, x)
    with session_for(net, mode, high="1536KiB") as session, torch.no_grad():
        for _ in range(3):
            net(x)
        sim.synchronize()
        sim.configure(trace=1)
        sim.reset_clock()
        sim.clear_copy_log()
        net(x)
        sim.synchronize()
        step = sim.clock()
        kernels = [(t.t0, t.t1) for t in sim.trace() if t.flops > 0]
        copies = list(weights_up(sim, session))
        matrices = [c for c in copies if c.nbytes >= 256 * 256 * 4]
        sim.configure(trace=0)
    alone = sum(c.t1 - c.t0 for c in copies)
    hidden = [c for c in matrices if any(a < c.t1 and c.t0 < b for a, b in kernels)]
    assert len(matrices) >= 5
    assert len(hidden) >= len(matrices) - 2, "copies do not run behind kernels"
    assert all(c.pinned for c in copies)
    assert step < compute + alone - 0.5 * min(compute, alone), f"{step} s, computing {compute} s, copying {alone} s"


def test_without_lookahead_it_takes_longer(sim: ModuleType) -> None:
    """The same bytes through a ring of one leaf, which leaves no room to copy ahead."""
    sim.configure(flops32=4e11, launch=1e-7, copy_lat=1e-6)
    net, x = build(wide), torch.randn(64, 256).to(DEVICE)
    taken = {}
    for prefetch in ("auto", 1):
        with session_for(net, "sequential", prefetch=prefetch), torch.no_grad():
            taken[prefetch] = virtual(sim, net, x)
    assert taken["auto"] < 0.8 * taken[1]


def test_a_ring_allocates_nothing_inside_a_step(sim: ModuleType) -> None:
    net, x = build(wide), torch.randn(64, 256).to(DEVICE)
    with session_for(net, "sequential") as session, torch.no_grad():
        for _ in range(3):
            net(x)
        ring = session.components["net"].engine.stream.ring
        sim.clear_copy_log()
        for _ in range(3):
            net(x)
        sim.synchronize()
        serial = sim.storage_serial(ring.buffer)
        assert session.components["net"].engine.stream.ring is ring
        assert {entry.storage for entry in weights_up(sim, session)} == {serial}


# ---------------------------------------------------------------------- races
def test_a_leaf_inside_a_leaf_is_not_overwritten(sim: ModuleType) -> None:
    """Given back in another order than taken, while the compute stream is far behind."""
    sim.configure(flops32=1e10)
    net = build(NETS["nested"][0])
    expected = results(clone(net), tokens, 6, "cpu")
    for prefetch in ("auto", 20 << 10, 1 << 20):
        with session_for(net, "sequential", prefetch=prefetch), torch.no_grad():
            for drawn, plain in zip(results(net, tokens, 6, DEVICE), expected, strict=True):
                assert torch.equal(drawn, plain)
    assert sim.races() == 0


@pytest.mark.parametrize("speed", [1e9, 1e11, 1e14])
@pytest.mark.parametrize("copy", [1e8, 1e10, 1e12])
def test_no_speed_of_card_or_link_races(sim: ModuleType, speed: float, copy: float) -> None:
    sim.configure(flops32=speed, h2d_pinned=copy)
    for name in ("chain", "skips", "late call", "tied", "functional", "own tensors"):
        make, inputs = NETS[name]
        net = build(make)
        expected = results(clone(net), inputs, 5, "cpu")
        for mode in ("balanced", "sequential"):
            with session_for(clone(net), mode) as session, torch.no_grad():
                subject = session.components["net"].module
                drawn = [subject(inputs(seed).to(DEVICE)) for seed in range(5)]  # no read-back in between
                for mine, plain in zip(drawn, expected, strict=True):
                    assert torch.equal(mine.cpu(), plain)
                del subject, drawn
    assert sim.races() == 0


# ---------------------------------------------------------------------- conversions
@pytest.mark.parametrize("mode", MODES)
def test_some_layers_converted_behind_our_back(sim: ModuleType, mode: str) -> None:
    """What was not converted keeps its size: neither a slab nor a unit's buffer is taken for one storage."""
    net, twin = build(Chain), build(Chain)
    session = session_for(net, mode)
    with torch.no_grad():
        net(tokens().to(DEVICE))
        for part in (net, twin):
            part.layers[2].weight.data = part.layers[2].weight.data.double().float() * 2
            part.layers[4].to(torch.float64).to(torch.float32)
        with session.run():
            for seed in range(3):
                assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed)))
        component = session.components["net"].component
        assert sorted(s.nbytes for s in component.storages) == sorted(storages(twin).values())
        assert session.device_bytes["net"] <= component.device_bytes
    session.detach()
    assert sorted(storages(net).values()) == sorted(storages(twin).values())
    assert same_values(values_of(twin), net)
    assert device_bytes(sim) == 0


def test_a_conversion_stays_managed(sim: ModuleType) -> None:
    for mode in MODES:
        net = build(Low)
        twin = clone(net).to(torch.float32)
        session = session_for(net, mode)
        with torch.no_grad():
            net(tokens().to(DEVICE))
            net.to(torch.float32)
            assert {p.dtype for p in net.parameters()} == {torch.float32}
            if mode != "none":  # there the weights are the user's to convert, until a run is recorded
                assert session.components["net"].component.weight_bytes == weight_bytes(twin)
            for seed in range(3):
                assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed))), mode
            assert session.device_bytes["net"] <= session.components["net"].component.device_bytes
        session.detach()
        assert weight_bytes(net) == weight_bytes(twin)
        assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"cpu"}
    assert device_bytes(sim) == 0


@pytest.mark.parametrize("change", ["dtype", "device", "refresh"])
@pytest.mark.parametrize("mode", OFFLOADING)
def test_a_conversion_that_changes_nothing_costs_nothing(sim: ModuleType, mode: str, change: str) -> None:
    """`.to` with what it is already: the same storages, of the same sizes, and no more of them resident."""
    net = build(Chain)
    twin = clone(net)
    session = session_for(net, mode)
    component = session.components["net"].component
    sizes = [s.nbytes for s in component.storages]
    with torch.no_grad():
        normal = [copied(sim, lambda: net(tokens().to(DEVICE)))["h2d_bytes"] for _ in range(3)][-1]
        if change == "refresh":
            session.refresh("net")
        else:
            net.to(torch.float32 if change == "dtype" else "cpu")
        component = session.components["net"].component
        assert [s.nbytes for s in component.storages] == sizes
        assert component.weight_bytes == weight_bytes(twin)
        for seed in range(3):
            assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed)))
        assert copied(sim, lambda: net(tokens().to(DEVICE)))["h2d_bytes"] == normal
    session.detach()
    assert weight_bytes(net) == weight_bytes(twin)
    assert sorted(storages(net).values()) == sorted(storages(twin).values())


# ---------------------------------------------------------------------- giving back
@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("name", [name for name in NETS if name != "counter"])
def test_detach_gives_everything_back(sim: ModuleType, name: str, where: str) -> None:
    make, inputs = NETS[name]
    net = build(make).to(where)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    there = device_bytes(sim)
    before, values = state_of(net), values_of(net)
    for mode in MODES:
        with torch.inference_mode(mode in ("balanced", "none")):  # hosts attach in either
            session = session_for(net, mode)
            with torch.no_grad():
                net(inputs(0).to(DEVICE))
                net(inputs(1).to(DEVICE))
            session.detach()
        assert state_of(net) == before, mode
        assert same_values(values, net), mode
        for tensor in (*net.parameters(), *net.buffers()):
            assert not tensor.is_pinned(), mode
    assert device_bytes(sim) == there


def test_a_forward_of_its_own_is_given_back(sim: ModuleType) -> None:
    """An instance's own `forward`, and hooks of somebody else, are there before, during and after."""
    net = build(Chain)
    own = net.forward
    called: list[str] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        called.append("own")
        return F.relu(own(x))

    net.forward = forward  # type: ignore[method-assign]
    net.layers[0].register_forward_hook(lambda *_: called.append("hook"))
    before = state_of(net)
    for mode in MODES:
        called.clear()
        session = session_for(net, mode)
        with torch.no_grad():
            drawn = net(tokens().to(DEVICE)).cpu()
        assert called == ["own", "hook"]
        assert drawn.min() >= 0
        session.detach()
        assert state_of(net) == before and net.forward is forward
