"""The denoisers of a bench. Invariant: two builds of one subject have equal weights, wherever values are computed.

Real sizes come from `offload.models`; "flux1-cut" is FLUX.1-dev with 4 + 8 of its 19 + 38 blocks, small enough for a
fast suite. Each has a tiny twin: the same classes with small widths and weights that are computed with.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]
_BLOCK = 1 << 22  # elements of random numbers, of which all weights are made: drawing 12 billion would take minutes
_LARGE = 1 << 22  # elements: above it, a buffer of a model of real size is left unwritten when it is built

CUT_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
"""FLUX.1-dev's published configuration but for the two numbers of layers: 4.74 GiB in bfloat16."""

CUT_TINY: dict[str, Any] = {
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 6, 6],
}
"""What its twin changes: 64 wide instead of 3072."""


@dataclass(frozen=True)
class Subject:
    """One denoiser.

    `skeleton(tiny)` builds it with unwritten weights; `inputs(resolution, tiny)` are its forward's, on the CPU (the
    twin's usual ones for None); `canonical(written)` is a resolution as it is noted, or the usual one for None.
    """

    name: str
    dtype: torch.dtype
    skeleton: Callable[[bool], nn.Module]
    inputs: Callable[[str | None, bool], Inputs]
    canonical: Callable[[str | None], str]
    computed: bool = False  # small enough to be computed with on the simulated accelerator, twin or no twin

    def build(self, *, tiny: bool = False, values: bool = True) -> nn.Module:
        """On the CPU in pageable memory; without `values` it is memory that nobody has written to."""
        module = self.skeleton(tiny)
        give_memory(module, self.dtype)
        if values:
            fill(module)
        return module.eval().requires_grad_(False)


def give_memory(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every parameter that has no memory (meta) by an untouched one in `dtype`; ties stay ties."""
    fresh: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old one, so that its id is not given out again
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in fresh:
                kind = dtype if parameter.is_floating_point() else parameter.dtype
                memory = torch.empty(parameter.shape, dtype=kind, device="cpu")
                fresh[id(parameter)] = parameter, nn.Parameter(memory, requires_grad=False)
            owner._parameters[key] = fresh[id(parameter)][1]
        for key, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_meta:
                raise ValueError(f"{type(owner).__name__}.{key}: a buffer without values cannot be run")


def fill(module: nn.Module, seed: int = 0) -> None:
    """Write random values that keep activations of order one into every parameter, at the speed of memory.

    All parameters share one block of random numbers, each from another offset on, so that two layers differ. Large
    buffers that are stored with the weights are written too; small ones were computed when the module was built.
    """
    stored = set(module.state_dict())
    large = [(name, buffer) for name, buffer in module.named_buffers() if name in stored and buffer.numel() > _LARGE]
    weights = [*module.named_parameters(), *large]
    longest = max((weight.numel() for _, weight in weights), default=1)
    noise = _noise(seed)[: 1 << longest.bit_length()]
    block = noise.numel()
    scaled: dict[tuple[torch.dtype, float], torch.Tensor] = {}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(weights):
            flat = parameter.data.view(-1)
            if parameter.dim() > 1:
                spread, centre = 1.0 / math.sqrt(parameter[0].numel()), 0.0
            else:  # a bias, or the gain of a norm
                spread, centre = 0.02, 1.0 if name.endswith("weight") else 0.0
            key = parameter.dtype, spread
            if key not in scaled:
                if len(scaled) > 16:
                    scaled.clear()
                scaled[key] = (noise * spread).to(parameter.dtype)
            source, at, start = scaled[key], 0, (number * 7919) % block
            while at < flat.numel():
                take = min(flat.numel() - at, block - start)
                flat[at : at + take].copy_(source[start : start + take])
                at, start = at + take, 0
            if centre:
                flat.add_(centre)


@functools.lru_cache(maxsize=1)
def _noise(seed: int) -> torch.Tensor:
    return torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))


def on_device(inputs: Mapping[str, Any], device: torch.device) -> Inputs:
    """The same inputs with every tensor on `device`, those in lists and mappings too."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(move(item) for item in value)
        return value

    return {key: move(value) for key, value in inputs.items()}


def output_tensor(output: Any) -> torch.Tensor:
    """The sample of a denoiser's output, as a tensor."""
    found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    if isinstance(found, (tuple, list)):
        found = found[0]
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"a denoiser's output should be or begin with a tensor, not {type(found).__name__}")
    return found


def _cut_skeleton(tiny: bool) -> nn.Module:
    diffusers = importlib.import_module("diffusers")
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(**{**CUT_CONFIG, **(CUT_TINY if tiny else {})})
    assert isinstance(module, nn.Module)
    return module


def _cut_resolution(written: str | None) -> str:
    return "512x512" if written is None else str(_flux().parse_resolution("flux1-dev", written))


def _cut_inputs(resolution: str | None, tiny: bool) -> Inputs:
    """FLUX.1-dev's own inputs; the cut changes the number of blocks only. The twin's are its own."""
    if not tiny:
        found = _flux().denoiser_inputs("flux1-dev", resolution or "512x512", dtype=torch.bfloat16, device="cpu")
        return dict(found)
    side, words = 8, 32
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    rows = torch.arange(side).view(side, 1).expand(side, side)
    image_ids = torch.stack([torch.zeros_like(rows), rows, rows.t()], dim=-1).reshape(-1, 3)
    return {
        "hidden_states": noise(1, side * side, CUT_CONFIG["in_channels"]),
        "encoder_hidden_states": noise(1, words, CUT_TINY["joint_attention_dim"]),
        "pooled_projections": noise(1, CUT_TINY["pooled_projection_dim"]),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5]),
        "img_ids": image_ids.to(torch.bfloat16),
        "txt_ids": torch.zeros(words, 3, dtype=torch.bfloat16),
        "return_dict": False,
    }


def _flux() -> Any:
    return importlib.import_module("...models", __name__)


CUT = Subject("flux1-cut", torch.bfloat16, _cut_skeleton, _cut_inputs, _cut_resolution)
TINY = Subject(
    "flux1-tiny",
    torch.bfloat16,
    lambda tiny: _cut_skeleton(True),
    lambda resolution, tiny: _cut_inputs(None, True),
    lambda written: "128x128",
    computed=True,
)
"""The twin of the cut as a subject of its own: every value is computed wherever it runs."""
_OWN = {subject.name: subject for subject in (CUT, TINY)}


def names() -> tuple[str, ...]:
    """Every subject there is."""
    from ..models import NAMES

    return (*NAMES, *_OWN)


def find(name: str) -> Subject:
    """The subject of that name.

    Raises:
        ValueError: there is none.
    """
    if name in _OWN:
        return _OWN[name]
    from ..models import build_denoiser, denoiser_inputs, parse_resolution

    dtype = torch.float16 if name == "sdxl" else torch.bfloat16

    def skeleton(tiny: bool) -> nn.Module:
        return build_denoiser(name, dtype, tiny=tiny)

    def inputs(resolution: str | None, tiny: bool) -> Inputs:
        return dict(denoiser_inputs(name, resolution, dtype=dtype, device="cpu", tiny=tiny))

    def canonical(written: str | None) -> str:
        return str(parse_resolution(name, written))

    if name not in names():
        raise ValueError(f"model: got {name!r}; allowed: {', '.join(names())}")
    return Subject(name, dtype, skeleton, inputs, canonical)
