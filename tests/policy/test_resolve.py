"""What a policy means on a machine: the fit rule, marks, lists and figures, with the arithmetic in the comments."""

import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest

from balanced_offload.offload.policy import (
    ComponentInfo,
    Machine,
    OffloadMode,
    OffloadPolicy,
    ResolvedPolicy,
    WorkingSet,
)
from balanced_offload.offload.sizes import GIB

# Weights as published, two bytes per parameter.
SDXL = WorkingSet(
    (
        ComponentInfo("text_encoder", "CLIPTextModel", "text_encoder", 246_120_960),
        ComponentInfo("text_encoder_2", "CLIPTextModelWithProjection", "text_encoder", 1_389_319_680),
        ComponentInfo("unet", "UNet2DConditionModel", "denoiser", 5_134_927_368),
        ComponentInfo("vae", "AutoencoderKL", "vae", 167_307_726),
    ),  # 6937675734 = 6.46 GiB
    activation_peak=5 * GIB // 2,
)
FLUX = WorkingSet(
    (
        ComponentInfo("text_encoder", "CLIPTextModel", "text_encoder", 246_120_960),
        ComponentInfo("text_encoder_2", "T5EncoderModel", "text_encoder", 9_524_621_312),
        ComponentInfo("transformer", "FluxTransformer2DModel", "denoiser", 23_802_816_640),
        ComponentInfo("vae", "AutoencoderKL", "vae", 167_639_366),
    ),  # 33741198278 = 31.42 GiB
    activation_peak=3 * GIB,
)
# Unit-size set: 2 + 6 + 1 = 9 GiB of weights, 3 GiB of activations, 12 GiB in all.
UNIT = WorkingSet(
    (
        ComponentInfo("text_encoder", "CLIPTextModel", "text_encoder", 2 * GIB),
        ComponentInfo("unet", "UNet2DConditionModel", "denoiser", 6 * GIB),
        ComponentInfo("vae", "AutoencoderKL", "vae", 1 * GIB),
    ),
    activation_peak=3 * GIB,
)


def card(gib: float, **changes: Any) -> Machine:
    base = Machine("Test card", "cuda", int(gib * GIB), int(gib * GIB), others=0, ram_total=64 * GIB, os="Linux")
    return replace(base, **changes)


def resolve(gib: float, working_set: WorkingSet = UNIT, **fields: Any) -> ResolvedPolicy:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning nobody expects fails the test
        return OffloadPolicy(**fields).resolve(card(gib), working_set)


# ---- the fit rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "working_set", "mode", "high"),
    [
        # SDXL needs 6.46 + 2.5 = 8.96 GiB
        (4, SDXL, "sequential", 2_576_980_377),  # 0.6 * 4 GiB = 2576980377.6
        (8, SDXL, "balanced", 5_153_960_755),  # 0.6 * 8 GiB
        (12, SDXL, "none", None),
        (16, SDXL, "none", None),
        (24, SDXL, "none", None),
        (32, SDXL, "none", None),
        # FLUX needs 31.42 + 3 = 34.42 GiB
        (4, FLUX, "sequential", 2_576_980_377),
        (8, FLUX, "balanced", 5_153_960_755),
        (12, FLUX, "balanced", 7_730_941_132),
        (16, FLUX, "balanced", 10_307_921_510),
        (24, FLUX, "balanced", 20_615_843_020),  # 0.8 * 24 GiB
        (32, FLUX, "balanced", 27_487_790_694),  # 0.8 * 32 GiB; the weights alone would fit
        (48, FLUX, "none", None),
    ],
)
def test_auto_on_the_usual_cards(gib: float, working_set: WorkingSet, mode: str, high: int | None) -> None:
    resolved = resolve(gib, working_set)
    assert (resolved.mode.value, resolved.high) == (mode, high)
    assert resolved.fits == (mode == "none")
    assert resolved.sources["mode"] == ("fit" if mode == "none" else "profile")
    assert resolved.sources["high"] == ("fit" if mode == "none" else "profile")
    assert not resolved.low_always
    assert resolved.notices == ()


