"""Invariant: what the README and docs point to is there, and every command that they show exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = ("README.md", "docs/comfyui.md", "docs/hosts.md", "docs/seeing.md", "workflows/README.md")
COMMAND = re.compile(r"(?:balanced-offload|python -m balanced_offload) ([a-z]+)")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(root: Path, page: str) -> None:
    text = (root / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    for target in targets:
        assert ((root / page).parent / target).exists(), target
    assert targets or page != "README.md"


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_project_that_are_named_exist(root: Path, page: str) -> None:
    text = (root / page).read_text(encoding="utf-8")
    for named in re.findall(r"`((?:tests|offload|docs|web|workflows|locales)/[\w./-]+)`", text):
        assert (root / named).exists(), named


def test_every_command_that_is_shown_exists(root: Path) -> None:
    shown = {name for page in PAGES for name in COMMAND.findall((root / page).read_text(encoding="utf-8"))}
    assert {"demo", "plan", "bench", "probe", "queue"} >= shown >= {"plan", "probe", "queue"}
    sources = "".join(path.read_text(encoding="utf-8") for path in (root / "offload").glob("cli*.py"))
    assert shown <= set(re.findall(r'add_parser\(\s*"(\w+)"', sources))


def test_the_readme_lists_every_node_with_its_page(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| \[(.+?)\]\(web/docs/(\w+)\.md\)", text, flags=re.MULTILINE))
    pages = {page.stem: page.read_text(encoding="utf-8").splitlines()[0] for page in (root / "web/docs").glob("*.md")}
    assert {name: f"# {title}" for title, name in listed.items()} == pages


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_a_rung(root: Path, page: str) -> None:
    """A table with measured times, sizes or speed-ups stands near the word that says what kind of evidence it is."""
    text = (root / page).read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=## )", text)
    for block in blocks:
        if re.search(r"^\|[-:| ]*--:\|", block, flags=re.MULTILINE):  # columns of figures are set to the right
            assert re.search(r"simulated|measured on a GPU|rung", block, flags=re.IGNORECASE), block[:80]


@pytest.mark.parametrize("page", PAGES)
def test_no_path_of_a_machine(root: Path, page: str) -> None:
    text = (root / page).read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt)/", text)
