"""Invariant: the wheel holds the package with all its data and nothing else; it works where only it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

DATA = [
    "locales/**/*.json",
    "offload/demo/digits/**/*",
    "offload/models/*.json",
    "offload/schemas/*.json",
    "offload/simulator/csrc/*",
    "web/docs/*.md",
]


def shipped(wheel_names: set[str]) -> set[PurePosixPath]:
    return {PurePosixPath(name) for name in wheel_names if ".dist-info/" not in name}


@pytest.mark.parametrize("pattern", DATA)
def test_data_files_are_in_the_wheel(root: Path, wheel_names: set[str], pattern: str) -> None:
    tree = {path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file()}
    assert tree, f"nothing in the checkout matches {pattern}"
    assert {f"balanced_offload/{name}" for name in tree} <= wheel_names


def test_every_module_is_in_the_wheel(root: Path, wheel_names: set[str]) -> None:
    tree = [root / "__init__.py", root / "__main__.py", *root.glob("nodes/**/*.py"), *root.glob("offload/**/*.py")]
    expected = {f"balanced_offload/{path.relative_to(root).as_posix()}" for path in tree}
    assert expected == {str(path) for path in shipped(wheel_names) if path.suffix == ".py"}


def test_nothing_but_the_package_is_in_the_wheel(wheel_names: set[str]) -> None:
    paths = shipped(wheel_names)
    assert {path.parts[0] for path in paths} == {"balanced_offload"}
    assert {path.parts[1] for path in paths if len(path.parts) > 2} == {"locales", "nodes", "offload", "web"}
    assert not [path for path in paths if "tests" in path.parts or path.suffix in {".so", ".pyc"}]


def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    look = "import sys; sys.path.insert(0, sys.argv[1]); import balanced_offload as pack; print(pack.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", look, str(tmp_path)], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "balanced_offload" / "__init__.py"
    entry_points = next(tmp_path.glob("*.dist-info")) / "entry_points.txt"
    assert "balanced-offload = balanced_offload.offload.cli:main" in entry_points.read_text(encoding="utf-8")


def test_the_command_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    # From a folder without the checkout, and before it on the path.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "balanced_offload", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout and "probe" in done.stdout
