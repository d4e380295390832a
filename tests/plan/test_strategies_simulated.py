"""Invariant: the peers' formulas say what the real libraries do on the simulated accelerator, within 5 %.

A stack of linear layers with weightless products between them, in ghost mode: real sizes, no arithmetic. The walk's
times are read from the resident stack, kernel by kernel; the libraries then run it as their users would have them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

from balanced_offload.offload.schedule import Piece, Rates, StepTime
from balanced_offload.offload.strategies import Overheads, dispatch, group_leaf, group_stream, sequential, whole

accelerate = pytest.importorskip("accelerate", reason="the library that is compared with")
pytest.importorskip("diffusers", reason="the library that is compared with")

WIDTH = 2048
STEPS = 5
BLOCKS = 6
GHOST = 1 << 16
TOLERANCE = 0.05

# tokens at which the device is busy with compute, even with it, or waits for the link
LOADS = {"compute-bound": 16384, "even": 4096, "transfer-bound": 512}


class Block(nn.Module):
    """An attention-like block: three small layers, a weightless product, a wide pair."""

    def __init__(self, wide: int, pinned: bool) -> None:
        super().__init__()
        self.first = layer(WIDTH, WIDTH, pinned)
        self.second = layer(WIDTH, WIDTH, pinned)
        self.up = layer(WIDTH, wide, pinned)
        self.down = layer(wide, WIDTH, pinned)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        x = weightless(x)
        return self.down(self.up(x))


class Stack(nn.Module):
    """Blocks of two widths between an entrance and an exit."""

    def __init__(self, pinned: bool) -> None:
        super().__init__()
        self.entrance = layer(WIDTH, WIDTH, pinned)
        self.blocks = nn.ModuleList(Block(WIDTH * (4 if i % 2 else 6), pinned) for i in range(BLOCKS))
        self.exit = layer(WIDTH, WIDTH, pinned)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entrance(x)
        for block in self.blocks:
            x = block(x)
        return self.exit(x)


def weightless(x: torch.Tensor) -> torch.Tensor:
    return torch.mm(torch.mm(x, x.t()[:, :1024]), x[:1024])


def layer(inner: int, outer: int, pinned: bool) -> nn.Linear:
    """A bf16 layer whose memory is never touched."""
    with torch.device("meta"):
        made = nn.Linear(inner, outer, dtype=torch.bfloat16)
    for name, parameter in list(made.named_parameters()):
        data = torch.empty(parameter.shape, dtype=torch.bfloat16, pin_memory=pinned)
        setattr(made, name, nn.Parameter(data, requires_grad=False))
    return made


@pytest.fixture
def card(sim: ModuleType) -> Iterator[ModuleType]:
    sim.configure(ghost=GHOST)
    yield sim
    sim.configure(ghost=0)


def rates_of(vram: ModuleType) -> tuple[Rates, Overheads]:
    """The simulated card's own."""
    now = vram.configuration()
    return (
        Rates(now["h2d_pinned"], now["h2d_pageable"], now["copy_lat"]),
        Overheads(launch=now["launch"], sync=now["sync_lat"], d2h_pageable=now["d2h_pageable"]),
    )


