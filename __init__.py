"""Invariant: this door opens without a GPU, diffusers, a compiler or a running server.

ComfyUI reads two names from here: `WEB_DIRECTORY` and `comfy_entrypoint`. All else is imported when the host asks for
the nodes.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The pack's `ComfyExtension`; only a ComfyUI host calls this, so only here `comfy_api` must exist."""
    from .nodes import build_extension

    return build_extension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