@pytest.mark.parametrize("mode", list(OffloadMode))
@pytest.mark.parametrize("marks", [{}, {"high": "30%"}, {"low": 0}, {"low": "90%"}, {"high": "2GiB", "low": "1GiB"}])
def test_what_holds_for_every_card_set_and_policy(mode: OffloadMode, marks: dict[str, Any]) -> None:
    for gib, working_set, others, reserve in itertools.product(
        (4, 8, 12, 16, 24, 32, 48), (SDXL, FLUX, UNIT), (0, GIB, None), (0, "1GiB", "10%", "100%")
    ):
        policy = OffloadPolicy(mode=mode, reserve=reserve, **marks)
        machine = card(gib, others=others)
        resolved = policy.resolve(machine, working_set)
        assert resolved.mode is not OffloadMode.AUTO
        assert resolved.available == max(0, machine.vram_total - (others or 0) - resolved.reserve)
        need = sum(c.weight_bytes for c in working_set.components) + working_set.activation_peak
        assert resolved.fits == (need <= resolved.available)
        assert 0 <= resolved.low <= machine.vram_total
        assert resolved.high is None or resolved.low <= resolved.high <= machine.vram_total
        if mode is not OffloadMode.AUTO:
            assert resolved.mode is mode
        elif resolved.fits and not marks:
            assert (resolved.mode, resolved.high) == (OffloadMode.NONE, None)
        if resolved.mode is OffloadMode.NONE and resolved.high is not None:
            assert all(c.weight_bytes <= resolved.high for c in working_set.components)
        assert resolved.low_always == (marks.get("low") == 0 and resolved.mode is not OffloadMode.NONE)
        assert not resolved.never & resolved.always
        assert set(resolved.sources.values()) <= {"user", "profile", "fit", "learned", "default", "device"}
        assert resolved.sentence.startswith(f"{resolved.mode.value}: ") and resolved.sentence.endswith(".")
        assert "\n" not in resolved.sentence and ".." not in resolved.sentence and "  " not in resolved.sentence
        assert policy.resolve(machine, working_set) == resolved  # the same question has the same answer


def test_fit_is_decided_to_the_byte() -> None:
    # 12 GiB needed: 12 GiB available fits, one byte less does not.
    assert resolve(16, reserve="4GiB").fits
    assert resolve(16, reserve="4GiB").mode is OffloadMode.NONE
    short = resolve(16, reserve=4 * GIB + 1)
    assert not short.fits and short.mode is OffloadMode.BALANCED


def test_other_programs_and_the_reserve_count_once_each() -> None:
    # 16 - 3 - 2 = 11 GiB, and 12 are needed
    resolved = OffloadPolicy(reserve="2GiB").resolve(card(16, others=3 * GIB), UNIT)
    assert (resolved.available, resolved.fits, resolved.reserve) == (11 * GIB, False, 2 * GIB)
    # 16 - 2 - 2 = 12 GiB
    resolved = OffloadPolicy(reserve="2GiB").resolve(card(16, others=2 * GIB), UNIT)
    assert (resolved.available, resolved.fits) == (12 * GIB, True)


def test_unknown_other_programs_are_said_not_guessed() -> None:
    resolved = OffloadPolicy().resolve(card(16, others=None), UNIT)
    assert resolved.available == 16 * GIB
    assert [n for n in resolved.notices if "unknown" in n]


def test_a_reserve_of_the_whole_card_leaves_nothing_and_not_less() -> None:
    resolved = OffloadPolicy(reserve="100%").resolve(card(16, others=GIB), UNIT)
    assert (resolved.available, resolved.fits) == (0, False)


def test_the_sentence_carries_the_figures() -> None:
    assert resolve(16).sentence == (
        "none: the run needs 12.0 GiB (9.0 GiB weights + 3.0 GiB activations, estimated) and 16.0 GiB of 16.0 GiB "
        "are available, so it fits and everything stays resident."
    )
    assert resolve(8).sentence == (
        "balanced: the run needs 12.0 GiB (9.0 GiB weights + 3.0 GiB activations, estimated) and 8.0 GiB of 8.0 GiB "
        "are available, so it does not fit and profile up_to_12_gib applies as the card has more than 4 and at most "
        "12 GiB; one component may hold 4.8 GiB."
    )


# ---- activations --------------------------------------------------------------------------------------------------


def test_headroom_counts_until_the_peak_is_learned() -> None:
    # 9 GiB weights + 8 GiB headroom > 16 GiB
    resolved = resolve(16, headroom="50%")
    assert (resolved.headroom, resolved.activation_peak, resolved.fits) == (8 * GIB, 8 * GIB, False)
    assert resolved.sources["headroom"] == "user"
    # learned 3 GiB: 12 <= 16
    learned = replace(UNIT, activation_source="learned")
    resolved = resolve(16, learned, headroom="50%")
    assert (resolved.headroom, resolved.activation_peak, resolved.fits) == (8 * GIB, 3 * GIB, True)
    assert resolved.sources["activation_peak"] == "learned"


