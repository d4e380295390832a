"""Bits, where the large model's are garbage. Invariant: the twin is run by the same strategy, with real arithmetic.

The twin is the tiny model of the same classes. Every strategy runs it once under a cap below its weights and once
without a cap, and every forward's output is compared bit for bit with the plain CPU run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .measure import Baseline, Bench, Setting, guarded, room_of, run_baseline, same
from .places import Place
from .strategies import Strategy
from .subjects import Subject, output_tensor

FORWARDS = 5
RESIDENT_SHARE = 0.5  # of the twin's weights that the tight cap leaves room for


@dataclass(frozen=True)
class Twin:
    """The tiny model of one subject on one place: its reference output and its tight cap (bytes)."""

    setting: Setting
    baseline: Baseline
    reference: torch.Tensor
    cap: int


def make_twin(place: Place, subject: Subject) -> Twin:
    """Run the tiny model on the plain CPU and whole on the device, which must agree.

    Raises:
        ValueError: they do not agree, so nothing can be said about a strategy.
    """
    setting = Setting(subject, None, tiny=True, real=True, steps=1)
    with torch.no_grad():
        reference = output_tensor(setting.module()(**setting.inputs(torch.device("cpu"))))
    baseline = run_baseline(place, setting)
    if not same(reference, baseline.output):
        raise ValueError(f"{subject.name}: the tiny model on {place.name} differs from the plain CPU run")
    return Twin(setting, baseline, reference, baseline.activations + int(RESIDENT_SHARE * baseline.weights))


def compare(place: Place, strategy: Strategy, twin: Twin) -> dict[str, Any]:
    """The verdict of a strategy's twin: `twin_equal`, True, False, or None where it ran under neither cap."""
    verdicts: dict[str, Any] = {}
    races: list[int] = []
    for label, cap in (("tight", twin.cap), ("loose", None)):
        place.use(None, cap)
        equal: list[bool] = []
        facts: dict[str, Any] = {}
        for apply in (strategy.apply, *strategy.fallbacks):
            equal.clear()

            def work(
                apply: Any = apply, cap: int | None = cap, equal: list[bool] = equal, facts: dict[str, Any] = facts
            ) -> None:
                with Bench(place, twin.setting, apply, room_of(place, cap, twin.baseline)) as bench:
                    for _ in range(FORWARDS):
                        equal.append(same(bench.step(), twin.reference))
                    races.append(place.races() or 0)
                    assert bench.applied is not None
                    facts.update(bench.applied.facts())

            failure = guarded(work)
            if not failure.out_of_memory:
                break
        verdicts[label] = None if failure.text is not None else all(equal)
        verdicts[f"{label}_error"] = failure.text
        verdicts[f"{label}_sentence"] = facts.get("sentence")
    known = [verdicts[label] for label in ("tight", "loose") if verdicts[label] is not None]
    return {"twin_equal": all(known) if known else None, "twin": {**verdicts, "cap": twin.cap, "races": sum(races)}}
