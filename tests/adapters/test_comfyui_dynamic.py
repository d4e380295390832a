"""Invariant: where the host pages, a policy is two figures of the pager, in force at every step and never in its way.

No pager runs here: it needs a CUDA or ROCm device. What stands in for it is `pager.py`, whose signatures
`test_comfyui_pager.py` holds against those of the real package.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui_dynamic as dynamic
from balanced_offload.offload.policy import OffloadPolicy

from . import paging_host
from .pager import PAGE, Net, StaticPatcher, end_of_node
from .paging_host import GIB, LEAF, MIB, calls, model, under

host = paging_host.host


# ---------------------------------------------------------------------- the mode table
def test_sequential_streams_every_page() -> None:
    patcher = under(model(), mode="sequential")
    assert patcher.sample(steps=2) == [[LEAF] * 32] * 2
    assert patcher._vbar_get().loaded_size() == 0


@pytest.mark.parametrize("mode", ["none", "auto"])
def test_none_and_auto_leave_the_pager_alone(mode: str) -> None:
    patcher = under(model(), mode=mode)
    assert patcher.sample(steps=2) == [[], []]
    assert [entry[0] for entry in patcher._vbar_get().log] == ["prioritize"]  # the host's own


def test_model_is_first_in_line_when_it_samples() -> None:
    patcher = under(model(), mode="model")
    patcher.load()
    patcher._vbar_get().log.clear()
    assert patcher.sampler() == [[]]
    assert patcher._vbar_get().log == [("prioritize",)]


def test_balanced_caps_at_the_high_mark_and_streams_the_rest() -> None:
    patcher = under(model(), mode="balanced", high="256MiB", low="64MiB")
    first, second = patcher.sample(steps=2)
    assert first == second == [LEAF] * 16  # 32 leaves of 16 MiB, half of them over the mark
    assert patcher._vbar_get().loaded_size() == 256 * MIB
    assert calls(patcher._vbar_get(), "set_watermark") == [256 * MIB]
    assert patcher._vbar_get().limit * PAGE == 64 * MIB


def test_high_rounds_down_and_counts_what_lies_outside_the_pages() -> None:
    """300 MiB with 60 MiB of small weights leave 240: seven pages of 32, not the eight that would be over the mark."""
    patcher = under(model(small=60 * MIB), mode="balanced", high="300MiB", low="0%")
    # "0%" of low is the user's zero, which the pager cannot do; follow keeps the model with it all the same.
    patcher = under(model(small=60 * MIB), mode="balanced", high="300MiB", low="1MiB", use_core_dynamic="follow")
    patcher.sample()
    assert calls(patcher._vbar_get(), "set_watermark") == [7 * PAGE]
    assert dynamic.state(patcher.model)["loaded"] == 7 * PAGE + 60 * MIB <= 300 * MIB


def test_a_share_is_a_share_of_this_card(host: SimpleNamespace) -> None:
    host.total = host.free = GIB
    patcher = under(model(), mode="balanced", high="25%", low="10%")
    patcher.sample()
    assert patcher._vbar_get().loaded_size() == 256 * MIB


def test_a_high_mark_over_the_model_asks_for_nothing() -> None:
    patcher = under(model(), mode="balanced", high="8GiB", low="1MiB")
    assert patcher.sample() == [[]]
    assert calls(patcher._vbar_get(), "set_watermark") == []


def test_auto_states_what_the_user_wrote_and_nothing_else() -> None:
    patcher = under(model(), mode="auto", high="128MiB")
    assert patcher.sample() == [[LEAF] * 24]
    assert calls(patcher._vbar_get(), "set_watermark") == [128 * MIB]
    assert patcher._vbar_get().limit == 0


def test_a_model_over_the_card_gets_the_profiles_mark_only_in_balanced(host: SimpleNamespace) -> None:
    host.total = host.free = 384 * MIB  # a card of at most 4 GiB: the profile's high is 60 %
    balanced, auto = under(model(), mode="balanced"), under(model(), mode="auto")
    balanced.load(), auto.load()
    assert calls(balanced._vbar_get(), "set_watermark") == [384 * MIB * 6 // 10 // PAGE * PAGE]
    assert calls(auto._vbar_get(), "set_watermark") == []


def test_never_keeps_the_whole_component_while_a_node_runs() -> None:
    patcher = under(model(), mode="balanced", never=["unet"], high="10GiB")
    patcher.sample()
    assert patcher._vbar_get().free_memory(512 * MIB) == 0
    assert patcher._vbar_get().loaded_size() == 512 * MIB


def test_floor_never_over_the_ceiling() -> None:
    patcher = under(model(), mode="balanced", high="100MiB", low="90MiB")
    patcher.sample()
    assert patcher._vbar_get().limit <= patcher._vbar_get().mark == 3


# ---------------------------------------------------------------------- in force when it counts
def test_every_load_states_it_again() -> None:
    patcher = under(model(), mode="balanced", high="128MiB", low="32MiB")
    for _ in range(3):
        assert patcher.sample() == [[LEAF] * 24]
        end_of_node(patcher)
    assert calls(patcher._vbar_get(), "set_watermark") == [128 * MIB] * 3


def test_the_floor_comes_back_when_sampling_starts() -> None:
    """The host zeroes every floor after each node; the model was loaded by one node and is sampled in the next."""
    patcher = under(model(), mode="balanced", high="256MiB", low="128MiB")
    patcher.load()
    patcher.forward()
    end_of_node(patcher)
    patcher.sampler()
    patcher._vbar_get().free_memory(GIB)
    assert patcher._vbar_get().loaded_size() == 128 * MIB


def test_what_pressure_took_is_not_raised_again() -> None:
    patcher = under(model(), mode="balanced", high="256MiB", low="32MiB")
    vbar = patcher.load()
    patcher.forward()
    assert vbar.free_memory(160 * MIB) == 160 * MIB
    patcher.sampler()
    assert vbar.mark * PAGE == 96 * MIB
    patcher.load()  # the host's own load makes it whole, so the mark is the policy's again
    assert vbar.mark * PAGE == 256 * MIB


def test_a_clone_with_a_lora_is_under_the_same_policy() -> None:
    patcher = under(model(), mode="balanced", high="128MiB")
    clone = patcher.clone()
    clone.patches["key"] = ("lora",)
    assert clone.sample() == [[LEAF] * 24]


def test_the_given_model_stays_as_it_was() -> None:
    given = model()
    patcher = under(given, mode="sequential")
    assert given.callbacks["on_load"] == {} and given.wrappers["sampler_sample"] == {}
    assert given.sample() == [[]]  # the host's load makes the shared pages whole
    assert patcher.sample() == [[LEAF] * 32]


def test_applied_twice_the_second_policy_counts_alone() -> None:
    patcher = under(under(model(), mode="sequential"), mode="balanced", high="256MiB")
    assert patcher.sample() == [[LEAF] * 16]
    assert calls(patcher._vbar_get(), "set_watermark") == [256 * MIB]
    assert [len(entries) for entries in patcher.callbacks["on_load"].values()] == [1]
    assert [len(entries) for entries in patcher.wrappers["sampler_sample"].values()] == [1]


def test_other_peoples_callbacks_stay() -> None:
    given, seen = model(), []
    given.add_callback_with_key("on_load", "other", lambda *arguments: seen.append(len(arguments)))
    under(given, mode="sequential").load()
    assert seen == [5]


def test_two_policies_on_clones_the_last_loaded_is_in_force_and_it_is_said() -> None:
    given = model()
    first = under(given, mode="balanced", high="256MiB")
    second, notice = dynamic.apply_dynamic(given, OffloadPolicy(mode="sequential"))
    assert "the one that is loaded last is in force" in notice
    assert first.sample() == [[LEAF] * 16]
    assert second.sample() == [[LEAF] * 32]
    assert dynamic.state(given.model)["mode"] == "sequential"
    # Sampling the first without a load would be under the second's pages: it must not state its own mark then.
    first.sampler()
    assert second._vbar_get().mark == 0


def test_the_hosts_static_delegate_is_left_alone() -> None:
    """For conditioning with hooks the host samples a static clone, which carries our callback along."""
    patcher = under(model(), mode="sequential")
    delegate = StaticPatcher(Net(1, LEAF))
    for callback in patcher.callbacks["on_load"][dynamic.PAGER_KEY]:
        callback(delegate, delegate.load_device, 0, False, False)
    assert dynamic.state(delegate.model) is None


def test_restored_the_host_is_stock_at_once_and_ours_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    patcher = under(model(), mode="balanced", high="64MiB", low="32MiB")
    patcher.sample()
    monkeypatch.setattr(dynamic, "restored", lambda: True)
    dynamic.release_all()
    vbar = patcher._vbar_get()
    assert vbar.mark == vbar.pages and vbar.limit == 0
    assert patcher.sample(steps=2) == [[], []]
    assert dynamic.states() == []
    monkeypatch.setattr(dynamic, "restored", lambda: False)
    assert patcher.sample() == [[LEAF] * 28]


def test_a_load_opens_the_prompts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[Any] = []
    monkeypatch.setattr(dynamic, "runs", lambda: SimpleNamespace(touch=lambda *found: touched.append(found)))
    patcher = under(model(), mode="model")
    patcher.load()
    assert touched == [("dynamic", OffloadPolicy(mode="model"))]


def test_nothing_here_keeps_a_model_alive() -> None:
    given = model()
    patcher = under(given, mode="sequential")
    patcher.sample()
    module = weakref.ref(given.model)
    del given, patcher
    gc.collect()
    assert module() is None
    assert dynamic.states() == [] and not dynamic._living
