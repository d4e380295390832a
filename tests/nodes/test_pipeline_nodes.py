"""Invariant: what a saved workflow names in the pipeline nodes stays; what they cannot do is said in plain words."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LOADER = ("policy", "pipeline_name", "dtype")
GENERATE = ("pipeline", "prompt", "negative", "width", "height", "steps", "guidance", "seed", "image", "strength")


@pytest.fixture
def place(nodes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one `diffusers` folder of the host, with a pipeline in it."""
    (tmp_path / "group" / "tiny").mkdir(parents=True)
    (tmp_path / "group" / "tiny" / "model_index.json").write_text("{}")
    monkeypatch.setattr(sys.modules["folder_paths"], "get_folder_paths", lambda kind: [str(tmp_path)])
    return tmp_path


def test_ids_and_their_order_are_for_ever(nodes: dict[str, Any]) -> None:
    loader = nodes["PipelineLoaderWithOffload"].define_schema()
    generate = nodes["PipelineGenerate"].define_schema()
    assert [item.id for item in loader.inputs] == list(LOADER)
    assert [item.id for item in generate.inputs] == list(GENERATE)
    assert [item.id for item in loader.outputs] == ["pipeline"] and loader.outputs[0].io_type == "OFFLOAD_PIPELINE"
    assert [item.id for item in generate.outputs] == ["image_out"] and generate.outputs[0].io_type == "IMAGE"
    for schema in (loader, generate):
        assert schema.category == "Offload"
        assert {"lowvram", "block swap", "unload", "oom", "vram", "offload"} <= set(schema.search_aliases)
        assert all(item.tooltip for item in (*schema.inputs, *schema.outputs))
        advanced = [bool(item.advanced) for item in schema.inputs]
        assert advanced == sorted(advanced), "advanced ones last"
        assert not {item.id for item in schema.inputs} & {item.id for item in schema.outputs}


def test_the_list_is_what_the_host_has_now(nodes: dict[str, Any], place: Path) -> None:
    node = nodes["PipelineLoaderWithOffload"]
    assert node.define_schema().inputs[1].options == ["group/tiny"]
    (place / "other").mkdir()
    (place / "other" / "model_index.json").write_text("{}")
    assert node.define_schema().inputs[1].options == ["group/tiny", "other"]


def test_a_name_is_judged_before_the_run(nodes: dict[str, Any], place: Path) -> None:
    node = nodes["PipelineLoaderWithOffload"]
    assert node.validate_inputs(pipeline_name="group/tiny") is True
    assert node.validate_inputs() is True, "connected to another node: not known yet"
    assert "Allowed are group/tiny" in node.validate_inputs(pipeline_name="zz")
    assert "refused" in node.validate_inputs(pipeline_name="../x")


def test_changed_files_run_the_loader_again_and_a_policy_is_not_its_affair(nodes: dict[str, Any], place: Path) -> None:
    node = nodes["PipelineLoaderWithOffload"]
    before = node.fingerprint_inputs(pipeline_name="group/tiny", policy=None)
    assert before == node.fingerprint_inputs(pipeline_name="group/tiny", policy=object(), dtype="auto")
    (place / "group" / "tiny" / "unet.json").write_text("{}")
    assert before != node.fingerprint_inputs(pipeline_name="group/tiny")
    assert node.fingerprint_inputs(pipeline_name="gone") is None


def test_without_diffusers_the_nodes_are_there_and_say_what_to_install(
    nodes: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter: ModuleType = importlib.import_module("balanced_offload.offload.adapters.comfyui_pipeline")
    monkeypatch.setattr(adapter, "installed", lambda: False)
    with pytest.raises(ImportError, match="pip install diffusers transformers"):
        nodes["PipelineLoaderWithOffload"].execute(pipeline_name="group/tiny")


def test_importing_the_adapter_imports_neither_diffusers_nor_a_host(root: Path) -> None:
    import subprocess

    code = (
        "import sys; sys.path.insert(0, 'tests'); import conftest;"
        "import balanced_offload.offload.adapters.comfyui_pipeline as p;"
        "found = {'diffusers', 'transformers', 'comfy', 'aiohttp'} & {n.split('.')[0] for n in sys.modules};"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_no_pipeline_names_the_node_that_makes_one(nodes: dict[str, Any]) -> None:
    values = dict.fromkeys(GENERATE[1:8], 1)
    with pytest.raises(TypeError, match=r"pipeline: got str, allowed is what Load Diffusers Pipeline \(Offload\)"):
        nodes["PipelineGenerate"].execute(pipeline="model", **values)
