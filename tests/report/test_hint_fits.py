"""FITS_BUT_MOVED where one of two runs, or a part of a row, says otherwise: silence, or the bound that is left."""

from __future__ import annotations

from typing import Any

import pytest

from balanced_offload.offload.arbiter import Other, at_stage_change
from balanced_offload.offload.hints import Found, Hint, find
from balanced_offload.offload.policy import ComponentInfo, Machine, OffloadPolicy, WorkingSet

from .hint_cases import UNET, evicted, gib, report, row, runs, seed


def hint_of(*reports: dict[str, Any]) -> Hint:
    found = find(*runs(*reports))
    assert found.hint is not None and found.hint.code == "FITS_BUT_MOVED", found
    return found.hint


def none_of(*reports: dict[str, Any]) -> None:
    assert find(*runs(*reports)) == Found()


def hires(**changes: Any) -> dict[str, Any]:
    """The second seed's run, with a decode that took 22 GiB."""
    stages = [*report()["stages"][:2], {**report()["stages"][2], "peak": gib(23.5)}]
    return seed(stages=stages, **changes)


@pytest.mark.parametrize("found", [(seed(), hires()), (hires(), seed())])
def test_a_decode_of_either_run_counts(found: tuple[dict[str, Any], ...]) -> None:
    told = find(*runs(*found))
    assert told.hint is None and told.note is not None and "it took 22.0 GiB" in told.note


def test_a_note_is_of_what_the_room_was_made_of() -> None:
    none_of(hires(reason="external"), hires(reason="external"))  # somebody else asked for it
    once = hires()
    once["by_component"][1] = row(UNET, 4.75)
    none_of(once, hires())  # not evicted in the run before
    none_of(hires(), once)  # and not brought up again
    none_of(hires() | {"by_component": [], "stages": []}, hires())
    short = hires()
    short["by_component"][1]["onload_s"] = 0.1
    none_of(short, short)  # not worth a word
    short["by_component"][1]["onload_s"] = None
    none_of(short, short)


@pytest.mark.parametrize(
    "given",
    [
        {"avoidable_bytes": None},
        {"avoidable_bytes": 0},
        {"bytes_h2d": None},
        {"bytes_h2d": 0},
        {"onload_s": None},
        {"dropped_for": None},
        {"dropped_for": {"low": None}},
        {"dropped_for": {"external": gib(9.5)}},
    ],
)
def test_a_row_that_proves_nothing(given: dict[str, Any]) -> None:
    run = seed(totals__evict_s=1.0)
    run["by_component"][1] |= given
    none_of(run, run)


def test_a_component_that_the_run_before_did_not_have() -> None:
    first = seed()
    first["by_component"] = [row("text_encoder", 1.5), row("vae", 0.25)]
    none_of(first, seed())
    first["by_component"].append(row(UNET, 4.75))  # it had it, and did not evict it
    none_of(first, seed())


def test_evictions_within_each_run() -> None:
    """The base pass loads what the hires pass finds gone: out and in within a run, whatever it left behind."""
    first = seed()
    first["by_component"][1]["dropped_for"] = {}
    assert hint_of(first, seed()).saving_s == pytest.approx(1.6875 + 1.3125)
    first["by_component"][1]["avoidable_bytes"] = 0
    none_of(first, seed())


@pytest.mark.parametrize(("evict_s", "dropped"), [(None, gib(9.5)), (0.0, gib(9.5)), (1.3125, None), (1.3125, 0)])
def test_evictions_that_are_not_known_are_not_counted(evict_s: float | None, dropped: int | None) -> None:
    run = seed(totals__evict_s=evict_s, totals__bytes_dropped=dropped)
    assert hint_of(run, run).saving_s == 1.6875


def test_evictions_are_shared_by_bytes() -> None:
    run = seed(totals__bytes_dropped=4 * gib(4.75))  # of which the UNet was half
    assert hint_of(run, run).saving_s == 1.6875 + 1.3125 / 2
    run["totals"]["bytes_dropped"] = gib(4.75)  # more than all is all
    assert hint_of(run, run).saving_s == 3.0


def test_no_more_can_have_come_back_than_had_left() -> None:
    first, second = seed(totals__evict_s=0.0), seed(totals__evict_s=0.0)
    first["by_component"][1]["dropped_for"] = {"low": gib(4.75)}
    second["by_component"][1]["dropped_for"] = {"external": gib(4.75)}
    assert hint_of(first, second).saving_s == 1.6875 / 2


def test_several_reasons_give_several_changes() -> None:
    """Two components, two causes, one button; and one component that left for two."""
    run = seed({"always": ["t5", UNET], "before_decode": "free_all"}, "always")
    run["by_component"][0] = evicted("text_encoder", 1.5, "policy", 0.5)
    hint = hint_of(run, run)
    assert hint.action == {
        "set": {"before_decode": "fit", "always": "t5"},
        "label": "Set Before decode to fit and set Always offload to t5",
    }
    run["by_component"][0] = row("text_encoder", 1.5)
    run["by_component"][1]["dropped_for"] = {"always": gib(4.75), "policy": gib(4.75)}
    assert hint_of(run, run).saving_s == 3.0, "both are cured"
    assert hint_of(run, run).action["set"] == {"before_decode": "fit", "always": "t5"}


