"""Lists, RAM, the collector and what is passed through; resolving changes nothing and is fast."""

import gc
import json
import time
import warnings
from dataclasses import replace
from typing import Any

import pytest

from balanced_offload.offload.policy import (
    ComponentInfo,
    Machine,
    OffloadPolicy,
    OffloadPolicyWarning,
    ResolvedPolicy,
    WorkingSet,
)
from balanced_offload.offload.sizes import GIB, MIB

# 1 + 9 + 22 + 1 = 33 GiB of weights, 3 of activations: over every card below.
FLUX = WorkingSet(
    (
        ComponentInfo("text_encoder", "CLIPTextModel", "text_encoder", 1 * GIB),
        ComponentInfo("text_encoder_2", "T5EncoderModel", "text_encoder", 9 * GIB),
        ComponentInfo("transformer", "FluxTransformer2DModel", "denoiser", 22 * GIB),
        ComponentInfo("vae", "AutoencoderKL", "vae", 1 * GIB),
    ),
    activation_peak=3 * GIB,
)
# 2 + 6 + 1 = 9 GiB of weights, 3 GiB of activations.
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


# ---- lists --------------------------------------------------------------------------------------------------------


def test_the_big_cards_profile_keeps_clips_and_vae() -> None:
    resolved = resolve(24, FLUX)  # T5 is none of them, and there is no clip-g: silent
    assert resolved.never == {"text_encoder", "vae"}
    assert (resolved.sources["never"], resolved.notices) == ("profile", ())


def test_a_profiles_list_is_only_for_balanced() -> None:
    for mode in ("none", "model", "sequential"):
        assert resolve(24, FLUX, mode=mode).never == frozenset()
    assert resolve(24, FLUX, mode="model", never="vae").never == {"vae"}


def test_a_users_list_replaces_the_profiles() -> None:
    resolved = resolve(24, FLUX, never="t5")
    assert (resolved.never, resolved.sources["never"]) == ({"text_encoder_2"}, "user")


def test_never_wins_over_always() -> None:
    resolved = resolve(8, never="vae, unet", always="AutoencoderKL, text-encoder")
    assert (resolved.never, resolved.always) == ({"vae", "unet"}, {"text_encoder"})
    assert "never and always both name vae: never wins" in resolved.notices


def test_a_users_always_wins_over_a_profiles_never() -> None:
    resolved = resolve(24, FLUX, always="vae")
    assert (resolved.never, resolved.always) == ({"text_encoder"}, {"vae"})


def test_an_entry_that_matches_nothing_warns_with_near_names() -> None:
    with pytest.warns(OffloadPolicyWarning, match=r"never: 'UNet2DCondition' .*UNet2DConditionModel") as caught:
        resolved = OffloadPolicy(never="UNet2DCondition, vae").resolve(card(8), UNIT)
    assert caught[0].filename == __file__  # the caller's line, not ours
    assert resolved.never == {"vae"}
    assert [n for n in resolved.notices if n.startswith("never: 'UNet2DCondition' matches no component")]
    with pytest.warns(OffloadPolicyWarning, match=r"always: 'zzzz' .*it has text_encoder, unet, vae"):
        OffloadPolicy(always="zzzz").resolve(card(8), UNIT)


def test_an_empty_run_does_not_make_entries_wrong() -> None:
    assert resolve(8, WorkingSet(()), never="anything").notices == ()


def test_a_never_list_too_large_is_said() -> None:
    # 6 GiB held + 3 GiB activations > 8 GiB
    (notice,) = resolve(8, never="unet").notices
    assert notice.startswith("never holds 6.0 GiB of the 8.0 GiB available")


# ---- RAM, GC and the rest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "written", "expected"),
    [
        ({}, "auto", 32 * GIB),  # 50 % of 64
        ({"os": "Darwin"}, "auto", 32 * GIB),
        ({"os": "Windows"}, "auto", 64 * GIB * 40 // 100),
        ({"ram_limit": 16 * GIB}, "auto", 8 * GIB),  # half of what the cgroup grants
        ({"memlock": 64 * MIB}, "auto", 64 * MIB),
        ({"ram_limit": 16 * GIB, "memlock": 12 * GIB}, "auto", 8 * GIB),
        ({}, "25%", 16 * GIB),
        ({}, "10GiB", 10 * GIB),
        ({}, 0, 0),
        ({"ram_limit": 4 * GIB}, "10GiB", 4 * GIB),
        ({"memlock": GIB}, "10GiB", GIB),
        ({"ram_total": None}, "10GiB", 10 * GIB),
        ({"ram_total": None}, "auto", 0),
        ({"ram_total": None, "ram_limit": 8 * GIB}, "auto", 4 * GIB),
    ],
)
def test_pinned_ram(changes: dict[str, Any], written: Any, expected: int) -> None:
    resolved = OffloadPolicy(pinned_ram=written).resolve(card(16, **changes), UNIT)
    assert resolved.pinned_ram == expected
    assert resolved.sources["pinned_ram"] == ("default" if written == "auto" else "user")


