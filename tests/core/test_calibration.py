"""Invariant: the costs of a forward add up to what the device computed in it, and looking costs no wait and no hook.

The simulated accelerator's trace says what ran when, to the nanosecond; layers are large enough here (and ghosts) that
the device, not the host, sets the pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from balanced_offload.offload import OffloadPolicy, Session
from balanced_offload.offload.backend import Backend, CpuBackend, open_backend
from balanced_offload.offload.calibration import Calibration, Costs
from balanced_offload.offload.units import build_component

from .toys import DEVICE, NETS, Chain, build, clone, hooks, state_of, tokens

MIB = 1 << 20
WIDTH, LENGTH = 2048, 2048  # 8 MiB of bf16 and 17 GFLOP: some 0.3 ms a layer


class Block(nn.Module):
    """Three layers with attention, which has no weights, between the first and the second."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.qkv(x)
        x = x + self.out(F.scaled_dot_product_attention(q, q, q))
        return x + self.down(F.gelu(self.up(x)))


class Tower(nn.Module):
    """Blocks with work of their own in front of and behind them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(x) * 2
        for block in self.blocks:
            x = block(x)
        return F.softmax(x, dim=-1)


def tower(depth: int = 3) -> nn.Module:
    """A tower of bf16 whose weights nobody has written: ghosts need no values, and the host no memory."""
    with torch.device("meta"):
        net = Tower(depth).to(torch.bfloat16)
    return net.to_empty(device="cpu").eval().requires_grad_(False)


@pytest.fixture
def ghosts(sim: ModuleType) -> ModuleType:
    sim.configure(ghost=MIB, trace=1, launch=1e-9)
    return sim


@pytest.fixture
def backend(sim: ModuleType) -> Backend:
    return open_backend(DEVICE)


def x_of(length: int = LENGTH) -> torch.Tensor:
    return torch.empty(1, length, WIDTH, dtype=torch.bfloat16, device=DEVICE)


def busy(sim: ModuleType) -> float:
    """Seconds of kernels since the clock was reset, by the trace."""
    return sum(e.t1 - e.t0 for e in sim.trace() if not e.name.startswith(("h2d", "d2h")))


def products(sim: ModuleType) -> list[float]:
    """Seconds of each matrix product since the clock was reset, by the trace."""
    return [e.t1 - e.t0 for e in sim.trace() if e.name == "aten::mm"]


def calibrated(net: nn.Module, backend: Backend, call: Callable[[], Any]) -> tuple[Calibration, Costs]:
    """The costs of one call; the device is waited for here, and nowhere else."""
    calibration = Calibration(build_component("net", net), backend)
    with calibration:
        call()
    backend.synchronize()
    costs = calibration.read()
    assert costs is not None
    return calibration, costs


# ---------------------------------------------------------------------- figures
def test_resident_costs_are_what_the_device_computed(ghosts: ModuleType, backend: Backend) -> None:
    net = tower().to(DEVICE)
    x = x_of()
    ghosts.reset_clock()
    _, costs = calibrated(net, backend, lambda: net(x))
    assert [index for index, _ in costs.walk] == list(range(12))
    assert sum(seconds for _, seconds in costs.walk) == pytest.approx(costs.total_s)
    assert costs.total_s == pytest.approx(busy(ghosts), rel=0.01)
    assert [costs.own[i] for i in range(12)] == pytest.approx(products(ghosts), rel=0.01)
    assert costs.waits_s == 0 and costs.repeats == ()


def test_weightless_work_counts_to_the_unit_in_front_of_it(ghosts: ModuleType, backend: Backend) -> None:
    net = tower(depth=1).to(DEVICE)
    x = x_of()
    ghosts.reset_clock()
    _, costs = calibrated(net, backend, lambda: net(x))
    trace = [e for e in ghosts.trace() if not e.name.startswith(("h2d", "d2h"))]
    starts = [e.t0 for e in trace if e.name == "aten::mm"]
    prelude = sum(e.t1 - e.t0 for e in trace if e.t1 <= starts[0])
    ends = [*starts[1:], max(e.t1 for e in trace)]
    wanted = [end - start for start, end in zip(starts, ends, strict=True)]
    wanted[-1] += prelude
    assert prelude > 0 and costs.before_s == pytest.approx(prelude, rel=0.05)
    assert [seconds for _, seconds in costs.walk] == pytest.approx(wanted, rel=0.01)
    assert dict(costs.walk)[0] > costs.own[0] * 1.2, "attention is in the walk, and not the layer's own"


@pytest.mark.parametrize("link", [24e9, 6e9])
@pytest.mark.parametrize("ram", ["auto", 0])
def test_streamed_costs_are_those_of_the_resident_model(
    link: float, ram: str | int, ghosts: ModuleType, backend: Backend
) -> None:
    net = tower(depth=4)
    x = x_of()
    ghosts.configure(h2d_pinned=link, h2d_pageable=link / 3)
    policy = OffloadPolicy(mode="balanced", high="48MiB", low=0, prefetch="40MiB", pinned_ram=ram, headroom="1MiB")
    with Session(policy, device=DEVICE) as session:
        session.add("net", net, role="denoiser")
        for _ in range(4):  # traced, timed, planned again with times, and steady
            net(x)
        calibration = Calibration(session.components["net"].component, backend)
        backend.synchronize()
        ghosts.reset_clock()
        copied = ghosts.copy_totals()["h2d_bytes"]
        with calibration:
            net(x)
        backend.synchronize()
        streamed, computed = calibration.read(), busy(ghosts)
        assert ghosts.copy_totals()["h2d_bytes"] - copied > 50 * MIB, "nothing streamed"
        wall = ghosts.clock()
    assert streamed is not None
    assert streamed.total_s == pytest.approx(computed, rel=0.01)
    if link == 6e9:  # 128 MiB less what is resident take longer than 16 products of 0.3 ms
        assert wall > 1.3 * computed and streamed.waits_s > 0.2 * computed
    resident = net.to(DEVICE)
    _, whole = calibrated(resident, backend, lambda: resident(x))
    assert dict(streamed.walk) == pytest.approx(dict(whole.walk), rel=0.01)
    assert dict(streamed.own) == pytest.approx(dict(whole.own), rel=0.01)


def test_what_other_hooks_make_the_host_wait_is_no_compute(ghosts: ModuleType, backend: Backend) -> None:
    net = tower(depth=1).to(DEVICE)
    x = x_of()
    _, plain = calibrated(net, backend, lambda: net(x))
    for module in (net.blocks[0].out, net.blocks[0].up):
        module.register_forward_pre_hook(lambda *_: ghosts.advance_host(0.1))
        module.register_forward_hook(lambda *_: ghosts.advance_host(0.2))
    _, held = calibrated(net, backend, lambda: net(x))
    assert dict(held.walk) == pytest.approx(dict(plain.walk), rel=0.01)
    assert 0.59 < held.waits_s < 0.6


# ---------------------------------------------------------------------- habits of modules
class Odd(nn.Module):
    """A layer called three times, one never, and one inside another that has a weight of its own."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.inner = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x * self.scale) * 2

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.often = nn.Linear(64, 64)
        self.never = nn.Linear(64, 64)
        self.outer = self.Outer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.often(x)
        return self.outer(x)


