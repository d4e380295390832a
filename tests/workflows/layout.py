"""Invariant: the UI graph says what the API graph says, in the form that the front end writes, laid out to be read.

A layout (layout.json) gives the columns of node ids from left to right, the note's text, and where the public files of
a graph are found. Sizes follow the front end's own: a title, 20 px a socket, 24 px a widget, and room for text.
"""

from __future__ import annotations

import uuid
from typing import Any

from .catalog import Input, Kind

GAP_X, GAP_Y, TOP, LEFT, TITLE = 60, 40, 60, 40, 30
NOTE_WIDTH, NOTE_HEIGHT = 420, 260
WIDTHS = {"CLIPTextEncode": 330, "PipelineGenerate": 380, "PreviewAny": 330, "SaveImage": 330, "VRAMReport": 330}
WIDE = 340
ROOM = {"SaveImage": 270, "PreviewAny": 120, "VRAMReport": 220}
"""Pixels of height for what such a node shows after a run."""
TEXT = 120
OPTIONAL = 7  # the shape of an optional socket
CORE = {"cnr_id": "comfy-core", "ver": "0.3.64"}
OURS = {"cnr_id": "balanced-offload", "ver": "0.1.0"}
AFTER_RUN = {"05-batch-report": "increment"}
"""What happens to seeds, where it is not "fixed"."""


def build(name: str, api: dict[str, Any], layout: dict[str, Any], kinds: dict[str, Kind]) -> dict[str, Any]:
    """The UI graph of `api`."""
    nodes = {key: _node(name, int(key), node, kinds[node["class_type"]]) for key, node in api.items()}
    links: list[list[Any]] = []
    for key, node in api.items():
        for field, value in node["inputs"].items():
            if isinstance(value, list):
                _connect(links, nodes, kinds[api[value[0]]["class_type"]], value, nodes[key], field)
    _place(nodes, layout["columns"])
    for key, models in layout.get("models", {}).items():
        nodes[key]["properties"]["models"] = models
    note = _note(len(api) + 1, layout["note"], layout["title"])
    ordered = [*nodes.values(), note]
    for place, key in enumerate(_execution_order(api)):
        nodes[key]["order"] = place + 1
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"balanced-offload/{name}")),
        "revision": 0,
        "last_node_id": note["id"],
        "last_link_id": len(links),
        "nodes": ordered,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.7, "offset": [0, 0]}},
        "version": 0.4,
    }


def _node(name: str, number: int, node: dict[str, Any], kind: Kind) -> dict[str, Any]:
    sockets = [entry for entry in kind.inputs if not entry.widget]
    widgets = [entry for entry in kind.inputs if entry.widget]
    values: list[Any] = []
    for entry in widgets:
        values.append(node["inputs"].get(entry.name, entry.default))
        if entry.seed:
            values.append(AFTER_RUN.get(name, "fixed"))
    made: dict[str, Any] = {
        "id": number,
        "type": node["class_type"],
        "pos": [0, 0],
        "size": _size(node["class_type"], kind, len(values)),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [_socket(entry) for entry in [*sockets, *widgets]],
        "outputs": [{"name": entry.name, "type": entry.type, "links": None} for entry in kind.outputs],
        "properties": {"Node name for S&R": node["class_type"], **(OURS if kind.ours else CORE)},
        "widgets_values": values,
    }
    if node["_meta"]["title"] != kind.title:
        made["title"] = node["_meta"]["title"]
    return made


def _socket(entry: Input) -> dict[str, Any]:
    found: dict[str, Any] = {"name": entry.name, "type": entry.type, "link": None}
    if entry.label != entry.name:
        found["localized_name"] = entry.label
    if entry.optional:
        found["shape"] = OPTIONAL
    if entry.widget:
        found["widget"] = {"name": entry.name}
    return found


def _size(type_name: str, kind: Kind, values: int) -> list[int]:
    sockets = sum(not entry.widget for entry in kind.inputs)
    texts = sum(entry.multiline for entry in kind.inputs)
    height = 20 * max(sockets, len(kind.outputs)) + 24 * (values - texts) + TEXT * texts + 14
    width = WIDTHS.get(type_name, WIDE if kind.ours else 300)
    return [width, height + ROOM.get(type_name, 0)]


def _connect(
    links: list[list[Any]],
    nodes: dict[str, dict[str, Any]],
    from_kind: Kind,
    source: list[Any],
    target: dict[str, Any],
    field: str,
) -> None:
    number, slot = len(links) + 1, source[1]
    place = [entry["name"] for entry in target["inputs"]].index(field)
    target["inputs"][place]["link"] = number
    output = nodes[source[0]]["outputs"][slot]
    output["links"] = [*(output["links"] or []), number]
    links.append([number, int(source[0]), slot, target["id"], place, from_kind.outputs[slot].type])


def _place(nodes: dict[str, dict[str, Any]], columns: list[list[int]]) -> None:
    left = LEFT
    for place, column in enumerate(columns):
        top = TOP + (NOTE_HEIGHT + TITLE + GAP_Y if place == 0 else 0)
        for number in column:
            node = nodes[str(number)]
            node["pos"] = [left, top]
            top += node["size"][1] + TITLE + GAP_Y
        widest = max(nodes[str(number)]["size"][0] for number in column)
        left += max(widest, NOTE_WIDTH if place == 0 else 0) + GAP_X


def _note(number: int, text: str, title: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [LEFT, TOP],
        "size": [NOTE_WIDTH, NOTE_HEIGHT],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title,
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def _execution_order(api: dict[str, Any]) -> list[str]:
    done: list[str] = []

    def visit(key: str) -> None:
        if key in done:
            return
        for value in api[key]["inputs"].values():
            if isinstance(value, list):
                visit(value[0])
        done.append(key)

    for key in api:
        visit(key)
    return done
