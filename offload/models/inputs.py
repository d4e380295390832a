"""Invariant: the denoiser gets what its pipeline would give it in one step: the same names, shapes and dtypes.

One call is one forward: SDXL and SD3.5 take both halves of classifier-free guidance as a batch of two, FLUX takes its
guidance as a number, Qwen-Image and Wan run once per half, and this is one of the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..sizes import bad_value
from .build import call_arguments, denoiser_name, load_spec

_WRITTEN = re.compile(r"(\d+)\s*[xX×]\s*(\d+)(?:\s*[xX×]\s*(\d+))?")
_CLIP_TOKENS = 77
_LARGEST = 8192  # pixels a side: more is a slip of the finger


@dataclass(frozen=True)
class Resolution:
    """Pixels, and the frames of a video (None: a picture)."""

    width: int
    height: int
    frames: int | None = None

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + ("" if self.frames is None else f"x{self.frames}")


@dataclass(frozen=True)
class _Latents:
    """What the denoiser sees of a picture or video."""

    channels: int
    height: int
    width: int
    frames: int
    patch: int

    @property
    def tokens(self) -> int:
        return self.frames * (self.height // self.patch) * (self.width // self.patch)


def parse_resolution(name: str, written: str | None = None, *, tiny: bool = False) -> Resolution:
    """The resolution that was written for the model, or its usual one: "1024x1024", and for a video "832x480x81".

    Raises:
        ValueError: it cannot be read, or the model cannot draw it; says what is allowed.
    """
    call = call_arguments(name, tiny_sizes=tiny)
    frames: int | None = call.get("num_frames")
    usual = Resolution(call["width"], call["height"], frames)
    if written is None:
        return usual
    size = read_resolution(written, step=_patch(name) * 8, frames=frames is not None, example=usual)
    limit = _longest_side(name, tiny)
    if limit is not None and max(size.width, size.height) > limit:
        allowed = f"up to {limit} pixels a side"
        raise bad_value("resolution", written, allowed, f"{name} has positions for no more; write {usual}")
    return replace(size, frames=frames) if size.frames is None else size


def read_resolution(
    written: str, *, step: int = 16, frames: bool = True, example: Resolution | None = None
) -> Resolution:
    """A written resolution: sides that are multiples of `step` pixels, and 4 k + 1 frames where `frames` are allowed.

    Raises:
        ValueError: names what was given, what is allowed and what to write.
    """
    allowed = f"WIDTHxHEIGHT{'[xFRAMES]' if frames else ''}, sides in multiples of {step} up to {_LARGEST}"
    match = _WRITTEN.fullmatch(written.strip())
    if match is None:
        raise bad_value("resolution", written, allowed, f'write for example "{example or "1024x1024"}"')
    width, height, given = int(match[1]), int(match[2]), int(match[3]) if match[3] else None
    for side in (width, height):
        if not 0 < side <= _LARGEST or side % step:
            near = min(max(step, round(side / step) * step), _LARGEST)
            raise bad_value("resolution", written, allowed, f"{side} could be {near}")
    if given is None:
        return Resolution(width, height)
    if not frames:
        raise bad_value("resolution", written, allowed, "this model draws pictures: leave the frames out")
    if not 0 < given <= _LARGEST or given % 4 != 1:
        near = min(max(0, given), _LARGEST) // 4 * 4 + 1
        raise bad_value("resolution", written, allowed + ", frames 4 k + 1", f"{given} frames could be {near}")
    return Resolution(width, height, given)


def denoiser_inputs(
    name: str,
    resolution: str | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    tiny: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of one forward of the denoiser of `build_denoiser(name, tiny=tiny)`.

    Args:
        resolution: as `parse_resolution` reads it; None is the model's usual one (the twin's, with `tiny`).
        dtype: of latents and embeddings.
        device: where the tensors are put; "meta" makes shapes only.
        seed: of the values, which are the same on every device.

    Raises:
        ValueError: no such model, or a resolution that it cannot draw.
    """
    size = parse_resolution(name, resolution, tiny=tiny)
    make = _Maker(dtype, torch.device(device), seed)
    config = denoiser_config(name, tiny)
    inputs: dict[str, Any] = _INPUTS[load_spec(name)["pipeline"]](config, _latents(name, size, config), make, tiny)
    return {**inputs, "return_dict": False}


def tokens(name: str, resolution: str | None = None) -> int:
    """How many picture tokens (SDXL: latent pixels) one sample of the resolution has."""
    return _latents(name, parse_resolution(name, resolution), denoiser_config(name)).tokens