def test_repeats_are_summed_and_the_never_called_are_left_out(sim: ModuleType, backend: Backend) -> None:
    sim.configure(trace=1, launch=1e-9)  # the smallest kernel takes longer than its launch: the device sets the pace
    net = build(Odd).to(DEVICE)
    x = torch.ones(8, 64, device=DEVICE)
    sim.reset_clock()
    _, costs = calibrated(net, backend, lambda: net(x))
    names = {unit.name: unit.index for unit in build_component("net", net).units}
    ran = [names["first"], names["often"], names["outer"], names["outer.inner"]]
    assert [index for index, _ in costs.walk] == ran
    assert costs.repeats == (names["often"],)
    kernel = costs.own[names["outer.inner"]]
    walk = dict(costs.walk)
    assert costs.own[names["often"]] == pytest.approx(3 * kernel) == pytest.approx(walk[names["often"]])
    # `outer` runs from its multiplication to the end of the next one, and the layer inside counts to itself
    assert walk[names["outer"]] + walk[names["outer.inner"]] == pytest.approx(costs.own[names["outer"]])
    assert costs.total_s == pytest.approx(busy(sim), rel=0.01)


@pytest.mark.parametrize("name", sorted(NETS))
def test_every_toy_computes_the_same_and_is_left_as_it_was(name: str, backend: Backend, sim: ModuleType) -> None:
    make, inputs = NETS[name]
    net = build(make).to(DEVICE)
    sim.configure(trace=1, launch=1e-9)
    want = clone(net)(inputs(0).to(DEVICE)).cpu()
    x = inputs(0).to(DEVICE)
    before = state_of(net)
    out: list[torch.Tensor] = []
    sim.reset_clock()
    _, costs = calibrated(net, backend, lambda: out.append(net(x)))
    total = busy(sim)
    assert torch.equal(out[0].cpu(), want)
    assert hooks(net) == [] and state_of(net) == before
    if costs.walk:
        assert costs.total_s == pytest.approx(total, rel=0.01)
    assert all(seconds >= 0 for _, seconds in costs.walk) and all(seconds >= 0 for seconds in costs.own.values())
    unhookable = {unit.index for unit in build_component("net", net).units if not unit.hookable}
    assert unhookable.isdisjoint(costs.own)


