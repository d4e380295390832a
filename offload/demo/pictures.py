"""Guards: a digit looks the same to every part: one renderer makes the pictures that the VAE, UNet and classifier see.

scikit-learn's digits are 8x8 grey with values 0..16. They become smooth 64x64 two-tone pictures (ink on paper), since
a real AutoencoderKL and a reader of the README both want more than 64 pixels.
"""

from __future__ import annotations

import importlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
"""Height and width of a picture, pixels."""
PAPER = (0.075, 0.125, 0.235)
INK = (1.0, 0.83, 0.45)
"""RGB in 0..1: where nothing is written, and where the pen pressed hardest."""


def load_digits() -> tuple[Tensor, Tensor]:
    """The data set: grey [1797, 1, 8, 8] float32 in 0..1 and labels [1797] int64.

    Raises RuntimeError, naming the remedy, where scikit-learn is not installed.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise RuntimeError(
            "training needs scikit-learn, which ships the digits: pip install scikit-learn (running the demo does not)"
        ) from error
    bunch = datasets.load_digits()
    grey = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return grey, torch.tensor(bunch.target, dtype=torch.int64)


def split(count: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train, held out) of a shuffle of `count` pictures that depends on `seed` alone."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:], order[:held_out]


def enlarge(grey: Tensor) -> Tensor:
    """Grey [N, 1, 8, 8] in 0..1 -> smooth ink [N, 1, 64, 64] in 0..1, with a margin of one source pixel."""
    padded = F.pad(grey, (1, 1, 1, 1))
    smooth = F.interpolate(padded, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    # The source is blurred by its own 8x8 averaging; a smoothstep gives the stroke an edge without stair-steps.
    edge = ((smooth - 0.15) / 0.55).clamp(0.0, 1.0)
    return edge * edge * (3.0 - 2.0 * edge)


def colour(ink: Tensor) -> Tensor:
    """Ink [N, 1, H, W] in 0..1 -> RGB [N, 3, H, W] in 0..1."""
    paper = torch.tensor(PAPER, dtype=ink.dtype, device=ink.device).view(1, 3, 1, 1)
    pen = torch.tensor(INK, dtype=ink.dtype, device=ink.device).view(1, 3, 1, 1)
    return paper + ink * (pen - paper)


def ink_of(picture: Tensor) -> Tensor:
    """RGB [N, 3, H, W] in 0..1 -> ink [N, 1, H, W] in 0..1: the inverse of `colour`, by projection on its axis."""
    paper = torch.tensor(PAPER, dtype=picture.dtype, device=picture.device).view(1, 3, 1, 1)
    axis = torch.tensor(INK, dtype=picture.dtype, device=picture.device).view(1, 3, 1, 1) - paper
    along = ((picture - paper) * axis).sum(dim=1, keepdim=True) / axis.square().sum()
    return along.clamp(0.0, 1.0)


def jitter(ink: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Ink [N, 1, H, W] slightly turned, scaled and shifted, each picture on its own; same shape and range.

    At strength 1: up to 10 degrees, 10 % in size and 6 % of the width in place.
    """
    count = ink.shape[0]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2.0 - 1.0) * limit * strength

    angle, scale = uniform(10.0 * math.pi / 180.0), 1.0 + uniform(0.10)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos, -sin, uniform(0.12), sin, cos, uniform(0.12)], dim=1).view(count, 2, 3)
    grid = F.affine_grid(rows, list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
