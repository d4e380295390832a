"""Invariant: what people read about an input or output is written once, in the node's schema; the rest is copied.

    python tests/workflows/words.py

writes locales/en/nodeDefs.json and the sections "Inputs" and "Outputs" of web/docs/<NodeId>.md from the schemas.
tests/nodes/test_words.py holds all of it together.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
NODE_DEFS = ROOT / "locales" / "en" / "nodeDefs.json"
# The first entry of a list that is made on the user's machine, where it is not the default.
OWN_FILES = "(first in the list)"
SHOWN = {True: "on", False: "off", "": "(empty)"}


def label(entry: Any) -> str:
    """What the front end shows for an input or output."""
    return str(entry.display_name or entry.id)


def node_defs(schemas: dict[str, Any]) -> dict[str, Any]:
    """The translations of all nodes, in the host's form."""
    return {
        name: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: {"name": label(entry), "tooltip": entry.tooltip} for entry in schema.inputs},
            "outputs": {
                str(place): {"name": label(entry), "tooltip": entry.tooltip}
                for place, entry in enumerate(schema.outputs)
            },
        }
        for name, schema in schemas.items()
    }


def default_of(entry: Any) -> str:
    """The default as the table shows it: a link, or the widget's value."""
    if not any(hasattr(entry, name) for name in ("options", "multiline", "min")) and entry.io_type != "BOOLEAN":
        return "(link, optional)" if entry.optional else "(link)"
    if entry.default is None:
        return OWN_FILES
    return str(SHOWN.get(entry.default, entry.default) if isinstance(entry.default, (bool, str)) else entry.default)


def inputs_section(schema: Any) -> str:
    rows = ["| input | name | default | meaning |", "|---|---|---|---|"]
    rows += [f"| {entry.id} | {label(entry)} | {default_of(entry)} | {entry.tooltip} |" for entry in schema.inputs]
    return "\n".join(rows)


def outputs_section(schema: Any) -> str:
    return "\n".join(f"- **{label(entry)}**: {entry.tooltip}" for entry in schema.outputs)


def section(page: str, heading: str) -> str:
    """The text below `## heading`, up to the next one; KeyError where there is none."""
    found = re.search(rf"^## {re.escape(heading)}\n\n(.*?)(?=\n\n## |\n*\Z)", page, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise KeyError(heading)
    return found.group(1)


def filled(page: str, schema: Any) -> str:
    """`page` with its two sections as the schema has them."""
    for heading, text in (("Inputs", inputs_section(schema)), ("Outputs", outputs_section(schema))):
        old = section(page, heading)
        page = page.replace(f"## {heading}\n\n{old}", f"## {heading}\n\n{text}")
    return page


def main() -> None:
    from build import HERE, _package  # type: ignore[import-not-found]

    _package("balanced_offload", ROOT)
    _package("workflow_tools", HERE)
    from workflow_tools.catalog import schemas  # type: ignore[import-not-found]

    with schemas() as found:
        NODE_DEFS.write_text(json.dumps(node_defs(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, schema in found.items():
            page = DOCS / f"{name}.md"
            page.write_text(filled(page.read_text(encoding="utf-8"), schema), encoding="utf-8")
            print(name)


if __name__ == "__main__":
    sys.exit(main())