def test_without_headroom_the_working_set_says_the_peak() -> None:
    resolved = resolve(16)
    assert (resolved.headroom, resolved.activation_peak) == (None, 3 * GIB)
    assert resolved.sources["headroom"] == "default"
    assert resolve(16, replace(UNIT, activation_source="learned")).sources["headroom"] == "learned"


# ---- high ---------------------------------------------------------------------------------------------------------


def test_a_users_high_splits_a_component_even_of_a_run_that_fits() -> None:
    # 30 % of 16 GiB = 4.8 GiB < 6 GiB of the unet: none could not keep that promise.
    resolved = resolve(16, high="30%")
    assert resolved.fits and resolved.mode is OffloadMode.BALANCED
    assert resolved.high == 5_153_960_755  # 0.3 * 16 GiB = 5153960755.2
    assert (resolved.sources["mode"], resolved.sources["high"]) == ("user", "user")
    assert "unet weighs 6.0 GiB" in resolved.sentence


def test_a_users_high_over_every_component_leaves_the_fit_alone() -> None:
    # 6 GiB is exactly the unet: "the most that it may occupy" is kept
    resolved = resolve(16, high="6GiB")
    assert (resolved.mode, resolved.high, resolved.sources["mode"]) == (OffloadMode.NONE, 6 * GIB, "fit")


def test_a_profiles_high_never_splits_a_run_that_fits() -> None:
    # One component of 11 of 16 GiB: over 0.6 * 16 = 9.6, and it fits with 2 GiB of activations.
    big = WorkingSet((ComponentInfo("unet", "U", "denoiser", 11 * GIB),), 2 * GIB)
    for mode in ("auto", "balanced"):
        resolved = resolve(16, big, mode=mode)
        assert (resolved.fits, resolved.high, resolved.sources["high"]) == (True, None, "fit")


def test_explicit_balanced_that_does_not_fit_takes_the_profiles_marks() -> None:
    resolved = resolve(8, mode="balanced")
    # 0.6 * 8 GiB = 5153960755.2; low 0.0 is "no floor", not "always evict"
    assert (resolved.high, resolved.low, resolved.low_always) == (5_153_960_755, 0, False)
    assert (resolved.sources["mode"], resolved.sources["high"], resolved.sources["low"]) == (
        "user",
        "profile",
        "profile",
    )


def test_bytes_over_the_card_are_clamped_with_a_notice() -> None:
    resolved = resolve(8, high="20GiB", low="10GiB", headroom="9GiB", prefetch="30GiB", reserve="9GiB")
    assert (resolved.high, resolved.low, resolved.headroom, resolved.prefetch, resolved.reserve) == (8 * GIB,) * 5
    for field, given in (
        ("high", "20GiB"), ("low", "10GiB"), ("headroom", "9GiB"), ("prefetch", "30GiB"), ("reserve", "9GiB")
    ):  # fmt: skip
        assert f"{field}: {given} is more than this card has, 8.0 GiB is used" in resolved.notices


def test_the_same_policy_on_another_card_is_the_same_share() -> None:
    for gib in (6, 10, 16, 40):
        assert resolve(gib, high="50%", mode="balanced").high == gib * GIB // 2


# ---- low ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 0.0, "0", "0%", "0GiB"])
def test_a_users_zero_always_evicts_even_in_a_run_that_fits(zero: Any) -> None:
    resolved = resolve(16, low=zero)
    assert resolved.fits and resolved.mode is OffloadMode.BALANCED
    assert (resolved.low, resolved.low_always, resolved.high) == (0, True, None)
    assert (resolved.sources["mode"], resolved.sources["low"]) == ("user", "user")


def test_a_profiles_zero_is_no_floor() -> None:
    resolved = resolve(8)
    assert (resolved.low, resolved.low_always, resolved.sources["low"]) == (0, False, "profile")


def test_default_profile_low_in_bytes() -> None:
    assert resolve(16, FLUX).low == 3_435_973_836  # 0.2 * 16 GiB = 3435973836.8


def test_marks_written_in_two_ways_cross_only_on_some_cards() -> None:
    fields = {"mode": "balanced", "high": "60%", "low": "6GiB"}
    # 60 % of 16 GiB = 9.6 GiB: in order.
    assert resolve(16, FLUX, **fields).low == 6 * GIB
    # 60 % of 8 GiB = 4.8 GiB: low comes down to high, and the user hears it.
    crossed = resolve(8, FLUX, **fields)
    assert (crossed.low, crossed.high) == (5_153_960_755, 5_153_960_755)
    assert [n for n in crossed.notices if n.startswith("low (6.0 GiB) is over high")]


