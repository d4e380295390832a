"""Where the time of each mode went, as one picture. Invariant: all lanes share one time axis, so lengths compare.

Each mode has a lane of exclusive categories and a thin lane of copies under it. Where many segments fall on one pixel
the pixel shows their shares, stacked: a lane is never painted by whichever segment came last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .record import CATEGORIES
from .summary import seconds, size

# Okabe and Ito's palette: told apart with every common kind of colour blindness, and in print by lightness.
COLOURS: dict[str, str] = {
    "encode": "#56B4E9",
    "denoise": "#0072B2",
    "decode": "#009E73",
    "preview": "#CC79A7",
    "onload": "#E69F00",
    "stall": "#D55E00",
    "evict": "#F0E442",
    "other": "#C4C4C4",
}
COPY_COLOURS: dict[str, str] = {"h2d": "#404040", "d2h": "#8B1A8B"}
_COPY_NAMES = {"h2d": "copy to the device", "d2h": "copy to the host"}
_BINS, _ROWS = 1600, 60


def timeline_png(records: Sequence[tuple[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Draw (label, `offload-report/1`) pairs from top to bottom; best from full reports. Needs matplotlib.

    Raises:
        ValueError: nothing to draw.
        OSError: `path` cannot be written.
    """
    if not records:
        raise ValueError("timeline_png: got no records, allowed is one or more")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    longest = max((report["totals"]["wall_s"] or 0.0 for _, report in records), default=0.0)
    unit, scale = ("ms", 1e3) if longest < 1 else ("s", 1.0)
    end = (longest or 1.0) * scale
    figure = Figure(figsize=(12, 1.5 + 0.8 * len(records)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # the figure's own canvas: pyplot would keep it alive and pick the user's window system
    axes = figure.add_subplot()
    seen: set[str] = set()
    for i, (_, report) in enumerate(records):
        wall = (report["totals"]["wall_s"] or 0.0) * scale
        segments = [(row["t"], row["dur_s"], row["by"]) for row in report.get("segments", ())]
        copies = [
            (row["t"], row["dur_s"], {row["dir"]: row["dur_s"]})
            for row in report["moves"]
            if row["t"] is not None and row["dur_s"] and row["dir"] in COPY_COLOURS and not row.get("aggregated")
        ]
        lanes = ((segments, COLOURS, i - 0.34, i + 0.16), (copies, COPY_COLOURS, i + 0.18, i + 0.34))
        for rows, colours, top, bottom in lanes:
            seen.update(key for _, _, by in rows for key, value in by.items() if value > 0)
            if rows and wall > 0:
                picture = _paint(rows, colours, wall / scale, max(2, round(_BINS * wall / end)))
                axes.imshow(picture, extent=(0, wall, bottom, top), aspect="auto", interpolation="nearest", zorder=2)
        axes.text(end * 1.008, i - 0.09, _caption(report), va="center", fontsize=9)
    axes.set_xlim(0, end)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_yticks(range(len(records)), [f"{label}\n{report['verdict']}" for label, report in records])
    axes.tick_params(axis="y", length=0)
    note = "heights are shares of time where events are finer than a pixel"
    axes.set_xlabel(f"time on the device's clock ({unit}), {_rungs(records)}; {note}")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    names = [name for name in CATEGORIES if name in seen]
    patches = [Patch(color=COLOURS[name], label=name) for name in names]
    patches += [Patch(color=COPY_COLOURS[key], label=_COPY_NAMES[key]) for key in COPY_COLOURS if key in seen]
    if patches:
        figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False, fontsize=9)
    target = Path(path)
    figure.savefig(target, format="png")
    return target


def _caption(report: Mapping[str, Any]) -> str:
    vram, totals = report["vram"], report["totals"]
    peak = next((vram[key] for key in ("peak_torch", "peak_device", "peak_noted") if vram.get(key) is not None), None)
    return f"{seconds(totals['wall_s'])}, peak {size(peak)}\n{size(totals['bytes_h2d'])} onloaded"


def _rungs(records: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return ", ".join(dict.fromkeys(str(report["rung"]) for _, report in records))


def _paint(
    rows: Sequence[tuple[float, float, Mapping[str, float]]], colours: Mapping[str, str], wall: float, bins: int
) -> Any:
    """An RGBA image (_ROWS, bins, 4) of [0, wall]: in each column the share of time of each key, stacked upwards."""
    import numpy as np
    from matplotlib.colors import to_rgba

    keys = list(colours)
    edges = np.linspace(0.0, wall, bins + 1)
    share = np.zeros((len(keys), bins))
    for i, key in enumerate(keys):
        spans = np.array([(t, t + dur, by[key] / dur) for t, dur, by in rows if dur > 0 and by.get(key)], dtype=float)
        if not len(spans):
            continue
        # Each span raises the rate at its start and lowers it at its end; the integral at two edges is a pixel's share.
        at = np.concatenate((spans[:, 0], spans[:, 1]))
        change = np.concatenate((spans[:, 2], -spans[:, 2]))
        order = np.argsort(at, kind="stable")
        at, rate = at[order], np.cumsum(change[order])
        until = np.concatenate(([0.0], np.cumsum(rate[:-1] * np.diff(at))))
        share[i] = np.diff(np.interp(edges, at, until)) / (wall / bins)
    share = np.clip(share, 0.0, 1.0)
    upto = np.round(np.cumsum(share, axis=0) * _ROWS)
    image = np.zeros((_ROWS, bins, 4))
    height = np.arange(_ROWS)[::-1, None]  # row 0 is the top of the lane
    for i in reversed(range(len(keys))):
        image[height < upto[i]] = to_rgba(colours[keys[i]])
    return image
