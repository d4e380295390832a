"""One hint at most, only where two comparable runs have proven a saving, and never an exception."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_offload.offload.hints import CODES, LEAST_S, LEAST_SHARE, Digest, Found, Hint, digest, find
from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.policy import OffloadPolicy
from balanced_offload.offload.report import build_report

from .hint_cases import GIB, UNET, evicted, gib, report, row, runs, seed, streaming

SEEING = (Path(__file__).parents[2] / "docs" / "seeing.md").read_text(encoding="utf-8")


def hint_of(*reports: dict[str, Any]) -> Hint:
    found = find(*runs(*reports))
    assert found.hint is not None and found.note is None, found
    return found.hint


def none_of(*reports: dict[str, Any]) -> None:
    assert find(*runs(*reports)) == Found()


# --- the second seed


def test_the_second_seed_gets_its_sentence() -> None:
    hint = hint_of(seed(), seed())
    assert hint.to_json() == {
        "code": "FITS_BUT_MOVED",
        "sentence": "UNet2DConditionModel (4.8 GiB) fits the budget of 25.6 GiB with everything else (6.5 GiB of "
        "weights in all, 2.1 GiB of activations), but was moved out and in again in 2 of 2 runs: 3.00 s a run.",
        "saving_s": 3.0,
        "action": {"set": {"fit_aware": True}, "label": "Turn Fit-aware on"},
    }
    assert f"> {hint.sentence}\n" in SEEING


def test_its_action_is_a_policy_that_stays_put() -> None:
    hint = hint_of(seed(), seed())
    assert hint.action is not None
    policy = OffloadPolicy.from_json({**seed()["policy"], **hint.action["set"]})
    assert policy.fit_aware and policy.mode.value == "balanced"


def test_the_first_run_gets_none_and_after_the_change_there_is_none() -> None:
    once = row(UNET, 4.75, bytes_h2d=gib(4.75), onload_s=1.0)
    third = report({"mode": "balanced"}, by_component=[row("text_encoder", 1.5), once, row("vae", 0.25)])
    fourth = report({"mode": "balanced"})
    none_of(seed())
    hint_of(seed(), seed())
    none_of(seed(), seed(), third)
    none_of(seed(), seed(), third, fourth)


def test_a_stage_that_is_large_for_the_card_keeps_its_room() -> None:
    """The maintainer's objection: a hires decode of 22 GiB needs what the UNet would hold."""
    stages = [*report()["stages"][:2], {**report()["stages"][2], "peak": gib(23.5)}]  # with 1.5 GiB of others
    found = find(*runs(seed(stages=stages), seed(stages=stages)))
    assert found.hint is None
    assert found.note == (
        "UNet2DConditionModel (4.8 GiB) was moved out and in again (1.69 s), and the decode of this run needed the "
        "room: it took 22.0 GiB, which with the other weights (6.2 GiB) is more than the 25.6 GiB available."
    )
    assert f"> {found.note}\n" in SEEING


@pytest.mark.parametrize(("peak", "told"), [(25.6 - 4.75, True), (25.6 - 4.75 + 0.01, False)])
def test_the_decode_s_own_peak_decides(peak: float, told: bool) -> None:
    """What was left on the device at the end was beside the decode: its peak is known to the byte."""
    stages = [*report()["stages"][:2], {**report()["stages"][2], "peak": gib(peak)}]
    found = find(*runs(seed(stages=stages), seed(stages=stages)))
    assert (found.hint is not None, found.note is None) == (told, told)


def test_where_what_else_was_there_is_not_known_nothing_is_claimed() -> None:
    """A decode in mid run with 20 GiB: needed if nothing was beside it, not needed if all was."""
    decode = {**report()["stages"][2], "peak": 20 * GIB}
    after = {"name": "encode", "component": "vae", "t0": 13.0, "t1": 13.4, "need": 0, "peak": GIB}
    assert find(*runs(*[seed(stages=[*report()["stages"][:2], decode, after])] * 2)) == Found()


