"""The offload core: imports torch, never a host, a server or a node. Invariant: its names cost nothing until used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .policy import OffloadMode, OffloadPolicy, OffloadPolicyWarning
    from .session import Session

__all__ = ["OffloadMode", "OffloadPolicy", "OffloadPolicyWarning", "Session"]


def __getattr__(name: str) -> Any:
    """The public names, on first use: a command's help need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".session" if name == "Session" else ".policy", __name__), name)