# ---------------------------------------------------------------------- never in the way
def test_reading_never_waits(ghosts: ModuleType, backend: Backend) -> None:
    net = tower().to(DEVICE)
    x = x_of()
    calibration = Calibration(build_component("net", net), backend)
    syncs, at = ghosts.host_clock(), ghosts.clock()
    with calibration:
        assert calibration.read() is None, "it is still running"
        net(x)
    assert ghosts.host_clock() - syncs < 0.2 * (ghosts.clock() - at), "the host waited in the forward"
    assert calibration.read() is None
    assert ghosts.host_clock() - syncs < 0.2 * (ghosts.clock() - at), "the host waited for the figures"
    backend.synchronize()
    costs = calibration.read()
    assert costs is not None and calibration.read() is costs


def test_after_an_exception_no_hook_stays_and_nothing_is_told(backend: Backend) -> None:
    net = build(Chain).to(DEVICE)
    calibration = Calibration(build_component("net", net), backend)
    broken = net.layers[3].register_forward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt), calibration:
        net(tokens(0).to(DEVICE))
    broken.remove()
    assert hooks(net) == []
    backend.synchronize()
    assert calibration.read() is None
    with calibration:
        net(tokens(0).to(DEVICE))
    backend.synchronize()
    costs = calibration.read()
    assert costs is not None and len(costs.walk) == 6 and costs.repeats == ()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_call_that_the_model_catches_is_over_with_its_caller(sim: ModuleType, backend: Backend) -> None:
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] != 64:
                raise RuntimeError("not like this")
            return super().forward(x)

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Fails(64, 64)
            self.last = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                self.inner(x[:, :3])
            except RuntimeError:
                x = self.inner(x)
            return torch.tanh(self.last(x))

    sim.configure(launch=1e-9)
    net = build(Catches).to(DEVICE)
    x = torch.ones(4, 64, device=DEVICE)
    _, costs = calibrated(net, backend, lambda: net(x))
    assert costs.repeats == (0,)
    assert costs.own[0] == pytest.approx(costs.own[1], rel=0.01)
    assert dict(costs.walk)[1] == pytest.approx(2 * costs.own[1], rel=0.01)


def test_hooks_that_cannot_be_set_leave_none(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(Chain)
    calibration = Calibration(build_component("net", net), backend)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(net.layers[4], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        calibration.start()
    assert hooks(net) == [] and calibration.read() is None


def test_started_again_and_stopped_twice(backend: Backend) -> None:
    net = build(Chain)
    calibration = Calibration(build_component("net", net), backend)
    calibration.stop()
    calibration.start()
    calibration.start()
    assert all(len(layer._forward_pre_hooks) == 2 for layer in net.layers), "hooked twice"
    calibration.stop()
    calibration.stop()
    assert hooks(net) == []


def test_on_the_host() -> None:
    net = build(Chain)
    calibration = Calibration(build_component("net", net), CpuBackend())
    with calibration, torch.inference_mode():
        net(tokens(0))
    costs = calibration.read()
    assert costs is not None and [index for index, _ in costs.walk] == list(range(6)) and costs.total_s > 0


def test_what_the_hooks_cost(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    net = build(lambda: Chain(depth=200, width=8)).to(DEVICE)
    x = torch.ones(1, 8, device=DEVICE)
    calibration = Calibration(build_component("net", net), backend)

    def seconds(watched: bool) -> float:
        best = float("inf")
        for _ in range(7):
            if watched:
                calibration.start()
            begin = time.perf_counter()
            net(x)
            best = min(best, time.perf_counter() - begin)
            calibration.stop()
        return best

    plain, watched = seconds(False), seconds(True)
    begin = time.perf_counter()
    calibration.start()
    hooked = time.perf_counter()
    calibration.stop()
    stopped = time.perf_counter()
    backend.synchronize()
    calibration.start()
    net(x)
    calibration.stop()
    backend.synchronize()
    read = time.perf_counter()
    assert calibration.read() is not None
    read = time.perf_counter() - read
    each = (watched - plain) / 200
    with capsys.disabled():
        print(
            f"\ncalibration, per unit: {each * 1e6:.1f} us in its forward, {(hooked - begin) / 200 * 1e6:.1f} us to "
            f"hook, {(stopped - hooked) / 200 * 1e6:.1f} us to unhook, {read / 200 * 1e6:.1f} us to read"
        )
    assert each < 200e-6, "once per model and shape, and still not for free"
