"""Invariant: what a saved workflow depends on stays: ids, order, types and choices of every node's inputs and outputs.

`object_info.json` is the snapshot; a host adds what it knows (file names, its samplers), which is left out. To renew it
after a deliberate change: `BALANCED_OFFLOAD_RENEW=1 python -m pytest tests/host/test_object_info.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .conftest import Host
from .server import HostServer

SNAPSHOT = Path(__file__).with_name("object_info.json")
IDS = (
    *("ApplyOffloadPolicy", "FreeVRAMToFit", "ModelLoaderWithOffload", "OffloadPolicy"),
    *("PipelineGenerate", "PipelineLoaderWithOffload", "VRAMReport"),
)
OF_THE_HOST = ("checkpoint", "diffusion_model", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
OF_THE_HOST += ("clip_type", "weight_dtype", "pipeline_name")
"""Choices that are the host's or the user's files: only the first is ours."""


def choices(kind: Any, options: dict[str, Any]) -> list[str] | None:
    """Of a combo, as older (a list for a type) and newer hosts write it."""
    if isinstance(kind, list):
        return kind
    return options.get("options") if kind == "COMBO" else None


def described(node: dict[str, Any]) -> dict[str, Any]:
    """What of a node's description is a promise to saved workflows and scripts."""
    inputs: dict[str, Any] = {}
    for group in ("required", "optional"):
        for name in node["input_order"].get(group, []):
            spec = node["input"][group][name]
            options = spec[1] if len(spec) > 1 else {}
            found = choices(spec[0], options)
            inputs[name] = {"type": "COMBO" if found is not None else spec[0], "optional": group == "optional"}
            if found is not None and name not in OF_THE_HOST:
                inputs[name]["options"] = found
            if "default" in options and name not in OF_THE_HOST:
                inputs[name]["default"] = options["default"]
    return {
        "display_name": node["display_name"],
        "category": node["category"],
        "output_node": node["output_node"],
        "inputs": inputs,
        "outputs": [list(pair) for pair in zip(node["output_name"], node["output"], strict=True)],
    }


def test_the_snapshot(server: HostServer) -> None:
    info = server.object_info()
    found = {name: described(info[name]) for name in IDS}
    if os.environ.get("BALANCED_OFFLOAD_RENEW"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_node_of_ours_is_in_it(server: HostServer) -> None:
    ours = [name for name, node in server.object_info().items() if "balanced_offload" in node["python_module"]]
    assert sorted(ours) == sorted(IDS)
    assert {server.object_info(name)[name]["category"] for name in ours} == {"Offload"}


def test_every_input_and_output_says_what_it_is(server: HostServer) -> None:
    for name in IDS:
        node = server.object_info(name)[name]
        assert node["description"], name
        for group in ("required", "optional"):
            for field, spec in node["input"].get(group, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{name}.{field}"
        assert all(node["output_tooltips"]), name


def test_what_newer_hosts_show(server: HostServer, host: Host) -> None:
    """`advanced` and `search_aliases` where the host knows them, and nowhere else."""
    for name in IDS:
        node = server.object_info(name)[name]
        if host.old:
            assert "search_aliases" not in node
            continue
        assert {"lowvram", "block swap", "unload", "oom"} <= set(node["search_aliases"]), name
    if not host.old:
        fields = server.object_info("OffloadPolicy")["OffloadPolicy"]["input"]
        order = [*fields["required"], *fields["optional"]]
        advanced = [bool({**fields["required"], **fields["optional"]}[field][1].get("advanced")) for field in order]
        assert any(advanced) and advanced == sorted(advanced), "advanced ones come last"
