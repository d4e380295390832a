"""What a decode took, and whether all would have fitted beside it: exact where it is known, else within bounds."""

from __future__ import annotations

from typing import Any

import pytest

from balanced_offload.offload.hint_fit import Room, beside_decodes, decode_alone, decode_needed, everything_fits, spare
from balanced_offload.offload.hints import Found, digest, find

from .hint_cases import GIB, gib, report, row, runs, seed, streaming, unpinned


def run(decode: dict[str, Any] | None = None, after: bool = False, **changes: Any) -> dict[str, Any]:
    """Three components of 4, 8 and 1 GiB on a card with 20 GiB, 2 GiB of activations; the decode is the last stage."""
    stage = {"name": "decode", "component": "vae", "t0": 1.0, "t1": 2.0, "need": None, "peak": None, **(decode or {})}
    stages = [stage, {"name": "encode", "component": "te", "t0": 2.0, "t1": 3.0}] if after else [stage]
    rows = [row("te", 4.0, left_bytes=GIB), row("unet", 8.0, left_bytes=0, resident_bytes=2 * GIB), row("vae", 1.0)]
    document = report(by_component=rows, stages=stages, **changes)
    document["resolved"] |= {"weight_bytes": 13 * GIB, "activation_peak": 2 * GIB, "available": 20 * GIB}
    return document


def needed(document: dict[str, Any]) -> Room | None:
    return decode_needed(digest(document))


def test_the_last_stage_is_known_to_the_byte() -> None:
    assert needed(run({"peak": 9 * GIB})) is None  # 8 of its own and 12 of the others are what there is
    assert needed(run({"peak": 9 * GIB + 1})) == Room(8 * GIB + 1, 8 * GIB + 1, 12 * GIB)
    assert everything_fits(digest(run({"peak": 9 * GIB}))) and not everything_fits(digest(run({"peak": 9 * GIB + 1})))


def test_an_earlier_one_within_bounds() -> None:
    """Beside it at most the 4 GiB of the text encoder were there, and the 2 GiB that the UNet ever had."""
    assert everything_fits(digest(run({"peak": 8 * GIB}, after=True)))
    assert not everything_fits(digest(run({"peak": 8 * GIB + 1}, after=True)))
    assert needed(run({"peak": 14 * GIB}, after=True)) is None
    assert needed(run({"peak": 14 * GIB + 1}, after=True)) == Room(8 * GIB + 1, 14 * GIB + 1, 12 * GIB)


def test_the_same_where_it_is_not_known_what_was_left() -> None:
    document = run({"peak": 14 * GIB + 1})
    document["by_component"][0]["left_bytes"] = None
    assert needed(document) == Room(8 * GIB + 1, 14 * GIB + 1, 12 * GIB)
    document["by_component"][1]["resident_bytes"] = None  # at most all of it
    assert needed(document) is None
    document["by_component"][1]["weight_bytes"] = None  # by the fit rule's sum: 13 GiB less its own 1
    document["stages"][0]["peak"] = 20 * GIB  # beside it all of the others may have been
    assert needed(document) is None
    document["stages"][0]["peak"] = 20 * GIB + 1
    assert needed(document) == Room(8 * GIB + 1, 20 * GIB + 1, 12 * GIB)


def test_without_a_peak_what_it_was_expected_to_need() -> None:
    assert everything_fits(digest(run({"need": 7 * GIB}))), "with its own weights, had they been missing"
    assert not everything_fits(digest(run({"need": 7 * GIB + 1})))
    assert needed(run({"need": 8 * GIB})) is None
    assert needed(run({"need": 8 * GIB + 1})) == Room(8 * GIB + 1, 9 * GIB + 1, 12 * GIB)
    assert not everything_fits(digest(run())), "neither is known: nothing is claimed"
    assert needed(run()) is None


def test_of_several_decodes_the_largest() -> None:
    document = run({"peak": 10 * GIB})
    document["stages"] += [{**document["stages"][0], "peak": peak * GIB} for peak in (12, 11)]
    assert needed(document) == Room(10 * GIB, 10 * GIB, 12 * GIB)  # the last one; of the others the bounds are lower
    document["stages"][1]["peak"] = 19 * GIB
    assert needed(document) == Room(13 * GIB, 19 * GIB, 12 * GIB)


def test_turns_are_no_weights() -> None:
    document = run({"peak": 9 * GIB})
    document["by_component"].append(row("te+unet", None))
    assert everything_fits(digest(document))


@pytest.mark.parametrize(
    ("weights", "activations", "fits"), [(18, 2, True), (18.001, 2, False), (18, 2.001, False), (0, 20.001, False)]
)
def test_the_fit_rule(weights: float, activations: float, fits: bool) -> None:
    document = run({"peak": 9 * GIB})
    document["resolved"] |= {"weight_bytes": gib(weights), "activation_peak": gib(activations)}
    assert everything_fits(digest(document)) is fits
    assert not everything_fits(digest(document | {"fits": False}))