def test_stages_that_were_put_together_may_hold_a_decode() -> None:
    """A run of thousands of stages: of the last ones only the highest peak is known."""
    several = {"name": "several", "component": "several", "t0": 13.0, "t1": 13.4, "peak": gib(19.1), "aggregated": True}
    hint_of(*[seed(stages=[*report()["stages"], several])] * 2)
    several["peak"] = gib(19.2)  # beside it all weights, 6.5 GiB, could not have stayed
    assert find(*runs(*[seed(stages=[*report()["stages"], several])] * 2)) == Found()


def test_an_eviction_for_the_decode_s_need_is_explained() -> None:
    run = seed({"mode": "balanced"}, reason="need")
    run["by_component"][1]["avoidable_bytes"] = 0
    run["stages"][2]["peak"] = gib(23.5)
    found = find(*runs(run, run))
    assert found.hint is None and found.note is not None and "the decode of this run needed the room" in found.note
    run["stages"][2]["peak"] = gib(3.75)  # nor is it a hint where the decode did not need it
    none_of(run, run)


# --- causes and actions of FITS_BUT_MOVED


@pytest.mark.parametrize(
    ("policy", "reason", "low_always", "changes", "label"),
    [
        ({"fit_aware": False}, "low", False, {"fit_aware": True}, "Turn Fit-aware on"),
        ({"low": 0}, "low", True, {"low": "auto"}, "Set Low mark (VRAM) to auto"),
        (
            {"low": "0%", "fit_aware": False},
            "low",
            True,
            {"low": "auto", "fit_aware": True},
            "Set Low mark (VRAM) to auto and turn Fit-aware on",
        ),
        ({"before_decode": "free_all"}, "policy", False, {"before_decode": "fit"}, "Set Before decode to fit"),
        ({"always": ["t5", UNET]}, "always", False, {"always": "t5"}, "Set Always offload to t5"),
        ({"always": ["unet"]}, "always", False, {"always": ""}, "Empty Always offload"),
    ],
)
def test_the_cause_decides_what_to_change(
    policy: dict[str, Any], reason: str, low_always: bool, changes: dict[str, Any], label: str
) -> None:
    run = seed(policy, reason, resolved__low_always=low_always)
    run["components"] = [{"name": UNET, "class": UNET, "role": "denoiser"}]
    hint = hint_of(run, run)
    assert hint.code == "FITS_BUT_MOVED" and hint.action == {"set": changes, "label": label}
    OffloadPolicy.from_json({**run["policy"], **hint.action["set"]})


def test_a_cause_that_no_field_has_is_no_hint() -> None:
    none_of(*[seed({"mode": "balanced"}, reason="low")] * 2)  # neither low = 0 nor fit_aware off
    none_of(*[seed({"fit_aware": False}, reason="external")] * 2)  # the host asked for it


def test_several_components_are_summed_and_the_largest_is_named() -> None:
    run = seed()
    run["by_component"][0] = evicted("text_encoder", 1.5, "low", 2.5)  # which waited longer for less
    hint = hint_of(run, run)
    assert hint.saving_s > 1.6875 + 2.5
    assert hint.sentence.startswith("UNet2DConditionModel (4.8 GiB) fits") and ", and 1 more with it, in 2 of 2" in (
        hint.sentence
    )


def test_only_the_share_that_could_be_spared_counts() -> None:
    run = seed(totals__evict_s=0.0)
    run["by_component"][1] |= {"avoidable_bytes": gib(4.75)}
    assert hint_of(run, run).saving_s == 1.6875 / 2
    run["by_component"][1] |= {"bytes_h2d": 4 * gib(4.75), "step_bytes": gib(4.75), "blocking_bytes": gib(4.75)}
    assert hint_of(run, run).saving_s == 1.6875 / 2  # what streams in steps waits as a stall, not as an onload


def test_components_that_take_turns_share_their_waiting() -> None:
    run = seed(totals__evict_s=0.0)
    control = row("controlnet", 1.0, bytes_h2d=2 * gib(4.75))
    run["by_component"] += [control, row(f"controlnet+{UNET}", None, onload_s=2.0)]
    assert hint_of(run, run).saving_s == 1.6875 + 1.0


def test_what_left_in_another_run_is_not_the_policy_s_fault() -> None:
    other = seed(workload="flux")
    none_of(seed(), other, seed())
    watched = report(workload=None, totals={"move_count": 0, "drop_count": 0})  # moved nothing: does not count
    hint = hint_of(seed(), watched, seed())
    assert "in 2 of 2 runs" in hint.sentence
    assert "in 4 of 4 runs" in hint_of(*[seed()] * 4).sentence


