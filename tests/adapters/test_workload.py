"""Invariant tested: what can be compared has one workload; another size, model or step count has another."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from balanced_offload.offload.adapters.comfyui_workload import digest

GRAPH: dict[str, Any] = {
    "1": {"class_type": "OffloadPolicy", "inputs": {"mode": "balanced", "fit_aware": False}},
    "2": {"class_type": "ModelLoaderWithOffload", "inputs": {"policy": ["1", 0], "diffusion_model": "a.safetensors"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["2", 1]}},
    "4": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "positive": ["3", 0], "seed": 5, "steps": 20}},
    "5": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["4", 0]}},
}


def changed(node: str, **inputs: Any) -> dict[str, Any]:
    graph = copy.deepcopy(GRAPH)
    graph[node]["inputs"].update(inputs)
    return graph


@pytest.mark.parametrize(
    "graph",
    [
        changed("1", fit_aware=True),
        changed("3", text="a dog"),
        changed("4", seed=6),
        changed("5", filename_prefix="y"),
        {**GRAPH, "9": {"class_type": "VRAMReport", "inputs": {"anything": ["4", 0]}}},
        {key: node for key, node in reversed(GRAPH.items())},
    ],
    ids=["policy", "text", "seed", "file", "report", "order"],
)
def test_the_same_workload(graph: dict[str, Any]) -> None:
    assert digest(graph) == digest(GRAPH)


def linked(kind: str, value: Any, node: str, field: str) -> dict[str, Any]:
    """An input that another node supplies."""
    return {**changed(node, **{field: ["8", 0]}), "8": {"class_type": kind, "inputs": {"value": value}}}


@pytest.mark.parametrize(("node", "field"), [("3", "text"), ("4", "seed")])
def test_a_text_or_seed_from_another_node_does_not_count(node: str, field: str) -> None:
    one, two = (digest(linked("Primitive", value, node, field)) for value in ("a", "b"))
    assert one == two == digest(GRAPH)
    chain = linked("Concat", "a", node, field)
    chain["8"]["inputs"]["more"] = ["7", 0]
    chain["7"] = {"class_type": "Primitive", "inputs": {"value": "far"}}
    assert digest(chain) == digest(GRAPH)


def test_what_counts_comes_from_another_node_and_counts() -> None:
    one, two = (digest(linked("Primitive", value, "4", "steps")) for value in (20, 21))
    assert one != two


def test_a_report_in_the_middle_makes_no_other_workload() -> None:
    graph = {**changed("5", images=["9", 0]), "9": {"class_type": "VRAMReport", "inputs": {"anything": ["4", 0]}}}
    assert digest(graph) == digest(GRAPH)


def test_links_in_a_circle_end() -> None:
    graph = {key: {"class_type": "VRAMReport", "inputs": {"anything": [other, 0]}} for key, other in ("ab", "ba")}
    graph["c"] = {"class_type": "SaveImage", "inputs": {"images": ["a", 0]}}
    assert digest(graph)


def test_ids_do_not_count() -> None:
    renamed = {
        f"1{key}": {
            "class_type": node["class_type"],
            "inputs": {k: [f"1{v[0]}", v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()},
        }
        for key, node in GRAPH.items()
    }
    assert digest(renamed) == digest(GRAPH)


@pytest.mark.parametrize(
    "graph",
    [
        changed("4", steps=21),
        changed("2", diffusion_model="b.safetensors"),
        changed("4", model=["3", 0]),
        {key: node for key, node in GRAPH.items() if key != "5"},
        {**GRAPH, "6": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0]}}},
    ],
    ids=["steps", "model", "link", "less", "more"],
)
def test_another_workload(graph: dict[str, Any]) -> None:
    assert digest(graph) != digest(GRAPH)


def test_what_is_no_graph_has_none() -> None:
    assert digest({}) is None
