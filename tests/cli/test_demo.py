"""Invariant: what the demo must show holds in one whole run on the simulated accelerator, read from its own JSON."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from balanced_offload.offload.report import validate

from .conftest import command

pytestmark = pytest.mark.xdist_group("demo")  # one demo, which takes a minute, on one worker

MODES = ["none", "balanced", "model", "sequential", "auto"]
CAPPED = MODES[1:]


@pytest.fixture(scope="module")
def demo(vram: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One whole demo: how it ended, its document, its folder, device bytes before and after."""
    out = tmp_path_factory.mktemp("demo")
    gc.collect()
    before, cap, options = vram.memory_allocated(), vram.memory_cap(), vram.configuration()
    ended = command("demo", "--json", "--device", "simulated", "--out", str(out))
    gc.collect()
    vram.synchronize()
    return SimpleNamespace(
        ended=ended,
        document=ended.document,
        out=out,
        rows={row["mode"]: row for row in ended.document["modes"]},
        left=vram.memory_allocated() - before,
        restored=(vram.memory_cap(), vram.configuration()) == (cap, options),
    )


def test_it_ends_well_and_says_where_it_ran(demo):
    assert demo.ended.code == 0, demo.ended.err
    assert demo.document["failures"] == []
    first = demo.ended.err.splitlines()[0]
    assert first.startswith("Running on the simulated accelerator")
    assert "All checks hold." in demo.ended.err


def test_the_document_keeps_to_its_schema(demo):
    validate(demo.document, "offload-demo-1")
    assert [row["mode"] for row in demo.document["modes"]] == MODES
    assert demo.document["rung"] == "simulated"


def test_the_cap_is_below_the_weights_and_lifted_for_the_reference(demo):
    weights = demo.rows["none"]["resident_peak"]
    assert demo.document["cap"] < weights
    assert demo.rows["none"]["cap"] is None
    assert {demo.rows[mode]["cap"] for mode in CAPPED} == {demo.document["cap"]}


@pytest.mark.parametrize("mode", MODES)
def test_pictures_are_equal_to_none_and_to_the_plain_cpu(demo, mode):
    assert demo.rows[mode]["equal_to_none"] is True
    assert demo.rows[mode]["equal_on"] == "cpu"


