"""Invariant: every claim of the demo can fail: broken on purpose, it is named on standard error, and the code is 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from balanced_offload.offload.backend.generic import AcceleratorBackend
from balanced_offload.offload.demo import classifier, run
from balanced_offload.offload.demo.audit import Looks
from balanced_offload.offload.demo.checks import ModeRun, check_mode, check_pictures
from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.weights import Weights

MIB = 1 << 20


def good(**changes) -> ModeRun:
    """A balanced run on the simulator with which nothing is wrong, and what the test changes in it."""
    looks = Looks(hooks_on_resident=0, component_peak=8 * MIB, log_h2d=100, log_d2h=0, races=0)
    fine = ModeRun(
        "balanced",
        "balanced",
        cap=16 * MIB,
        high=9 * MIB,
        equal_to_none=True,
        equal_to_cpu=True,
        peak_vram=15 * MIB,
        resident_peak=12 * MIB,
        high_crossings=0,
        bytes_h2d=100,
        bytes_d2h=0,
        looks=dataclasses.replace(looks, **changes.pop("looks", {})),
    )
    return dataclasses.replace(fine, **changes)


def test_a_good_run_has_no_failure():
    assert check_mode(good(), on_simulator=True, tight=True) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"equal_to_none": False}, "differ from those of mode none"),
        ({"equal_to_none": None}, "differ from those of mode none"),
        ({"equal_to_cpu": False}, "differ from those of the plain CPU"),
        ({"peak_vram": 16 * MIB + 1}, "over the cap"),
        ({"peak_vram": 13 * MIB}, "81% of the cap"),
        ({"high_crossings": 2}, "over high 2 times"),
        ({"looks": {"component_peak": 10 * MIB}}, "over high 9.0 MiB"),
        ({"looks": {"hooks_on_resident": 3}}, "3 hooks on resident modules"),
        ({"bytes_d2h": 512}, "copied back to the host, by the ledger"),
        ({"looks": {"log_d2h": 512}}, "copied back to the host, by the copy log"),
        ({"looks": {"log_h2d": 101}}, "the ledger has 100 bytes"),
        ({"looks": {"races": 1}}, "1 races"),
        ({"looks": {"lost": 7}}, "lost 7 copies"),
        ({"error": "OutOfMemoryError: no room"}, "did not finish: OutOfMemoryError"),
    ],
)
def test_each_check_can_fail(changes, words):
    (failure,) = check_mode(good(**changes), on_simulator=True, tight=True)
    assert words in failure


def test_an_unknown_peak_proves_nothing():
    failures = check_mode(good(peak_vram=None), on_simulator=True, tight=True)
    assert [text.split(" is ")[0] for text in failures][:1] == ["the allocator's peak n/a"]
    assert len(failures) == 2


def test_the_share_is_not_asked_for_where_the_cap_is_wide():
    assert check_mode(good(peak_vram=MIB), on_simulator=True, tight=False) == []


def test_the_share_leaves_out_what_libraries_hold():
    run_ = good(cap=48 * MIB, peak_vram=45 * MIB, context=32 * MIB)
    (failure,) = check_mode(run_, on_simulator=True, tight=True)
    assert "81% of the cap" in failure


def test_pictures_that_do_not_differ_and_digits_that_cannot_be_read():
    pictures = torch.zeros(10, 3, 4, 4)
    for i in range(9):
        pictures[i] = i
    pictures[9] = 8
    asked = list(range(10))
    (failure,) = check_pictures(pictures, asked, asked)
    assert failure == "different prompts gave the same picture: 8 and 9"
    pictures[9] = 9
    assert check_pictures(pictures, asked, [*asked[:9], 0]) == []
    (failure,) = check_pictures(pictures, asked, [*asked[:8], 0, 0])
    assert "8 of 10" in failure


# --------------------------------------------------------------------- broken for real, through the command
def break_reading(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(classifier, "read_digits", lambda pictures, weights=None: [7] * len(pictures))
    return "read the digit right in 0 of 2"


def break_equality(patch: pytest.MonkeyPatch) -> str:
    draw = run._Bench.draw

    def drawn(self, call, batch, after_step=None):
        pictures = draw(self, call, batch, after_step)
        if self.place.simulator.memory_cap() < 18 * MIB:  # under the cap: not the reference
            pictures[0, 0, 0, 0] += 2.0**-20
        return pictures

    patch.setattr(run._Bench, "draw", drawn)
    return "balanced: its pictures differ from those of mode none"


def break_eviction(patch: pytest.MonkeyPatch) -> str:
    unbind = Weights.unbind

    def copying(self, storage, **options):
        bound = self.bound(storage)
        if bound is not None:
            bound.cpu()
        return unbind(self, storage, **options)

    patch.setattr(Weights, "unbind", copying)
    return "copied back to the host, by the copy log"


def break_ledger(patch: pytest.MonkeyPatch) -> str:
    move = Ledger.move

    def more(self, component, direction, nbytes, *args, **kwargs):
        return move(self, component, direction, nbytes + 1, *args, **kwargs)

    patch.setattr(Ledger, "move", more)
    return "bytes of weights copied up, the copy log"


def break_hooks(patch: pytest.MonkeyPatch) -> str:
    load = run.load_pipeline

    def hooked():
        pipe = load()
        pipe.unet.conv_in.register_forward_hook(lambda module, args, output: None)
        return pipe

    patch.setattr(run, "load_pipeline", hooked)
    return "none: 1 hooks on resident modules"


def break_peak(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(AcceleratorBackend, "peak_allocated", lambda self: 17 * MIB)
    return "the allocator's peak 17.0 MiB is over the cap"


def break_prompts(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(run, "PROMPTS", ["a photo of the digit zero"] * 10)
    return "different prompts gave the same picture: 0 and 1"


@pytest.mark.parametrize(
    "breaking",
    [break_reading, break_equality, break_eviction, break_ledger, break_hooks, break_peak, break_prompts],
)
def test_a_broken_claim_ends_with_exit_code_1(
    vram: ModuleType, small: Callable[..., object], monkeypatch: pytest.MonkeyPatch, breaking: Callable[..., str]
):
    words = breaking(monkeypatch)
    ended = small()
    assert ended.code == 1
    named = [text for text in ended.err.splitlines() if text.startswith("FAILED  ")]
    assert any(words in text for text in named), named
    assert [f"FAILED  {text}" for text in ended.document["failures"]] == named
    assert "All checks hold." not in ended.err


def test_the_same_command_unbroken_ends_well(vram: ModuleType, small: Callable[..., object]):
    ended = small()
    assert (ended.code, ended.document["failures"]) == (0, [])
    assert [row["mode"] for row in ended.document["modes"]] == ["none", "balanced"]
    assert ended.document["modes"][1]["cap_share"] >= 0.85


def test_a_cap_that_nothing_fits_under_is_a_failure_and_leaves_it_clean(vram: ModuleType, small):
    before = vram.memory_allocated()
    ended = small("--cap", "1MiB")
    assert ended.code == 1
    assert any("balanced: did not finish" in text for text in ended.document["failures"])
    assert vram.memory_allocated() == before
