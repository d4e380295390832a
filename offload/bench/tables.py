"""A bench for people: lines while it runs, tables after it. Invariant: made from the document alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..sizes import GIB, format_size
from ..summary import seconds, table
from .document import result_of, shown_size, title

Entry = Mapping[str, Any]
_DASH = "–"


def result_line(entry: Entry, name: str) -> str:
    """One result in one line, for the progress."""
    result = result_of(entry, name)
    assert result is not None
    if not result["completed"]:
        return f"  {name:<36} {result['error'][:100]}"
    ratio = result["ratio_to_bound"]
    equal = {True: "equal", False: "NOT EQUAL", None: "not compared"}[verdict(result)]
    return (
        f"  {name:<36} {seconds(result['step_s']):>9}  {ratio:5.2f} x bound  "
        f"VRAM {format_size(result['peak_vram']):>9}  "
        f"pinned {format_size(result['pinned_ram']):>9}  {equal}"
    )


def verdict(result: Mapping[str, Any]) -> bool | None:
    """Whether its outputs are equal bit for bit, there or on the twin; None where nothing says so."""
    known = [value for value in (result["equal"], result.get("twin_equal")) if value is not None]
    return all(known) if known else None


def case_table(entry: Entry) -> str:
    """All strategies of a case, aligned text."""
    rows = []
    for result in entry["results"]:
        host_us = None if result["host_s"] is None else result["host_s"] * 1e3
        rows.append(
            {
                "strategy": result["name"],
                "step": seconds(result["step_s"]) if result["completed"] else "failed",
                "x bound": _rounded(result.get("ratio_to_bound")),
                "with Python": seconds(result.get("step_python_s")),
                "of link": _percent(result.get("share_of_bandwidth")),
                "peak VRAM": format_size(result["peak_vram"]),
                "pinned RAM": format_size(result["pinned_ram"]),
                "up/step": _bytes(result["bytes_h2d"]),
                "down/step": _bytes(result["bytes_d2h"]),
                "syncs": _count(result["host_syncs"]),
                "allocs": _count(result.get("allocations")),
                "host ms": _rounded(host_us, 1),
                "equal": verdict(result),
                "races": result.get("races"),
            }
        )
    return table(rows)


def closing_text(document: Mapping[str, Any]) -> str:
    """Everything below the progress."""
    parts = []
    for entry in document["cases"]:
        parts.append(f"\n{title(entry)} ({document['rung']})")
        parts.append(
            f"weights {format_size(entry['weights'])}, activations {format_size(entry['activations'])}, "
            f"compute {seconds(entry['compute_s'])}, bound {seconds(entry['bound_s'])}, "
            f"all streamed {seconds(entry['bound_all_streamed_s'])}"
        )
        parts.append(case_table(entry))
        if entry["ratio_ours_best_peer"] is not None:
            speed = 1 / entry["ratio_ours_best_peer"]
            parts.append(f"{entry['ours']} is {speed:.2f} x as fast as the best peer, {entry['best_peer']}")
    if hooks := document["hooks"]:
        parts.append(
            f"\nPython per streamed leaf: ours {hooks['ours_us']:.1f} us, accelerate's hook "
            f"{hooks['accelerate_us']:.1f} us (1/{1 / hooks['ratio']:.1f})"
        )
    return "\n".join(parts)


def markdown(document: Mapping[str, Any]) -> str:
    """One row per case: compute, bound, ours, the best peer; times per step. For the README."""
    heads = ["model", "card", "compute", "bound", "ours", "best peer", "speed-up", "VRAM ours / peer", "pinned RAM"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---", "---"] + ["--:"] * (len(heads) - 2)) + "|"]
    for entry in document["cases"]:
        ours, peer = result_of(entry, entry["ours"]), result_of(entry, entry["best_peer"])
        ratio = entry["ratio_ours_best_peer"]
        cells = [
            f"{entry['model']} {shown_size(entry)}",
            _card(document, entry),
            seconds(entry["compute_s"]),
            seconds(entry["bound_s"]),
            f"**{seconds(ours['step_s'])}**" if ours else "failed",
            f"{seconds(peer['step_s'])} ({_short(peer['name'])})" if peer else "none ran",
            f"{1 / ratio:.2f} x" if ratio else _DASH,
            _pair(ours, peer, "peak_vram"),
            _pair(ours, peer, "pinned_ram"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", caption(document)])


def caption(document: Mapping[str, Any]) -> str:
    """What kind of evidence the table is, in a paragraph."""
    versions = document["parameters"].get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    text = f"Seconds per denoising step, sizes in GiB; peers are the real libraries ({named})."
    if document["rung"] == "simulated":
        text = f"*Simulated*: virtual time from the cards' parameters, no measurement of a card. {text}"
        text += " Outputs are compared bit for bit on a tiny twin of each model with real arithmetic."
    return text


def parameter_table(document: Mapping[str, Any]) -> str:
    """The simulated cards' parameters, as Markdown; what a measured link gave on a GPU."""
    cards: dict[str, Mapping[str, Any]] = {}
    for entry in document["cases"]:
        found = entry.get("parameters") or document["parameters"]
        cards.setdefault(str(found.get("card", found.get("card_name"))), found)
    heads = ["card", "link", "pinned GB/s", "pageable GB/s", "16-bit TFLOP/s", "memory GB/s", "launch us", "copy us"]
    keys = ["h2d_pinned", "h2d_pageable", "flops16", "hbm", "launch", "copy_lat"]
    scales = [1e-9, 1e-9, 1e-12, 1e-9, 1e6, 1e6]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * len(keys)]
    for name, found in cards.items():
        values = [
            f"{found[key] * scale:.4g}" if key in found else _DASH for key, scale in zip(keys, scales, strict=True)
        ]
        lines.append(f"| {name} | {found.get('link', _DASH)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def details(document: Mapping[str, Any]) -> str:
    """Every result of every case, as Markdown."""
    heads = ["strategy", "step", "x bound", "VRAM", "pinned", "GiB up", "GiB down", "syncs", "allocations", "equal"]
    parts = []
    for entry in document["cases"]:
        parts += [f"\n### {title(entry)}\n", "| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
        for result in entry["results"]:
            if not result["completed"]:
                parts.append(f"| {result['name']} | {_cell(result['error'])} |" + " |" * (len(heads) - 2))
                continue
            cells = [
                f"**{result['name']}**" if result["ours"] else result["name"],
                seconds(result["step_s"]),
                _rounded(result["ratio_to_bound"]) or _DASH,
                _gib(result["peak_vram"]),
                _gib(result["pinned_ram"]),
                _gib(result["bytes_h2d"]),
                _gib(result["bytes_d2h"]),
                _count(result["host_syncs"]) or _DASH,
                _count(result.get("allocations")) or _DASH,
                {True: "yes", False: "NO", None: _DASH}[verdict(result)],
            ]
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts)


def write_markdown(document: Mapping[str, Any], path: Path) -> Path:
    """The table, the cards and the details in one file. OSError where it cannot be written."""
    text = [f"# bench --suite {document['suite']}\n", markdown(document), "\n## Cards\n", parameter_table(document)]
    if hooks := document["hooks"]:
        text.append(
            f"\nPython per streamed leaf: ours {hooks['ours_us']:.1f} us, accelerate's hook "
            f"{hooks['accelerate_us']:.1f} us."
        )
    text += ["\n## Every strategy", details(document), ""]
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def _card(document: Mapping[str, Any], entry: Entry) -> str:
    name = (entry.get("parameters") or document["parameters"]).get("card_name") or ""
    short = str(name).removeprefix("GeForce ").removeprefix("NVIDIA ")
    return f"{entry['cap'] / GIB:.4g} GiB {short}".strip()


def _pair(ours: Mapping[str, Any] | None, peer: Mapping[str, Any] | None, key: str) -> str:
    return " / ".join(_gib(one[key]) if one else _DASH for one in (ours, peer))


def _short(name: str) -> str:
    return name.removeprefix("diffusers.")


def _gib(value: float | None) -> str:
    return _DASH if value is None else f"{value / GIB:.2f}"


def _bytes(value: float | None) -> str | None:
    return None if value is None else format_size(round(value))


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _rounded(value: float | None, digits: int = 2) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "/")
