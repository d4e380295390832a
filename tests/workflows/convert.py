"""Invariant: a UI graph becomes the API graph that the front end would send, by the schemas and nothing else.

UI form (version 0.4): `nodes` with sockets before widgets, `widgets_values` in the schema's order (a seed carries a
second value, what happens to it after a run), `links` as [id, from node, from slot, to node, to slot, type].
"""

from __future__ import annotations

from typing import Any

from .catalog import Kind

NOTES = ("Note", "MarkdownNote")
AFTER_RUN = ("fixed", "increment", "decrement", "randomize")


class GraphError(ValueError):
    """The UI graph contradicts itself or the schemas."""


def to_api(graph: dict[str, Any], kinds: dict[str, Kind]) -> dict[str, Any]:
    """API form of `graph`: id -> class_type, inputs, title. Notes are left out, as they are nothing to the server."""
    links = {link[0]: link for link in graph["links"]}
    found: dict[str, Any] = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        kind = kinds.get(node["type"])
        if kind is None:
            raise GraphError(f"node {node['id']}: no schema of {node['type']}")
        inputs = {**_widgets(node, kind), **_links(node, kind, links)}
        ordered = {entry.name: inputs[entry.name] for entry in kind.inputs if entry.name in inputs}
        title = node.get("title", kind.title)
        found[str(node["id"])] = {"class_type": node["type"], "_meta": {"title": title}, "inputs": ordered}
    return found


def _widgets(node: dict[str, Any], kind: Kind) -> dict[str, Any]:
    values = list(node["widgets_values"])
    found = {}
    for entry in kind.inputs:
        if not entry.widget:
            continue
        if not values:
            raise GraphError(f"node {node['id']} ({node['type']}): no value for {entry.name}")
        found[entry.name] = values.pop(0)
        if entry.seed and (not values or values.pop(0) not in AFTER_RUN):
            raise GraphError(f"node {node['id']} ({node['type']}): {entry.name} lacks what happens to it after a run")
    if values:
        raise GraphError(f"node {node['id']} ({node['type']}): {len(values)} values too many: {values}")
    return found


def _links(node: dict[str, Any], kind: Kind, links: dict[int, list[Any]]) -> dict[str, Any]:
    found = {}
    for slot, entry in enumerate(node["inputs"]):
        kind.input(entry["name"])
        if entry["link"] is None:
            continue
        _, source, source_slot, target, target_slot, _ = links[entry["link"]]
        if (target, target_slot) != (node["id"], slot):
            raise GraphError(f"link {entry['link']}: ends at {target}.{target_slot}, but {node['id']}.{slot} names it")
        found[entry["name"]] = [str(source), source_slot]
    return found