def test_a_profiles_mark_yields_to_the_users() -> None:
    # user's high 10 % of 16 GiB = 1.6 GiB under the profile's low 3.2 GiB
    resolved = resolve(16, FLUX, high="10%")
    assert (resolved.high, resolved.low) == (1_717_986_918, 1_717_986_918)
    assert resolved.sources["low"] == "profile"
    # user's low 90 % over the profile's high 60 %
    resolved = resolve(16, FLUX, low="90%")
    assert (resolved.high, resolved.low) == (15_461_882_265, 15_461_882_265)
    assert [n for n in resolved.notices if "profile's high, which is raised" in n]


# ---- modes --------------------------------------------------------------------------------------------------------


def test_fit_unaware_is_the_originals_rule_and_keeps_the_marks() -> None:
    resolved = resolve(16, mode="balanced", fit_aware=False)
    assert resolved.fits and not resolved.fit_aware
    assert (resolved.mode, resolved.high, resolved.low) == (OffloadMode.BALANCED, 10_307_921_510, 3_435_973_836)
    assert (resolved.sources["high"], resolved.sources["fit_aware"]) == ("profile", "user")
    auto = resolve(16, fit_aware=False)
    assert (auto.mode, auto.high) == (OffloadMode.BALANCED, 10_307_921_510)
    assert "fit rule is off" in auto.sentence


def test_four_gib_is_sequential_unless_it_fits() -> None:
    assert resolve(4).mode is OffloadMode.SEQUENTIAL
    small = WorkingSet((ComponentInfo("unet", "U", "denoiser", 3 * GIB),), GIB)
    assert resolve(4, small).mode is OffloadMode.NONE


def test_explicit_none_that_does_not_fit_stays_none_and_says_so() -> None:
    resolved = resolve(8, mode="none")
    assert resolved.mode is OffloadMode.NONE and not resolved.fits and resolved.high is None
    assert resolved.notices == ("mode none does not fit: the run needs 12.0 GiB, 8.0 GiB are available",)


def test_explicit_none_says_what_it_ignores() -> None:
    resolved = resolve(16, mode="none", high="2GiB", low=0, always="vae", before_decode="free_all")
    assert (resolved.mode, resolved.high, resolved.low_always) == (OffloadMode.NONE, None, False)
    ignored = " | ".join(n for n in resolved.notices if n.endswith("has no effect"))
    for ask in ("high = 2.0 GiB (unet weighs 6.0 GiB)", "low = 0", "always = vae", "before_decode = free_all"):
        assert ask in ignored


def test_explicit_model_holds_whole_components_and_warns_of_one_too_large() -> None:
    resolved = resolve(8, mode="model")
    assert (resolved.mode, resolved.high, resolved.notices) == (OffloadMode.MODEL, None, ())
    resolved = resolve(4, mode="model")
    (notice,) = resolved.notices
    assert "unet (6.0 GiB) is over the 4.0 GiB available" in notice
    assert resolve(8, mode="model", high="2GiB").high == 2 * GIB  # a user's high always caps


@pytest.mark.parametrize("fields", [{"always": "vae"}, {"before_decode": "free_all"}])
def test_auto_does_what_none_cannot_when_the_user_asks(fields: dict[str, Any]) -> None:
    resolved = resolve(16, **fields)
    assert resolved.fits and resolved.mode is OffloadMode.BALANCED and resolved.sources["mode"] == "user"
    assert resolved.high is None  # all the rest stays resident


@pytest.mark.parametrize("machine", [card(16, shared_memory=True), card(16, kind="mps")], ids=["integrated", "mps"])
@pytest.mark.parametrize("mode", list(OffloadMode))
def test_shared_memory_devices_are_none_and_say_so(machine: Machine, mode: OffloadMode) -> None:
    for fields in ({}, {"high": "10%"}, {"low": 0}):
        resolved = OffloadPolicy(mode=mode, **fields).resolve(machine, FLUX)
        assert resolved.mode is OffloadMode.NONE
        assert (resolved.high, resolved.low_always) == (None, False)
        assert resolved.sources["mode"] == "device"
        assert "Test card shares its memory with the host" in resolved.sentence
        said = [n for n in resolved.notices if n.startswith(f"mode {mode.value} becomes none")]
        assert len(said) == (mode not in (OffloadMode.AUTO, OffloadMode.NONE))
