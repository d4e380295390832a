"""The place that a GPU is, on the simulated accelerator's module: wall time, caps by fraction, rounds, equality."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from balanced_offload.offload.bench.cases import Case
from balanced_offload.offload.bench.document import SCHEMA_FILE
from balanced_offload.offload.bench.gpu import GpuPlace
from balanced_offload.offload.bench.run import Options, run_suite
from balanced_offload.offload.bench.strategies import chosen
from balanced_offload.offload.bench.tables import markdown
from balanced_offload.offload.report import validate

from .conftest import LOOSE


def test_a_matrix_in_rounds(sim: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    total, shares = sim.memory_cap(), []

    def fraction(share: float, device: torch.device) -> None:
        shares.append(share)
        sim.set_memory_cap(int(share * total))

    monkeypatch.setattr(sim, "set_per_process_memory_fraction", fraction, raising=False)
    place = GpuPlace(torch.device("vram"))
    only = ["ours.auto", "diffusers.group_leaf_stream", "torch.to"]
    cases = (Case("flux1-tiny", "128x128", None, LOOSE),)
    said: list[str] = []
    options = Options("peers", cases, chosen(only), steps=1, rounds=2, path=tmp_path / "gpu.json", hooks=False)
    document = run_suite(place, options, said.append)
    validate(document, SCHEMA_FILE)
    assert document["failures"] == [] and document["rung"] == "gpu" and document["complete"] is True
    entry = document["cases"][0]
    assert [result["name"] for result in entry["results"]] == only
    for result in entry["results"]:
        assert result["completed"], result["error"]
        assert result["equal"] is True and result["equal_on"] == "gpu" and "twin" not in result
        assert result["rounds"] == 2 and len(result["samples"]) == 2 * place.timed_blocks
        assert result["spread"] is not None and result["step_s"] > 0 and result["races"] is None
        assert result["step_python_s"] is None, "wall time has Python in it"
    assert LOOSE / total in shares and shares[-1] == 1.0, "the cap was set, and lifted in the end"
    assert [text for text in said if "round" in text] == [f"{cases[0]}, round 1", f"{cases[0]}, round 2"]
    assert "*Simulated*" not in markdown(document)
    assert sim.memory_cap() == total


def test_what_the_driver_does_not_show_is_reserved(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "set_per_process_memory_fraction", lambda share, device: None, raising=False)
    place = GpuPlace(torch.device("vram"))
    place.use(None, 3 << 30)
    assert place.reserve == sim.memory_cap() - (3 << 30)
    place.use(None, None)
    assert place.reserve == 0
    with pytest.raises(ValueError, match="--card"):
        place.use("rtx4090-24g", None)
    assert place.bandwidth > 0 and place.pinned() is None
