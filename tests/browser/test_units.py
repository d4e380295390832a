"""Invariant: every file of unit tests runs under Node's own test runner; one that runs no test at all fails.

`tests/browser/unit/NAME.test.mjs` tests `web/js/NAME.js`: pure modules, no page. Needs Node.js alone.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from . import places

UNIT = Path(__file__).resolve().parent / "unit"
FILES = sorted(UNIT.glob("*.test.mjs"))


def run(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["node", "--test", "--test-reporter=tap", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=places.quiet_node())


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_unit(path: Path) -> None:
    reason = places.no_node()
    if reason is not None:
        pytest.skip(reason)
    done = run(path)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert passed and int(passed[1]) > 0, f"{path.name} ran no test:\n{done.stdout[-2000:]}"


def test_there_are_unit_tests() -> None:
    assert FILES, f"no *.test.mjs in {UNIT}"


def test_a_failing_file_fails(tmp_path: Path) -> None:
    reason = places.no_node()
    if reason is not None:
        pytest.skip(reason)
    wrong = tmp_path / "wrong.test.mjs"
    wrong.write_text('import test from "node:test";\ntest("no", () => { throw new Error("as it must"); });\n')
    assert run(wrong).returncode != 0
