"""Invariant: the node passes on what comes in, returns what is known, and is never taken from a cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui_runs
from balanced_offload.offload.adapters.comfyui_runs import PromptRuns
from balanced_offload.offload.report import validate

from .report_prompts import Node, Prompts


@pytest.fixture
def report_node(nodes: dict[str, Any]) -> Any:
    return nodes["VRAMReport"]


@pytest.fixture
def prompts(nodes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    """After `nodes`: the pack was loaded before there was a server."""
    return Prompts(tmp_path, monkeypatch)


@pytest.fixture
def runs(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> PromptRuns:
    made = PromptRuns(session=lambda: None)
    monkeypatch.setattr(comfyui_runs, "_runs", made)
    return made


def test_the_schema(report_node: Any) -> None:
    schema = report_node.define_schema()
    assert (schema.display_name, schema.category, schema.is_output_node) == ("VRAM Report", "Offload", True)
    assert [(entry.id, entry.io_type, entry.optional) for entry in schema.inputs] == [("anything", "*", True)]
    outputs = [("any", "*"), ("report_json", "STRING"), ("peak_vram_gib", "FLOAT"), ("move_seconds", "FLOAT")]
    assert [(entry.id, entry.io_type) for entry in schema.outputs] == outputs
    assert {"lowvram", "block swap", "unload", "oom", "vram", "offload"} <= set(schema.search_aliases)
    ids = [entry.id for entry in (*schema.inputs, *schema.outputs)]
    assert len(set(ids)) == len(ids), "older hosts forbid one id on both sides"
    assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))


def test_a_prompt_with_the_node(report_node: Any, prompts: Prompts, runs: PromptRuns) -> None:
    thing = object()
    made: list[Any] = []

    def execute() -> Any:
        made.append(report_node.execute(anything=thing))
        return made[0]

    report_node.hidden = SimpleNamespace(unique_id="7")
    entry = prompts.run(
        Node("7", "VRAMReport", execute), prompt_id="p", starts=lambda: report_node.fingerprint_inputs(anything=None)
    )
    out, text, peak, moved = made[0].result
    assert out is thing
    so_far = json.loads(text)
    validate(so_far)
    assert so_far["ended"] is False and so_far["prompt_id"] == "p"
    assert peak > 0 and math.isnan(moved), "on a CPU the peak is RAM; stock models' moves are not known"
    record = entry["outputs"]["7"]["vram_report"][0]
    validate(record)
    assert record["ended"] is True and record["file"]["filename"] == "offload-report_p.json"
    shown = made[0].ui
    assert all(isinstance(values, list) for values in shown.values()), "the host joins lists"
    assert len(shown["text"][0]) <= 1024


def test_it_is_never_cached(report_node: Any, prompts: Prompts, runs: PromptRuns) -> None:
    answers: list[float] = []
    prompts.run(Node("7", "VRAMReport", None), starts=lambda: answers.append(report_node.fingerprint_inputs()))
    assert math.isnan(answers[0])


def test_an_older_host(report_node: Any, host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3.64's Schema lacks `search_aliases`, and refuses what it does not know."""

    def old_schema(
        node_id: str,
        display_name: str,
        category: str,
        description: str,
        inputs: list,
        outputs: list,
        hidden: list,
        is_output_node: bool,
    ) -> dict:
        return {"node_id": node_id, "is_output_node": is_output_node}

    monkeypatch.setattr(host.io, "Schema", old_schema)
    assert report_node.define_schema() == {"node_id": "VRAMReport", "is_output_node": True}