def timed(vram: ModuleType, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the compute engine, and of host time to launch it."""
    vram.synchronize()
    vram.reset_clock()
    work()
    counters = vram.counters()
    return counters["busy_compute"], counters["ops"] * vram.configuration()["launch"]


def walk_of(vram: ModuleType, tokens: int) -> list[Piece]:
    """The stack's walk, its times read from the device layer by layer."""
    layers: list[tuple[nn.Linear, bool]] = []
    stack = Stack(pinned=True)
    layers.append((stack.entrance, False))
    for block in stack.blocks:
        layers += [(block.first, False), (block.second, True), (block.up, False), (block.down, False)]
    layers.append((stack.exit, False))
    x = torch.empty(tokens, WIDTH, dtype=torch.bfloat16, device="vram")
    after, after_host = timed(vram, lambda: weightless(x))
    walk = []
    with torch.no_grad():
        for made, followed in layers:
            inputs = torch.empty(tokens, made.in_features, dtype=torch.bfloat16, device="vram")
            made.to("vram")
            own, host = timed(vram, lambda made=made, inputs=inputs: made(inputs))  # type: ignore[misc]
            nbytes = sum(p.numel() * p.element_size() for p in made.parameters())
            walk.append(
                Piece(
                    nbytes,
                    own + (after if followed else 0.0),
                    len(walk),
                    host + (after_host if followed else 0.0),
                    own_s=own,
                    tensors=2,
                )
            )
            made.to("meta")
    return walk


def measured(vram: ModuleType, stack: nn.Module, tokens: int) -> float:
    """Seconds per step in the steady state: two warm-up steps (the first one traces), then `STEPS` in a row."""
    x = torch.empty(tokens, WIDTH, dtype=torch.bfloat16, device="vram")
    with torch.no_grad():
        stack(x)
        stack(x)
        vram.synchronize()
        vram.reset_clock()
        stack(x)
        begun = vram.clock()
        for _ in range(STEPS):
            stack(x)
        return (float(vram.clock()) - float(begun)) / STEPS


@contextlib.contextmanager
def streams_allowed() -> Iterator[None]:
    """diffusers takes streams from CUDA and XPU only; its XPU branch is generic torch."""
    before = torch.xpu.is_available
    torch.xpu.is_available = lambda: True
    try:
        yield
    finally:
        torch.xpu.is_available = before


def group(stack: nn.Module, **options: object) -> nn.Module:
    from diffusers.hooks import apply_group_offloading

    with streams_allowed():
        apply_group_offloading(stack, torch.device("vram"), torch.device("cpu"), **options)
    return stack


def blocks_of(count: int) -> dict[int, int]:
    """Positions in the walk -> block: four layers each behind the entrance."""
    return {1 + 4 * block + at: block for block in range(count) for at in range(4)}


def check(predicted: StepTime | None, found: float) -> None:
    assert predicted is not None
    error = predicted.step_s / found - 1
    assert abs(error) <= TOLERANCE, f"predicted {predicted.step_s:.6f} s, measured {found:.6f} s: {error:+.1%}"


ROOM = 8 << 30


@pytest.mark.parametrize("load", LOADS)
class TestPeers:
    def test_whole(self, card: ModuleType, load: str) -> None:
        rates, over = rates_of(card)
        walk = walk_of(card, LOADS[load])
        check(whole(walk, ROOM, rates, over), measured(card, Stack(pinned=False).to("vram"), LOADS[load]))

    def test_sequential(self, card: ModuleType, load: str) -> None:
        rates, over = rates_of(card)
        walk = walk_of(card, LOADS[load])
        stack = Stack(pinned=False)
        accelerate.cpu_offload(stack, torch.device("vram"))
        check(sequential(walk, ROOM, rates, over), measured(card, stack, LOADS[load]))

    def test_dispatch(self, card: ModuleType, load: str) -> None:
        rates, over = rates_of(card)
        walk = walk_of(card, LOADS[load])
        budget = sum(piece.nbytes for piece in walk) // 2
        stack = Stack(pinned=False)
        device_map = accelerate.infer_auto_device_map(stack, {0: budget, "cpu": 1 << 40})
        assert "cpu" in device_map.values() and len(set(device_map.values())) == 2
        placed = {name: torch.device("vram") if where == 0 else "cpu" for name, where in device_map.items()}
        accelerate.dispatch_model(stack, placed, main_device=torch.device("vram"), force_hooks=True)
        check(dispatch(walk, budget, rates, over), measured(card, stack, LOADS[load]))

    def test_group_leaf(self, card: ModuleType, load: str) -> None:
        rates, over = rates_of(card)
        walk = walk_of(card, LOADS[load])
        stack = group(Stack(pinned=False), offload_type="leaf_level")
        check(group_leaf(walk, ROOM, rates, over), measured(card, stack, LOADS[load]))

    @pytest.mark.parametrize("record", [False, True])
    def test_group_leaf_stream(self, card: ModuleType, load: str, record: bool) -> None:
        rates, over = rates_of(card)
        walk = walk_of(card, LOADS[load])
        stack = group(Stack(pinned=True), offload_type="leaf_level", use_stream=True, record_stream=record)
        found = measured(card, stack, LOADS[load])
        check(group_stream(walk, ROOM, rates, over, record=record), found)

    def test_group_leaf_stream_record_in_little_memory(self, card: ModuleType, load: str) -> None:
        """Copies run ahead until memory is full; then the allocator waits for everything that is held back."""
        rates, over = rates_of(card)
        tokens = LOADS[load]
        walk = walk_of(card, tokens)
        whole_stack = Stack(pinned=False).to("vram")
        torch.accelerator.reset_peak_memory_stats()
        measured(card, whole_stack, tokens)
        activations = torch.accelerator.max_memory_allocated() - sum(piece.nbytes for piece in walk)
        del whole_stack
        budget = 3 * max(piece.nbytes for piece in walk)
        stack = group(Stack(pinned=True), offload_type="leaf_level", use_stream=True, record_stream=True)
        card.set_memory_cap(budget + activations)
        check(group_stream(walk, budget, rates, over, record=True), measured(card, stack, tokens))

    @pytest.mark.parametrize("record", [False, True])
    def test_group_block_stream(self, card: ModuleType, load: str, record: bool) -> None:
        rates, over = rates_of(card)
        walk = walk_of(card, LOADS[load])
        options = {"offload_type": "block_level", "num_blocks_per_group": 1}
        stack = group(Stack(pinned=True), use_stream=True, record_stream=record, **options)
        found = measured(card, stack, LOADS[load])
        check(group_stream(walk, ROOM, rates, over, record=record, blocks=blocks_of(BLOCKS)), found)
