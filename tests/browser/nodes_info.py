"""Invariant: the stub's nodes are the pack's own snapshot and the core nodes of the default graph, nothing made up.

The snapshots say what a saved workflow depends on; what a host adds (files, samplers, bounds) is put in here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK = "custom_nodes.balanced_offload"
ADVANCED = ("headroom", "reserve", "pinned_ram", "gc_threshold", "prefetch", "fit_aware", "use_core_dynamic")
FILES = {"ckpt_name": ["tiny.safetensors"]}
DEFAULT_GRAPH = {
    "UNETLoader": ({"unet_name": "COMBO", "weight_dtype": "COMBO"}, "MODEL"),
    "CLIPLoader": ({"clip_name": "COMBO", "type": "COMBO", "device": "COMBO"}, "CLIP"),
    "VAELoader": ({"vae_name": "COMBO"}, "VAE"),
    "ModelSamplingAuraFlow": ({"model": "MODEL", "shift": "FLOAT"}, "MODEL"),
}
"""What the front end opens with and no workflow of ours has: inputs, output."""


def _read(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return found


def _described(name: str, title: str, required: dict[str, Any], optional: dict[str, Any], **more: Any) -> Any:
    outputs: list[list[str]] = more.pop("outputs")
    base = {
        "input": {"required": required, "optional": optional},
        "input_order": {"required": list(required), "optional": list(optional)},
        **{"output": [kind for _, kind in outputs], "output_is_list": [False] * len(outputs)},
        **{"output_name": [label for label, _ in outputs], "name": name, "display_name": title, "description": ""},
        **{"output_node": False, "deprecated": False, "experimental": False},
    }
    return {**base, **more}


def _spec(name: str, entry: dict[str, Any]) -> list[Any]:
    """One input in the host's words: [type, options]."""
    options = {key: value for key, value in entry.items() if key not in ("type", "optional", "options", "name")}
    if name in ADVANCED:
        options["advanced"] = True
    if entry["type"] == "COMBO":
        return ["COMBO", {**options, "options": entry.get("options") or FILES.get(name, ["none"])}]
    return [entry["type"], options]


def _ours() -> dict[str, Any]:
    made = {}
    for name, node in _read("tests/host/object_info.json").items():
        specs = {key: (_spec(key, entry), entry["optional"]) for key, entry in node["inputs"].items()}
        made[name] = _described(
            name,
            node["display_name"],
            {key: spec for key, (spec, optional) in specs.items() if not optional},
            {key: spec for key, (spec, optional) in specs.items() if optional},
            outputs=node["outputs"],
            category=node["category"],
            output_node=node["output_node"],
            python_module=PACK,
        )
    return made


def _core() -> dict[str, Any]:
    nodes = _read("tests/workflows/core_nodes.json")
    for name, (inputs, output) in DEFAULT_GRAPH.items():
        entries = [{"name": key, "type": kind} for key, kind in inputs.items()]
        nodes.setdefault(name, {"title": name, "inputs": entries, "outputs": [{"name": output, "type": output}]})
    made = {}
    for name, node in nodes.items():
        required = {entry["name"]: _spec(entry["name"], entry) for entry in node["inputs"]}
        made[name] = _described(
            name,
            node["title"],
            required,
            {},
            outputs=[[output["name"], output["type"]] for output in node["outputs"]],
            category="core",
            output_node=name in ("SaveImage", "PreviewAny"),
            python_module="nodes",
        )
    return made


def object_info() -> dict[str, Any]:
    """`GET /object_info`."""
    return {**_core(), **_ours()}


def translations() -> dict[str, Any]:
    """`GET /i18n`: the pack's words, as a host gathers them."""
    main = _read("locales/en/main.json")
    words = {"nodeDefs": _read("locales/en/nodeDefs.json"), "settings": _read("locales/en/settings.json")}
    return {"en": {**main, **words}}
