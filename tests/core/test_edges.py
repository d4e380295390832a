"""Invariant: at the edges, too, a run gives the right numbers or a clear error: gradients, edits in place, tiny cards.

Each of these was once wrong: a gradient from reused bytes, an edit that an eviction dropped, a ladder whose last step
asked for as much as its first.
"""

from __future__ import annotations

import time
import warnings
from types import ModuleType

import pytest
import torch
from torch import nn

from balanced_offload.offload import OffloadPolicy, Session

from .toys import DEVICE, MIB, MODES, Chain, Tied, build, clone, copied, device_bytes, policy, tokens

STREAMING = ("balanced", "sequential")


def session_of(net: nn.Module, mode: str, **fields: object) -> Session:
    session = Session(policy(mode, **fields), device=DEVICE)
    session.add("net", net)
    return session


# ---------------------------------------------------------------------- gradients
def gradient(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x).square().sum(), x)[0].cpu()


@pytest.mark.parametrize("plain_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_with_respect_to_an_input(sim: ModuleType, mode: str, plain_first: bool) -> None:
    """Guidance: the component is resident for the call if there is any room for it, also in the middle of a stage."""
    net = build(Chain).requires_grad_(False)
    expected = gradient(clone(net), tokens())
    with session_of(net, mode) as session:
        if plain_first:
            with torch.no_grad():
                net(tokens().to(DEVICE))
        for _ in range(3):
            assert torch.allclose(gradient(net, tokens().to(DEVICE)), expected, rtol=1e-6, atol=0)
            with torch.no_grad():
                net(tokens().to(DEVICE))
        session.stages.leave()
    settled(sim)


def settled(sim: ModuleType) -> None:
    """Nothing is left on the device, once autograd's own thread has let go of its last tensor in its own time."""
    until = time.monotonic() + 5
    while device_bytes(sim) and time.monotonic() < until:
        time.sleep(0.01)
    assert device_bytes(sim) == 0


def test_a_gradient_through_weights_that_must_stream_is_refused(sim: ModuleType) -> None:
    net = build(lambda: Chain(8, 128)).requires_grad_(False)
    sim.set_memory_cap(256 * 1024)
    with session_of(net, "sequential") as session:
        with pytest.raises(RuntimeError, match="weights stream"):
            gradient(net, torch.ones(1, 4, 128, device=DEVICE))
        with torch.no_grad():
            assert torch.equal(
                net(torch.ones(1, 4, 128, device=DEVICE)).cpu(), clone_of(session)(torch.ones(1, 4, 128))
            )


def clone_of(session: Session) -> nn.Module:
    """The same net with the same weights, outside the session."""
    managed = session.components["net"]
    twin = Chain(8, 128)
    twin.load_state_dict({k: v.detach().cpu().clone() for k, v in managed.module.state_dict().items()})
    return twin


# ---------------------------------------------------------------------- edits in place
@pytest.mark.parametrize("how", ["load_state_dict", "copy_"])
@pytest.mark.parametrize("mode", MODES)
def test_an_edit_in_place_survives_eviction_and_detach(sim: ModuleType, mode: str, how: str) -> None:
    net, other = build(Chain, seed=1), build(Chain, seed=2)
    expected = other(tokens())
    session = session_of(net, mode)
    with torch.no_grad():
        net(tokens().to(DEVICE))
        if how == "load_state_dict":
            net.load_state_dict(other.state_dict())
        else:
            for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
        for _ in range(2):
            assert torch.equal(net(tokens().to(DEVICE)).cpu(), expected)
            session.free()
    session.detach()
    assert torch.equal(net(tokens()), expected)


# ---------------------------------------------------------------------- tiny cards
class Table(nn.Module):
    """An embedding that dwarfs the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8192, 256)
        self.body = Chain(8, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.table(x))


@pytest.mark.parametrize("mode", ["sequential", "auto", "balanced", "model"])
@pytest.mark.parametrize("cap", [9, 10, 12, 20])
def test_a_card_that_holds_the_largest_leaf_is_enough(sim: ModuleType, mode: str, cap: int) -> None:
    """8 MiB of table, 2 MiB of body: three tables' worth of ring would never fit."""
    net = build(Table)
    x = torch.arange(16)[None]
    expected = clone(net)(x)
    sim.set_memory_cap(cap * MIB)
    with Session(OffloadPolicy(mode=mode), device=DEVICE) as session, torch.no_grad():
        session.add("net", net, role="text_encoder")
        for _ in range(3):
            assert torch.equal(net(x.to(DEVICE)).cpu(), expected)
    assert sim.max_memory_allocated() <= cap * MIB


def test_a_wish_for_a_large_ring_is_cut_to_what_there_is(sim: ModuleType) -> None:
    net = build(lambda: Chain(8, 128))
    x = torch.ones(1, 4, 128)
    expected = clone(net)(x)
    sim.set_memory_cap(1 * MIB)
    with session_of(net, "sequential", prefetch="100MiB"), torch.no_grad():
        assert torch.equal(net(x.to(DEVICE)).cpu(), expected)


def test_a_squeezed_run_does_not_lock_itself_out_of_fitting(sim: ModuleType) -> None:
    """What is held for a forward is weights, and no activation: with room again, everything stays."""
    net = build(Tied)
    x = torch.tensor([[3, 4]])
    sim.set_memory_cap(8 * MIB)
    with session_of(net, "auto") as session, torch.no_grad():
        sim.set_others(8 * MIB - 48 * 1024)
        for _ in range(3):
            net(x.to(DEVICE))
        assert not session.resolved.fits
        sim.set_others(0)
        for _ in range(3):
            session.stages.leave()
            up = copied(sim, lambda: net(x.to(DEVICE)))
        assert session.resolved.fits and session.resolved.mode.value == "none"
        assert up["h2d_bytes"] == x.numel() * x.element_size(), "only the input goes up"


# ---------------------------------------------------------------------- figures and ends
def test_what_is_held_counts_against_the_high_mark(sim: ModuleType) -> None:
    net = build(Tied)
    with session_of(net, "sequential", high="1KiB") as session, session.run(), torch.no_grad():
        net(torch.tensor([[1, 2]]).to(DEVICE))
        session.stages.leave()
        assert session.stages.high_crossings > 0
        assert session.stages.resident_peak >= net.embed.weight.nbytes


def test_weights_that_come_down_are_in_the_ledger(sim: ModuleType) -> None:
    net = build(Chain).to(DEVICE)
    before = sim.copy_totals()["d2h_bytes"]
    session = session_of(net, "sequential")
    came = sim.copy_totals()["d2h_bytes"] - before
    assert came > 0 and session.ledger.total_bytes_d2h == came
    session.detach()
    assert {p.device.type for p in net.parameters()} == {DEVICE}
    del net, session


def test_a_detach_without_room_leaves_the_weights_in_system_memory(sim: ModuleType) -> None:
    net = build(Chain)
    expected = clone(net)(tokens())
    net.to(DEVICE)
    session = session_of(net, "sequential")
    sim.set_memory_cap(sim.memory_allocated() + 1024)
    with pytest.warns(UserWarning, match="system memory"):
        session.detach()
    assert {p.device.type for p in net.parameters()} == {"cpu"} and not session.components
    assert torch.equal(net(tokens()), expected)


def test_a_component_that_went_is_forgotten(sim: ModuleType) -> None:
    session = Session(OffloadPolicy(), device=DEVICE)
    with torch.no_grad():
        session.add("net", build(Chain))
        session.components["net"].module(torch.ones(64, 64, 64, device=DEVICE))
        session.stages.leave()
        assert session.stages.peaks.largest()[0] > 0
        session.remove("net")
        assert session.stages.peaks.largest() == (0, "estimated")


# ---------------------------------------------------------------------- repeats
class Draws(nn.Module):
    """Uses the generator it is given, then runs out of memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Chain(2)
        self.fail = True

    def forward(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        if self.fail:
            self.fail = False
            raise torch.OutOfMemoryError("once")
        return self.body(x + noise)


def test_a_repeated_call_draws_the_same_numbers(sim: ModuleType) -> None:
    net = build(Draws)
    twin = clone(net)
    twin.fail = False
    with session_of(net, "balanced", high="8KiB") as session, torch.no_grad():
        session.add("other", build(Chain, seed=3))
        session.components["other"].module(tokens().to(DEVICE))
        drawn = net(tokens().to(DEVICE), torch.Generator(DEVICE).manual_seed(5)).cpu()
        assert not net.fail
    assert torch.equal(drawn, twin(tokens(), torch.Generator().manual_seed(5)))


def test_turns_end_when_the_partner_stays_away(sim: ModuleType) -> None:
    """A control net that one run used must not keep its place, and its share, in the next ones."""
    control, unet = build(lambda: Chain(8, 64), seed=1), build(lambda: Chain(8, 64), seed=2)
    with Session(OffloadPolicy(mode="balanced", high="100%"), device=DEVICE) as session, torch.no_grad():
        session.add("control", control, role="controlnet")
        session.add("unet", unet)
        with session.run():
            for _ in range(4):
                unet(control(tokens().to(DEVICE)))
        assert session.stages._known_turns == [frozenset({"control", "unet"})]
        for _ in range(2):
            with session.run():
                for _ in range(4):
                    unet(tokens().to(DEVICE))
        assert session.stages._known_turns == []


def test_no_warning_for_a_list_while_components_are_added(sim: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Session(OffloadPolicy(mode="balanced", never=["second"]), device=DEVICE) as session:
            session.add("first", build(Chain))
            session.add("second", build(Chain, seed=1))
            assert session.resolved.never == {"second"}
