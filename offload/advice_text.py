"""Invariant: people read what the document says, best first by a mark, and that all of it is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .advice import fastest
from .sizes import GIB, format_size

BEST = "*"
EQUAL = 5e-4  # relative: steps that read the same
_LABELS = {"none": "ours.none", "balanced": "ours.balanced", "model": "ours.model"}
_LABELS |= {"sequential": "ours.sequential", "auto": "ours.auto"}


def advice_text(document: dict[str, Any]) -> str:
    """The document of `advise` for a terminal."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    resolution = f" at {document['resolution']}" if document["resolution"] else ""
    yield f"{document['model']}{resolution} on {document['card']} with {format_size(document['vram'])}"
    yield f"  {_sources(document)}"
    yield ""
    plan = document["plan"]
    yield plan["sentence"] if plan is not None else "There is no plan: not even the largest unit has room."
    yield ""
    yield from _table(document)
    yield ""
    yield from _closing(document)


def _sources(document: dict[str, Any]) -> str:
    sources = document["sources"]
    hbm = "" if document["hbm"] is None else f" and {document['hbm'] / 1e9:.0f} GB/s of its memory"
    words = [
        f"{document['bandwidth'] / 1e9:.3g} GB/s pinned ({sources['bandwidth']})",
        f"{document['pageable'] / 1e9:.3g} pageable ({sources['pageable']})",
        f"{document['tflops']:.3g} TFLOP/s{hbm} ({sources['tflops']})",
        f"{format_size(document['activations'])} for activations ({sources['activations']})",
        f"{document['context'] / 1e9:.1f} GB for the driver",
    ]
    if document["reserve"]:
        words.append(f"{format_size(document['reserve'])} reserved")
    return ", ".join(words)


def _table(document: dict[str, Any]) -> Iterator[str]:
    modes = {_LABELS[mode]: found for mode, found in document["modes"].items()}
    peers = document["peers"]
    plan = document["plan"]
    width = max(len(name) for name in (*modes, *peers, "the plan above"))
    best = min((t for t in (fastest(document), plan and plan["step_s"]) if t is not None), default=None)
    yield f"  {'':{width}}    it/s  s/step  of the bound"
    bound = document["bound_s"]
    yield f"  {'the bound':{width}}  {_rate(bound)}  {_seconds(bound)}  max(compute, what cannot stay / bandwidth)"
    rows = [("the plan above", plan), *modes.items(), *peers.items()]
    for name, found in rows:
        if found is None:
            yield f"  {name:{width}}     n/a     n/a  does not fit"
            continue
        mark = BEST if best is not None and found["step_s"] <= best * (1 + EQUAL) else " "
        share = bound / found["step_s"] if found["step_s"] > 0 else 1.0
        yield (
            f"{mark} {name:{width}}  {_rate(found['step_s'])}  {_seconds(found['step_s'])}  {share:6.1%}  {_how(found)}"
        ).rstrip()


def _how(found: dict[str, Any]) -> str:
    """What a mode does, in a few words."""
    if "resident" not in found:  # another library's
        return f"copies {format_size(found['copied'])} a step" if found["copied"] else "all resident"
    if not found["streamed"]:
        return "all resident"
    kept = f"keeps {format_size(found['resident'])}" if found["resident"] else "keeps nothing"
    capped = found.get("resolved") == "balanced" and found["high"] is not None
    high = f", high {format_size(found['high'])}" if capped else ""
    return f"{kept}, streams {format_size(found['streamed'])} through {format_size(found['ring'])}{high}"


def _closing(document: dict[str, Any]) -> Iterator[str]:
    plan, auto = document["plan"], document["modes"]["auto"]
    if plan is not None and auto is not None and auto["step_s"] > plan["step_s"] * 1.01:
        high = math.ceil((plan["resident"] + plan["ring"]) / GIB * 10) / 10
        now = f"{1 / auto['step_s']:.3g} it/s"
        mode = "auto" if auto["resolved"] == "balanced" else "balanced"  # which goes by a high mark on this card
        advice = f'{mode} with high = "{high:.1f}GiB" gives the plan above; auto gives {now}'
        yield f"The card's profile leaves room: {advice}."
    times = {name: found["step_s"] for name, found in document["peers"].items() if found is not None}
    if times and plan is not None and plan["step_s"] > 0:
        name = min(times, key=lambda key: times[key])
        yield f"The plan is {times[name] / plan['step_s']:.2f} x as fast as the best of the others here, {name}."
    yield f"{BEST} marks the fastest. All figures are predictions (rung: {document['rung']}) for the denoiser alone;"
    yield f"its arithmetic is {document['sources']['compute']}. Text encoders and the VAE take turns with it."
    for note in document["notes"]:
        yield f"Note: {note}."


def _rate(step_s: float) -> str:
    return f"{1 / step_s:6.3g}" if step_s > 0 else "   inf"


def _seconds(step_s: float) -> str:
    return f"{step_s:6.3g}"
