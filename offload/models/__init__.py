"""Invariant: real model shapes from JSON configs in this folder; building one costs no RAM and downloads nothing."""

from .build import NAMES, build_model, build_pipeline, call_arguments, load_spec, tiny

__all__ = ["NAMES", "build_model", "build_pipeline", "call_arguments", "load_spec", "tiny"]