@pytest.mark.parametrize("mode", CAPPED)
def test_the_allocators_peak_is_under_the_cap(demo, mode):
    assert 0 < demo.rows[mode]["peak_vram"] <= demo.document["cap"]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_came_down_and_the_ledger_equals_the_copy_log(demo, mode):
    row = demo.rows[mode]
    assert row["bytes_d2h"] == 0
    assert row["bytes_h2d"] == row["copy_log_h2d"] > 0
    assert row["races"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_no_resident_module_carries_a_hook(demo, mode):
    assert demo.rows[mode]["hooks_on_resident"] == 0


def test_none_moves_each_weight_once_and_model_once_per_generation(demo):
    from balanced_offload.offload.adapters.parts import modules_of, role_of
    from balanced_offload.offload.demo.pipeline import load_pipeline
    from balanced_offload.offload.units import aligned, build_component

    units = [
        unit
        for name, module in modules_of(load_pipeline()).items()
        for unit in build_component(name, module, role_of(name, module)).units
    ]
    weights = sum(storage.nbytes for unit in units for storage in unit.storages)
    assert demo.rows["none"]["bytes_h2d"] == weights
    # in mode model all will move again, so all lies in slabs: a unit is one copy, with what lies between its weights
    gaps = sum(aligned(storage.nbytes) - storage.nbytes for unit in units for storage in unit.storages[:-1])
    assert demo.rows["model"]["bytes_h2d"] == 5 * (weights + gaps)


def test_auto_moves_to_the_byte_what_the_mode_that_it_became_moves(demo):
    auto = demo.rows["auto"]
    assert auto["resolved"] == "sequential"  # a card of this size takes the profile for up to 4 GiB
    assert auto["bytes_h2d"] == demo.rows["sequential"]["bytes_h2d"]
    assert f"auto became {auto['sentence']}" in demo.ended.err


def test_balanced_keeps_the_high_mark_streams_and_uses_the_cap(demo):
    row, unet = demo.rows["balanced"], max_component(demo)
    assert row["resolved"] == "balanced"
    assert row["high"] < unet
    assert row["high_crossings"] == 0
    assert row["component_peak"] <= row["high"]
    assert row["peak_vram"] >= 0.85 * demo.document["cap"]
    assert row["bytes_h2d"] > 2 * demo.rows["none"]["bytes_h2d"]


def max_component(demo: SimpleNamespace) -> int:
    """Device bytes of the largest component: what mode model held at most."""
    return int(demo.rows["model"]["component_peak"])


def test_the_classifier_reads_the_digits(demo):
    assert demo.document["digits"]["total"] == 50
    assert demo.document["digits"]["right"] >= 45


def test_its_files_are_there_and_whole(demo):
    assert sorted(path.name for path in demo.out.iterdir()) == sorted(demo.document["files"])
    reports = json.loads((demo.out / "report.json").read_text(encoding="utf-8"))
    assert sorted(reports) == sorted(MODES)
    for report in reports.values():
        validate(report)
    events = json.loads((demo.out / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {event["ph"] for event in events} >= {"X", "M", "C"}
    for name in ("images.png", "timeline.png"):
        assert (demo.out / name).read_bytes().startswith(b"\x89PNG")


def test_people_get_a_table_and_a_line_per_mode(demo):
    text = demo.ended.err
    for heading in ("mode", "resolved", "equal", "moved up", "moved down", "hooks on resident", "digits read"):
        assert heading in text
    for mode in MODES:
        assert demo.rows[mode]["line"] in text
        assert demo.rows[mode]["line"].startswith("Time ")


def test_the_device_is_left_as_it_was(demo):
    assert demo.left == 0
    assert demo.restored


def test_predicted_bytes_are_near_the_measured_ones(demo):
    from balanced_offload.offload.adapters.parts import modules_of, role_of
    from balanced_offload.offload.demo.pipeline import DEFAULTS, PROMPTS, load_pipeline
    from balanced_offload.offload.demo.predict import Meter, Part, predict
    from balanced_offload.offload.units import build_component

    pipe = load_pipeline()
    modules = modules_of(pipe)
    with Meter(modules) as meter:
        pipe(PROMPTS[:2], output_type="pt", **DEFAULTS)
    parts = [
        Part(
            build_component(name, module, role_of(name, module)),
            meter.calls[name],
            meter.activations[name],
            meter.compute_s[name],
        )
        for name, module in modules.items()
    ]
    assert [part.calls for part in parts if part.component.role == "denoiser"] == [DEFAULTS["num_inference_steps"]]
    high = demo.rows["balanced"]["high"]
    predicted = {mode: predict(mode, parts, 5, demo.document["cap"], high) for mode in MODES}
    for mode in ("none", "model"):
        assert predicted[mode].bytes_h2d == demo.rows[mode]["bytes_h2d"]
    for mode in ("balanced", "sequential"):
        assert predicted[mode].bytes_h2d == pytest.approx(demo.rows[mode]["bytes_h2d"], rel=0.1)
    for mode in MODES:
        assert predicted[mode].predicted
        assert predicted[mode].resolved == demo.rows[mode]["resolved"]


def test_json_goes_to_a_file_as_well(vram: ModuleType, tmp_path: Path):
    target = tmp_path / "demo.json"
    ended = command(
        *("demo", "--json", str(target), "--device", "simulated", "--pictures", "2"),
        *("--mode", "none", "--out", str(tmp_path), "--card", "rtx4060-8g-pcie4x8"),
    )
    assert ended.code == 0, ended.err
    assert ended.out == ""
    document = json.loads(target.read_text(encoding="utf-8"))
    assert [row["mode"] for row in document["modes"]] == ["none"]
    assert "rtx4060-8g-pcie4x8" in ended.err.splitlines()[0]
    assert vram.card().key == "generic-8g"
