"""Invariant: without any accelerator the demo still draws, and no predicted figure passes for a measured one."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from balanced_offload.offload import simulator
from balanced_offload.offload.demo import places
from balanced_offload.offload.report import validate

from .conftest import command


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory):
    """A demo where torch sees no accelerator and the simulated one cannot be built."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(name: str = "vram"):
            raise simulator.SimulatorUnavailable("no C++ compiler found: install g++")

        patch.setattr(simulator, "load", refuse)
        patch.setattr(places, "_on_gpu", lambda wanted: (None, "torch finds no accelerator"))
        return command("demo", "--json", "--pictures", "10", "--out", str(tmp_path_factory.mktemp("cpu")))


def test_the_first_line_says_so_and_why(fallback):
    first = fallback.err.splitlines()[0]
    assert first.startswith("Running on the plain CPU")
    assert "torch finds no accelerator" in first
    assert "no C++ compiler found" in first
    assert "predicted" in first
    assert fallback.code == 0, fallback.err


def test_every_row_is_labelled_predicted(fallback):
    validate(fallback.document, "offload-demo-1")
    assert fallback.document["rung"] == "cpu"
    assert all(row["predicted"] for row in fallback.document["modes"])
    assert all(row["equal_to_none"] is None and row["equal_on"] is None for row in fallback.document["modes"])
    assert "PREDICTED" in fallback.err
    assert "All checks hold." not in fallback.err


def test_the_prediction_is_made_of_sizes(fallback):
    rows = {row["mode"]: row for row in fallback.document["modes"]}
    cap, weights = fallback.document["cap"], rows["none"]["bytes_h2d"]
    assert cap < weights
    assert 5 * weights <= rows["model"]["bytes_h2d"] < 5.02 * weights  # with what lies between weights in their slabs
    assert weights < rows["balanced"]["bytes_h2d"] < rows["sequential"]["bytes_h2d"]
    assert rows["auto"]["resolved"] == "sequential"
    assert all(rows[mode]["peak_vram"] <= cap for mode in ("balanced", "model", "sequential", "auto"))
    assert rows["none"]["peak_vram"] > cap
    assert all(row["time_s"] > 0 for row in rows.values())


def test_the_pictures_are_real(fallback):
    assert fallback.document["digits"]["total"] == 10
    assert fallback.document["digits"]["right"] >= 9
    assert "images.png" in fallback.document["files"]
