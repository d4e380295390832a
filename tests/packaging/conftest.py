"""Invariant: packaging is tested on a copy: a build leaves nothing in the checkout, and nothing stale is shipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so")


@pytest.fixture(scope="session")
def pack_copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, copied into a folder named the way ComfyUI users name it: with hyphens."""
    target = tmp_path_factory.mktemp("custom_nodes") / "ComfyUI-Balanced-Offload"
    shutil.copytree(root, target, ignore=LEFT_OUT)
    return target


def _git(root: Path, *arguments: str) -> list[str] | None:
    """The lines (NUL-separated) that git prints, None where this is no git checkout."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments, "-z"], cwd=root, capture_output=True)
    if done.returncode:  # such as a checkout that belongs to somebody else
        return None
    return [name for name in done.stdout.decode().split("\0") if name]


@pytest.fixture(scope="session")
def shipped_files(root: Path) -> list[str]:
    """What the registry's packer takes: the files that git tracks, without what .comfyignore names, by git's rules."""
    tracked = _git(root, "ls-files", "--cached")
    ignored = _git(root, "ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")
    if tracked is None or ignored is None:
        pytest.skip("no git checkout: which files the registry package takes is what git tracks")
    return sorted(name for name in set(tracked) - set(ignored) if (root / name).is_file())


@pytest.fixture(scope="session")
def registry_copy(root: Path, shipped_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack as the ComfyUI registry ships it, in a folder named as it is installed: exactly these files."""
    target = tmp_path_factory.mktemp("registry") / "balanced-offload"
    for name in shipped_files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target / name)
    return target


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
