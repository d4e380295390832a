"""One picture from a diffusers pipeline inside a host. Invariant: a call gets what its signature takes, and no more.

Whatever ends the call (an error, the host's interrupt, which is a BaseException on newer hosts), the next one is as the
first: the scheduler and the types of the models are put back.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ledger import Ledger
from . import comfyui_host
from .comfyui_progress import Progress
from .parts import modules_of


class GenerateError(ValueError):
    """A value that this pipeline cannot work with: the input, what was given, what is allowed."""


@dataclass(frozen=True)
class Request:
    """What PipelineGenerate asks for. `image`: [B, H, W, C] in 0..1 or None; sizes are pixels."""

    prompt: str
    negative: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    guidance: float = 7.0
    seed: int = 0
    image: torch.Tensor | None = None
    strength: float = 0.75


def variant_for(pipe: Any, request: Request) -> Any:
    """`pipe`, or where an image is given and it takes none, its image-to-image kind on the same modules.

    Raises:
        GenerateError: it needs an image and there is none, or diffusers has no image-to-image pipeline for its class.
    """
    image = _parameters(pipe).get("image")
    kind = type(pipe).__name__
    if request.image is None:  # image-to-image classes give `image` a default, and fail on it late, in other words
        if image is not None and (image.default is inspect.Parameter.empty or "strength" in _parameters(pipe)):
            raise GenerateError(
                f"image: got none, and {kind} needs one. Wire an image, or load a text-to-image pipeline."
            )
        return pipe
    if image is not None:
        return pipe
    import diffusers

    try:
        return diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise GenerateError(
            f"image: {kind} takes none, and diffusers {diffusers.__version__} has no image-to-image pipeline for it "
            f"({' '.join(str(error).split())[:200]}). Take the image off, or load a pipeline that has one "
            "(Stable Diffusion 1, XL and 3, Flux and others do)."
        ) from error


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """What of the request the pipeline's call takes, by its parameters' names.

    Raises:
        GenerateError: steps and strength that leave nothing to do, an image of another shape.
    """
    taken = _parameters(pipe)
    generator = torch.Generator("cpu").manual_seed(request.seed)  # the same noise whatever the device
    given: dict[str, Any] = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "generator": generator,
        "output_type": "pt",
    }
    if request.negative.strip():  # "" and none are not the same to every pipeline, and none is what it takes by itself
        given["negative_prompt"] = request.negative
    if request.image is not None:
        given |= _of_image(request.image, given, "strength" in taken, request)
    if "prompt" in given and "prompt" not in taken:
        del given["prompt"]
    return {name: value for name, value in given.items() if name in taken}


def _of_image(image: torch.Tensor, given: dict[str, Any], with_strength: bool, request: Request) -> dict[str, Any]:
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise GenerateError(f"image: got a tensor {list(image.shape)}, allowed is [batch, height, width, 3]")
    if with_strength and int(request.steps * request.strength) < 1:
        raise GenerateError(
            f"strength: got {request.strength:g} with {request.steps} steps, which leaves none to do; allowed is at "
            f"least {1 / request.steps:.3g} with that many steps"
        )
    count = image.shape[0]
    found: dict[str, Any] = {
        "image": image[..., :3].movedim(-1, 1).to("cpu", torch.float32).expand(-1, 3, -1, -1).contiguous(),
        "strength": request.strength,
        "height": image.shape[1],
        "width": image.shape[2],
    }
    if count > 1:  # one prompt for each picture
        found |= {key: [given[key]] * count for key in ("prompt", "negative_prompt") if key in given}
    return found


def left_out(pipe: Any, request: Request) -> list[str]:
    """What was asked for and the pipeline does not know, a sentence each."""
    taken, kind = _parameters(pipe), type(pipe).__name__
    found = []
    if request.negative.strip() and "negative_prompt" not in taken:
        found.append(f"negative: {kind} has no negative prompt; it was left out.")
    if request.image is not None and "strength" not in taken:
        found.append(f"strength: {kind} takes an image without a strength; it was left out.")
    return found


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipe).__call__).parameters)


# ---------------------------------------------------------------------- the call
def generate(pipe: Any, request: Request, ledger: Ledger) -> torch.Tensor:
    """Run `pipe`, one that `variant_for` gave; pictures [B, H, W, C], float32 on the CPU, in 0..1.

    Raises:
        GenerateError: see `call_arguments`; a pipeline whose result is no picture.
        BaseException: the host's interrupt, between two steps.
    """
    comfyui_host.throw_if_interrupted()
    arguments = call_arguments(pipe, request)
    size = arguments.get("height", request.height), arguments.get("width", request.width)
    progress = Progress(pipe, request.steps, size, ledger)
    with contextlib.ExitStack() as undo:
        undo.enter_context(_as_before(pipe))
        arguments |= undo.enter_context(progress.watching(pipe))
        if "generator" not in arguments:
            undo.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(request.seed)
        with torch.no_grad():
            output = pipe(**arguments)
        return pictures(output, type(pipe).__name__)


@contextlib.contextmanager
def _as_before(pipe: Any) -> Iterator[None]:
    """The scheduler as it was, which else keeps steps and their tensors; after an error the models' types as well."""
    scheduler = getattr(pipe, "scheduler", None)
    kept = {key: _copied(value) for key, value in vars(scheduler).items()} if scheduler is not None else {}
    types = {name: _dtype_of(module) for name, module in modules_of(pipe).items()}
    try:
        yield
    except BaseException:
        for name, module in modules_of(pipe).items():
            before = types.get(name)
            if before is not None and _dtype_of(module) != before:  # SDXL casts its VAE for the decode, and back
                module.to(before)
        raise
    finally:
        if scheduler is not None:
            vars(scheduler).clear()
            vars(scheduler).update(kept)


def _copied(value: Any) -> Any:
    return list(value) if type(value) is list else value


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), None)


def pictures(output: Any, kind: str) -> torch.Tensor:
    """What a pipeline returned as [B, H, W, C], float32 on the CPU, in 0..1; the frames of a video one by one.

    Raises:
        GenerateError: no pictures.
    """
    found = getattr(output, "images", None)
    found = getattr(output, "frames", None) if found is None else found
    if found is None:
        raise GenerateError(
            f"pipeline: {kind} returns {type(output).__name__}, which has no pictures; allowed is one that draws"
        )
    stacked = _stacked(found)
    if stacked.ndim == 5:
        stacked = stacked.flatten(0, 1)
    if stacked.ndim != 4:
        raise GenerateError(f"pipeline: {kind} returned a tensor {list(stacked.shape)}, allowed are pictures")
    if stacked.shape[-1] == 1:
        stacked = stacked.expand(-1, -1, -1, 3)
    return stacked.clamp(0, 1).contiguous()


def _stacked(found: Any) -> torch.Tensor:
    """Tensors (channels first), arrays (channels last) or PIL images as one tensor, channels last."""
    if isinstance(found, torch.Tensor):
        plain = found.to("cpu", torch.float32)
        return plain.movedim(-3, -1) if plain.ndim >= 3 else plain
    if isinstance(found, (list, tuple)):
        return torch.stack([_stacked(item) for item in found])
    import numpy

    array = numpy.asarray(found)
    scale = 255.0 if array.dtype == numpy.uint8 else 1.0
    tensor = torch.from_numpy(array.astype(numpy.float32)) / scale
    return tensor.unsqueeze(-1) if tensor.ndim == 2 else tensor
