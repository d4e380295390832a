"""A bad option is refused before anything is built, naming what was given, what is allowed and what to do."""

from __future__ import annotations

import pytest

from balanced_offload.offload.bench.cases import PEERS, PEERS_CARDS, Case, cases_of
from balanced_offload.offload.bench.strategies import all_strategies, chosen
from balanced_offload.offload.simulator.cards import CARDS

from .conftest import command

GIB = 1 << 30


def test_the_suite_is_every_picture_on_every_card() -> None:
    cases = cases_of("peers", True)
    assert len(cases) == len(PEERS) * len(PEERS_CARDS)
    assert {case.cap for case in cases} == {8 * GIB, 12 * GIB, 16 * GIB, 24 * GIB}
    assert all(case.card is not None and case.cap == CARDS[case.card].vram for case in cases)
    assert str(cases[0]) == "flux1-dev 1024x1024 on rtx3070-8g, 8 GiB"


def test_what_is_named_replaces_the_suites_own() -> None:
    assert cases_of("peers", True, ["sdxl"], ["10GiB"], "rtx4080-16g", ["768x512"]) == (
        Case("sdxl", "768x512", "rtx4080-16g", 10 * GIB),
    )
    # a cap without a card takes the clock of the card whose memory is nearest
    assert [case.card for case in cases_of("peers", True, ["sdxl"], ["6GiB", "12GiB", "40GiB"])] == [
        "rtx3070-8g",
        "rtx4070-12g",
        "rtx5090-32g-pcie5",
    ]
    assert [case.resolution for case in cases_of("peers", True, ["flux1-dev"], None, "rtx4070-12g")] == [
        "1024x1024",
        "512x512",
    ]
    assert [case.resolution for case in cases_of("peers", True, ["wan21-14b"], None, "rtx4070-12g")] == ["832x480x81"]
    assert [case.resolution for case in cases_of("peers", True, ["sdxl"], None, "rtx4070-12g", ["512"])] == ["512x512"]
    assert cases_of("peers", True, ["sdxl"], ["50%"], "rtx4070-12g")[0].cap == 6 * GIB


def test_on_a_gpu_there_are_caps_and_no_cards() -> None:
    cases = cases_of("peers", False)
    assert {case.card for case in cases} == {None}
    assert [case.cap // GIB for case in cases[:4]] == [12, 24, 8, 16]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "all"], ["--suite", "'all'", "peers-small"]),
        (["--model", "flux"], ["--model", "'flux'", "flux1-dev"]),
        (["--card", "h200"], ["--card", "'h200'", "rtx4090-24g"]),
        (["--cap", "lots"], ["--cap", "'lots'", "GiB"]),
        (["--cap", "0"], ["--cap", "'0'"]),
        (["--resolution", "500x500"], ["resolution", "500x500"]),
        (["--only", "theirs"], ["--only", "'theirs'", "diffusers.group_leaf"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cuda"]),
        (["--device", "cuda", "--card", "rtx4090-24g"], ["--card", "simulated"]),
        (["--steps", "0"], ["--steps", "0", "1 or more"]),
        (["--limit", "0"], ["--limit", "0", "above zero"]),
        (["--rounds", "0"], ["--rounds", "0", "1 or more"]),
        (["--resume"], ["--resume", "--json"]),
    ],
)
def test_a_bad_option_is_one_sentence_and_two(arguments: list[str], words: list[str]) -> None:
    ended = command(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.count("\n") == 1 and all(word in ended.err for word in words)


def test_the_names_are_those_of_the_interface() -> None:
    assert [one.name for one in all_strategies()] == [
        *(f"ours.{mode}" for mode in ("none", "balanced", "model", "sequential", "auto")),
        "diffusers.model",
        "diffusers.sequential",
        "diffusers.group_leaf",
        "diffusers.group_leaf_stream",
        "diffusers.group_leaf_stream_record",
        "diffusers.group_leaf_stream_lowcpu",
        "diffusers.group_block_stream",
        "diffusers.group_block_stream_record",
        "accelerate.dispatch",
        "torch.to",
    ]
    assert {one.name for one in all_strategies() if one.ours} == {one.name for one in chosen(["ours"])}
    assert [one.name for one in chosen(["torch.to", "ours.auto"])] == ["ours.auto", "torch.to"]