def test_sd_next_s_rule_and_free_all_are_both_named() -> None:
    """Half of what left went for each of them: the seconds of both are promised, and both are changed."""
    run = seed({"mode": "balanced", "fit_aware": False, "before_decode": "free_all"})
    run["by_component"][1]["dropped_for"] = {"policy": gib(4.75), "low": gib(4.75)}
    hint = hint_of(run, run)
    assert hint.saving_s == 3.0
    assert hint.action == {
        "set": {"fit_aware": True, "before_decode": "fit"},
        "label": "Turn Fit-aware on and set Before decode to fit",
    }


def test_a_reason_that_no_field_has_is_not_promised() -> None:
    """Half went for free_all, half for a list of always that is none: only the first half is cured, and counted."""
    run = seed({"before_decode": "free_all", "always": ["t5"]}, "policy")
    run["by_component"][1]["dropped_for"] = {"policy": gib(4.75), "always": gib(4.75)}
    hint = hint_of(run, run)
    assert hint.saving_s == 1.5 and hint.action is not None and hint.action["set"] == {"before_decode": "fit"}
    run["by_component"][1]["dropped_for"] = {"policy": gib(4.75), "external": gib(4.75)}  # the host will ask again
    assert hint_of(run, run).saving_s == 1.5


_WRITTEN = [
    {"always": always, "low": low, "before_decode": decode, "fit_aware": aware, "mode": mode}
    for always in ((), ("unet",), ("t5", UNET))
    for low in ("auto", 0)
    for decode in ("fit", "free_all")
    for aware in (True, False)
    for mode in ("balanced", "none")
]


@pytest.mark.parametrize("written", _WRITTEN, ids=str)
def test_what_the_button_sets_leaves_no_cause_that_takes_the_place_of_another(written: dict[str, Any]) -> None:
    """The reasons are the arbiter's own, for a UNet that is not needed while text is encoded and while is decoded."""
    infos = (ComponentInfo(UNET, UNET, "denoiser", gib(4.75)), ComponentInfo("vae", "VAE", "vae", gib(0.25)))
    machine = Machine("card", "cuda", gib(32), others=0, ram_total=gib(64))

    def evictions(fields: dict[str, Any]) -> list[str]:
        policy = OffloadPolicy.from_json(fields).resolve(machine, WorkingSet(infos))
        unet, used = [Other(UNET, gib(4.75), 1)], gib(32)
        gone = [
            one for decoding in (False, True) for one in at_stage_change(policy, unet, decoding=decoding, used=used)
        ]
        return [one.reason for one in gone]

    reasons = evictions(OffloadPolicy(**written).to_json())
    run = seed(written, resolved__mode=written["mode"], resolved__low_always=written["low"] == 0)
    if written["mode"] == "none":
        run["resolved"]["low_always"] = False
    run["components"] = [{"name": UNET, "class": UNET, "role": "denoiser"}]
    run["by_component"][1]["dropped_for"] = {reason: reasons.count(reason) * gib(4.75) for reason in reasons}
    if reasons:
        hint = hint_of(run, run)
        assert hint.saving_s == pytest.approx(3.0 if len(reasons) == 2 else 1.6875 + 1.3125 / 2)
        assert hint.action is not None and evictions({**run["policy"], **hint.action["set"]}) == []
    else:
        none_of(run, run)


def test_a_list_loses_every_entry_that_was_to_blame() -> None:
    run = seed({"always": ["text_encoder", "t5", UNET, "vae"]}, "always")
    run["by_component"][0] = evicted("text_encoder", 1.5, "always", 0.5)
    action = hint_of(run, run).action
    assert action is not None and action["set"] == {"always": "t5, vae"}
    run["policy"]["always"] = "text_encoder"  # not a list, as a policy writes it
    none_of(run, run)


def test_a_run_that_did_not_fit_is_none_of_the_two() -> None:
    none_of(seed(fits=False), seed())
    none_of(seed(), seed(fits=False))


def test_a_note_names_what_waited_longest_and_what_that_run_had() -> None:
    run = hires()
    run["by_component"][0] = evicted("text_encoder", 1.5, "low", 1.75)
    for order in (run["by_component"], list(reversed(run["by_component"]))):
        found = find(*runs(run | {"by_component": order}, run | {"by_component": order}))
        assert found.note is not None and found.note.startswith("text_encoder (1.5 GiB) was moved")
    earlier = hires(resolved__available=gib(25.5))
    note = find(*runs(earlier, hires())).note
    assert note is not None and note.endswith("more than the 25.6 GiB available.")
    note = find(*runs(earlier, seed())).note
    assert note is not None and note.endswith("more than the 25.5 GiB available.")


def test_a_component_whose_weights_are_not_known() -> None:
    run = seed()
    run["by_component"][1]["weight_bytes"] = None
    assert hint_of(run, run).sentence.startswith("UNet2DConditionModel fits the budget of 25.6 GiB with")
    run["by_component"][0] = evicted(
        "text_encoder", 1.5, "low", 0.5
    )  # known, and less than what was moved of the other
    assert hint_of(run, run).sentence.startswith("UNet2DConditionModel fits")


def test_turns_of_others_are_not_its_own() -> None:
    run = seed(totals__evict_s=0.0)
    run["by_component"] += [row("a", 0.0, bytes_h2d=1), row("b", 0.0), row("a+b", None, onload_s=8.0)]
    run["by_component"] += [row(f"a+{UNET}", None, onload_s=None)]
    assert hint_of(run, run).saving_s == 1.6875


def test_a_hint_without_a_button_is_json_too() -> None:
    assert Hint("X", "y", 1.0, None).to_json() == {"code": "X", "sentence": "y", "saving_s": 1.0, "action": None}
