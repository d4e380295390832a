"""Rules of what a component kept waiting, beside FITS_BUT_MOVED, each at its threshold; and the page of all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from balanced_offload.offload.hints import CODES, Found, Hint, find
from balanced_offload.offload.policy import OffloadPolicy

from .hint_cases import (
    DEFAULT,
    GIB,
    MINE,
    by_mode,
    failed,
    gib,
    runs,
    seed,
    streaming,
    timed,
    unpinned,
)

PAGE = Path(__file__).parents[2] / "web" / "docs" / "Hints.md"


def hint_of(code: str, *reports: dict[str, Any]) -> Hint:
    found = find(*runs(*reports))
    assert found.hint is not None and found.hint.code == code, found
    return found.hint


def none_of(*reports: dict[str, Any]) -> None:
    assert find(*runs(*reports)) == Found()


# --- HIGH_MARK_TOO_LOW


def test_a_mark_that_streams_more_than_it_must() -> None:
    """8 GiB under a mark of 4: four of them stream in each of ten steps. 12 GiB less 2 for activations hold 10, but
    auto's mark is 60 % of 16 GiB: all 8 stay. What is loaded anew for it, 4 GiB at 10 GiB/s, is counted against it."""
    hint = hint_of("HIGH_MARK_TOO_LOW", streaming(), streaming())
    assert hint.to_json() == {
        "code": "HIGH_MARK_TOO_LOW",
        "sentence": "UNet2DConditionModel (8.0 GiB) may hold 4.0 GiB by the high mark, so the rest streams in every "
        "step and stalled it for 2.00 s a run; there is room for 4.0 GiB more, which saves at least 1.60 s.",
        "saving_s": 1.6,
        "action": {"set": {"high": "auto"}, "label": "Set High mark (VRAM) to auto"},
    }


def test_less_room_saves_less() -> None:
    run = streaming()
    run["resolved"]["available"] = run["vram"]["available"] = 7 * GIB  # one GiB more than the mark
    assert hint_of("HIGH_MARK_TOO_LOW", run, run).saving_s == pytest.approx(2.0 / 4 - 0.1)
    run["steps"] = []  # how often is not known: as if all of it streamed in every step
    none_of(run, run)  # 0.25 - 0.1


def test_what_never_leaves_takes_its_room() -> None:
    run = streaming()
    run["resolved"] |= {"available": 9 * GIB, "never": ["text_encoder"]}
    none_of(run, run)  # 9 - 2 - 3 = 4: the mark is right


@pytest.mark.parametrize(
    "change",
    [
        {"sources": {"high": "profile"}},
        {"high": None},
        {"high": gib(9.6)},  # auto's mark
        {"mode": "sequential"},
        {"available": 6 * GIB},
        {"activation_peak": None},
    ],
)
def test_the_mark_is_not_blamed_where(change: dict[str, Any]) -> None:
    run = streaming()
    run["resolved"] |= change
    none_of(run, run)


def test_the_component_that_would_gain_most_is_named() -> None:
    run = streaming()
    run["by_component"][0] |= {"weight_bytes": 5 * GIB, "step_bytes": 10 * GIB, "step_copy_s": 1.0, "stall_s": 0.5}
    assert "UNet2DConditionModel (8.0 GiB) may hold" in hint_of("HIGH_MARK_TOO_LOW", run, run).sentence
    run["by_component"].reverse()
    assert "UNet2DConditionModel (8.0 GiB) may hold" in hint_of("HIGH_MARK_TOO_LOW", run, run).sentence


@pytest.mark.parametrize(("fits", "fit_aware", "saved"), [(True, True, 2.0), (True, False, 1.6), (False, True, 1.28)])
def test_where_the_run_fits_auto_sets_no_mark(fits: bool, fit_aware: bool, saved: float) -> None:
    """A card of 12 GiB, whose mark is 7.2 GiB by its profile; loading what stays counts unless all is known to fit."""
    policy = OffloadPolicy(mode="balanced", high="4GiB", always=["vae"], fit_aware=fit_aware).to_json()
    run = streaming(fits=fits, policy=policy, vram={"total": 12 * GIB, "available": gib(11.5)})
    run["by_component"][0]["weight_bytes"] = GIB
    run["resolved"] |= {"available": gib(11.5), "weight_bytes": gib(9.25)}
    assert hint_of("HIGH_MARK_TOO_LOW", run, run).saving_s == pytest.approx(saved)


def test_copies_that_are_waited_for_stream_as_well() -> None:
    run = streaming()
    run["by_component"][1] |= {"step_bytes": 0, "step_copy_s": None, "blocking_bytes": 40 * GIB, "blocking_copy_s": 8.0}
    assert hint_of("HIGH_MARK_TOO_LOW", run, run).saving_s == pytest.approx(2.0 - 0.8)  # 4 GiB at 5 GiB/s
    run["by_component"][1]["blocking_copy_s"] = None  # what loading it costs is not known
    none_of(run, run)
    run["by_component"][1] |= {"step_bytes": 20 * GIB, "step_copy_s": 2.0, "blocking_bytes": 60 * GIB}
    assert hint_of("HIGH_MARK_TOO_LOW", run, run).saving_s == pytest.approx(2.0 / 2 - 0.4)  # half of 8 GiB a step


