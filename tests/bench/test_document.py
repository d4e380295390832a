"""The document keeps to its schema, its ratios follow from its figures, and a matrix goes on where it stopped."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from torch import nn

from balanced_offload.offload.bench.document import SCHEMA_FILE, joined, work_out
from balanced_offload.offload.bench.peers import whole
from balanced_offload.offload.bench.strategies import Applied, Room, Strategy, chosen
from balanced_offload.offload.report import schema, validate

from .conftest import LOOSE, TIGHT, Bench, command


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema(SCHEMA_FILE))


def test_a_run_keeps_to_it_and_other_things_do_not(bench: Bench) -> None:
    document = bench(*chosen(["diffusers.sequential", "torch.to"]))
    validate(document, SCHEMA_FILE)
    assert document["lora"] == [] and document["fit"] == []
    for path, value in (
        (("schema",), "offload-bench/2"),
        (("rung",), "guess"),
        (("cases", 0, "cap"), "8GiB"),
        (("cases", 0, "results", 0, "name"), "mine"),
        (("cases", 0, "results", 0, "equal"), "yes"),
        (("cases", 0, "results", 0, "step_s"), -1.0),
        (("cases", 0, "results", 0, "equal_on"), "paper"),
    ):
        broken: Any = copy.deepcopy(document)
        at = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            validate(broken, SCHEMA_FILE)
    for key in ("completed", "host_syncs", "pinned_ram"):
        broken = copy.deepcopy(document)
        del broken["cases"][0]["results"][0][key]
        with pytest.raises(jsonschema.ValidationError):
            validate(broken, SCHEMA_FILE)


def result(name: str, *samples: float, **more: Any) -> dict[str, Any]:
    base = {"name": name, "ours": name.startswith("ours"), "completed": bool(samples), "samples": list(samples)}
    return base | {"bytes_h2d": 12.0, "equal": None, "error": None, "peak_vram": 1, "pinned_ram": 1, **more}


def test_ratios_follow_from_the_figures() -> None:
    entry: dict[str, Any] = {"bound_s": 2.0, "bandwidth": 10.0}
    entry["results"] = [
        result("ours.none"),
        result("ours.balanced", 2.4),
        result("ours.auto", 2.5),
        result("diffusers.group_leaf", 6.0, 4.0, 5.0),
        result("torch.to"),
    ]
    work_out(entry)
    assert (entry["ours"], entry["best_peer"], entry["ratio_ours_best_peer"]) == (
        "ours.auto",
        "diffusers.group_leaf",
        0.5,
    )
    leaf = entry["results"][3]
    assert (leaf["step_s"], leaf["spread"], leaf["ratio_to_bound"]) == (5.0, 0.4, 2.5)
    assert leaf["share_of_bandwidth"] == 12 / 5 / 10
    assert entry["results"][4]["ratio_to_bound"] is None
    del entry["results"][2]
    work_out(entry)
    assert entry["ours"] == "ours.balanced"


def test_a_second_round_joins_the_first() -> None:
    first = result("torch.to", 1.0, equal=True, peak_vram=5)
    both = joined(first, result("torch.to", 3.0, equal=False, peak_vram=4))
    assert both["samples"] == [1.0, 3.0] and both["rounds"] == 2 and both["equal"] is False and both["peak_vram"] == 5
    assert joined(both, result("torch.to", error="gone"))["completed"] is False


def test_resume_runs_what_is_not_there(bench: Bench, tmp_path: Path) -> None:
    path, ran = tmp_path / "bench.json", []

    def counted(name: str) -> Strategy:
        def apply(module: nn.Module, room: Room) -> Applied:
            ran.append((name, room.cap))
            return whole(module, room)

        return Strategy(name, False, apply)

    first, second = counted("test.first"), counted("test.second")
    bench(first, caps=(LOOSE,), path=path)
    assert ran == [("test.first", LOOSE)]
    document = bench(first, second, caps=(LOOSE, 2 * LOOSE), path=path, resume=True)
    assert ran[1:] == [("test.second", LOOSE), ("test.first", 2 * LOOSE), ("test.second", 2 * LOOSE)]
    assert json.loads(path.read_text(encoding="utf-8")) == document
    assert [[r["name"] for r in entry["results"]] for entry in document["cases"]] == [["test.first", "test.second"]] * 2
    ran.clear()
    bench(first, second, caps=(LOOSE, 2 * LOOSE), path=path, resume=True)
    assert ran == []
    bench(first, second, caps=(LOOSE,), path=path, resume=True, rounds=2)
    assert ran == [("test.first", LOOSE), ("test.second", LOOSE)]
    ran.clear()
    bench(first, caps=(LOOSE,), path=path)  # without it the file is written anew
    assert len(ran) == 1 and len(json.loads(path.read_text(encoding="utf-8"))["cases"]) == 1


def test_a_limit_in_time_stops_between_strategies(bench: Bench, tmp_path: Path) -> None:
    path, strategies = tmp_path / "bench.json", chosen(["torch.to", "diffusers.model"])
    document = bench(*strategies, caps=(LOOSE,), path=path, limit_s=1e-6)
    assert document["complete"] is False and not any(entry["results"] for entry in document["cases"])
    document = bench(*strategies, caps=(LOOSE,), path=path, resume=True)
    assert document["complete"] is True and len(document["cases"][0]["results"]) == 2


def test_every_result_is_saved_before_the_next_one(bench: Bench, tmp_path: Path) -> None:
    path, seen = tmp_path / "bench.json", []

    def look(module: nn.Module, room: Room) -> Applied:
        seen.append(len(json.loads(path.read_text(encoding="utf-8"))["cases"][0]["results"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(*chosen(["torch.to"]), Strategy("test.look", False, look), caps=(LOOSE,), path=path)
    assert seen == [1]
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["complete"] is False and kept["cases"][0]["results"][0]["name"] == "torch.to"


@pytest.mark.parametrize(("key", "value"), [("suite", "peers"), ("steps", 9)])
def test_resume_refuses_another_run(bench: Bench, tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "bench.json"
    document = bench(*chosen(["torch.to"]), caps=(LOOSE,), path=path)
    (document["parameters"] if key == "steps" else document)[key] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=f"--resume: bench.json .*{key}.*{value}"):
        bench(*chosen(["torch.to"]), caps=(LOOSE,), path=path, resume=True)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is no JSON"):
        bench(*chosen(["torch.to"]), caps=(LOOSE,), path=path, resume=True)


def test_the_command_end_to_end(place: Any, tmp_path: Path) -> None:
    only = ["ours.balanced", "ours.auto", "diffusers.group_leaf_stream_record", "torch.to"]
    caps = [f"{TIGHT}B", f"{LOOSE}B"]
    ended = command(
        *("--suite", "peers-small", "--model", "flux1-tiny", "--json", "--out", str(tmp_path), "--steps", "2"),
        *("--only", *only, "--cap", *caps),
    )
    assert ended.code == 0, ended.err
    document = ended.document
    validate(document, SCHEMA_FILE)
    assert [r["name"] for r in document["cases"][0]["results"]] == only
    assert document["rung"] == "simulated" and document["complete"] is True
    hooks = document["hooks"]
    assert hooks["leaves"] > 0 and hooks["ratio"] == hooks["ours_us"] / hooks["accelerate_us"]
    assert hooks["accelerate_us"] > 0
    assert (tmp_path / "bench.md").exists() and (tmp_path / "bench.png").exists()
    assert "flux1-tiny" in ended.err and "x bound" in ended.err
