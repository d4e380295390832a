"""What a prompt asks for, as one short text. Invariant: equal for the same graph, models and sizes, else another.

The text that is encoded, the seed, names of files to write and the offload policy do not change what can be compared;
neither do ids, which differ when somebody builds the same graph anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from . import comfyui_runs_host as host

OURS = frozenset({"OffloadPolicy", "VRAMReport", "FreeVRAMToFit"})
"""Nodes whose presence does not make it another workload."""
FREE = frozenset(
    {"seed", "noise_seed", "control_after_generate", "filename_prefix", "policy", "string", "prompt", "negative"}
    | {"positive", "text", "text_g", "text_l", "clip_l", "t5xxl"}
)
"""Inputs that differ between runs that can be compared."""


def workload_of(prompt_id: str) -> str | None:
    """The workload of a prompt that executes, 16 hexadecimal digits; None where the host does not show its graph."""
    with contextlib.suppress(Exception):
        return digest(host.registry(prompt_id).dynprompt.original_prompt)
    return None


def digest(graph: Mapping[str, Any]) -> str | None:
    """Of a graph in the host's API format; None for an empty one."""
    if not graph:
        return None
    free = _free_nodes(graph)
    kept = (node for key, node in graph.items() if node["class_type"] not in OURS and key not in free)
    return hashlib.sha256("\n".join(sorted(_line(graph, node) for node in kept)).encode(errors="replace")).hexdigest()[
        :16
    ]


def _free_nodes(graph: Mapping[str, Any]) -> set[str]:
    """Nodes whose result goes into free inputs alone: where a text or a seed comes from another node."""
    ends: dict[str, list[tuple[str, str]]] = {}
    for key, node in graph.items():
        for name, value in node.get("inputs", {}).items():
            if _is_link(graph, value):
                ends.setdefault(str(value[0]), []).append((key, name))
    free: set[str] = set()
    grown = True
    while grown:
        more = {
            key
            for key, consumers in ends.items()
            if key not in free and all(name in FREE or consumer in free for consumer, name in consumers)
        }
        free |= more
        grown = bool(more)
    return free


def _line(graph: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    inputs = {key: _value(graph, value) for key, value in node.get("inputs", {}).items() if key not in FREE}
    return json.dumps([node["class_type"], inputs], sort_keys=True, default=str)


def _value(graph: Mapping[str, Any], value: Any) -> Any:
    """A link is the class of the node that it comes from, so that ids do not count; nodes of ours pass things on."""
    for _ in range(len(graph)):
        if not _is_link(graph, value):
            return value
        source = graph[str(value[0])]
        if source["class_type"] not in OURS or "anything" not in source.get("inputs", {}):
            return ["link", str(source["class_type"]), value[1]]
        value = source["inputs"]["anything"]
    return None


def _is_link(graph: Mapping[str, Any], value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) in graph
