"""Invariant: what a graph may contain is written in one form, for the host's nodes (recorded) and for ours (asked).

`core_nodes.json` holds the few nodes of the host that the example graphs use, as 0.3.64 and 0.33.0 describe them under
`/object_info`: names, types, defaults and the options that the graphs choose. SaveImage and PreviewAny have an output
on newer hosts only, which is left out. Ours come from their schemas, through the small V3 API of tests/nodes.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FAKE_HOST = HERE.parent / "nodes" / "fake_host"
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")
ANY = "*"


@dataclass(frozen=True)
class Input:
    """`options`: what a choice may be; None where it is a list of files or nothing to choose from."""

    name: str
    type: str
    label: str
    default: Any = None
    optional: bool = False
    multiline: bool = False
    options: tuple[str, ...] | None = None
    seed: bool = False
    """The front end adds a second widget, what happens to the value after a run."""
    least: float | None = None
    most: float | None = None

    @property
    def widget(self) -> bool:
        return self.type in WIDGETS


@dataclass(frozen=True)
class Output:
    name: str
    type: str


@dataclass(frozen=True)
class Kind:
    """A node as its schema has it; `inputs` in the schema's order."""

    title: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    ours: bool

    def input(self, name: str) -> Input:
        """KeyError where the schema has no such input."""
        for entry in self.inputs:
            if entry.name == name:
                return entry
        raise KeyError(name)


def core_nodes() -> dict[str, Kind]:
    """The recorded nodes of the host."""
    written = json.loads((HERE / "core_nodes.json").read_text(encoding="utf-8"))
    return {name: _recorded(node) for name, node in written.items()}


def _recorded(node: dict[str, Any]) -> Kind:
    inputs = tuple(
        Input(
            entry["name"],
            entry["type"],
            entry["name"],
            entry.get("default"),
            entry.get("optional", False),
            entry.get("multiline", False),
            tuple(entry["options"]) if "options" in entry else None,
            entry.get("control_after_generate", False),
            entry.get("min"),
            entry.get("max"),
        )
        for entry in node["inputs"]
    )
    return Kind(node["title"], inputs, tuple(Output(**entry) for entry in node["outputs"]), ours=False)


# ---------------------------------------------------------------------- ours
# What a host brings; `nodes` is its module, not the pack's.
OF_HOST = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server")


def _forget() -> None:
    """Drop the small API and every module that took its classes."""
    for name, module in list(sys.modules.items()):
        of_ours = name.startswith("balanced_offload.nodes.") and hasattr(module, "io")
        if of_ours or name.split(".")[0] in OF_HOST:
            del sys.modules[name]


@contextmanager
def schemas() -> Iterator[dict[str, Any]]:
    """Node id -> schema of every node of the pack, through its door, on the small V3 API."""
    pack = importlib.import_module("balanced_offload")
    _forget()
    sys.path.insert(0, str(FAKE_HOST))
    try:
        extension = asyncio.run(pack.comfy_entrypoint())
        classes = asyncio.run(extension.get_node_list())
        found = [kind.define_schema() for kind in classes]
        yield {schema.node_id: schema for schema in found}
    finally:
        sys.path.remove(str(FAKE_HOST))
        _forget()


def our_nodes() -> dict[str, Kind]:
    """The pack's nodes as their schemas have them now."""
    with schemas() as found:
        return {name: _asked(schema) for name, schema in found.items()}


# Filled on the user's machine: what the tests' machine lists says nothing about a shipped graph.
FILE_LISTS = {
    "ModelLoaderWithOffload": {"checkpoint", "diffusion_model", "text_encoder", "text_encoder_2", "text_encoder_3"}
    | {"vae", "clip_type", "weight_dtype"},
    "PipelineLoaderWithOffload": {"pipeline_name"},
}


def _asked(schema: Any) -> Kind:
    inputs = []
    for entry in schema.inputs:
        options = getattr(entry, "options", None)
        of_files = entry.id in FILE_LISTS.get(schema.node_id, ())
        inputs.append(
            Input(
                entry.id,
                entry.io_type,
                entry.display_name or entry.id,
                entry.default if hasattr(entry, "default") else None,
                bool(entry.optional),
                bool(getattr(entry, "multiline", False)),
                None if options is None or of_files else tuple(options),
                bool(getattr(entry, "control_after_generate", False)),
                getattr(entry, "min", None),
                getattr(entry, "max", None),
            )
        )
    outputs = tuple(Output(entry.display_name or entry.id, entry.io_type) for entry in schema.outputs)
    return Kind(schema.display_name, tuple(inputs), outputs, ours=True)


def all_nodes() -> dict[str, Kind]:
    return {**core_nodes(), **our_nodes()}
