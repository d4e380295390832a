"""Invariant: which ComfyUI checkouts the host tests use is decided here alone, and "none" always comes with a reason.

Standard library only: run.py reads it before anything is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

NEW, OLD = "COMFYUI_PATH", "COMFYUI_PATH_OLD"
DEFAULT_NEW, DEFAULT_OLD = "comfy/ComfyUI", "comfy/ComfyUI-0.3.64"
"""Below the home folder: comfy-cli's default workspace, and the oldest supported host beside it."""
APART = "python -m pytest tests/host"

# What the hosts import before they are ready, as modules.
REQUIRED = (
    *("aiohttp", "alembic", "av", "comfy_aimdo", "comfy_kitchen", "comfyui_frontend_package", "einops", "filelock"),
    *("kornia", "numpy", "PIL", "psutil", "pydantic", "pydantic_settings", "requests", "safetensors", "scipy"),
    *("sentencepiece", "simpleeval", "spandrel", "sqlalchemy", "tokenizers", "torch", "torchaudio", "torchsde"),
    *("torchvision", "tqdm", "transformers", "yaml", "yarl", "blake3"),
)


def is_host(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy" / "model_management.py").is_file()


def version(host: Path) -> str:
    """The host's version as it states it, or "unknown"."""
    try:
        lines = (host / "comfyui_version.py").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split('"')[1] for line in lines if line.startswith("__version__")), "unknown")


def host_for(checkout: Path, environment: Mapping[str, str], home: Path) -> tuple[Path | None, str]:
    """The host that this process tests against, and a sentence saying where it was found or why there is none."""
    named = environment.get(NEW)
    if named:
        folder = Path(named).expanduser().resolve()
        if is_host(folder):
            return folder, f"{NEW} names ComfyUI {version(folder)}"
        return None, f"{NEW} names {named}, which has no main.py and comfy/model_management.py"
    # Not resolved: a link in custom_nodes stands where it stands.
    above = checkout.parent.parent
    if checkout.parent.name == "custom_nodes" and is_host(above):
        return above, f"the checkout lies in the custom_nodes of ComfyUI {version(above)}"
    folder = home / DEFAULT_NEW
    if is_host(folder):
        return folder, f"~/{DEFAULT_NEW} is ComfyUI {version(folder)}"
    return None, f"no ComfyUI found: {NEW} is not set, the checkout is in no custom_nodes, ~/{DEFAULT_NEW} is not there"


def all_hosts(checkout: Path, environment: Mapping[str, str], home: Path) -> tuple[list[Path], str]:
    """Every host that the test command runs against, the newer one first, and the sentence about the first."""
    first, reason = host_for(checkout, environment, home)
    hosts = [first] if first else []
    named = environment.get(OLD)
    older = Path(named).expanduser().resolve() if named else home / DEFAULT_OLD
    if is_host(older) and older not in hosts:
        hosts.append(older)
    return hosts, reason


def missing() -> list[str]:
    """The host's requirements that this Python cannot import."""
    return [name for name in REQUIRED if importlib.util.find_spec(name) is None]


def why_not(checkout: Path, environment: Mapping[str, str], home: Path) -> str | None:
    """Why the host tests cannot run in this Python, in a sentence with the remedy; None where they can."""
    host, reason = host_for(checkout, environment, home)
    if host is None:
        return reason
    absent = missing()
    if absent:
        some = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        return f"{reason}, but its requirements are not installed here ({some}): `python run.py test` installs them"
    return None
