"""Invariant: the `sim` fixture gives every test the same empty device, and sees what a test leaves behind."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest_plugins = ["pytester"]

LEAKY = """
import torch

kept = []

def test_leak(sim):
    kept.append(torch.empty(1000, device="vram"))

def test_race(sim):
    sim.configure(strict_races=0)
    source, side = torch.ones(1 << 20, pin_memory=True), sim.Stream()
    with sim.stream(side):
        there = source.to("vram", non_blocking=True)
    there.add_(1)
    sim.synchronize()

def test_stream(sim):
    sim.set_stream(sim.Stream())

def test_clean(sim):
    assert sim.memory_allocated() == 4096, "only the leak is there"
    assert sim.clock() == 0.0
    assert sim.memory_cap() == 8 << 30

def test_failing_test_is_no_leak(sim):
    held = torch.empty(1000, device="vram")
    raise ValueError("as the test wants it")
"""


def test_the_device_is_empty_and_at_time_zero(sim: ModuleType) -> None:
    assert sim.memory_allocated() == 0 and sim.max_memory_allocated() == 0
    assert sim.clock() == 0.0 and sim.races() == 0
    assert sim.mem_get_info() == (8 << 30, 8 << 30)
    assert sim.configuration()["strict_races"] == 1 and sim.configuration()["ghost"] == 0


@pytest.mark.parametrize("turn", [1, 2])
def test_what_a_test_sets_is_set_back(sim: ModuleType, turn: int) -> None:
    assert sim.memory_cap() == 8 << 30 and sim.others() == 0
    normal = sim.configuration()["h2d_pinned"]
    assert normal != 1e9
    sim.set_memory_cap(1 << 30)
    sim.set_others(1 << 20)
    sim.configure(h2d_pinned=1e9, ghost=1)
    assert sim.copy_totals()["h2d"] == 0
    torch.ones(1000, dtype=torch.int64).to("vram")
    assert sim.copy_totals()["h2d"] == 1


def test_leaks_and_races_fail_the_test(vram: ModuleType, pytester: pytest.Pytester, root: Path) -> None:
    pytester.makeconftest(
        (root / "tests" / "conftest.py").read_text().replace("parents[1]", f"parents[0] / {str(root)!r}")
    )
    pytester.makepyfile(test_left_behind=LEAKY)
    outcome = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    outcome.assert_outcomes(passed=4, errors=3, failed=1)
    outcome.stdout.fnmatch_lines_random(
        [
            "*4096 device bytes are still allocated*",
            "*1 races, the last:*",
            "*left another stream*",
            "*as the test wants it*",
        ]
    )
