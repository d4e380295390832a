"""Invariant: what the registry ships works in a real host: nodes, pages, translations, examples and a run of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..packaging.shipped import NO_GIT, copy_shipped, shipped_files
from ..workflows.catalog import WIDGETS, core_nodes
from ..workflows.test_workflows import NAMES, OURS
from .conftest import ROOT, Host
from .server import HostServer

FOLDER = "balanced-offload"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exactly the files of the registry package, in the folder that the Manager makes."""
    files = shipped_files(ROOT)
    if files is None:
        pytest.skip(NO_GIT)
    return copy_shipped(ROOT, files, tmp_path_factory.mktemp("package") / FOLDER)


@pytest.fixture(scope="module")
def server(host: Host, models: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """A host with the package as its only pack beside the tests' own; the demo's pipeline is a diffusers folder."""
    base = tmp_path_factory.mktemp("package_host")
    paths = base / "paths.yaml"
    paths.write_text(f"demo:\n  base_path: {json.dumps(str(package))}\n  diffusers: offload/demo\n", encoding="utf-8")
    made = HostServer(host.path, base, models, None, ("--extra-model-paths-config", str(paths)), (package,))
    made.start()
    yield made
    made.stop()


def workflow(package: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((package / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_every_node_arrives_and_nothing_failed(server: HostServer) -> None:
    info = server.object_info()
    assert {name for name, node in info.items() if node["python_module"] == f"custom_nodes.{FOLDER}"} == OURS
    log = server.log()
    assert "IMPORT FAILED" not in log and "Cannot import" not in log


def test_pages_translations_and_examples_are_served(server: HostServer, package: Path) -> None:
    for name in OURS:
        assert server.status_of(f"/extensions/{FOLDER}/docs/{name}.md") == 200
    assert set(server.get("/i18n")["en"]["nodeDefs"]) == OURS
    assert sorted(server.get("/workflow_templates")[FOLDER]) == NAMES
    for name in NAMES:
        served = server.get(f"/api/workflow_templates/{FOLDER}/{name}.json")
        assert served == json.loads((package / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        assert server.status_of(f"/api/workflow_templates/{FOLDER}/{name}.jpg") == 200


def test_the_recorded_nodes_are_the_hosts(server: HostServer) -> None:
    """tests/workflows/core_nodes.json, which the examples are checked against, on each host."""
    info = server.object_info()
    for name, kind in core_nodes().items():
        node = info[name]
        described = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        order = [*node["input_order"].get("required", []), *node["input_order"].get("optional", [])]
        assert order == [entry.name for entry in kind.inputs], name
        for entry in kind.inputs:
            type_name, *rest = described[entry.name]
            options = rest[0] if rest else {}
            choices = type_name if isinstance(type_name, list) else options.get("options", [])
            assert ("COMBO" if isinstance(type_name, list) else type_name) == entry.type, f"{name}.{entry.name}"
            assert set(entry.options or ()) <= set(choices), f"{name}.{entry.name}"
            if entry.widget and entry.type != "COMBO" and entry.default is not None:
                assert options["default"] == entry.default, f"{name}.{entry.name}"
            assert bool(options.get("control_after_generate")) == entry.seed, f"{name}.{entry.name}"
        outputs = list(zip(node["output_name"], node["output"], strict=True))
        assert outputs[: len(kind.outputs)] == [(entry.name, entry.type) for entry in kind.outputs], name


def test_the_host_knows_every_input_of_every_example(server: HostServer, package: Path) -> None:
    info = server.object_info()
    for name in NAMES:
        for key, node in workflow(package, name).items():
            groups = info[node["class_type"]]["input"]
            known = {**groups.get("required", {}), **groups.get("optional", {})}
            assert set(node["inputs"]) <= set(known), f"{name} {key}"
            for field, value in node["inputs"].items():
                type_name = known[field][0]
                is_widget = isinstance(type_name, list) or type_name in WIDGETS
                assert is_widget or isinstance(value, list), f"{name} {key}.{field}"


@pytest.mark.parametrize("name", ["06-digits-without-gpu", "07-tiny-model"])
def test_an_example_runs_without_a_gpu(server: HostServer, package: Path, name: str) -> None:
    if name.startswith("06"):
        pytest.importorskip("diffusers", reason="diffusers is not installed: its two nodes say so and the rest works")
    prompt_id = server.queue(workflow(package, name))
    entry = server.wait(prompt_id)
    assert entry["status"]["status_str"] == "success", entry["status"]
    nodes = {node["class_type"]: key for key, node in workflow(package, name).items()}
    assert len(entry["outputs"][nodes["SaveImage"]]["images"]) == 1
    record = server.get(f"/offload/report/{prompt_id}")
    assert record["schema"] == "offload-report/1" and record["complete"] is True
    assert entry["outputs"][nodes["VRAMReport"]]["vram_report"][0]["prompt_id"] == prompt_id
    assert not [line for line in server.log().splitlines() if "simulator" in line]
