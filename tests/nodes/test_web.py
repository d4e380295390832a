"""Invariant: one file of web/js touches the front end; it names the pack's nodes and settings in its words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from balanced_offload.offload.adapters.comfyui_runs_host import RESTORE

ENTRY = "adapter.js"
LINES = 400
IMPORT = re.compile(r"""(?:\bfrom\s*|\bimport\s*\(?\s*)["']([^"']+)["']""")
FRONT_END = re.compile(
    r"(?<![\w.#\"'`])(?:window\.|globalThis\.)?(?:LiteGraph|LGraph\w*|comfyAPI|app|api)\s*(?:\?\.|\.|\[)"
)


def code(script: Path) -> str:
    """The script without its comments; what a JSDoc type imports is no import."""
    text = re.sub(r"/\*.*?\*/", "", script.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"(?<!:)//.*", "", text)


@pytest.fixture
def scripts(root: Path) -> list[Path]:
    return sorted((root / "web").rglob("*.js"))


@pytest.fixture
def entry(root: Path) -> str:
    return (root / "web" / "js" / ENTRY).read_text(encoding="utf-8")


def written(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "locales" / "en" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def settings(entry: str) -> dict[str, dict[str, str]]:
    """id -> name, tooltip, group, as the entry writes them."""
    blocks = re.findall(r'"(BalancedOffload\.\w+)": \{\n(.*?)\n  \}', entry, flags=re.DOTALL)
    return {name: dict(re.findall(r'(\w+): "(.*?)",', body)) for name, body in blocks}


def test_every_script_lies_in_one_folder(root: Path, scripts: list[Path]) -> None:
    assert {script.parent for script in scripts} == {root / "web" / "js"}
    assert ENTRY in {script.name for script in scripts}


def test_only_the_entry_imports_the_front_end(root: Path, scripts: list[Path]) -> None:
    """Served as /extensions/<folder>/js/<name>.js; the front end's modules lie in /scripts, ours beside each other."""
    depth = len((root / "web" / "js" / ENTRY).relative_to(root / "web").parts) + 1
    host = {"../" * depth + f"scripts/{name}.js" for name in ("api", "app")}
    for script in scripts:
        targets = set(IMPORT.findall(code(script)))
        if script.name == ENTRY:
            assert targets >= host
            targets -= host
        for target in targets:
            assert re.fullmatch(r"\./\w+\.js", target), f"{script.name} imports {target}"
            assert (script.parent / target).is_file(), f"{script.name} imports {target}, which is not there"


def test_only_the_entry_names_the_front_end(scripts: list[Path]) -> None:
    for script in scripts:
        found = FRONT_END.findall(code(script))
        assert bool(found) == (script.name == ENTRY), f"{script.name}: {found[:3]}"


def test_text_is_never_markup_and_no_text_is_run(scripts: list[Path]) -> None:
    wrong = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(|DOMParser|srcdoc|\.src\s*="
    for script in scripts:
        assert not re.findall(wrong, code(script)), script.name


def test_no_address_of_another_host(scripts: list[Path]) -> None:
    for script in scripts:
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", script.read_text(encoding="utf-8"))
        assert not found, f"{script.name}: {found}"


def test_scripts_are_short_and_open_with_their_invariant(scripts: list[Path]) -> None:
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert text.count("\n") < LINES, script.name
        first = re.search(r"/\*\*?(.*?)\*/", text, flags=re.DOTALL)
        assert first and "Invariant:" in first[1], script.name
        assert first.start() < 20, f"{script.name}: something stands before its invariant"


def test_settings_have_their_words(root: Path, entry: str) -> None:
    found, words = settings(entry), written(root, "settings")
    assert len(found) >= 5
    assert {name.replace(".", "_") for name in found} == set(words)
    for name, setting in found.items():
        entry_words = words[name.replace(".", "_")]
        assert (setting["name"], setting["tooltip"]) == (entry_words["name"], entry_words["tooltip"])
    groups = {setting["group"] for setting in found.values()}
    assert {"Balanced Offload", *groups} == set(written(root, "main")["settingsCategories"])


def test_the_setting_that_the_server_reads_is_there(entry: str) -> None:
    assert RESTORE in settings(entry)


def test_settings_that_scripts_ask_for_are_there(entry: str, scripts: list[Path]) -> None:
    used = {name for script in scripts for name in re.findall(r'"(BalancedOffload\.\w+)"', code(script))}
    commands = set(re.findall(r'const TOGGLE = "(.+)"', entry))
    assert used - commands == set(settings(entry))


def test_commands_have_their_words(root: Path, entry: str) -> None:
    (command,) = re.findall(r'const TOGGLE = "(.+)"', entry)
    (label,) = re.findall(r'id: TOGGLE, label: "(.+?)"', entry)
    assert written(root, "commands") == {command.replace(".", "_"): {"label": label}}


def test_categories_of_nodes_have_words(root: Path, nodes: dict[str, Any]) -> None:
    assert set(written(root, "main")["nodeCategories"]) == {kind.define_schema().category for kind in nodes.values()}


def test_the_nodes_that_get_a_widget_are_ours(entry: str, nodes: dict[str, Any]) -> None:
    (report,) = re.findall(r'const REPORT = "(\w+)"', entry)
    (policy,) = re.findall(r'const POLICY = "(\w+)"', entry)
    assert nodes[report].define_schema().is_output_node
    assert nodes[policy].define_schema().outputs[0].io_type == "OFFLOAD_POLICY"
