"""The document `offload-bench/1`. Invariant: every ratio in it is made from the figures beside it, and saved at once.

Each result is written to the file as soon as it is there (whole or not at all), so that a matrix can be cut short and
resumed. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..report import save_json, validate
from .cases import Case
from .measure import Baseline

SCHEMA = "offload-bench/1"
SCHEMA_FILE = "offload-bench-1"
HEADLINE = "ours.auto"
"""Whose figures stand for ours: what one gets without choosing anything."""


class Book:
    """The document in memory and on disk."""

    def __init__(self, document: dict[str, Any], path: Path | None) -> None:
        self.document = document
        self.path = path

    @classmethod
    def new(cls, suite: str, rung: str, device: str, parameters: Mapping[str, Any], path: Path | None) -> Book:
        """An empty document."""
        head = {"schema": SCHEMA, "suite": suite, "rung": rung, "device": device, "parameters": dict(parameters)}
        return cls({**head, "cases": [], "lora": [], "fit": [], "hooks": None, "failures": [], "complete": False}, path)

    @classmethod
    def resumed(cls, suite: str, rung: str, device: str, parameters: Mapping[str, Any], path: Path) -> Book:
        """What `path` holds of the same suite on the same device with the same parameters, or an empty document.

        Raises:
            ValueError: it holds something else; names the field.
        """
        book = cls.new(suite, rung, device, parameters, path)
        if not path.exists():
            return book
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--resume: {path.name} is no JSON ({error}); name another file") from error
        for key in ("schema", "suite", "rung", "device"):
            if found.get(key) != book.document[key]:
                raise ValueError(
                    f"--resume: {path.name} has {key} {found.get(key)!r}, this run {book.document[key]!r}; "
                    "name another file, or leave --resume out to write it anew"
                )
        for key in ("steps", "python_time"):
            if found["parameters"].get(key) != parameters.get(key):
                raise ValueError(
                    f"--resume: {path.name} was made with {key} {found['parameters'].get(key)}, this run has "
                    f"{parameters.get(key)}; use the same, or name another file"
                )
        book.document |= found
        return book

    def save(self) -> None:
        """Write it, if it has a file."""
        if self.path is not None:
            save_json(self.document, self.path)

    def case(self, case: Case) -> dict[str, Any]:
        """The entry of a case, made if it is not there yet."""
        names = ("model", "resolution", "card", "cap")
        for entry in self.document["cases"]:
            if all(entry[name] == getattr(case, name) for name in names):
                return dict_of(entry)
        entry = {name: getattr(case, name) for name in names} | {"compute_s": None, "bound_s": None, "results": []}
        self.document["cases"].append(entry)
        return entry

    def rounds(self, case: Case, name: str) -> int:
        """How often a strategy has been measured on a case so far."""
        return sum(result.get("rounds", 1) for result in self.case(case)["results"] if result["name"] == name)

    def describe(self, case: Case, baseline: Baseline, bandwidth: float, parameters: Mapping[str, Any]) -> None:
        """Note what the case is by itself: weights, activations, compute, and the bounds."""
        entry = self.case(case)
        streamed = max(0, baseline.weights - max(0, case.cap - baseline.activations))
        copy_all = baseline.weights / bandwidth
        entry |= {
            "parameters": dict(parameters),
            "weights": baseline.weights,
            "activations": baseline.activations,
            "fits": streamed == 0,
            "half_fits": 2 * streamed <= baseline.weights,
            "streamed_least": streamed,
            "compute_s": baseline.compute_s,
            "compute_host_s": baseline.host_s,
            "copy_all_s": copy_all,
            "bound_s": max(baseline.compute_s, streamed / bandwidth),
            "bound_all_streamed_s": max(baseline.compute_s, copy_all),
            "bandwidth": bandwidth,
        }

    def add(self, case: Case, result: dict[str, Any], order: tuple[str, ...]) -> None:
        """Take a result, or another round of it; work the ratios out anew, and save."""
        entry = self.case(case)
        results: list[dict[str, Any]] = entry["results"]
        before = next((one for one in results if one["name"] == result["name"]), None)
        if before is None:
            results.append(result | {"rounds": 1})
        else:
            results[results.index(before)] = joined(before, result)
        results.sort(key=lambda one: order.index(one["name"]) if one["name"] in order else len(order))
        work_out(entry)
        self.document["failures"] = failures(self.document)
        self.save()

    def finish(self, complete: bool = True) -> dict[str, Any]:
        """Note whether all of it is there, save, and check it against its schema where jsonschema is installed."""
        self.document["complete"] = complete
        self.document["failures"] = failures(self.document)
        self.save()
        with contextlib.suppress(ImportError):
            validate(self.document, SCHEMA_FILE)
        return self.document


def dict_of(entry: Any) -> dict[str, Any]:
    """The entry itself, typed."""
    assert isinstance(entry, dict)
    return entry


def joined(before: Mapping[str, Any], again: Mapping[str, Any]) -> dict[str, Any]:
    """Two rounds of one strategy: all samples; equal only if both are; completed only if both did."""
    both = {**before, **again, "rounds": before.get("rounds", 1) + 1, "samples": before["samples"] + again["samples"]}
    both["completed"] = before["completed"] and again["completed"]
    both["error"] = again["error"] or before["error"]
    if before["equal"] is not None and again["equal"] is not None:
        both["equal"] = before["equal"] and again["equal"]
    for key in ("peak_vram", "pinned_ram"):
        known = [one[key] for one in (before, again) if one[key] is not None]
        both[key] = max(known) if known else None
    return both


def work_out(entry: dict[str, Any]) -> None:
    """Every figure of a case that follows from others: medians, ratios, the best peer."""
    from statistics import median

    bound, bandwidth = entry.get("bound_s"), entry.get("bandwidth")
    for result in entry["results"]:
        samples = result["samples"]
        step = result["step_s"] = median(samples) if samples else None
        result["spread"] = (max(samples) - min(samples)) / step if step and len(samples) > 1 else None
        result["ratio_to_bound"] = step / bound if step and bound else None
        moved = result["bytes_h2d"]
        result["share_of_bandwidth"] = moved / step / bandwidth if step and bandwidth and moved is not None else None
    ran = [result for result in entry["results"] if result["completed"] and result["step_s"]]
    peers = [result for result in ran if not result["ours"]]
    mine = [result for result in ran if result["ours"]]
    best = min(peers, key=lambda one: float(one["step_s"]), default=None)
    ours = next((one for one in mine if one["name"] == HEADLINE), None) or min(
        mine, key=lambda one: float(one["step_s"]), default=None
    )
    entry["best_peer"] = best["name"] if best else None
    entry["ours"] = ours["name"] if ours else None
    entry["ratio_ours_best_peer"] = ours["step_s"] / best["step_s"] if ours and best else None


def result_of(entry: Mapping[str, Any], name: str | None) -> dict[str, Any] | None:
    """A strategy's result in a case."""
    return next((dict_of(one) for one in entry["results"] if one["name"] == name), None)


