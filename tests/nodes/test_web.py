"""Invariant: the front end's file names the nodes and the setting that the pack has, in its translations' words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from balanced_offload.offload.adapters.comfyui_runs_host import RESTORE

SCRIPT = "adapter.js"


@pytest.fixture
def script(root: Path) -> str:
    return (root / "web" / "js" / SCRIPT).read_text(encoding="utf-8")


def written(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "locales" / "en" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_one_file_is_imported_by_the_front_end(root: Path) -> None:
    assert [path.name for path in (root / "web").rglob("*.js")] == [SCRIPT]


def test_its_import_leads_to_the_front_end(root: Path, script: str) -> None:
    """Served as /extensions/<folder>/js/adapter.js; the front end's modules lie in /scripts."""
    targets = re.findall(r'^import .* from "(.+)";$', script, flags=re.MULTILINE)
    depth = len((root / "web" / "js" / SCRIPT).relative_to(root / "web").parts) + 1
    assert targets == ["../" * depth + f"scripts/{name}.js" for name in ("api", "app")]


def test_the_setting_is_the_one_that_the_server_reads(root: Path, script: str) -> None:
    (given,) = re.findall(r'id: "([\w.]+)"', script)
    assert given == RESTORE
    (entry,) = written(root, "settings").items()
    assert entry[0] == RESTORE.replace(".", "_")
    assert f'name: "{entry[1]["name"]}"' in script and f'"{entry[1]["tooltip"]}"' in script
    (category,) = re.findall(r"category: \[(.+)\]", script)
    parts = re.findall(r'"([^"]+)"', category)
    assert set(parts[:2]) == set(written(root, "main")["settingsCategories"])


def test_categories_of_nodes_have_words(root: Path, nodes: dict[str, Any]) -> None:
    assert set(written(root, "main")["nodeCategories"]) == {kind.define_schema().category for kind in nodes.values()}


def test_it_shows_the_text_of_a_node_that_returns_one(script: str, nodes: dict[str, Any]) -> None:
    (shown,) = re.findall(r'const REPORT = "(\w+)"', script)
    assert nodes[shown].define_schema().is_output_node
