"""The bench as one picture. Invariant: bars of one case share a scale, and a bar that is cut says how long it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..sizes import GIB
from .document import HEADLINE, result_of, shown_size

# Okabe and Ito's palette: told apart with every common kind of colour blindness. Ours is the one dark, saturated bar.
OURS = "#0072B2"
PEERS = {
    "torch.to": "#BBBBBB",
    "diffusers.model": "#999999",
    "accelerate.dispatch": "#009E73",
    "diffusers.sequential": "#CC79A7",
    "diffusers.group_leaf": "#F0E442",
    "diffusers.group_leaf_stream": "#E69F00",
    "diffusers.group_leaf_stream_record": "#D55E00",
    "diffusers.group_block_stream": "#56B4E9",
}
_LABELS = {
    HEADLINE: "ours (auto)",
    "torch.to": ".to(device)",
    "diffusers.model": "model offload",
    "diffusers.sequential": "sequential offload",
    "accelerate.dispatch": "accelerate dispatch",
}
MOST = 4.0
"""Bars longer than this many times the bound are cut, with their figure written beside them."""
COLUMNS = 4


def chart_png(document: Mapping[str, Any], path: Path) -> Path:
    """Step time over the bound per strategy, one panel per case. Needs matplotlib.

    Raises:
        ValueError: no case has a result.
        OSError: `path` cannot be written.
    """
    entries = [entry for entry in document["cases"] if entry["results"]]
    if not entries:
        raise ValueError("chart: the document has no results to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in (HEADLINE, *PEERS) if any(result_of(entry, name) for entry in entries)]
    columns = min(COLUMNS, len(entries))
    rows = -(-len(entries) // columns)
    size = (1.9 + 2.9 * columns, 1.0 + rows * (0.75 + 0.21 * len(names)))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # the figure's own canvas: pyplot would keep it alive and pick the user's window system
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, entry in enumerate(entries):
        _panel(axes[place // columns][place % columns], document, entry, names)
    for place in range(len(entries), rows * columns):
        axes[place // columns][place % columns].set_visible(False)
    kind = "simulated" if document["rung"] == "simulated" else f"measured on {document['device']}"
    figure.suptitle(f"Denoising step over its physical bound ({kind})", fontsize=10)
    figure.supxlabel("step time / max(compute, bytes that do not fit / link): shorter is better", fontsize=8)
    figure.savefig(path, format="png")
    return path


def _panel(axes: Any, document: Mapping[str, Any], entry: Mapping[str, Any], names: list[str]) -> None:
    for row, name in enumerate(names):
        result = result_of(entry, name)
        ratio = result["ratio_to_bound"] if result is not None and result["completed"] else None
        if ratio is None:
            text = "not run" if result is None else "out of memory" if _out_of_memory(result) else "failed"
            axes.text(1.04, row, text, va="center", fontsize=7, color="#767676", style="italic")
            continue
        ours = name == HEADLINE
        axes.barh(row, min(ratio, MOST), height=0.78, color=OURS if ours else PEERS[name], zorder=2)
        inside = ratio > 0.8 * MOST
        axes.text(
            min(ratio, MOST) + (-0.06 if inside else 0.06),
            row,
            f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
            va="center",
            ha="right" if inside else "left",
            fontsize=7,
            fontweight="bold" if ours else "normal",
            color="black",
            zorder=3,
        )
    axes.axvline(1.0, color="black", linewidth=0.9, zorder=4)
    axes.set_xlim(0, MOST)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [_label(name) for name in names], fontsize=7)
    for label, name in zip(axes.get_yticklabels(), names, strict=False):
        label.set_fontweight("bold" if name == HEADLINE else "normal")
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="x", labelsize=7)
    card = (entry.get("parameters") or document["parameters"]).get("card_name") or ""
    where = f"{entry['cap'] / GIB:.4g} GiB {str(card).removeprefix('GeForce ')}".strip()
    axes.set_title(f"{entry['model']} {shown_size(entry)}, {where}", fontsize=8)
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.7, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _out_of_memory(result: Mapping[str, Any]) -> bool:
    return "OutOfMemory" in str(result["error"])


def _label(name: str) -> str:
    return _LABELS.get(name, name.removeprefix("diffusers.").replace("_", " "))
