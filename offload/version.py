"""Which copy of the pack this is. Invariant: one answer, whoever asks."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path


def version() -> str:
    """The version of this copy: of the checkout it lies in, else of the installed package."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        found = re.search(r'^version = "([^"]+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    try:
        return importlib.metadata.version("balanced-offload")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
