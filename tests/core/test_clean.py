"""Invariant: after any exception nothing is half done: the next run works, and equals the first.

An error is raised inside the forward of every leaf in turn, under every mode, with the copies of the next leaves on
their way; out of memory comes from the card itself, whose cap or whose other users change between two calls.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload import OffloadPolicy, Session

from .toys import (
    DEVICE,
    MIB,
    MODES,
    Chain,
    OwnTensors,
    Tied,
    build,
    clone,
    copied,
    device_bytes,
    hooks,
    policy,
    tokens,
    words,
)

Nets = {"chain": (lambda: Chain(8), tokens), "tied": (Tied, words), "own tensors": (OwnTensors, tokens)}


class Interrupt(BaseException):
    """What a host raises to stop a run: no Exception."""


class Bomb:
    """Raises inside the forward of one module, once; the modules themselves carry nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.target: nn.Module | None = None
        self.error: type[BaseException] = Interrupt
        for kind in (nn.Linear, nn.Embedding):
            monkeypatch.setattr(kind, "forward", self.wrap(kind.forward))

    def wrap(self, forward: Any) -> Any:
        def explode(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = forward(module, x)
            if module is self.target:
                self.target = None
                raise self.error("as the test wants it")
            return out

        return explode


@pytest.fixture
def bomb(monkeypatch: pytest.MonkeyPatch) -> Bomb:
    return Bomb(monkeypatch)


@pytest.mark.parametrize("name", Nets)
@pytest.mark.parametrize("mode", MODES)
def test_an_error_in_any_leaf_leaves_it_clean(sim: ModuleType, bomb: Bomb, name: str, mode: str) -> None:
    make, inputs = Nets[name]
    net = build(make)
    expected = clone(net)(inputs(1))
    leaves = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    x = inputs(1).to(DEVICE)
    start = sim.memory_allocated()
    with torch.no_grad():
        session = Session(policy(mode), device=DEVICE)
        session.add("net", net)
        for _ in range(3):
            net(x)
        session.stages.leave()  # the next stage is planned with the times that this one has told
        for _ in range(2):
            net(x)
        steady = copied(sim, lambda: net(x))
        resident, hooked = dict(session.device_bytes), hooks(net)
        kinds = itertools.cycle([KeyboardInterrupt, Interrupt, RuntimeError])
        for leaf in (*leaves, leaves[0]):
            bomb.target, bomb.error = leaf, next(kinds)
            with pytest.raises(bomb.error):
                net(x)
            assert bomb.target is None
            weights = {t.device.type for t in net.parameters()} if mode == "sequential" else {"cpu"}
            assert weights == {"cpu"}, "a weight is still bound to the ring"
            assert torch.equal(net(x).cpu(), expected)
            assert dict(session.device_bytes) == resident and hooks(net) == hooked
            assert copied(sim, lambda: net(x)) == steady
        assert device_bytes(sim) - start == sum(session.device_bytes.values())
        session.detach()
    assert hooks(net) == [] and device_bytes(sim) == start
    assert session.ledger.total_bytes_d2h == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_run_is_recorded_as_such(sim: ModuleType, bomb: Bomb, mode: str) -> None:
    net = build(lambda: Chain(8))
    expected = clone(net)(tokens())
    with Session(policy(mode), device=DEVICE) as session, torch.no_grad():
        session.add("net", net)
        bomb.target = net.layers[4]
        with pytest.raises(Interrupt), session.run("first"):
            net(tokens().to(DEVICE))
        assert session.record is not None and not session.record.complete
        assert session.record.error_type == "Interrupt" and not session.ledger.active
        with session.run("second"):
            assert torch.equal(net(tokens().to(DEVICE)).cpu(), expected)
        assert session.record.complete and session.record.prompt_id == "second"


# ---------------------------------------------------------------------- out of memory
class Spike(Chain):
    """Allocates `room` bytes in the middle, as attention at a high resolution does."""

    def __init__(self, depth: int = 16) -> None:
        super().__init__(depth, 128)
        self.room = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i == len(self.layers) // 2 and self.room and x.device.type != "cpu":
                torch.empty(self.room, dtype=torch.uint8, device=x.device)
        return x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


WEIGHTS = 16 * (128 * 128 * 4 + 512)


def steps_of(session: Session) -> list[str]:
    assert session.record is not None
    return [event["data"]["step"] for event in session.record.events if event["kind"] == "oom"]


def inputs() -> torch.Tensor:
    return torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("how", ["cap", "others"])
def test_a_card_that_shrinks_between_two_calls(sim: ModuleType, how: str) -> None:
    sim.set_memory_cap(8 * MIB)
    net = build(Spike)
    expected = clone(net)(inputs())
    for mode in ("balanced", "model", "sequential", "auto"):
        with Session(OffloadPolicy(mode=mode), device=DEVICE) as session, torch.no_grad():
            session.add("net", net)
            x = inputs().to(DEVICE)
            assert torch.equal(net(x).cpu(), expected)
            left = 600 << 10
            if how == "cap":
                sim.set_memory_cap(left)
            else:
                sim.set_others(8 * MIB - left)
            for _ in range(3):
                with session.run():
                    assert torch.equal(net(x).cpu(), expected), mode
            assert sim.memory_allocated() <= left
            sim.set_memory_cap(8 * MIB)
            sim.set_others(0)
            for _ in range(2):
                assert torch.equal(net(x).cpu(), expected), mode
            del x
    assert device_bytes(sim) == 0


def test_the_ladder_is_taken_in_order_each_step_once(sim: ModuleType) -> None:
    """Evict the other, shrink, tile, sequential; each of them reported, and none twice in a stage."""
    sim.set_memory_cap(8 * MIB)
    other, vae = build(lambda: Chain(16, 128)), build(Spike, seed=1)
    expected = clone(vae)(inputs())
    tiled: list[str] = []
    with Session(OffloadPolicy(mode="balanced", headroom=0, high="100%"), device=DEVICE) as session, torch.no_grad():
        session.add("other", other)
        session.add("vae", vae, role="vae", entries=("decode",))

        def tile(name: str) -> bool:
            tiled.append(name)
            return True

        session.step_down.tile = tile
        found = {}
        for room in (0, 7 * MIB - 256 * 1024, 7 * MIB + 256 * 1024, 7 * MIB + 720 * 1024):
            session.free()
            tiled.clear()
            session.stages.peaks.learned.clear()
            other(inputs().to(DEVICE))
            vae.room = room
            with session.run():
                assert torch.equal(vae.decode(inputs().to(DEVICE)).cpu(), expected)
            found[room] = steps_of(session)
            assert len(set(found[room])) == len(found[room])
            assert bool(tiled) == ("tile" in found[room])
        ladder = ["evict", "shrink", "tile", "sequential"]
        assert next(iter(found.values())) == []
        assert list(found.values())[1] == ladder[:1]
        assert list(found.values())[-1] == ladder
        for steps in found.values():
            assert steps == ladder[: len(steps)]
        assert session.ledger.total_bytes_d2h == 0


def test_the_error_has_the_figures(sim: ModuleType) -> None:
    sim.set_memory_cap(8 * MIB)
    net = build(Spike)
    expected = clone(net)(inputs())
    net.room = 9 * MIB
    with Session(OffloadPolicy(mode="balanced"), device=DEVICE) as session, torch.no_grad():
        session.add("unet", net)
        with pytest.raises(torch.OutOfMemoryError) as caught, session.run():
            net(inputs().to(DEVICE))
        text = str(caught.value)
        for part in ("unet", "ran out of memory", "free of 8.0 MiB", "shrink", "sequential", "Lower `high`"):
            assert part in text, text
        assert session.record is not None and session.record.oom and not session.record.complete
        assert steps_of(session) == ["shrink", "sequential"]
        del caught
        net.room = 0
        assert torch.equal(net(inputs().to(DEVICE)).cpu(), expected)
        with session.run():
            assert torch.equal(net(inputs().to(DEVICE)).cpu(), expected)
        assert steps_of(session) == []


def test_stop_means_stop(sim: ModuleType) -> None:
    sim.set_memory_cap(8 * MIB)
    net = build(Spike)
    expected = clone(net)(inputs())
    net.room = 7 * MIB + 512 * 1024
    with Session(OffloadPolicy(mode="balanced", headroom=0, on_oom="stop"), device=DEVICE) as session, torch.no_grad():
        session.add("unet", net)
        with pytest.raises(torch.OutOfMemoryError, match="steps taken: nothing"), session.run():
            net(inputs().to(DEVICE))
        assert steps_of(session) == []
        session.policy = OffloadPolicy(mode="balanced", headroom=0)
        with session.run():
            assert torch.equal(net(inputs().to(DEVICE)).cpu(), expected)
        assert steps_of(session) == ["shrink", "sequential"]


def test_what_was_learned_from_running_out_is_kept(sim: ModuleType) -> None:
    """The second run of the shape makes room beforehand: no step down, and no more moved than streams."""
    sim.set_memory_cap(8 * MIB)
    net = build(Spike)
    net.room = 7 * MIB + 256 * 1024
    with Session(OffloadPolicy(mode="balanced", headroom=0, high="100%"), device=DEVICE) as session, torch.no_grad():
        session.add("unet", net)
        with session.run():
            net(inputs().to(DEVICE))
        assert steps_of(session) == ["shrink"]
        for _ in range(3):
            with session.run():
                net(inputs().to(DEVICE))
            assert steps_of(session) == []


def test_mode_none_that_does_not_fit_leaves_everything_as_it_was(sim: ModuleType) -> None:
    sim.set_memory_cap(WEIGHTS + WEIGHTS // 2)
    first, second = build(Spike), build(Spike, seed=1)
    expected = clone(first)(inputs())
    forwards = [m.__dict__.get("forward") for m in (first, second)]
    with Session(OffloadPolicy(mode="none"), device=DEVICE) as session:
        session.add("first", first)
        with pytest.raises(torch.OutOfMemoryError, match="Mode none keeps everything resident"):
            session.add("second", second)
        assert list(session.components) == ["first"]
        assert hooks(second) == [] and {p.device.type for p in second.parameters()} == {"cpu"}
        with torch.no_grad():
            assert torch.equal(first(inputs().to(DEVICE)).cpu(), expected)
    assert [m.__dict__.get("forward") for m in (first, second)] == forwards
    assert device_bytes(sim) == 0


def test_a_policy_that_cannot_be_had_is_put_back(sim: ModuleType) -> None:
    sim.set_memory_cap(WEIGHTS + WEIGHTS // 2)
    first, second = build(Spike), build(Spike, seed=1)
    twins = clone(first), clone(second)
    before = OffloadPolicy(mode="balanced")
    with Session(before, device=DEVICE) as session, torch.no_grad():
        session.add("first", first)
        session.add("second", second)
        with pytest.raises(torch.OutOfMemoryError):
            session.policy = OffloadPolicy(mode="none")
        assert session.policy is before
        for net, twin in zip((first, second), twins, strict=True):
            assert torch.equal(net(inputs().to(DEVICE)).cpu(), twin(inputs()))
    assert device_bytes(sim) == 0


@pytest.mark.parametrize("mode", MODES)
def test_fifty_cycles_give_everything_back(sim: ModuleType, mode: str) -> None:
    net, vae = build(lambda: Chain(8, 128)), build(Spike, seed=1)
    start = sim.memory_allocated()
    session = Session(policy(mode), device=DEVICE)
    session.add("unet", net)
    session.add("vae", vae, role="vae", entries=("decode",))
    whole = sum(session.device_bytes.values())
    x = inputs().to(DEVICE)
    mine = sim.memory_allocated() - start - whole
    with torch.no_grad():
        for cycle in range(50):
            vae.decode(net(x))
            if mode != "none":
                session.free()
            session.backend.synchronize()
            assert sim.memory_allocated() - start == mine + (whole if mode == "none" else 0), f"cycle {cycle}"
    session.detach()
    assert session.ledger.total_bytes_d2h == 0
    del x
