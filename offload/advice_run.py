"""Invariant: options are read and refused before anything is counted; what is counted is counted once."""

from __future__ import annotations

from typing import Any

import torch

from .advice import advise
from .advice_options import DTYPES, Asked, figures_of, is_path, read_bytes
from .models import NAMES, ModelWalk, parse_resolution, walk
from .models.files import walk_path
from .models.inputs import read_resolution
from .sizes import bad_value


def advise_asked(asked: Asked) -> dict[str, Any]:
    """The `offload-plan/1` document of what was asked.

    Raises:
        ValueError: an option that cannot be read, an unknown model, a damaged file.
        ImportError: diffusers is not installed.
    """
    dtype = _dtype(asked.dtype)
    activations = None if asked.activations is None else read_bytes("--activations", asked.activations)
    resolution = asked.resolution
    named = asked.model in NAMES
    if not named and not is_path(asked.model):
        known = "a .safetensors file or a model folder"
        raise bad_value("--model", asked.model, f"{', '.join(NAMES)}, or {known}", "check the spelling, or the path")
    try:
        size = None
        if named:
            resolution = str(parse_resolution(asked.model, resolution))
        elif resolution is not None:
            size = read_resolution(resolution)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    figures = figures_of(asked)
    walked: ModelWalk
    walked = (
        walk(asked.model, resolution, dtype=dtype or torch.bfloat16) if named else walk_path(asked.model, size, dtype)
    )
    return advise(walked, figures, activations)


def _dtype(written: str | None) -> torch.dtype | None:
    if written is None:
        return None
    if written not in DTYPES:
        raise bad_value("--dtype", written, ", ".join(DTYPES), "8-bit weights need the file itself: name its path")
    found: torch.dtype = getattr(torch, DTYPES[written])
    return found