# --- comparable


@pytest.mark.parametrize(
    "change",
    [
        {"workload": None},
        {"workload": "sdxl 768"},
        {"host__gpu": "Another"},
        {"rung": "cpu"},
        {"rung": None},
        {"world": "dynamic"},
        {"world": None},
        {"complete": False},
        {"complete": None},
        {"policy": {}},
        {"policy": OffloadPolicy(mode="balanced", fit_aware=False, reserve="1GiB").to_json()},
    ],
)
def test_runs_that_do_not_compare_make_no_hint(change: dict[str, Any]) -> None:
    none_of(seed(**change), seed())
    none_of(seed(), seed(**change))


@pytest.mark.parametrize(
    "name", ["workload", "rung", "policy", "resolved", "by_component", "fits", "complete", "world", "stages"]
)
def test_without_a_part_there_is_no_hint(name: str) -> None:
    for missing in ({}, {name: None}, {name: [None, 3]}, {name: math.nan}):
        run = {key: value for key, value in seed().items() if key != name} | missing
        if name == "stages":  # a run without a decode has none that could need the room
            hint_of(run, run)
        else:
            none_of(run, run)


@pytest.mark.parametrize("field", ["available", "weight_bytes", "activation_peak"])
def test_without_a_figure_of_the_fit_rule_there_is_no_hint(field: str) -> None:
    run = seed(**{f"resolved__{field}": None}, vram__available=None)
    if field == "weight_bytes":  # the rows have it as well
        hint_of(run, run)
        for entry in run["by_component"]:
            entry["weight_bytes"] = None
    none_of(run, run)


def test_the_long_lists_are_not_needed() -> None:
    lists = ("moves", "segments", "vram_track", "residency", "steps")
    capped = {key: value for key, value in seed().items() if key not in lists}
    for rest in ({}, dict.fromkeys(lists), {name: [] for name in lists}):
        assert hint_of(capped | rest, capped | rest) == hint_of(seed(), seed())


# --- thresholds


@pytest.mark.parametrize(
    ("saved", "wall", "told"),
    [
        (LEAST_S, 1000.0, True),
        (math.nextafter(LEAST_S, 0), 1000.0, False),
        (0.125, 2.5, True),  # 5 % to the bit
        (0.124, 2.5, False),
        (0.0, 0.0, False),
        (LEAST_S, None, True),
        (0.25, None, False),
    ],
)
def test_a_saving_is_told_from_the_threshold_on(saved: float, wall: float | None, told: bool) -> None:
    run = seed(totals__evict_s=0.0, totals__wall_s=wall)
    run["by_component"][1]["onload_s"] = saved
    assert LEAST_SHARE == 0.05
    assert (find(*runs(run, run)).hint is not None) is told


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 100, allow_nan=False), st.floats(0, 100, allow_nan=False), st.floats(0.001, 1000, allow_nan=False))
def test_a_larger_saving_is_never_kept_back(a: float, b: float, wall: float) -> None:
    def told(saved: float) -> bool:
        run = seed(totals__evict_s=0.0, totals__wall_s=wall)
        run["by_component"][1]["onload_s"] = saved
        return find(*runs(run, run)).hint is not None

    assert told(min(a, b)) <= told(max(a, b))


def test_of_several_the_largest_is_told_and_of_equals_the_first_of_the_catalogue() -> None:
    def both(evictions_s: float) -> dict[str, Any]:
        """Mode auto under a high mark of the user's that splits the UNet, and SD.Next's rule."""
        run = seed({"mode": "auto", "high": "4GiB", "fit_aware": False})
        run["resolved"] |= {"high": 4 * GIB, "sources": {"high": "user"}}
        run["totals"] |= {"onload_s": 1.0, "stall_s": 1.0, "evict_s": 0.0}
        run["by_component"][1]["onload_s"] = evictions_s
        return run

    assert hint_of(both(1.0), both(1.0)).code == "NO_OFFLOAD_FASTER"  # 2 s against 1 s
    assert hint_of(both(2.0), both(2.0)).code == "FITS_BUT_MOVED"  # 2 s against 2 s
    assert CODES.index("FITS_BUT_MOVED") < CODES.index("NO_OFFLOAD_FASTER")


