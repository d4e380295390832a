"""Invariant: each example says the same in the front end's form and the API's, and both are what the nodes take."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from .catalog import ANY, Kind, all_nodes
from .convert import AFTER_RUN, NOTES, GraphError, to_api
from .layout import build

HERE = Path(__file__).resolve().parent
WORKFLOWS = HERE.parents[1] / "workflows"
LAYOUTS = json.loads((HERE / "layout.json").read_text(encoding="utf-8"))
NAMES = sorted(LAYOUTS)
OURS = {
    *("OffloadPolicy", "ModelLoaderWithOffload", "ApplyOffloadPolicy", "PipelineLoaderWithOffload"),
    *("PipelineGenerate", "FreeVRAMToFit", "VRAMReport"),
}
FOLDERS = {"checkpoints", "diffusion_models", "text_encoders", "vae"}


@pytest.fixture(scope="module")
def kinds() -> dict[str, Kind]:
    return all_nodes()


def ui(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_every_file_belongs_to_an_example() -> None:
    expected = {f"{name}.{ending}" for name in NAMES for ending in ("json", "jpg")} | {"README.md", "api"}
    assert {path.name for path in WORKFLOWS.iterdir()} == expected
    assert {path.name for path in (WORKFLOWS / "api").iterdir()} == {f"{name}.json" for name in NAMES}


def test_every_node_of_ours_has_an_example(kinds: dict[str, Kind]) -> None:
    assert {name for name, kind in kinds.items() if kind.ours} == OURS
    used = {node["class_type"] for name in NAMES for node in api(name).values()}
    assert used & OURS == OURS
    assert used <= set(kinds)
    assert used >= {name for name, kind in kinds.items() if not kind.ours}, "a recorded node that no example uses"


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph(name: str, kinds: dict[str, Kind]) -> None:
    converted, written = to_api(ui(name), kinds), api(name)
    assert converted == written
    for key, node in converted.items():
        assert list(node["inputs"]) == [
            entry.name for entry in kinds[node["class_type"]].inputs if entry.name in node["inputs"]
        ], key


@pytest.mark.parametrize("name", NAMES)
def test_the_api_graph_is_what_the_nodes_take(name: str, kinds: dict[str, Kind]) -> None:
    graph = api(name)
    for key, node in graph.items():
        kind = kinds[node["class_type"]]
        given = node["inputs"]
        missing = {entry.name for entry in kind.inputs if not entry.optional} - set(given)
        assert missing == set(), f"{key}: {missing}"
        for field, value in given.items():
            entry = kind.input(field)
            if isinstance(value, list):
                source = kinds[graph[value[0]]["class_type"]].outputs[value[1]]
                assert ANY in (entry.type, source.type) or entry.type == source.type, f"{key}.{field}"
            else:
                check_value(f"{key}.{field}", entry, value)


def check_value(where: str, entry: Any, value: Any) -> None:
    python = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}[entry.type]
    assert isinstance(value, python), where
    assert isinstance(value, bool) == (entry.type == "BOOLEAN"), where
    if entry.options is not None:
        assert value in entry.options, where
    if entry.least is not None:
        assert value >= entry.least, where
    if entry.most is not None:
        assert value <= entry.most, where


@pytest.mark.parametrize("name", NAMES)
def test_the_ui_graph_is_sound(name: str, kinds: dict[str, Kind]) -> None:
    graph = ui(name)
    assert graph["version"] == 0.4
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and max(nodes) == graph["last_node_id"]
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"]) and graph["last_link_id"] == max(links)
    for number, source, from_slot, target, to_slot, type_name in graph["links"]:
        assert number in nodes[source]["outputs"][from_slot]["links"]
        assert nodes[target]["inputs"][to_slot]["link"] == number
        assert nodes[source]["outputs"][from_slot]["type"] == type_name
        assert nodes[source]["order"] < nodes[target]["order"]
    for node in nodes.values():
        if node["type"] in NOTES:
            continue
        kind = kinds[node["type"]]
        names = [entry["name"] for entry in node["inputs"]]
        sockets = [entry.name for entry in kind.inputs if not entry.widget]
        assert names == sockets + [entry.name for entry in kind.inputs if entry.widget]
        for entry in node["inputs"]:
            schema = kind.input(entry["name"])
            assert entry["type"] == schema.type
            assert ("widget" in entry) == schema.widget
            assert ("shape" in entry) == schema.optional
            assert entry.get("localized_name", entry["name"]) == schema.label
        assert [(entry["name"], entry["type"]) for entry in node["outputs"]] == [(o.name, o.type) for o in kind.outputs]
        listed = {number for entry in node["outputs"] for number in entry["links"] or []}
        assert listed == {link[0] for link in graph["links"] if link[1] == node["id"]}


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_lie_on_each_other(name: str) -> None:
    boxes = [(*node["pos"], *node["size"], node["id"]) for node in ui(name)["nodes"]]
    title = 30
    for place, (x, y, wide, high, one) in enumerate(boxes):
        for a, b, width, height, other in boxes[place + 1 :]:
            apart = x + wide <= a or a + width <= x or y + high <= b - title or b + height <= y - title
            assert apart, f"{one} and {other}"


@pytest.mark.parametrize("name", NAMES)
def test_the_ui_graph_is_the_one_that_is_built(name: str, kinds: dict[str, Kind]) -> None:
    """After a change of a graph, of layout.json or of a schema: python tests/workflows/build.py"""
    assert ui(name) == build(name, api(name), LAYOUTS[name], kinds)


@pytest.mark.parametrize("name", NAMES)
def test_no_path_of_a_machine_and_only_known_downloads(name: str) -> None:
    text = (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")
    text += (WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r'"(?:/|~|[A-Za-z]:[\\/]|\\\\)', text)
    assert not re.search(r"/(?:home|root|Users|tmp|work|mnt)/", text)
    urls = set(re.findall(r"https?://[^\"\s)]+", text))
    models = [model for node in ui(name)["nodes"] for model in node["properties"].get("models", [])]
    assert urls == {model["url"] for model in models}
    for model in models:
        assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(f"/{model['name']}")
        assert model["directory"] in FOLDERS
        assert f'"{model["name"]}"' in (WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_one(name: str) -> None:
    image = pytest.importorskip("PIL.Image")
    with image.open(WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.format == "JPEG" and picture.width == 1280 and 400 <= picture.height <= 1280
        assert len(picture.convert("RGB").quantize(64).getcolors()) > 16, "nothing is drawn"
    assert (WORKFLOWS / f"{name}.jpg").stat().st_size < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_the_note_says_what_to_do(name: str, kinds: dict[str, Kind]) -> None:
    (note,) = [node for node in ui(name)["nodes"] if node["type"] in NOTES]
    assert note["title"] == LAYOUTS[name]["title"] and len(note["widgets_values"][0]) > 150
    for bold in re.findall(r"\*\*(.+?)\*\*", note["widgets_values"][0]):
        assert bold in {kind.title for kind in kinds.values() if kind.ours}, bold
    for key, field in re.findall(r"--set (\d+)\.(\w+)=", note["widgets_values"][0]):
        assert field in api(name)[key]["inputs"]


# ---------------------------------------------------------------------- the check itself finds what it is there for
def changed(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    graph = ui(name)
    return graph, {node["type"]: node for node in graph["nodes"]}


def test_a_swapped_value_is_found(kinds: dict[str, Kind]) -> None:
    graph, nodes = changed("01-observe")
    values = nodes["KSampler"]["widgets_values"]
    values[2], values[3] = values[3], values[2]
    assert to_api(graph, kinds) != api("01-observe")


@pytest.mark.parametrize("cut", ["shorter", "longer"])
def test_too_few_and_too_many_values_are_found(kinds: dict[str, Kind], cut: str) -> None:
    graph, nodes = changed("01-observe")
    values = nodes["EmptyLatentImage"]["widgets_values"]
    values.pop() if cut == "shorter" else values.append(1)
    with pytest.raises(GraphError, match="EmptyLatentImage"):
        to_api(graph, kinds)


def test_a_seed_without_its_second_value_is_found(kinds: dict[str, Kind]) -> None:
    graph, nodes = changed("01-observe")
    assert nodes["KSampler"]["widgets_values"].pop(1) in AFTER_RUN
    with pytest.raises(GraphError, match="seed"):
        to_api(graph, kinds)


def test_a_rewired_link_is_found(kinds: dict[str, Kind]) -> None:
    graph, _ = changed("02-fit-aware-hires")
    link = next(link for link in graph["links"] if link[5] == "VAE" and link[3] == 10)
    other = copy.deepcopy(link)
    other[1], other[2] = 2, 2
    graph["links"][graph["links"].index(link)] = other
    assert to_api(graph, kinds) != api("02-fit-aware-hires")


def test_a_link_that_ends_elsewhere_is_found(kinds: dict[str, Kind]) -> None:
    graph, _ = changed("01-observe")
    graph["links"][0][4] += 1
    with pytest.raises(GraphError, match="ends at"):
        to_api(graph, kinds)


def test_an_unknown_node_is_found(kinds: dict[str, Kind]) -> None:
    graph, nodes = changed("01-observe")
    nodes["KSampler"]["type"] = "KSamplerOfAnotherPack"
    with pytest.raises(GraphError, match="KSamplerOfAnotherPack"):
        to_api(graph, kinds)
