"""Invariant: which files the registry's packer takes is decided by git and .comfyignore alone, as there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

NO_GIT = "no git checkout: which files the registry package takes is what git tracks"


def _git(root: Path, *arguments: str) -> list[str] | None:
    """The names that git prints, None where this is no git checkout."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments, "-z"], cwd=root, capture_output=True)
    if done.returncode:  # such as a checkout that belongs to somebody else
        return None
    return [name for name in done.stdout.decode().split("\0") if name]


def shipped_files(root: Path) -> list[str] | None:
    """What git tracks, without what .comfyignore names by git's rules; None where git does not say."""
    tracked = _git(root, "ls-files", "--cached")
    ignored = _git(root, "ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")
    if tracked is None or ignored is None:
        return None
    return sorted(name for name in set(tracked) - set(ignored) if (root / name).is_file())


def copy_shipped(root: Path, files: list[str], target: Path) -> Path:
    """`target` with exactly these files."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target / name)
    return target
