"""What a streamed leaf costs the host. Invariant: ours and accelerate's hook are timed on the same leaves, in turn.

A model of many tiny Linear leaves, so that the forward is nothing but the host's work. The time of the same model
whole on the device is taken off, and what is left is divided by the leaves. The least of several rounds is taken:
whatever else the machine does only adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .measure import WARM_UPS
from .ours import managed
from .peers import sequential_offload, whole
from .places import Place
from .strategies import Applied, Apply, Room

LEAVES = 256
WIDTH = 16
ROUNDS = 5
STEPS = 3


def hook_cost(place: Place, leaves: int = LEAVES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Host microseconds per streamed leaf of ours (mode sequential) and of accelerate's hook, and their ratio.

    `*_us` is the CPU time of Python and libraries; `*_wall_us` is wall time, and has the calls of the device in it
    (on the simulated accelerator those are what stands in for a driver).
    """
    applies: dict[str, Apply] = {
        "none": whole,
        "ours": lambda module, room: managed(module, room, "sequential"),
        "accelerate": sequential_offload,
    }
    place.use(None, None)
    place.clean()
    room = Room(place.device, None, 0, 0)
    inputs = torch.randn(1, WIDTH).to(place.device)
    applied: dict[str, Applied] = {}
    python: dict[str, float] = {}
    wall: dict[str, float] = {}
    outputs: list[torch.Tensor] = []
    try:
        for name, apply in applies.items():
            applied[name] = apply(_tower(leaves), room)
        steps = {name: _step(one.module, inputs) for name, one in applied.items()}
        for step in steps.values():
            for _ in range(WARM_UPS):
                output = step()
                place.synchronize()
            outputs.append(output.to("cpu"))
        if not all(torch.equal(outputs[0], output) for output in outputs):
            raise ValueError("the tower of leaves gives different outputs under different hooks")
        for _ in range(rounds):
            for name, step in steps.items():
                wall[name] = min(wall.get(name, float("inf")), _wall(step))
        for _ in range(rounds):
            for name, step in steps.items():
                python[name] = min(python.get(name, float("inf")), place.python_seconds(step, STEPS))
    finally:
        for one in applied.values():
            one.close()
        applied.clear()
    place.clean()

    def per_leaf(times: dict[str, float], name: str) -> float:
        return (times[name] - times["none"]) / leaves * 1e6

    ours, theirs = per_leaf(python, "ours"), per_leaf(python, "accelerate")
    return {
        "leaves": leaves,
        "ours_us": ours,
        "accelerate_us": theirs,
        "ratio": ours / theirs,
        "ours_wall_us": per_leaf(wall, "ours"),
        "accelerate_wall_us": per_leaf(wall, "accelerate"),
    }


def _tower(leaves: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(leaves))).eval().requires_grad_(False)


def _step(module: nn.Module, inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        with torch.no_grad():
            output = module(inputs)
        assert isinstance(output, torch.Tensor)
        return output

    return step


def _wall(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - begin) / STEPS
