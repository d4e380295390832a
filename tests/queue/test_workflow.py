"""Invariant: an input is found by one name that cannot be mistaken; everything else is a sentence with the remedy."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from balanced_offload.offload.queue.workflow import Asked, Target, find_target, load_workflow, set_inputs

from .stub import WORKFLOW


def changed(**nodes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(WORKFLOW), **nodes}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("3.seed", ("3", "seed")),
        ("Sampler.seed", ("3", "seed")),
        ("KSampler.seed", ("3", "seed")),
        ("ksampler.seed", ("3", "seed")),
        ("Positive.text", ("6", "text")),
        ("Load.fast", ("4", "fast")),
    ],
)
def test_a_node_is_named_by_id_title_or_class(name: str, target: tuple[str, str]) -> None:
    assert find_target(WORKFLOW, name) == Target(*target)


def test_ids_titles_and_inputs_may_hold_dots_and_colons() -> None:
    graph = changed(
        **{
            "57:3": {"class_type": "Resize", "inputs": {"mode": "a", "mode.width": 64}},
            "8": {"class_type": "Note", "inputs": {"text": "x"}, "_meta": {"title": "v1.5 prompt"}},
            "10": {"class_type": "Note", "inputs": {"text": "y"}, "_meta": {"title": "3"}},
        }
    )
    assert find_target(graph, "57:3.mode.width") == Target("57:3", "mode.width")
    assert find_target(graph, "v1.5 prompt.text") == Target("8", "text")
    assert find_target(graph, "3.seed") == Target("3", "seed")  # an id goes before a title


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seed", ["NODE.INPUT", "3.seed"]),
        ("3.", ["NODE.INPUT"]),
        ("Samplr.seed", ["'Samplr'", "Sampler"]),
        ("99.seed", ["'99'", "3 (Sampler)", "6 (Positive)"]),
        ("3.sead", ["'sead'", "near names: seed"]),
        ("3.width", ["'width'", "seed", "steps", "denoise"]),
        ("Encode.text", ["2 nodes", "6.text (Positive)", "7.text (Negative)"]),
        ("3.model", ["linked to node 4 (Load)", "4.ckpt_name", "4.fast"]),
        ("9.images", ["linked to node 3 (Sampler)", "3.seed"]),
    ],
)
def test_what_is_no_input_is_refused_with_the_remedy(name: str, words: list[str]) -> None:
    with pytest.raises(Asked) as error:
        find_target(WORKFLOW, name)
    for word in words:
        assert word in str(error.value)


def test_setting_leaves_the_workflow_as_it_was() -> None:
    before = copy.deepcopy(WORKFLOW)
    made = set_inputs(WORKFLOW, {Target("3", "seed"): 11})
    assert made["3"]["inputs"]["seed"] == 11
    assert before == WORKFLOW
    made["3"]["inputs"]["seed"] = 7
    assert made == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"nodes": [{"id": 1}], "links": []}', ['"Export (API)"', "browser"]),
        ("[]", ["list", '"Export (API)"']),
        ("{}", ["no nodes", '"Export (API)"']),
        ('{"3": {"inputs": {}}}', ["'3'", "class_type", '"Export (API)"']),
        ('{"3": {"class_type": "A", "inputs": []}}', ["'3'", "inputs"]),
        ('{"3": {"class_type": "A"}, "3": {"class_type": "B"}}', ["'3'", "twice"]),
        ("{", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
    ],
)
def test_a_file_that_is_no_api_workflow(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "flow.json"
    path.write_text(text)
    with pytest.raises(Asked) as error:
        load_workflow(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Asked, match="No such file"):
        load_workflow(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes('{"3": "é"}'.encode("latin-1"))
    with pytest.raises(Asked, match="not UTF-8"):
        load_workflow(tmp_path / "latin.json")


def test_a_byte_order_mark_and_the_body_of_a_request_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "flow.json"
    path.write_text(json.dumps({"prompt": WORKFLOW, "client_id": "x"}), encoding="utf-8-sig")
    assert load_workflow(path) == WORKFLOW