def test_what_is_to_spare() -> None:
    assert spare(digest(run({"peak": 5 * GIB}))) == 4 * GIB  # by a decode of 4 GiB beside 12
    assert spare(digest(run({"peak": 2 * GIB}))) == 5 * GIB  # by the fit rule: 13 and 2
    document = run({"peak": 2 * GIB})
    document["stages"] = []
    assert spare(digest(document)) == 5 * GIB and everything_fits(digest(document))


def test_a_decode_alone_is_to_blame_where_the_weights_fit_without_it() -> None:
    document = run({"peak": 9 * GIB + 1})
    assert decode_alone(digest(document)) == Room(8 * GIB + 1, 8 * GIB + 1, 12 * GIB)
    document["resolved"]["weight_bytes"] = 20 * GIB
    assert decode_alone(digest(document)) is not None
    document["resolved"]["weight_bytes"] += 1
    assert decode_alone(digest(document)) is None and needed(document) is not None
    assert decode_alone(digest(run({"peak": 9 * GIB}))) is None


def test_what_may_be_there_beside_every_decode() -> None:
    document = run({"peak": 9 * GIB})  # 8 GiB of its own on a card with 20
    assert beside_decodes(digest(document), "unet") == 12 * GIB
    assert beside_decodes(digest(document), "vae") is None, "it is what decodes"
    assert beside_decodes(digest(run()), "unet") is None, "its peak is not known"
    document["resolved"]["available"] = 7 * GIB
    assert beside_decodes(digest(document), "unet") == 0
    document["resolved"]["available"] = document["vram"]["available"] = None
    assert beside_decodes(digest(document), "unet") is None


# --- what is said, and what is not


def test_against_the_decode_nothing_is_told_that_would_keep_more() -> None:
    """A mark that splits the UNet, and a decode of 7 GiB that has no room beside the 11 GiB of the others."""
    run = streaming()
    run["by_component"][0] |= {"bytes_h2d": 3 * GIB, "dropped_for": {"need": 3 * GIB}, "onload_s": 1.0, "left_bytes": 0}
    run["stages"][2]["peak"] = 7 * GIB
    objected = (
        "the decode of this run needed the room: it took 7.0 GiB, which with the other weights (11.0 GiB) is more than "
        "the 12.0 GiB available."
    )
    found = find(*runs(run, run))
    assert found == Found(note=f"text_encoder (3.0 GiB) was moved out and in again (1.00 s), and {objected}")
    run["by_component"][0] |= {"bytes_h2d": 0, "onload_s": 0.0}  # nothing came back: the objection is told all the same
    assert find(*runs(run, run)) == Found(note=f"Nothing is said that would keep more in VRAM, as {objected}")
    run["stages"][2]["peak"] = gib(0.9)
    assert find(*runs(run, run)).hint is not None


def test_nor_is_the_default_praised_that_would_keep_more() -> None:
    decode = {**report()["stages"][2], "peak": 22 * GIB}
    own = {"stages": [*report()["stages"][:2], decode], "world": "static"}
    mine = seed(nodes=[{"id": "3", "type": "KSampler", "cached": False}], **own)
    default = {**mine, "policy": {**mine["policy"], "mode": "auto"}, "totals": {**mine["totals"], "wall_s": 6.0}}
    found = find(*runs(default, mine, mine))
    assert found.hint is None and found.note is not None and "needed the room: it took 20.5 GiB" in found.note


def test_what_keeps_nothing_more_may_be_told_beside_the_note() -> None:
    run = unpinned()
    run["by_component"][0] |= {"bytes_h2d": 3 * GIB, "dropped_for": {"need": 3 * GIB}, "onload_s": 1.0, "left_bytes": 0}
    run["stages"][2]["peak"] = 7 * GIB
    run["resolved"]["sources"]["pinned_ram"] = "default"
    found = find(*runs(run, run))
    assert found.hint is not None and found.hint.code == "RAM_PRESSURE"
    assert found.hint.sentence.endswith("More RAM or smaller weights would help.")  # and no higher mark
    assert found.note is not None and "and the decode of this run needed the room" in found.note


def test_a_decode_is_not_blamed_where_the_weights_alone_are_too_much() -> None:
    run = streaming()
    run["by_component"][0] |= {"weight_bytes": 5 * GIB, "bytes_h2d": 5 * GIB, "dropped_for": {"need": 5 * GIB}}
    run["by_component"][0] |= {"onload_s": 1.0, "left_bytes": 5 * GIB}
    found = find(*runs(run, run))
    assert found.hint is not None and found.hint.code == "HIGH_MARK_TOO_LOW"
    assert found.note == (
        "text_encoder (5.0 GiB) was moved out and in again (1.00 s), and there was no room for all: the weights "
        "(13.2 GiB) are more than the 12.0 GiB available."
    )
    run["stages"][2]["peak"] = 13 * GIB  # 8 of its own: the 4 GiB of the UNet may stay, and no more of it
    assert find(*runs(run, run)).hint is None
