"""How the weights of a pipeline folder are to be read. Invariant: only headers and names are looked at here."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from . import comfyui_host
from .loading import _variant_of as variant_of

DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST = 100 << 20  # bytes of a header; safetensors' own limit


def choose_dtype(choice: str, folder: Path, device: torch.device) -> torch.dtype | None:
    """The type of all models. auto: the one that the largest file holds, where the host computes in it, else float32.

    Raises:
        ValueError: no such choice.
    """
    if choice not in DTYPES:
        raise ValueError(f"dtype: got {choice!r}, allowed are {', '.join(DTYPES)}")
    if choice != "auto":
        return DTYPES[choice]
    stored = _stored_dtype(folder)
    if stored is None or stored is torch.float32:
        return stored
    mm = comfyui_host.model_management()
    half = mm.should_use_bf16 if stored is torch.bfloat16 else mm.should_use_fp16
    return stored if half(device) else torch.float32


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """What most elements of the largest weights file are."""
    files = sorted(folder.glob("*/*.safetensors"), key=lambda file: file.stat().st_size)
    if not files:
        return None
    counts: dict[str, int] = {}
    try:
        with files[-1].open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, _LONGEST)))
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + last - first
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged: the load says so, and what to do
    return _STORED.get(max(counts, key=lambda key: counts[key])) if counts else None


def choose_variant(folder: Path, dtype: torch.dtype | None) -> str | None:
    """The word in the file names (`model.fp16.safetensors`) to load by, None for the plain ones.

    It is taken where some model has no other weights, and where it is the type that is asked for: half the reading.
    """
    words = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    places = [place for place in folder.iterdir() if place.is_dir()]
    models = [{variant_of(file) for file in place.glob("*.safetensors")} for place in places]
    found = {word for model in models for word in model if word is not None}
    wanted = words.get(dtype) if dtype is not None else None
    if wanted in found:
        return wanted
    lacking = any(model and None not in model for model in models)
    return min(found) if lacking else None
