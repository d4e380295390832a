"""Invariant: nothing piles up: after a thousand cycles and all switches, host and device are where they were."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from balanced_offload.offload import OffloadPolicy, Session

pytestmark = pytest.mark.slow

MIB = 1 << 20
CYCLES = 1000
WARM_UP = 400  # until the allocator of the host is at rest; flat to the byte from there on
MODES = ("balanced", "model", "sequential", "auto")


class Net(nn.Module):
    """Layers of half a MiB, enough for a leak of one of them a cycle to show within 1 % of the process."""

    def __init__(self, depth: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, 256, 256) for _ in range(depth))
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.06, generator=generator)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    decode = forward


def policies() -> dict[str, OffloadPolicy]:
    return {
        "none": OffloadPolicy(mode="none"),
        "balanced": OffloadPolicy(mode="balanced", high="1MiB"),
        "model": OffloadPolicy(mode="model"),
        "sequential": OffloadPolicy(mode="sequential"),
        "auto": OffloadPolicy(),
    }


def rss() -> int:
    """Resident bytes once the C allocator has given back what it merely kept: where a heap ends is chance."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's; elsewhere the figure is what it is
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def build() -> dict[str, Net]:
    return {"text_encoder": Net(3, 1), "unet": Net(12, 2), "vae": Net(2, 3)}


def add_to(session: Session, parts: dict[str, Net]) -> None:
    roles: dict[str, Any] = {"text_encoder": "text_encoder", "unet": "denoiser", "vae": "vae"}
    for name, part in parts.items():
        session.add(name, part, role=roles[name], entries=("decode",) if name == "vae" else ("forward",))


def draw(parts: dict[str, Net], device: str) -> torch.Tensor:
    with torch.inference_mode():
        x = torch.ones(4, 256).to(device)
        x = parts["text_encoder"](x)
        for _ in range(2):
            x = parts["unet"](x)
        return parts["vae"].decode(x).cpu()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_generations_and_evictions(sim: ModuleType, mode: str) -> None:
    sim.configure(copy_log=0)  # it grows with every copy, up to its limit
    parts = build()
    expected = draw(parts, "cpu")
    with Session(policies()[mode], device="vram") as session:
        add_to(session, parts)
        start = sim.memory_allocated()
        before = 0
        for cycle in range(WARM_UP + CYCLES):
            if cycle == WARM_UP:
                before = rss()
            with session.run():
                drawn = draw(parts, "vram")
            assert torch.equal(drawn, expected), f"cycle {cycle}"
            session.free()
            session.backend.synchronize()
            assert sim.memory_allocated() == start, f"cycle {cycle}"
        after = rss()
        assert session.ledger.total_bytes_d2h == 0
    assert abs(after - before) <= 0.01 * before, f"{before} bytes before, {after} after {CYCLES} cycles"
    assert sim.races() == 0


@pytest.mark.timeout(1800)
def test_every_switch_of_modes_again_and_again(sim: ModuleType) -> None:
    """The twenty ordered pairs, fifty times over: a thousand switches with a picture after each."""
    sim.configure(copy_log=0)
    parts, wanted = build(), policies()
    expected = draw(parts, "cpu")
    pairs = [(a, b) for a in wanted for b in wanted if a != b]
    session = Session(wanted["none"], device="vram")
    add_to(session, parts)
    before = 0
    for turn in range(55):
        if turn == 5:
            before = rss()
        for source, target in pairs:
            for mode in (source, target):
                session.policy = wanted[mode]
                assert torch.equal(draw(parts, "vram"), expected), f"{source} to {target}, at {mode}"
        session.policy = wanted["sequential"]
        session.free()
        session.backend.synchronize()
        assert sim.memory_allocated() == 0, f"turn {turn}"
    after = rss()
    assert abs(after - before) <= 0.01 * before, f"{before} bytes before, {after} after"
    assert session.ledger.total_bytes_d2h == 0
    session.detach()
    assert sim.memory_allocated() == 0 and sim.races() == 0


@pytest.mark.timeout(1800)
def test_sessions_come_and_go(sim: ModuleType) -> None:
    """Attached and given back in every mode: masters and slabs go with their session.

    The host's allocator is at rest after about a hundred turns; the two hundred after those are measured.
    """
    sim.configure(copy_log=0)
    parts, wanted = build(), policies()
    expected = draw(parts, "cpu")
    before = 0
    for turn in range(320):
        if turn == 120:
            before = rss()
        for policy in wanted.values():
            with Session(policy, device="vram") as session:
                add_to(session, parts)
                assert torch.equal(draw(parts, "vram"), expected)
        assert sim.memory_allocated() == 0, f"turn {turn}"
    after = rss()
    assert abs(after - before) <= 0.01 * before, f"{before} bytes before, {after} after"
