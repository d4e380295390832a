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

__all__ = [
    "NAMES",
    "build_denoiser",
    "build_model",
    "build_pipeline",
    "call_arguments",
    "denoiser_name",
    "load_spec",
    "meta_denoiser",
    "tiny",
]
