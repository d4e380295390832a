"""Invariant: a pipeline that does on purpose what is hard to offload, small enough to read.

Its denoisers are called in another order than their layers were made in, skip a layer in odd steps, read a weight of a
child without calling it, tie two weights, and own a parameter at the root. Two denoisers share the steps.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn

WIDTH = 16


class ToyDenoiser(nn.Module):
    """[batch, WIDTH] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)  # made first, called last
        self.optional = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(8, WIDTH)  # read, never called
        self.first = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.first.weight
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("shift", torch.rand(WIDTH))

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        x = torch.tanh(self.first(x)) + self.table.weight[step]
        if step % 2 == 0:
            x = torch.relu(self.optional(x)) - x
        x = self.tied(x) * self.scale + self.shift
        return torch.tanh(self.last(x))


class ToyText(nn.Module):
    """Ids [batch, length] -> [batch, WIDTH]; the pipeline calls a part of it as well as the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = nn.Sequential(nn.Embedding(32, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.projection = nn.Linear(WIDTH, WIDTH)

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.projection(self.text_model(ids).mean(1))

    def get_text_features(self, ids: torch.Tensor) -> torch.Tensor:
        return self.projection(self.text_model(ids).amax(1))


class ToyPipeline(DiffusionPipeline):
    """A text model and one or two denoisers. `fail_at`: raise between two steps, or inside one."""

    model_cpu_offload_seq = "text_encoder->transformer->transformer_2"
    _optional_components: ClassVar[list[str]] = ["transformer_2"]

    def __init__(self, transformer: Any, text_encoder: Any, scheduler: Any, transformer_2: Any = None) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, scheduler=scheduler, transformer_2=transformer_2
        )

    def check_inputs(self, steps: int) -> None:
        if steps < 1:
            raise ValueError("steps")

    @torch.no_grad()
    def __call__(self, steps: int = 4, callback: Any = None, **kwargs: Any) -> Any:
        self.check_inputs(steps)
        device = self._execution_device
        ids = torch.arange(6, device=device).view(1, 6)
        x = self.text_encoder(ids) + self.text_encoder.get_text_features(ids)
        x = x + self.text_encoder.text_model(ids).sum(1)
        for step in range(steps):
            second = self.transformer_2 is not None and step % 3 == 2
            x = (self.transformer_2 if second else self.transformer)(x, step)
            if callback is not None:
                callback(step)
        self.maybe_free_model_hooks()
        return SimpleNamespace(images=x)


def build_toy(two: bool = True) -> Any:
    """Weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe = ToyPipeline(ToyDenoiser(), ToyText(), DDIMScheduler(), ToyDenoiser() if two else None)
    for part in (pipe.transformer, pipe.text_encoder, pipe.transformer_2):
        if part is not None:
            part.eval().requires_grad_(False)
    return pipe
