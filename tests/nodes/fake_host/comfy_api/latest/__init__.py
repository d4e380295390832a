"""The V3 node API as far as the nodes use it, with the host's argument names; an argument it lacks is a TypeError."""

from __future__ import annotations

from . import io
from .io import ComfyExtension

__all__ = ["ComfyExtension", "io"]
