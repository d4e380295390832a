"""Rules of whole runs, each at its threshold and at what it must not claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from balanced_offload import offload
from balanced_offload.offload.hint_digest import _POLICIES
from balanced_offload.offload.hints import Found, Hint, find

from .hint_cases import DEFAULT, GIB, MINE, UNET, by_mode, failed, gib, report, row, runs, timed


def hint_of(code: str, *reports: dict[str, Any]) -> Hint:
    found = find(*runs(*reports))
    assert found.hint is not None and found.hint.code == code, found
    return found.hint


def none_of(*reports: dict[str, Any]) -> None:
    assert find(*runs(*reports)) == Found()


# --- NO_OFFLOAD_FASTER


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_a_mode_that_moves_what_fits(mode: str) -> None:
    hint = hint_of("NO_OFFLOAD_FASTER", by_mode(mode, 3.0), by_mode(mode))
    assert hint.to_json() == {
        "code": "NO_OFFLOAD_FASTER",
        "sentence": "Everything fits with 17.0 GiB to spare (6.5 GiB of weights and 2.1 GiB of activations in 25.6 "
        f"GiB), but mode {mode} moved weights in 2 of 2 runs: 2.25 s a run.",
        "saving_s": 2.25,  # the smaller one of the two runs
        "action": {"set": {"mode": "auto"}, "label": "Set Mode to auto"},
    }


def test_a_high_mark_below_a_component_that_fits() -> None:
    capped = report({"mode": "balanced", "high": "4GiB"}, resolved__sources={"high": "user"}, resolved__high=4 * GIB)
    capped["totals"] |= {"stall_s": 1.5, "move_count": 9}
    hint = hint_of("NO_OFFLOAD_FASTER", capped, capped)
    assert hint.action is not None and hint.action["set"] == {"mode": "auto", "high": "auto"}
    assert "but a high mark of 4.0 GiB moved weights" in hint.sentence
    capped["resolved"]["high"] = 5 * GIB  # above the largest component: it moves nothing, something else did
    none_of(capped, capped)
    capped["resolved"] |= {"high": 4 * GIB, "sources": {"high": "profile"}}
    none_of(capped, capped)


def test_with_the_fit_rule_off_auto_needs_it_on() -> None:
    run = by_mode(fit_aware=False)
    assert hint_of("NO_OFFLOAD_FASTER", run, run).action == {
        "set": {"mode": "auto", "fit_aware": True},
        "label": "Set Mode to auto and turn Fit-aware on",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"fits": False},
        {"fits": None},
        {"resolved__weight_bytes": gib(23.5)},  # by its own figures it does not
        {"resolved__mode": "balanced"},  # another mode than asked for: the device's, or none at all
        {"resolved__low_always": True},  # auto would go on evicting
        {"totals__evict_s": None},
        {"totals__stall_s": None},
        {"workload": None},
    ],
)
def test_no_mode_is_blamed_where(change: dict[str, Any]) -> None:
    run = by_mode()
    for path, value in change.items():
        section, _, key = path.partition("__")
        (run[section] if key else run).__setitem__(key or section, value)
    none_of(run, run)


def test_nor_where_the_decode_needs_the_room() -> None:
    run = by_mode("model")
    run["stages"][2]["peak"] = gib(25.6 - 4.75)  # with what was left there: to the byte what is available
    hint_of("NO_OFFLOAD_FASTER", run, run)
    run["stages"][2]["peak"] += 1
    none_of(run, run)


def test_the_decode_counts_in_what_is_to_spare() -> None:
    run = by_mode("model")
    run["stages"][2]["peak"] = gib(19.85)  # and 4.75 GiB that were not there
    assert "Everything fits with 1.0 GiB to spare" in hint_of("NO_OFFLOAD_FASTER", run, run).sentence


# --- several policies in a run


@pytest.mark.parametrize(
    "told",
    [
        "More than one policy in this run: mode sequential, then model. Each model goes by its own; ...",
        "unet: two policies on clones of one model; the one loaded last counts",
    ],
)
def test_the_last_of_several_policies_is_not_blamed_for_all(told: str) -> None:
    events = [{"kind": "policy", "text": told, "data": {}, "t": 0.0}]
    hint_of("NO_OFFLOAD_FASTER", by_mode(), by_mode())
    none_of(by_mode() | {"events": events}, by_mode())
    none_of(by_mode(), by_mode() | {"events": events})
    told_of_one = [{"kind": "policy", "text": "unet: placed by this pack, mode sequential", "data": {}, "t": 0.0}]
    hint_of("NO_OFFLOAD_FASTER", by_mode() | {"events": told_of_one}, by_mode() | {"events": told_of_one})


def test_the_adapters_say_it_in_these_words() -> None:
    adapters = Path(offload.__path__[0]) / "adapters"
    told = [(adapters / name).read_text(encoding="utf-8") for name in ("comfyui_run.py", "comfyui_static.py")]
    assert [words in text for words, text in zip(_POLICIES, told, strict=True)] == [True, True]


def test_components_that_ran_in_several_modes_are_of_several_policies() -> None:
    def modes(unet: str, encoder: str, **given: Any) -> dict[str, Any]:
        found = [{"name": UNET, "mode": unet}, {"name": "text_encoder", "mode": encoder}, {"name": "vae", "mode": None}]
        return by_mode() | {"components": found} | given

    hint_of("NO_OFFLOAD_FASTER", modes("sequential", "sequential"), modes("sequential", "sequential"))
    none_of(modes("sequential", "model"), modes("sequential", "model"))
    left_over = modes("sequential", "model", stages=report()["stages"][1:])  # of another graph: it did not run
    hint_of("NO_OFFLOAD_FASTER", left_over, left_over)
    several = {**report()["stages"][2], "name": "several", "component": "several"}
    none_of(*[left_over | {"stages": [*left_over["stages"], several]}] * 2)  # it may have


# --- DECODE_PEAK


def test_a_decode_that_is_begun_again() -> None:
    hint = hint_of("DECODE_PEAK", failed("evict"), failed("evict"))
    assert hint.to_json() == {
        "code": "DECODE_PEAK",
        "sentence": "The decode ran out of memory once (then it was tried with: the other components evicted) and was "
        "begun again, in 2 of 2 runs: 500.0 ms a run.",
        "saving_s": 0.5,
        "action": {"set": {"before_decode": "free_all"}, "label": "Set Before decode to free_all"},
    }


def test_the_shorter_of_the_two_runs_counts() -> None:
    assert hint_of("DECODE_PEAK", failed("evict", took=0.375), failed("evict")).saving_s == 0.375
    none_of(failed("evict", took=0.25), failed("evict"))  # below the threshold: 13.5 s
    none_of(failed(), failed("evict"))  # once is no rule
    none_of(failed("evict"), failed())


def test_only_the_first_try_is_spared_where_evicting_was_not_enough() -> None:
    run = failed("evict", "shrink")
    hint = hint_of("DECODE_PEAK", run, run)
    assert hint.saving_s == 0.5 and hint.action is not None and hint.action["set"] == {"before_decode": "free_all"}
    assert "2 times (then it was tried with: the other components evicted, less of its weights)" in hint.sentence


def test_what_ended_in_tiles_may_begin_in_tiles() -> None:
    run = failed("evict", "tile")
    hint = hint_of("DECODE_PEAK", run, run)
    assert hint.saving_s == 1.0 and hint.action is not None and hint.action["set"] == {"vae_tiling": "on"}


@pytest.mark.parametrize(
    "run", [failed("shrink"), failed("evict", before_decode="free_all"), failed(None), failed("?", vae_tiling="on")]
)
def test_where_no_field_helps_the_sentence_says_what_does(run: dict[str, Any]) -> None:
    hint = hint_of("DECODE_PEAK", run, run)
    assert hint.action is None and hint.sentence.endswith("a smaller picture, leaves it the room.")


def test_memory_that_ran_out_elsewhere_is_not_the_decode_s() -> None:
    run = failed("evict")
    run["events"][1]["t"] = 5.0
    none_of(run, run)
    run["events"][1]["t"] = None
    none_of(run, run)


# --- CORE_DEFAULT_BEST


def test_the_default_was_faster() -> None:
    found = [timed(6.25, DEFAULT), timed(6.5, DEFAULT), timed(14.0, MINE), timed(13.5, MINE)]
    hint = hint_of("CORE_DEFAULT_BEST", *found)
    assert hint.to_json() == {
        "code": "CORE_DEFAULT_BEST",
        "sentence": "The same graph took at most 6.50 s in each of 2 runs under mode auto, and at least 13.50 s in two "
        "runs with this policy: 7.00 s a run.",
        "saving_s": 7.0,
        "action": {"set": {"mode": "auto"}, "label": "Set Mode to auto"},
    }


def test_the_host_s_own_paging_was_faster() -> None:
    own: dict[str, Any] = {"env": {"dynamic_vram": True}}
    mine = {"mode": "sequential", "use_core_dynamic": "bypass"}
    stock = timed(6.25, None, **own)
    stock |= {"policy": {}, "world": "observe"}
    pages = timed(6.5, None, **own) | {"world": "dynamic"}
    for default in (stock, pages):
        hint = hint_of("CORE_DEFAULT_BEST", default, timed(9.0, mine, **own), timed(9.0, mine, **own))
        assert "under ComfyUI's own memory management, and" in hint.sentence
        assert hint.action is not None and hint.action["set"] == {"mode": "auto", "use_core_dynamic": "auto"}
    asks = {**mine, "low": 0}  # which no pager can do: under auto it would be loaded static again
    none_of(stock, timed(9.0, asks, **own), timed(9.0, asks, **own))
    plain = {"env": {"dynamic_vram": False}}  # stock loaders on a host without a pager: auto would be ours
    none_of(stock | plain, timed(9.0, mine), timed(9.0, mine))


@pytest.mark.parametrize(
    "found",
    [
        [timed(6.5, DEFAULT), timed(13.5, MINE)],  # one run with this policy
        [timed(14.0, MINE), timed(13.5, MINE)],  # none with the other
        [timed(14.0, DEFAULT), timed(6.5, DEFAULT), timed(14.5, MINE), timed(14.0, MINE)],  # the slowest of them counts
        [timed(6.5, {"mode": "auto"}), timed(14.0, MINE), timed(13.5, MINE)],  # it has no high mark: another policy
        [timed(6.5, DEFAULT, ran=()), timed(14.0, MINE), timed(13.5, MINE)],  # its sampler came from the cache
        [timed(6.5, DEFAULT, workload="other"), timed(14.0, MINE), timed(13.5, MINE)],
        [timed(6.5, DEFAULT, complete=False), timed(14.0, MINE), timed(13.5, MINE)],
        [timed(6.5, DEFAULT), timed(14.0, MINE), timed(13.5, MINE) | {"nodes": []}],  # what ran is not known
        [timed(6.5, DEFAULT), timed(9.0, DEFAULT), timed(9.0, DEFAULT)],  # it is the default
    ],
)
def test_no_default_is_praised_where(found: list[dict[str, Any]]) -> None:
    none_of(*found)


def test_5_percent_of_a_short_run_count() -> None:
    long = [timed(1.9, DEFAULT), timed(2.0, MINE)]
    assert hint_of("CORE_DEFAULT_BEST", *long, timed(2.0, MINE)).saving_s == pytest.approx(0.1)
    none_of(timed(1.91, DEFAULT), timed(2.0, MINE), timed(2.0, MINE))


# --- in a module's world there are no nodes


def test_without_nodes_the_stages_tell_whether_the_work_was_the_same() -> None:
    def module(wall: float, written: dict[str, Any], stages: int = 3) -> dict[str, Any]:
        run = report(written, totals__wall_s=wall, world="module")
        return run | {"stages": run["stages"][:stages]}

    hint_of("CORE_DEFAULT_BEST", module(6.5, DEFAULT), module(9.0, MINE), module(9.0, MINE))
    none_of(module(6.5, DEFAULT, 2), module(9.0, MINE), module(9.0, MINE))
    none_of(module(6.5, DEFAULT, 0), module(9.0, MINE, 0), module(9.0, MINE, 0))


def test_a_run_in_which_nothing_moved_has_no_hint() -> None:
    assert find(*runs(*[report({"mode": "auto"})] * 3)) == Found()
    assert find(*runs(report(by_component=[row(UNET, 4.75)]))) == Found()
