"""Invariant: packaging is tested on a copy: a build leaves nothing in the checkout, and nothing stale is shipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .shipped import NO_GIT, copy_shipped, shipped_files

LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so")


@pytest.fixture(scope="session")
def pack_copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, copied into a folder named the way ComfyUI users name it: with hyphens."""
    target = tmp_path_factory.mktemp("custom_nodes") / "ComfyUI-Balanced-Offload"
    shutil.copytree(root, target, ignore=LEFT_OUT)
    return target


@pytest.fixture(scope="session", name="shipped_files")
def files_shipped(root: Path) -> list[str]:
    """What the registry's packer takes."""
    files = shipped_files(root)
    if files is None:
        pytest.skip(NO_GIT)
    return files


@pytest.fixture(scope="session")
def registry_copy(root: Path, shipped_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack as the ComfyUI registry ships it, in a folder named as it is installed: exactly these files."""
    return copy_shipped(root, shipped_files, tmp_path_factory.mktemp("registry") / "balanced-offload")


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(root, source, ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def wheel_names(wheel: Path) -> set[str]:
    """Paths of all files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())
