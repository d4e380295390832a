"""Invariant tested: the second seed's run by a pipeline: evicted though it fits, told when proven, then cured."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from balanced_offload.offload import OffloadPolicy
from balanced_offload.offload.adapters.diffusers import offload
from balanced_offload.offload.adapters.hinting import RUNS, Advice
from balanced_offload.offload.report import validate

from .conftest import Example

PROMPT = "p"


def test_the_second_seed(sim: ModuleType, example: Callable[[str], Example]) -> None:
    """SD.Next's rule evicts the fitting UNet in every run; fit_aware on leaves it where it is."""
    case = example("sd")
    pipe = case.build()
    sim.configure(h2d_pinned=2e8, h2d_pageable=1e8)  # a slow bus, so that what is copied is no small share
    with offload(pipe, OffloadPolicy(mode="balanced", low=0, fit_aware=False), device="vram") as handle:
        found = []
        for _ in range(3):
            case.draw(handle)
            report = handle.report()
            validate(report)
            assert report["fits"] is True and report["workload"]
            found.append([hint["code"] for hint in report["hints"]])
        assert found == [[], ["FITS_BUT_MOVED"], ["FITS_BUT_MOVED"]]
        (hint,) = report["hints"]
        assert hint["saving_s"] > 0 and hint["action"]["set"]
        fields = {**OffloadPolicy(mode="balanced", low=0, fit_aware=False).to_json(), **hint["action"]["set"]}
        handle.policy = OffloadPolicy.from_json(fields)
        moved = []
        for _ in range(4):
            case.draw(handle)
            report = handle.report()
            moved.append(report["totals"]["bytes_h2d"])
            assert report["hints"] == []
            assert max(row["moves"] and row["bytes_h2d"] / row["weight_bytes"] for row in report["by_component"]) <= 1
        assert moved[1:] == [0, 0, 0], "what fits is brought up once"


def test_rows_by_component_know_the_pipelines_models(sim: ModuleType, example: Callable[[str], Example]) -> None:
    case = example("sd")
    pipe = case.build()
    with offload(pipe, OffloadPolicy(mode="sequential"), device="vram") as handle:
        case.draw(handle)
        report = handle.report()
    rows = {row["component"]: row for row in report["by_component"]}
    assert {"unet", "vae", "text_encoder"} <= rows.keys()
    for name, managed in handle.session.components.items():
        assert rows[name]["weight_bytes"] == managed.info.weight_bytes
    for name in ("onload_s", "stall_s", "evict_s"):
        assert sum(row[name] for row in rows.values()) == pytest.approx(report["totals"][name], abs=1e-12)
    assert sum(row["bytes_h2d"] for row in rows.values()) == report["totals"]["bytes_h2d"] > 0
    assert report["line"] == handle.summary()


def test_only_the_last_runs_are_kept_and_an_error_is_forgotten() -> None:
    advice = Advice()
    for i in range(2 * RUNS):
        assert advice.look({"prompt_id": f"{PROMPT}{i}"}) == ((), None)
    assert len(advice._before) == RUNS
    advice.forget(f"{PROMPT}{2 * RUNS - 1}")
    advice.forget("never there")
    assert len(advice._before) == RUNS - 1


def test_a_run_that_is_looked_at_twice_is_known_once() -> None:
    """By the thread that ends it and by the one that looks after it: else it would prove itself."""
    advice = Advice()
    for _ in range(2):
        advice.look({"prompt_id": "p"})
    assert [known for known, _ in advice._before] == ["p"]


@pytest.mark.parametrize("garbage", [{}, {"totals": None}, {"by_component": [{}], "totals": {}}, {"resolved": 3}])
def test_a_report_that_is_none_gives_no_hint(garbage: Any) -> None:
    advice = Advice()
    assert advice.look(garbage) == advice.look(garbage) == ((), None)
