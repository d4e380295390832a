"""Invariant tested: on a real host a hint is one proven sentence, the same everywhere, and what it says cures it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from . import graphs
from .server import HostServer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEED = {"mode": "balanced", "fit_aware": False}
"""SD.Next's rule on a card that has room for everything, as in the second seed."""


@pytest.fixture
def roomy(servers: Callable[..., HostServer], vram: ModuleType) -> HostServer:
    """A host on the simulated accelerator with 64 MiB, more than twice what the tiny models need."""
    environment = {"SIMULATED_VRAM": str(64 << 20), "BALANCED_OFFLOAD_CHECKOUT": str(ROOT)}
    return servers(packs=(HERE / "packs" / "simulated_device",), environment=environment)


def draw(
    server: HostServer, fields: dict[str, Any], text: str, *, steps: int = 2, size: int = 64, report: bool = True
) -> dict[str, Any]:
    """One generation -> its report. Another number of steps is another workload: tests do not see each other's."""
    build = graphs.Builder()
    graph = graphs.draw(build, *graphs.our_loaders(build, fields), prompt=text, steps=steps, size=size)
    if report:
        build.add("VRAMReport")
    prompt_id = server.queue(graph)
    assert server.wait(prompt_id)["status"]["status_str"] == "success"
    until = time.monotonic() + 10
    while True:
        found: dict[str, Any] = server.get(f"/offload/report/{prompt_id}")
        if found["ended"] or time.monotonic() > until:
            assert found["ended"]
            return found
        time.sleep(0.02)


def logged(server: HostServer, text: str) -> bool:
    """Whether the log has it; it is written by the watcher, soon after the report is there."""
    until = time.monotonic() + 10
    while text not in server.log():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_the_second_seed(roomy: HostServer) -> None:
    first, second = (draw(roomy, SEED, f"a cat {i}") for i in range(2))
    assert first["workload"] == second["workload"] is not None
    assert first["hints"] == [] and len(second["hints"]) == 1
    (hint,) = second["hints"]
    assert hint["code"] == "FITS_BUT_MOVED"
    moved = [row for row in second["by_component"] if row["avoidable_bytes"]]
    assert any(row["component"] in hint["sentence"] for row in moved)
    assert "64.0 MiB" in hint["sentence"], "the budget"
    blocked = sum(second["totals"][name] for name in ("onload_s", "stall_s", "evict_s"))
    assert 0.05 * second["totals"]["wall_s"] <= hint["saving_s"] <= blocked
    # the same sentence wherever it is told
    rows = roomy.get("/offload/runs?limit=1")["runs"]
    history = roomy.history(second["prompt_id"]) or {}
    record = next(out["vram_report"][0] for out in history["outputs"].values() if "vram_report" in out)
    assert rows[0]["hints"] == record["hints"] == second["hints"]
    assert logged(roomy, f"hint: {hint['sentence']}") and logged(roomy, second["line"])
    assert hint["sentence"] in rows[0]["text"]
    # what it says to change cures it
    cured = {**SEED, **hint["action"]["set"]}
    third, fourth = (draw(roomy, cured, f"a dog {i}") for i in range(2))
    assert third["workload"] == first["workload"], "the policy makes no other workload"
    for row in third["by_component"]:
        assert row["bytes_h2d"] <= (row["weight_bytes"] or 0), "onloaded at most once"
    assert fourth["totals"]["bytes_h2d"] == fourth["totals"]["move_count"] == 0
    assert third["hints"] == fourth["hints"] == []


def test_a_prompt_without_the_node_is_told_in_the_log_alone(roomy: HostServer) -> None:
    found = [draw(roomy, SEED, f"a bird {i}", steps=3, report=False) for i in range(3)]
    told = [report["hints"] for report in found]
    assert not told[0] and told[1]
    assert logged(roomy, f"hint: {told[1][0]['sentence']}")


def test_another_size_is_no_proof(roomy: HostServer) -> None:
    """Once at 64 pixels and once at 128 are two workloads: nothing is proven yet."""
    for size in (64, 128):
        assert draw(roomy, SEED, "a fish", steps=1, size=size, report=False)["hints"] == []