# --- whatever comes in

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["decode", "low", "user", "balanced", "sequential", UNET, "0%", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in _paths(item, (*at, key)))]


def _put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    document[path[0]] = _put(document[path[0]], path[1:], value)
    return document


_SOUND = [seed(), report(), streaming()]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_garbage_in_a_report_never_raises_and_never_makes_two_hints(data: st.DataObject) -> None:
    document = copy.deepcopy(data.draw(st.sampled_from(_SOUND)))
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(_paths(document)))
        document = _put(document, path, data.draw(json_values))
        if not isinstance(document, dict):
            break
    bad, sound = digest(document), digest(data.draw(st.sampled_from(_SOUND)))
    for found in (find(bad, [bad]), find(sound, [bad, sound]), find(bad, [sound, bad]), find(sound, [sound, bad])):
        assert isinstance(found, Found) and (found.note is None or len(found.note) < 400)
        if found.hint is not None:
            told = found.hint.to_json()
            assert told["code"] in CODES and told["saving_s"] > 0 and math.isfinite(told["saving_s"])
            assert "nan" not in told["sentence"] and "None" not in told["sentence"] and len(told["sentence"]) < 400
            assert told["action"] is None or (told["action"]["set"] and told["action"]["label"])


@given(json_values)
def test_anything_at_all_has_a_digest(value: Any) -> None:
    assert find(digest(value), [digest(value)]) == Found()


def test_a_name_is_one_short_line() -> None:
    run = seed()
    name = "<b>unet</b>\n\x1b[31m" + "x" * 200
    run["by_component"][1]["component"] = name
    sentence = hint_of(run, run).sentence
    assert sentence.startswith("<b>unet</b> [31mxxx") and "\n" not in sentence and len(sentence) < 300


def test_a_digest_is_frozen_and_small() -> None:
    found = digest(seed())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.complete = False  # type: ignore[misc]
    assert find(found, []) == Found() and isinstance(found, Digest)


# --- from the ledger itself


def test_from_the_ledger(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    """Two runs of toy components as the session records them: out for the low mark, in again, 0.5 s of 4.5."""
    sizes = {"text_encoder": 2 * GIB, "unet": 5 * GIB, "vae": GIB}
    given |= {
        "policy_json": OffloadPolicy(mode="balanced", fit_aware=False).to_json(),
        "resolved_json": {"mode": "balanced", "weight_bytes": 8 * GIB, "activation_peak": 2 * GIB, "fits": True},
        "vram": {"total": 16 * GIB, "available": 15 * GIB},
        "components": [{"name": name, "weight_bytes": nbytes} for name, nbytes in sizes.items()],
        "workload": "toy",
    }

    def run(again: bool) -> dict[str, Any]:
        ledger.open_run("p")
        ledger.stage_begin("denoise", "unet", need=7 * GIB, have=15 * GIB)
        with ledger.span("onload"):
            clock.tick(0.5)
            ledger.move("unet", "h2d", 5 * GIB, "stage", avoidable=again)
            ledger.note_vram(8 * GIB, 8 * GIB, sizes)
        ledger.begin("denoise")
        clock.tick(3.0)
        ledger.stage_end(10 * GIB)
        ledger.stage_begin("decode", "vae", need=3 * GIB, have=10 * GIB)
        ledger.move("unet", "drop", 5 * GIB, "low")
        ledger.note_vram(3 * GIB, 3 * GIB, {**sizes, "unet": 0})
        ledger.begin("decode")
        clock.tick(1.0)
        ledger.stage_end(5 * GIB)
        return build_report(ledger.close_run(), **given)

    first, second = run(False), run(True)
    assert find(*runs(first)) == Found()
    hint = hint_of(first, second)
    assert (hint.code, hint.saving_s) == ("FITS_BUT_MOVED", 0.5)
    assert hint.sentence.startswith("unet (5.0 GiB) fits the budget of 15.0 GiB with everything else (8.0 GiB of ")
    found = build_report(ledger.last_record, **given, lists=False)  # type: ignore[arg-type]
    assert digest(found) == dataclasses.replace(digest(second), steps=None)
