"""Guards: the judge is independent of what it judges: trained on real digits only, never on the pipeline's pictures.

A small convolutional reader of 64x64 pictures; its weights ship as `digits/classifier.safetensors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pictures import ink_of

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS = Path(__file__).parent / "digits" / "classifier.safetensors"
VIEW = 32
"""The reader looks at ink of this height and width, whatever the picture's size."""


class DigitReader(nn.Module):
    """Ink [N, 1, 32, 32] in 0..1 -> logits [N, 10]; 34 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 10),
        )

    def forward(self, ink: Tensor) -> Tensor:
        logits: Tensor = self.layers(ink)
        return logits


def view_of(pictures: Tensor) -> Tensor:
    """RGB [N, 3, H, W] in 0..1 -> what the reader looks at, ink [N, 1, 32, 32]."""
    return F.interpolate(ink_of(pictures), size=(VIEW, VIEW), mode="area")


@lru_cache(maxsize=2)
def load_reader(weights: Path = WEIGHTS) -> DigitReader:
    """The trained reader on the CPU, evaluation mode. Raises FileNotFoundError where the weights are missing."""
    from safetensors.torch import load_file

    reader = DigitReader()
    reader.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return reader.eval()


def as_tensor(picture: Tensor | Image) -> Tensor:
    """A PIL picture or a tensor [3, H, W] in 0..1 -> float32 [3, H, W] on the CPU in 0..1.

    Raises ValueError for a tensor of another shape.
    """
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or picture.shape[0] != 3:
            raise ValueError(f"a picture is a tensor [3, H, W] in 0..1, not {list(picture.shape)}")
        return picture.detach().to("cpu", torch.float32)
    rgb = picture.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).float() / 255.0


def read_digits(pictures: Sequence[Tensor | Image], weights: Path = WEIGHTS) -> list[int]:
    """The digit (0..9) that each picture shows, in order; pictures may differ in size."""
    if not pictures:
        return []
    views = torch.cat([view_of(as_tensor(picture).unsqueeze(0)) for picture in pictures])
    with torch.inference_mode():
        return [int(value) for value in load_reader(weights)(views).argmax(dim=1)]


def read_digit(picture: Tensor | Image, weights: Path = WEIGHTS) -> int:
    """The digit (0..9) that the picture shows."""
    return read_digits([picture], weights)[0]
