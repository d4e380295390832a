"""Guards: the demo's pipeline loads from the files beside this module alone: no network, safetensors only, no pickle.

The folder `digits/` is written by `train.py`; its README says what is in it and how it was made.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from .words import DIGITS

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

FOLDER = Path(__file__).parent / "digits"
PROMPTS: list[str] = [f"a photo of the digit {word}" for word in DIGITS]
"""Ten prompts; the index is the digit."""


class Defaults(TypedDict):
    """How the pipeline is called: pixels, steps and the weight of the prompt."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float


DEFAULTS: Defaults = {"height": 64, "width": 64, "num_inference_steps": 10, "guidance_scale": 3.0}


@contextmanager
def quiet() -> Iterator[None]:
    """No loading bars and no advice about unused image processors; both libraries' settings as before afterwards."""
    diffusers_log = importlib.import_module("diffusers.utils.logging")
    transformers_log = importlib.import_module("transformers.utils.logging")
    bars = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    level = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()
    for log in bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        transformers_log.set_verbosity(level)
        for log in bars:
            log.enable_progress_bar()


def load_pipeline(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> StableDiffusionXLPipeline:
    """The digits pipeline on the CPU in `dtype` (17.7 MiB of weights in fp32), progress bar off.

    `folder` is another one written by `train.py`; None is the one that ships with the package.
    Raises FileNotFoundError, naming the training command, where the folder holds no pipeline.
    """
    source = FOLDER if folder is None else folder
    if not (source / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline in {source}: it ships with the repository; to make it anew run "
            f"python -m balanced_offload.offload.demo.train --out {source}"
        )
    with quiet():
        from diffusers import StableDiffusionXLPipeline

        pipe: StableDiffusionXLPipeline = StableDiffusionXLPipeline.from_pretrained(
            str(source), local_files_only=True, use_safetensors=True, add_watermarker=False
        )
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            # The dtype argument's name differs between diffusers versions; fp16 on disk to fp32 is exact either way.
            nn.Module.to(component, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
