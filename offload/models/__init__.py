"""Invariant: real model shapes from JSON configs in this folder; building one costs no RAM and downloads nothing."""

from .build import (
    NAMES,
    build_denoiser,
    build_model,
    build_pipeline,
    call_arguments,
    denoiser_name,
    load_spec,
    meta_denoiser,
    tiny,
)
from .inputs import Resolution, denoiser_inputs, parse_resolution
from .walks import ModelWalk, UnitCost, pieces, walk

__all__ = [
    "NAMES",
    "ModelWalk",
    "Resolution",
    "UnitCost",
    "build_denoiser",
    "build_model",
    "build_pipeline",
    "call_arguments",
    "denoiser_inputs",
    "denoiser_name",
    "load_spec",
    "meta_denoiser",
    "parse_resolution",
    "pieces",
    "tiny",
    "walk",
]
