"""Guards: an input that is set is one that the workflow has, by one unmistakable name, and is no link.

A workflow in API format is `{node id: {"class_type", "inputs": {name: value or [node id, slot]}, "_meta": {"title"}}}`.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Prompt = dict[str, Any]
MOST_BYTES = 64 << 20


class Asked(ValueError):
    """Something was asked wrongly: one message that names what was given, what is allowed and the remedy."""


@dataclass(frozen=True, order=True)
class Target:
    """One input of one node. `str()` of it is its name in columns and messages: `NODE.INPUT`."""

    node: str
    input: str

    def __str__(self) -> str:
        return f"{self.node}.{self.input}"


def load_workflow(path: Path) -> Prompt:
    """The graph of a file in API format.

    Raises:
        Asked: no such file, not JSON, a node twice, or a workflow that was saved for the browser.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise Asked(f"{path}: more than {MOST_BYTES >> 20} MiB, which is no workflow")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Asked(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise Asked(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); allowed: a JSON file") from None
    try:
        document = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        if isinstance(error, Asked):
            raise Asked(f"{path}: {error}") from None
        raise Asked(f"{path}: not JSON ({error})") from None
    return _checked(document, path)


def set_inputs(prompt: Prompt, values: Mapping[Target, Any]) -> Prompt:
    """A copy of the graph with these values."""
    changed = copy.deepcopy(prompt)
    for target, value in values.items():
        changed[target.node]["inputs"][target.input] = value
    return changed


def find_target(prompt: Prompt, name: str) -> Target:
    """The input that `NODE.INPUT` means; NODE is an id, or a title or class that only one node has.

    A title and an input's name may hold dots, so every split is tried.

    Raises:
        Asked: there is no such node or input (near names are listed), several, or the input is a link.
    """
    splits = [(name[:at], name[at + 1 :]) for at, letter in enumerate(name) if letter == "."]
    splits = [(node, field) for node, field in splits if node and field]
    if not splits:
        raise Asked(f"--set: got {name!r}, allowed: NODE.INPUT, for example {_example(prompt)}")
    found = [(nodes, field) for node, field in splits if (nodes := find_nodes(prompt, node))]
    if not found:
        node = splits[0][0]
        near = "" if node.isdigit() else _near(node, [*prompt, *_names(prompt)])
        others = near or f"it has {_list(f'{one} ({_label(prompt, one)})' for one in prompt)}"
        raise Asked(f"--set {name}: no node {node!r} in the workflow; {others}")
    for nodes, field in found:
        holders = [node for node in nodes if field in _inputs(prompt, node)]
        if len(nodes) == 1 and holders:
            return _not_a_link(prompt, Target(nodes[0], field))
    for nodes, field in found:
        if len(nodes) > 1:
            ways = _list(f"{node}.{field} ({_label(prompt, node)})" for node in nodes)
            raise Asked(f"--set {name}: {len(nodes)} nodes have that name; take the id: {ways}")
    nodes, field = found[0]
    has = list(_inputs(prompt, nodes[0]))
    near = _near(field, has) or (f"it has: {_list(has)}" if has else "it has none in this workflow")
    raise Asked(f"--set {name}: node {nodes[0]} ({_label(prompt, nodes[0])}) has no input {field!r}; {near}")


def find_nodes(prompt: Prompt, name: str) -> list[str]:
    """The ids that a name may mean: an id itself, else titles, else classes, else either without regard to case."""
    if name in prompt:
        return [name]
    for same in (
        lambda node: _title(prompt, node) == name,
        lambda node: prompt[node]["class_type"] == name,
        lambda node: name.casefold() in (_title(prompt, node).casefold(), prompt[node]["class_type"].casefold()),
    ):
        found = [node for node in prompt if same(node)]
        if found:
            return found
    return []


def value_of(prompt: Prompt, target: Target) -> Any:
    """What the workflow has there now."""
    return prompt[target.node]["inputs"][target.input]


def class_of(prompt: Prompt, node: str) -> str:
    """The node's class, as the host knows it."""
    return str(prompt[node]["class_type"])


def _not_a_link(prompt: Prompt, target: Target) -> Target:
    value = value_of(prompt, target)
    if not isinstance(value, (list, dict)):
        return target
    label = _label(prompt, target.node)
    if not is_link(value):
        raise Asked(f"--set {target}: the value of node {label!r} there is a {type(value).__name__}, not one value")
    source = str(value[0])
    begin = f"--set {target}: that input of {label!r} is linked to node {source}"
    if source not in prompt:
        raise Asked(f"{begin}, which the workflow lacks; export it again")
    own = [name for name, given in _inputs(prompt, source).items() if not isinstance(given, (list, dict))]
    if own:
        ways = _list(f"{source}.{name}" for name in own)
        raise Asked(f"{begin} ({_label(prompt, source)}); set it there: {ways}")
    raise Asked(f"{begin} ({_label(prompt, source)}), which has no value of its own; unlink it and export again")


def is_link(value: Any) -> bool:
    """Whether a value is `[node id, slot]`, as the host reads it."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _checked(document: Any, path: Path) -> Prompt:
    export = 'in ComfyUI: menu, "Export (API)" (older: "Save (API Format)", with the developer options on)'
    if not isinstance(document, dict):
        raise Asked(f"{path}: got a JSON {type(document).__name__}, allowed: a workflow in API format; {export}")
    if isinstance(document.get("nodes"), list):
        raise Asked(f"{path}: that is the workflow as the browser saves it, which the API does not take; {export}")
    if set(document) <= {"prompt", "client_id", "extra_data", "number", "front"} and "prompt" in document:
        document = document["prompt"] if isinstance(document["prompt"], dict) else {}
    if not document:
        raise Asked(f"{path}: no nodes; {export}")
    for node, held in document.items():
        if not (isinstance(held, dict) and isinstance(held.get("class_type"), str)):
            raise Asked(f"{path}: node {node!r} has no class_type, so this is no workflow in API format; {export}")
        if not isinstance(held.setdefault("inputs", {}), dict):
            raise Asked(f"{path}: the inputs of node {node!r} are no JSON object; {export}")
    checked: Prompt = document
    return checked


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise Asked(f"the key {key!r} is there twice, so one would be lost; repair the file")
        made[key] = value
    return made


def _inputs(prompt: Prompt, node: str) -> dict[str, Any]:
    held: dict[str, Any] = prompt[node]["inputs"]
    return held


def _title(prompt: Prompt, node: str) -> str:
    meta = prompt[node].get("_meta")
    return str(meta.get("title") or "") if isinstance(meta, dict) else ""


def _label(prompt: Prompt, node: str) -> str:
    return _title(prompt, node) or class_of(prompt, node)


def _names(prompt: Prompt) -> list[str]:
    return [name for node in prompt for name in (_title(prompt, node), class_of(prompt, node)) if name]


def _near(name: str, names: Iterable[str]) -> str:
    folded = {known.casefold(): known for known in names}
    near = [folded[key] for key in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.6)]
    return f"near names: {', '.join(near)}" if near else ""


def _list(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _example(prompt: Prompt) -> str:
    for node in prompt:
        for name, value in _inputs(prompt, node).items():
            if not isinstance(value, (list, dict)):
                return f"{node}.{name}"
    return "3.seed"
