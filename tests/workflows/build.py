"""Invariant: workflows/*.json are made from workflows/api/*.json and layout.json, the same bytes each time.

python -m pytest ... checks them; after a change of a graph, of layout.json or of a node's schema:
python tests/workflows/build.py
The pictures beside them are of a real front end: tests/browser/test_examples.py says how to take them anew.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORKFLOWS = ROOT / "workflows"


def dumps(value: Any, indent: int = 0) -> str:
    """JSON with one line for what is short: readable in a diff."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) + indent <= 110 or not isinstance(value, (dict, list)):
        return flat
    pad, inner = " " * indent, " " * (indent + 2)
    if isinstance(value, dict):
        rows = [f"{inner}{json.dumps(key)}: {dumps(entry, indent + 2)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{pad}}}"
    return "[\n" + ",\n".join(f"{inner}{dumps(entry, indent + 2)}" for entry in value) + f"\n{pad}]"


def _package(name: str, folder: Path) -> ModuleType:
    """Register `folder` as the package `name`, whatever the checkout is called."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if (folder / "__init__.py").exists():
        spec.loader.exec_module(module)
    return module


def main() -> None:
    _package("balanced_offload", ROOT)
    _package("workflow_tools", HERE)
    from workflow_tools.catalog import all_nodes  # type: ignore[import-not-found]
    from workflow_tools.layout import build  # type: ignore[import-not-found]

    kinds = all_nodes()
    layouts = json.loads((HERE / "layout.json").read_text(encoding="utf-8"))
    for name, layout in layouts.items():
        api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
        graph = build(name, api, layout, kinds)
        (WORKFLOWS / f"{name}.json").write_text(dumps(graph) + "\n", encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