def denoiser_config(name: str, tiny: bool = False) -> dict[str, Any]:
    """The denoiser's configuration as it is built."""
    entry = load_spec(name)["components"][denoiser_name(name)]
    return {**entry["config"], **(entry["tiny"] if tiny else {})}


class _Maker:
    """Makes the tensors: random values from one CPU generator, so that they do not depend on the device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int) -> torch.Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self._dtype, device=self.device)
        values = torch.randn(shape, generator=self._generator, dtype=torch.float32)
        return values.to(self._dtype).to(self.device)

    def number(self, value: float, count: int | None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[count] times the value; a scalar for None."""
        shape = () if count is None else (count,)
        return torch.full(shape, value, dtype=dtype or self._dtype).to(self.device)

    def ids(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self._dtype).to(self.device)


def _sdxl(config: dict[str, Any], latents: _Latents, make: _Maker, tiny: bool) -> dict[str, Any]:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    time_ids = torch.tensor([[latents.height * 8, latents.width * 8, 0, 0, latents.height * 8, latents.width * 8]] * 2)
    return {
        "sample": make.noise(2, latents.channels, latents.height, latents.width),
        "timestep": make.number(999.0, None, torch.float32),
        "encoder_hidden_states": make.noise(2, _CLIP_TOKENS, config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": make.noise(2, pooled), "time_ids": make.ids(time_ids)},
    }


def _sd3(config: dict[str, Any], latents: _Latents, make: _Maker, tiny: bool) -> dict[str, Any]:
    text = _CLIP_TOKENS + _text_tokens("sd35-large", tiny)
    return {
        "hidden_states": make.noise(2, latents.channels, latents.height, latents.width),
        "timestep": make.number(1000.0, 2, torch.float32),
        "encoder_hidden_states": make.noise(2, text, config["joint_attention_dim"]),
        "pooled_projections": make.noise(2, config["pooled_projection_dim"]),
    }


def _flux(config: dict[str, Any], latents: _Latents, make: _Maker, tiny: bool) -> dict[str, Any]:
    text = _text_tokens("flux1-dev", tiny)
    rows, columns = latents.height // 2, latents.width // 2
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    return {
        "hidden_states": make.noise(1, latents.tokens, latents.channels),
        "timestep": make.number(1.0, 1),
        "guidance": make.number(3.5, 1, torch.float32),
        "pooled_projections": make.noise(1, config["pooled_projection_dim"]),
        "encoder_hidden_states": make.noise(1, text, config["joint_attention_dim"]),
        "txt_ids": make.ids(torch.zeros(text, 3)),
        "img_ids": make.ids(grid),
    }


def _qwen(config: dict[str, Any], latents: _Latents, make: _Maker, tiny: bool) -> dict[str, Any]:
    # The mask is left out where it masks nothing, as the pipeline does for one prompt.
    return {
        "hidden_states": make.noise(1, latents.tokens, latents.channels),
        "timestep": make.number(1.0, 1),
        "encoder_hidden_states": make.noise(1, _text_tokens("qwen-image", tiny), config["joint_attention_dim"]),
        "img_shapes": [[(1, latents.height // 2, latents.width // 2)]],
    }


def _wan(config: dict[str, Any], latents: _Latents, make: _Maker, tiny: bool) -> dict[str, Any]:
    return {
        "hidden_states": make.noise(1, latents.channels, latents.frames, latents.height, latents.width),
        "timestep": make.number(999, 1, torch.int64),
        "encoder_hidden_states": make.noise(1, _text_tokens("wan21-14b", tiny), config["text_dim"]),
    }


_INPUTS = {
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "QwenImagePipeline": _qwen,
    "WanPipeline": _wan,
}


def _latents(name: str, size: Resolution, config: dict[str, Any]) -> _Latents:
    frames = 1 if size.frames is None else (size.frames - 1) // 4 + 1
    return _Latents(config["in_channels"], size.height // 8, size.width // 8, frames, _patch(name))


def _patch(name: str) -> int:
    """Latent pixels a side of one token: SDXL's UNet halves twice, but tolerates all of them."""
    return 1 if denoiser_name(name) == "unet" else 2


def _longest_side(name: str, tiny: bool) -> int | None:
    positions = denoiser_config(name, tiny).get("pos_embed_max_size")
    return None if positions is None else int(positions) * _patch(name) * 8


def _text_tokens(name: str, tiny: bool) -> int:
    """Text tokens of a usual prompt: what the pipeline pads to, where it does."""
    padded = int(call_arguments(name, tiny_sizes=tiny)["max_sequence_length"])
    return min(padded, int(load_spec(name).get("prompt_tokens", padded)))
