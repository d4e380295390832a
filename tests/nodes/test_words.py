"""Invariant: the node's words are the same in the schema, the translations and the help page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def test_locales_repeat_the_schema(nodes: dict[str, Any], root: Path) -> None:
    written = json.loads((root / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    expected = {}
    for name, kind in nodes.items():
        schema = kind.define_schema()
        expected[name] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: {"name": entry.display_name, "tooltip": entry.tooltip} for entry in schema.inputs},
            "outputs": {
                str(place): {"name": entry.display_name, "tooltip": entry.tooltip}
                for place, entry in enumerate(schema.outputs)
            },
        }
    assert written == expected


def test_every_node_has_a_help_page_that_names_every_input(nodes: dict[str, Any], root: Path) -> None:
    for name, kind in nodes.items():
        schema = kind.define_schema()
        page = (root / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")
        rows = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \|", page, flags=re.MULTILINE)
        documented = {row[0]: (row[1].strip(), row[2].strip()) for row in rows}
        for entry in schema.inputs:
            label, default = documented[entry.id]
            assert label == entry.display_name
            shown = {True: "on", False: "off", "": "(empty)"}.get(entry.default, entry.default)
            assert default == shown, entry.id
