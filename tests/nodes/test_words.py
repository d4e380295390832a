"""Invariant: a node's words are the same in the schema, the translations and the help page, and every node has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ..workflows.words import filled, inputs_section, label, node_defs, outputs_section, section

# For ever: saved workflows name them.
NODES = {
    "OffloadPolicy": "Offload Policy",
    "ModelLoaderWithOffload": "Load Model (Offload)",
    "ApplyOffloadPolicy": "Apply Offload Policy",
    "PipelineLoaderWithOffload": "Load Diffusers Pipeline (Offload)",
    "PipelineGenerate": "Generate (Diffusers)",
    "FreeVRAMToFit": "Free VRAM (keep what fits)",
    "VRAMReport": "VRAM Report",
}
ALIASES = {"lowvram", "block swap", "unload", "oom", "vram", "offload"}


@pytest.fixture
def schemas(nodes: dict[str, Any]) -> dict[str, Any]:
    return {name: kind.define_schema() for name, kind in nodes.items()}


def test_the_pack_brings_these_nodes(schemas: dict[str, Any]) -> None:
    assert {name: schema.display_name for name, schema in schemas.items()} == NODES
    for schema in schemas.values():
        assert schema.category == "Offload"
        assert set(schema.search_aliases) >= ALIASES


def test_every_input_and_output_has_a_tooltip(schemas: dict[str, Any]) -> None:
    for name, schema in schemas.items():
        for entry in [*schema.inputs, *schema.outputs]:
            assert entry.tooltip and entry.tooltip.strip() == entry.tooltip, f"{name}.{entry.id}"
            assert "|" not in entry.tooltip and "\n" not in entry.tooltip, "a row of a table"


def test_ids_of_inputs_and_outputs_differ(schemas: dict[str, Any]) -> None:
    """0.3.64 refuses a node that uses one id twice."""
    for name, schema in schemas.items():
        ids = [entry.id for entry in [*schema.inputs, *schema.outputs]]
        assert len(ids) == len(set(ids)), name


def test_advanced_inputs_come_last(schemas: dict[str, Any]) -> None:
    for name, schema in schemas.items():
        flags = [bool(entry.advanced) for entry in schema.inputs]
        assert flags == sorted(flags), name


def test_locales_repeat_the_schema(schemas: dict[str, Any], root: Path) -> None:
    """Where this fails: python tests/workflows/words.py"""
    written = json.loads((root / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert written == node_defs(schemas)


def test_every_node_has_its_page_and_two_are_linked_from_them(schemas: dict[str, Any], root: Path) -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (root / "web" / "docs").glob("*.md")}
    linked = {"PerformanceTimers", "Hints"}
    assert set(pages) == set(schemas) | linked
    assert all(name in pages["VRAMReport"] for name in linked)


@pytest.mark.parametrize("name", NODES)
def test_a_page_repeats_the_schema(schemas: dict[str, Any], root: Path, name: str) -> None:
    """Where this fails: python tests/workflows/words.py"""
    schema, page = schemas[name], (root / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n\n")
    assert section(page, "Inputs") == inputs_section(schema)
    assert section(page, "Outputs") == outputs_section(schema)
    assert filled(page, schema) == page


@pytest.mark.parametrize("name", NODES)
def test_a_page_has_an_example_and_remedies(schemas: dict[str, Any], root: Path, name: str) -> None:
    page = (root / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    example = section(page, "Example")
    assert re.findall(r"^\d\. ", example, flags=re.MULTILINE), "what to wire"
    assert "you see" in example, "what one then sees"
    remedies = section(page, "When something is wrong").splitlines()
    assert len(remedies) >= 2 + 3 and all(row.count("|") == 3 for row in remedies)
    assert section(page, "Tips").startswith("- ")


@pytest.mark.parametrize("name", NODES)
def test_a_page_names_only_what_there_is(schemas: dict[str, Any], root: Path, name: str) -> None:
    page = (root / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    inputs = {word for schema in schemas.values() for entry in schema.inputs for word in (entry.id, label(entry))}
    for used in re.findall(r"`([\w ()]+)` = `", section(page, "Example")):
        assert used in inputs, used
    layouts = json.loads((root / "tests" / "workflows" / "layout.json").read_text(encoding="utf-8"))
    titles = {layout["title"].split(". ", 1)[1] for layout in layouts.values()}
    for title in re.findall(r"the template \*(.+?)\*", page):
        assert title in titles


@pytest.mark.parametrize("name", NODES)
def test_links_and_pictures_of_a_page_are_there(root: Path, name: str) -> None:
    page = (root / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert (root / "web" / "docs" / target).is_file(), target
    assert "http://" not in page and "https://" not in page
