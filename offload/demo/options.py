"""Guards: what the user asks of the demo is read once, here, before anything is drawn."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from .pipeline import PROMPTS

MODES = ("none", "balanced", "model", "sequential", "auto")
PICTURES = 50
BATCH = 2  # pictures per generation: enough to be quick, few enough that weights outweigh activations
NEEDS = ("diffusers", "transformers", "safetensors", "matplotlib", "PIL")


class MissingExtras(RuntimeError):
    """Packages that only the demo needs are not installed."""


@dataclass(frozen=True)
class Options:
    """What the user asked for. `cap` as written; a share is one of the weights of the run."""

    modes: tuple[str, ...] = MODES
    cap: int | float | str | None = None
    device: str = "auto"
    card: str | None = None
    pictures: int = PICTURES
    out: Path = Path("balanced-offload-demo")


@dataclass(frozen=True)
class Batch:
    """One generation: the digits to draw and the seed that all of its pictures start from.

    One seed for all prompts: where two pictures differ, the prompt made the difference.
    """

    digits: tuple[int, ...]
    seed: int


def require_extras() -> None:
    """Raise MissingExtras, naming the packages and the remedy, where the demo cannot run."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtras(
            f'the demo needs {", ".join(missing)}, which is not installed: pip install "balanced-offload[demo]"'
        )


def batches(count: int) -> tuple[list[Batch], list[Batch]]:
    """The generations of `count` pictures: what every mode draws (ten prompts, one seed), and the further ones."""
    sets: list[list[Batch]] = [[], []]
    for start in range(0, count, len(PROMPTS)):
        digits = range(min(len(PROMPTS), count - start))
        seed = start // len(PROMPTS)
        for i in range(0, len(digits), BATCH):
            sets[min(seed, 1)].append(Batch(tuple(digits[i : i + BATCH]), seed))
    return sets[0], sets[1]
