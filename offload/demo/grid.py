"""Guards: the picture shows what was measured: every mode's own pictures, each with what the classifier read in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .words import DIGITS

RIGHT, WRONG = "#1B7F3B", "#C0261C"


def images_png(
    rows: Sequence[tuple[str, Tensor, Sequence[int]]], asked: Sequence[int], path: str | os.PathLike[str], title: str
) -> Path:
    """Draw a grid: one row per (label, pictures [N, 3, H, W] in 0..1, digits read), one column per prompt.

    Needs matplotlib. Raises ValueError where there is nothing to draw, OSError where `path` cannot be written.
    """
    if not rows:
        raise ValueError("images_png: got no rows, allowed is one or more")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(asked)
    figure = Figure(figsize=(1.6 + 1.02 * max(columns, 4), 0.8 + 1.24 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # the figure's own canvas: pyplot would pick the user's window system
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for y, (label, pictures, read) in enumerate(rows):
        for x, axes in enumerate(grid[y]):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if y == 0:
                axes.set_title(DIGITS[asked[x]], fontsize=11)
            if x == 0:
                axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
            axes.imshow(pictures[x].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_xlabel(f"read: {read[x]}", fontsize=9, labelpad=3, color=RIGHT if read[x] == asked[x] else WRONG)
    figure.suptitle(title, fontsize=11)
    target = Path(path)
    figure.savefig(target, format="png")
    return target