def all_results(document: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """(case, result), in order."""
    for entry in document["cases"]:
        for result in entry["results"]:
            yield entry, result


def title(entry: Mapping[str, Any]) -> str:
    """A case in words."""
    return str(Case(entry["model"], entry["resolution"], entry["card"], entry["cap"]))


def shown_size(entry: Mapping[str, Any]) -> str:
    """ "1024px" for a square picture, else the resolution as it is."""
    sides = str(entry["resolution"]).split("x")
    return f"{sides[0]}px" if len(sides) == 2 and sides[0] == sides[1] else str(entry["resolution"])


MUST_RUN = ("ours.auto", "ours.balanced", "ours.sequential")
"""Modes that run under any cap; the others may be too large for it."""


def failures(document: Mapping[str, Any]) -> list[str]:
    """What must not be: ours unequal, racing, or not finished. Peers' shortcomings are in their rows."""
    found = []
    for entry, result in all_results(document):
        if not result["ours"]:
            continue
        where = f"{result['name']}, {title(entry)}"
        if result["equal"] is False:
            found.append(f"{where}: the output differs from the whole model's on the device")
        if result.get("twin_equal") is False:
            found.append(f"{where}: the tiny twin's output differs from the plain CPU run")
        races = (result.get("races") or 0) + (result.get("twin") or {}).get("races", 0)
        if races:
            found.append(f"{where}: {races} races")
        if not result["completed"] and result["name"] in MUST_RUN:
            found.append(f"{where}: did not finish: {result['error']}")
    return found