def test_less_pinned_ram_than_meant_is_said() -> None:
    def notices(written: Any, **changes: Any) -> str:
        return " ".join(OffloadPolicy(pinned_ram=written).resolve(card(16, **changes), UNIT).notices)

    assert "memlock allows 64.0 MiB of 32.0 GiB" in notices("auto", memlock=64 * MIB)
    assert "more RAM than there is, 4.0 GiB is used" in notices("10GiB", ram_limit=4 * GIB)
    assert "RAM is unknown, so nothing is pinned" in notices("auto", ram_total=None)
    assert notices("auto") == notices("10GiB") == ""


@pytest.mark.parametrize(
    ("gib", "written", "expected", "source"),
    [(4, "profile", 0.0, "profile"), (12, "profile", 0.7, "profile"), (16, None, 0.7, "profile"),
     (24, "auto", 0.7, "profile"), (4, "90%", 0.9, "user"), (16, 0, 0.0, "user"), (16, 1, 1.0, "user")],
)  # fmt: skip
def test_gc_threshold(gib: int, written: Any, expected: float, source: str) -> None:
    resolved = resolve(gib, FLUX, gc_threshold=written)
    assert (resolved.gc_threshold, resolved.sources["gc_threshold"]) == (expected, source)


def test_what_is_passed_through_keeps_its_source() -> None:
    plain = resolve(8)
    assert (plain.vae_tiling, plain.before_decode, plain.on_oom, plain.prefetch) == ("auto", "fit", "step_down", None)
    written = resolve(
        8, vae_tiling="on", before_decode="keep", on_oom="stop", prefetch="256MiB", use_core_dynamic="follow"
    )
    assert (written.vae_tiling, written.before_decode, written.on_oom) == ("on", "keep", "stop")
    assert (written.prefetch, written.use_core_dynamic) == (256 * MIB, "follow")
    for field in ("vae_tiling", "before_decode", "on_oom", "prefetch", "use_core_dynamic"):
        assert written.sources[field] == "user"
        assert plain.sources[field] in ("default", "profile")


def test_every_policy_field_has_a_source() -> None:
    sources = resolve(8).sources
    assert set(OffloadPolicy().to_json()) - {"schema"} <= set(sources)


def test_resolved_prints_as_json() -> None:
    resolved = resolve(24, FLUX)
    document = json.loads(json.dumps(resolved.to_json(), allow_nan=False))
    assert document["mode"] == "balanced"
    assert document["never"] == ["text_encoder", "vae"]
    assert document["high"] == 20_615_843_020
    assert document["sources"]["high"] == "profile"


# ---- pure and fast ------------------------------------------------------------------------------------------------


def test_resolving_changes_nothing() -> None:
    policy = OffloadPolicy(never="vae", high="30%", always="t5, clip-l")
    machine, before = card(16), policy.to_json()
    first = policy.resolve(machine, FLUX)
    first.sources["mode"] = "scribbled"
    second = policy.resolve(machine, FLUX)
    assert second.sources["mode"] != "scribbled"
    assert policy.to_json() == before and machine == card(16)


def test_two_thousand_components_take_under_ten_milliseconds() -> None:
    many = WorkingSet(tuple(ComponentInfo(f"block_{i}", f"Block{i}Model", "other", MIB + i) for i in range(2000)), GIB)
    policy = OffloadPolicy(never="block_1, clip-l, Block7Model", always="block_2, vae")
    machine = card(24)
    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OffloadPolicyWarning)  # clip-l and vae: near names are searched as well
        gc.disable()  # as timeit does: what other tests left behind is no cost of ours
        for _ in range(15):  # this thread's time: what other programs do meanwhile is no fault of resolve
            start = time.thread_time()
            resolved = policy.resolve(machine, many)
            times.append(time.thread_time() - start)
        gc.enable()
    assert (resolved.never, resolved.always) == ({"block_1", "block_7"}, {"block_2"})
    assert min(times) < 0.010
