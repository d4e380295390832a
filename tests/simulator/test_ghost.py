"""Invariant: ghost mode changes no shape, byte, operation or virtual time; it only leaves the arithmetic out."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEVICE = "vram"


class Block(nn.Module):
    """Convolution, norms, attention and a gated linear layer: what the denoisers are made of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.group = nn.GroupNorm(4, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.silu(self.group(self.conv(x)))
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
        tokens = tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        value, gate = self.gate(tokens).chunk(2, -1)
        tokens = torch.cat([value * F.gelu(gate), tokens], -1)[..., : x.shape[1]]
        return tokens.transpose(1, 2).reshape(x.shape)


def figures(vram: ModuleType, ghost: float, move: str) -> dict[str, Any]:
    """Runs a small model that is resident, moved block by block, or prefetched, and returns all that is counted."""
    torch.manual_seed(0)
    blocks = [Block(32) for _ in range(3)]
    masters = [{name: p.data.pin_memory() for name, p in block.named_parameters()} for block in blocks]
    x = torch.randn(1, 32, 16, 16).to(DEVICE)
    side, main = vram.Stream(), vram.current_stream()

    def onload(index: int, non_blocking: bool) -> None:
        for name, p in blocks[index].named_parameters():
            p.data = masters[index][name].to(DEVICE, non_blocking=non_blocking)

    vram.configure(ghost=ghost)
    vram.reset_clock()
    vram.clear_copy_log()
    vram.reset_peak_memory_stats()
    start = vram.memory_allocated()
    if move == "resident":
        for i in range(3):
            onload(i, False)
    for i, block in enumerate(blocks):
        if move == "blockwise":
            onload(i, False)
        elif move == "prefetch":
            for j in range(i, min(i + 2, 3)):
                if block.qkv.weight.device.type == "cpu" or j > i:
                    with vram.stream(side):
                        onload(j, True)
            main.wait_stream(side)
        x = block(x)
        for name, p in block.named_parameters():
            if move != "resident":
                p.data.record_stream(main)
                p.data = masters[i][name]
    vram.synchronize()
    counters = vram.counters()
    return {
        "clock": vram.clock(),
        "peak": vram.max_memory_allocated() - start,
        "shape": tuple(x.shape),
        "copies": [(c.direction, c.nbytes, c.offset, c.stream, c.t0, c.t1, c.pinned) for c in vram.copy_log()],
        "races": vram.races(),
        **{name: counters[name] for name in ("ops", "flops", "h2d_bytes", "d2h_bytes", "busy_compute", "busy_h2d")},
    }


@pytest.mark.parametrize("move", ["resident", "blockwise", "prefetch"])
def test_ghost_counts_as_real(vram: ModuleType, move: str) -> None:
    real = figures(vram, 0, move)
    some = figures(vram, 8192, move)
    every = figures(vram, 1, move)
    assert real["races"] == 0
    assert real["ops"] > 30 and real["h2d_bytes"] > 100_000

    def without_streams(f: dict[str, Any]) -> dict[str, Any]:
        """The pool hands out another stream number each time."""
        return {**f, "copies": [copy[:3] + copy[4:] for copy in f["copies"]]}

    assert without_streams(some) == without_streams(real)
    assert without_streams(every) == without_streams(real)


def resident_kib() -> int:
    """Physical memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS in /proc/self/status")


def test_ghost_memory_touches_no_pages(vram: ModuleType) -> None:
    """64 GiB on the device and 16 GiB pinned, on a machine that has neither."""
    vram.set_memory_cap(80 << 30)
    vram.configure(ghost=1 << 20)
    before = resident_kib()
    start = vram.memory_allocated()
    weights = [torch.empty(4 << 30, dtype=torch.bfloat16, pin_memory=True) for _ in range(2)]
    on_device = [w.to(DEVICE, non_blocking=True) for w in weights]
    more = [torch.zeros(4 << 30, dtype=torch.bfloat16, device=DEVICE) for _ in range(5)]
    more.append(more[0] + more[1])
    assert vram.memory_allocated() - start == 64 << 30
    assert all(w.is_pinned() for w in weights)
    assert resident_kib() - before < 64 << 10
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(20 << 30, dtype=torch.uint8, device=DEVICE)
    del on_device, more
    assert vram.memory_allocated() == start


def test_ghost_copies_say_so(vram: ModuleType) -> None:
    vram.configure(ghost=4096)
    vram.clear_copy_log()
    torch.empty(1 << 20, pin_memory=True).to(DEVICE)
    torch.zeros(16).to(DEVICE)
    assert [copy.ghost for copy in vram.copy_log()] == [True, False]


def test_small_operations_stay_real(vram: ModuleType) -> None:
    vram.configure(ghost=1 << 20)
    assert torch.equal((torch.ones(64, device=DEVICE) * 3).cpu(), torch.full((64,), 3.0))


def test_strict_races_hold_in_ghost_mode(vram: ModuleType) -> None:
    vram.configure(ghost=1024, strict_races=1)
    target, side = torch.empty(1 << 20, device=DEVICE), vram.Stream()
    with vram.stream(side):
        target.copy_(torch.empty(1 << 20, pin_memory=True), non_blocking=True)
    with pytest.raises(RuntimeError, match="race"):
        target + 1
    vram.synchronize()
