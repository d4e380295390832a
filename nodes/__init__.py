"""Invariant: importing this package imports no host; `comfy_api` is needed only when a host asks for the extension."""

from __future__ import annotations

from typing import Any


def build_extension() -> Any:
    """The `ComfyExtension` that lists this pack's nodes."""
    from .extension import BalancedOffloadExtension

    return BalancedOffloadExtension()
