"""Invariant: what a browser test needs is found or named: a skip says what is missing and how to get it.

Front ends are packages from PyPI (comfyui-frontend-package), each in a folder of its own; nothing of them is in the
tree. `python run.py test` fetches them into `.frontends`; BALANCED_OFFLOAD_FRONTENDS names another folder, with one
subfolder for each version. Standard library only: run.py reads this too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FRONTENDS = ("1.49.6", "1.58.1")
NEWEST = FRONTENDS[-1]
PACKAGE = "comfyui-frontend-package"
NODE_TOOLS = Path(__file__).resolve().parent / "node_modules"


class Where(NamedTuple):
    """A front end and how it draws nodes. vue: Nodes 2.0."""

    frontend: str
    vue: bool

    def __str__(self) -> str:
        return f"{self.frontend}-{'nodes2' if self.vue else 'canvas'}"


WHERES = tuple(Where(frontend, vue) for frontend in FRONTENDS for vue in (False, True))


def named() -> str | None:
    """The folder that the user named; nothing is fetched into it."""
    return os.environ.get("BALANCED_OFFLOAD_FRONTENDS") or None


def folder() -> Path:
    """Where the front ends lie, one subfolder for each version."""
    return Path(named() or ROOT / ".frontends")


def frontend(version: str) -> Path:
    """The folder that a host serves; it need not be there."""
    return folder() / version / "comfyui_frontend_package" / "static"


def chromium() -> str | None:
    """A Chromium's executable: BALANCED_OFFLOAD_CHROMIUM, else what is on the path."""
    named = os.environ.get("BALANCED_OFFLOAD_CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def why_not(version: str | None = None) -> str | None:
    """Why no browser test can run here (with this front end); None if it can."""
    for module in ("playwright", "aiohttp"):
        if importlib.util.find_spec(module) is None:
            return f"browser tests need the package {module} (extra dev)"
    if chromium() is None:
        return "browser tests need a Chromium on the path, or BALANCED_OFFLOAD_CHROMIUM"
    if version is not None and not (frontend(version) / "index.html").is_file():
        return f"no front end {version} in {folder()}: python run.py test fetches it, or BALANCED_OFFLOAD_FRONTENDS"
    return None


def no_node() -> str | None:
    """Why no test by Node can run here."""
    return None if shutil.which("node") else "needs Node.js (node) on the path"


def quiet_node() -> dict[str, str]:
    """The environment for a Node process: what pytest's own workers are told about tests is not for it."""
    return {key: value for key, value in os.environ.items() if not key.startswith("NODE_")}


def no_tool(name: str) -> str | None:
    """Why a tool of package.json cannot be used here."""
    if (NODE_TOOLS / name).is_dir():
        return no_node()
    return f"needs {name}: npm install in tests/browser, as python run.py test does where npm is there"
