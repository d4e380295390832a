"""Invariant: every module below web/js passes TypeScript's strict check on its JSDoc, and imports nothing from outside.

Needs Node.js and the tools of package.json, and no browser.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from . import places

HERE = Path(__file__).resolve().parent
JS = places.ROOT / "web" / "js"
IMPORT = re.compile(r"""(?:\bfrom|\bimport)\s*\(?\s*["']([^"']+)["']""")
FRONT_END = {"../../../scripts/app.js", "../../../scripts/api.js"}


def modules() -> list[Path]:
    return sorted(JS.rglob("*.js"))


def tsc(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["node", str(places.NODE_TOOLS / "typescript" / "bin" / "tsc"), *arguments]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240)


def needs(tool: str) -> None:
    reason = places.no_tool(tool)
    if reason is not None:
        pytest.skip(reason)


def test_types_are_strict() -> None:
    needs("typescript")
    done = tsc("-p", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_can_fail(tmp_path: Path) -> None:
    """Under the same options a wrong argument is found, in a .js file by its JSDoc alone."""
    needs("typescript")
    wrong = tmp_path / "wrong.js"
    wrong.write_text("/** @param {number} n */\nexport const twice = (n) => n * 2;\ntwice('text');\n")
    project = {"extends": str(HERE / "tsconfig.json"), "include": ["wrong.js"]}
    (tmp_path / "tsconfig.json").write_text(json.dumps(project))
    done = tsc("-p", str(tmp_path))
    assert done.returncode != 0 and "TS2345" in done.stdout


def test_every_module_is_checked() -> None:
    """None switches the check off, for itself or for a line."""
    assert modules()
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert "@ts-nocheck" not in text and "@ts-ignore" not in text, path.name


def test_imports_stay_at_home() -> None:
    """Modules import each other; the front end's are imported by adapter.js alone."""
    for path in modules():
        for target in IMPORT.findall(path.read_text(encoding="utf-8")):
            if target.endswith("types") or target.endswith("types.d.ts"):  # in JSDoc
                assert (JS / "types.d.ts").is_file()
            elif target in FRONT_END:
                assert path.name == "adapter.js", f"{path.name} imports {target}"
            else:
                assert target.startswith("./") and (path.parent / target).is_file(), f"{path.name} imports {target}"


def test_text_is_never_markup() -> None:
    """What is shown goes in as text; no code is made from a string."""
    banned = re.compile(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function|DOMParser)\b")
    for path in modules():
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [
            line.strip() for line in lines if banned.search(line) and not line.strip().startswith(("*", "//", "/*"))
        ]
        assert not found, f"{path.name}: {found}"
