"""Invariant: with `python_time`, what the host computes between device calls is on the clock; else nothing is."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DEVICE = "vram"
MS = 1e-3


def burn(seconds: float) -> None:
    """Keeps this thread's CPU busy."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


class Chatty(nn.Module):
    """Two kernels with 1 ms of plain Python between them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        burn(MS)
        return x * 2


def chain(hooks: bool, leaves: int = 10) -> nn.Module:
    """A chain of chatty leaves, each with 2 ms of hooks (one before, one after its forward) if asked for."""
    model = nn.Sequential(*(Chatty() for _ in range(leaves)))

    def hook(*_: Any) -> None:
        burn(MS)

    if hooks:
        for leaf in model:
            leaf.register_forward_pre_hook(hook)
            leaf.register_forward_hook(hook)
    return model


def forward_s(vram: ModuleType, model: nn.Module) -> float:
    x = torch.ones(8, device=DEVICE)
    vram.reset_clock()
    model(x)
    vram.synchronize()
    return float(vram.clock())


@pytest.mark.parametrize(("hooks", "burnt"), [(False, 10 * MS), (True, 30 * MS)])
def test_helpers_and_hooks_of_a_forward_are_charged(vram: ModuleType, hooks: bool, burnt: float) -> None:
    model = chain(hooks)
    without = forward_s(vram, model)
    vram.configure(python_time=1)
    begun = time.thread_time()
    with_python = forward_s(vram, model)
    spent = time.thread_time() - begun
    assert without < MS
    assert without + burnt <= with_python < without + spent


def test_python_hides_behind_the_device(vram: ModuleType) -> None:
    """20 kernels of 10 ms: the host runs ahead, so 10 ms of Python do not show in the step."""
    vram.configure(kernel_min=10 * MS)
    model = chain(hooks=False)
    without = forward_s(vram, model)
    vram.configure(python_time=1)
    # beyond its own time, a step is only later by what comes before its first kernel
    assert forward_s(vram, model) < without + 5 * MS


def test_work_on_host_tensors_is_the_hosts(vram: ModuleType) -> None:
    a = torch.ones(300, 300)
    vram.configure(python_time=1)
    before, begun = vram.host_clock(), time.thread_time()
    for _ in range(5):
        a @ a
    spent = time.thread_time() - begun
    assert vram.host_clock() - before >= 0.9 * spent > 0


def test_sleep_is_no_work(vram: ModuleType) -> None:
    vram.configure(python_time=1)
    before = vram.host_clock()
    time.sleep(0.05)
    assert vram.host_clock() - before < 0.02


def test_the_scale_stands_for_a_faster_or_slower_machine(vram: ModuleType) -> None:
    vram.configure(python_time=1, python_scale=100)
    before = vram.host_clock()
    burn(5 * MS)
    assert 0.5 <= vram.host_clock() - before < 5
    vram.configure(python_scale=0)
    before = vram.host_clock()
    burn(5 * MS)
    assert vram.host_clock() == before