def test_both_runs_have_to_stall() -> None:
    calm = streaming()
    calm["by_component"][1]["stall_s"] = 0.25
    none_of(calm, streaming())
    none_of(streaming(), calm)
    none_of(streaming())


# --- RAM_PRESSURE


def test_weights_that_are_not_page_locked() -> None:
    hint = hint_of("RAM_PRESSURE", unpinned(), unpinned())
    assert hint.to_json() == {
        "code": "RAM_PRESSURE",
        "sentence": "UNet2DConditionModel streamed 20.0 GiB a run from RAM that is not page-locked, at 4.0 GiB/s in "
        "place of 10.0 GiB/s, as Pinned RAM in the policy allows 2.0 GiB: 3.00 s a run.",
        "saving_s": 3.0,
        "action": {"set": {"pinned_ram": "auto"}, "label": "Set Pinned RAM to auto"},
    }
    assert hint_of("RAM_PRESSURE", unpinned(), unpinned(stall_s=1.0)).saving_s == 1.0, "at most what it stalled"
    assert hint_of("RAM_PRESSURE", unpinned(stall_s=1.5), unpinned()).saving_s == 1.5, "in either run"


def test_the_machine_s_own_limit_has_no_button() -> None:
    run = unpinned()
    run["resolved"]["sources"]["pinned_ram"] = "default"
    hint = hint_of("RAM_PRESSURE", run, run)
    assert hint.action is None and "as this machine allows 2.0 GiB" in hint.sentence
    assert hint.sentence.endswith("More RAM or smaller weights would help, or a higher high mark.")


def test_nor_has_a_size_that_the_machine_cut_down() -> None:
    run = unpinned()
    run["policy"] = OffloadPolicy(mode="balanced", pinned_ram="60GiB").to_json()
    assert hint_of("RAM_PRESSURE", run, run).action is None


@pytest.mark.parametrize(
    "given",
    [
        {"step_copy_s": None},  # no rate to compare with
        {"step_bytes": 0},
        {"blocking_copy_s": None},
        {"blocking_bytes": None},
        {"blocking_copy_s": 2.0},  # as fast as the others
        {"stall_s": 0.0},
        {"stall_s": None},
        {"weight_bytes": None},
    ],
)
def test_no_claim_without_two_rates_and_a_reason(given: dict[str, Any]) -> None:
    none_of(unpinned(**given), unpinned(**given))


def test_nor_has_a_share_that_auto_would_not_exceed() -> None:
    run = unpinned()
    run["policy"] = OffloadPolicy(mode="balanced", pinned_ram="50%").to_json()
    run["resolved"]["pinned_ram"], run["ram"]["pinned"] = 32 * GIB, 31 * GIB
    hint = hint_of("RAM_PRESSURE", run, run)
    assert hint.action is None and "as Pinned RAM in the policy allows 32.0 GiB" in hint.sentence


@pytest.mark.parametrize(("stall_s", "wall_s", "told"), [(0.3, 20.0, True), (0.29, 20.0, False), (0.29, 5.8, True)])
def test_what_is_not_worth_a_word(stall_s: float, wall_s: float, told: bool) -> None:
    run = unpinned(stall_s=stall_s)
    run["totals"]["wall_s"] = wall_s
    assert (find(*runs(run, run)).hint is not None) is told


@pytest.mark.parametrize(
    ("budget", "pinned", "steps", "told"),
    [
        (6, 4.25, 10, True),  # 2 GiB a step are not page-locked, and 1.75 GiB are left
        (6, 4.0, 10, False),  # with room for them the cause is another
        (6, None, 10, True),  # of the UNet's 8 GiB not all can be
        (6, 4.0, 0, True),
        (8, None, 10, False),
        (8, 7.0, 0, False),
    ],
)
def test_the_budget_is_blamed_where_it_is_what_binds(budget: int, pinned: float | None, steps: int, told: bool) -> None:
    run = unpinned()
    run["resolved"]["pinned_ram"] = budget * GIB
    run["ram"]["pinned"] = None if pinned is None else gib(pinned)
    run["steps"] = run["steps"][:steps]
    assert (find(*runs(run, run)).hint is not None) is told


def test_the_rate_of_another_component_will_do() -> None:
    run = unpinned(step_bytes=0, step_copy_s=None)
    run["by_component"][0] |= {"step_bytes": 10 * GIB, "step_copy_s": 1.0}
    assert hint_of("RAM_PRESSURE", run, run).saving_s == 3.0


# --- the page


def test_the_page_has_a_section_per_code_with_a_sentence_that_a_run_gets() -> None:
    text = PAGE.read_text(encoding="utf-8")
    told = dict(re.findall(r"^## ([A-Z_]+)\n\n    (.+)$", text, flags=re.MULTILINE))
    assert tuple(told) == CODES
    found = [
        find(*runs(*reports)).hint
        for reports in (
            [seed()] * 2,
            [by_mode()] * 2,
            [failed("evict", took=1.2)] * 2,
            [streaming()] * 2,
            [unpinned()] * 2,
            [timed(6.25, DEFAULT), timed(6.5, DEFAULT), timed(14.0, MINE), timed(13.5, MINE)],
        )
    ]
    assert told == {hint.code: hint.sentence for hint in found if hint is not None}
