"""Invariant: the calibration finds exactly the parameters that a clock was set to, and keeps no simulated figures."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parent / "calibrate.py"
CLOCK = {  # nobody's card, so that a default that slipped in would be seen
    "h2d_pinned": 11e9,
    "h2d_pageable": 3e9,
    "d2h_pinned": 13e9,
    "d2h_pageable": 2e9,
    "hbm": 210e9,
    "flops16": 17e12,
    "flops32": 5e12,
    "launch": 3e-6,
    "copy_lat": 7e-6,
}


@pytest.fixture
def calibrate() -> Iterator[ModuleType]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("offload_calibrate", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["offload_calibrate"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["offload_calibrate"]


@pytest.fixture
def clock(sim: ModuleType) -> ModuleType:
    sim.configure(**CLOCK)
    return sim


def test_the_method_finds_the_clock_it_measures(calibrate: ModuleType, clock: ModuleType, tmp_path: Path) -> None:
    kept = sorted(calibrate.RESULTS.glob("*.json"))
    before = clock.configuration()
    assert calibrate.main(["--device", "vram", "--out", str(tmp_path / "found.json")]) == 0
    document = json.loads((tmp_path / "found.json").read_text())
    assert (document["schema"], document["rung"]) == ("offload-calibration/1", "simulated")
    assert document["parameters"] == pytest.approx(CLOCK, rel=1e-6)
    assert set(document["ratios"]) == set(document["figures"]) == set(document["simulated"])
    assert {"stack.resident", "stack.streamed", "launch", "h2d.pageable.8MiB"} <= set(document["figures"])
    for item, ratio in document["ratios"].items():
        assert ratio == pytest.approx(1.0, rel=1e-6), item
    assert clock.configuration() == before
    assert sorted(calibrate.RESULTS.glob("*.json")) == kept, "simulated figures were kept as a card's"


def only_copies(calibrate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(bench: Any) -> dict[str, float]:
        bench.copies()
        return bench.figures

    monkeypatch.setattr(calibrate.Bench, "all", copies)


def test_a_ratio_is_what_it_says(calibrate: ModuleType, clock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the rate and no latency make a copy twice as long, less twice the latency."""
    only_copies(calibrate, monkeypatch)
    figures = calibrate.simulate({}, "small", 1 << 30)
    slower = calibrate.simulate({"h2d_pinned": CLOCK["h2d_pinned"] / 2, "copy_lat": 0}, "small", 1 << 30)
    nbytes = 8 << 20
    assert figures["h2d.pinned.8MiB"] == pytest.approx(nbytes / CLOCK["h2d_pinned"] + CLOCK["copy_lat"], rel=1e-6)
    assert slower["h2d.pinned.8MiB"] == pytest.approx(2 * nbytes / CLOCK["h2d_pinned"], rel=1e-6)


def test_a_card_is_simulated_in_another_process(calibrate: ModuleType, clock: ModuleType) -> None:
    """What a GPU's figures are compared with: the same numbers, from a process that has seen no GPU."""
    here = calibrate.simulate(CLOCK, "small", 1 << 30)
    there, reason = calibrate.simulate_elsewhere(CLOCK, "small", 1 << 30)
    assert reason == ""
    assert there == pytest.approx(here, rel=1e-6)


def test_without_the_simulator_the_figures_stand_alone(calibrate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate.simulator, "available", lambda: (False, "this is another torch"))
    assert calibrate.simulate_elsewhere(CLOCK, "small", 1 << 30) == (None, "this is another torch")


def test_only_a_real_device_has_a_file_of_its_own(calibrate: ModuleType) -> None:
    real = {"rung": "gpu", "device": "NVIDIA GeForce RTX 3060 (12 GB)"}
    assert calibrate.default_file(real) == calibrate.RESULTS / "nvidia-geforce-rtx-3060-12-gb.json"
    assert calibrate.default_file({**real, "rung": "simulated"}) is None


def test_files_in_results_were_measured_on_real_devices(calibrate: ModuleType) -> None:
    found = [json.loads(file.read_text()) for file in calibrate.RESULTS.glob("*.json")]
    assert [document["rung"] for document in found] == ["gpu"] * len(found)
    assert {document["schema"] for document in found} <= {"offload-calibration/1"}
