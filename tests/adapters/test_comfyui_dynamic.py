"""Invariant: where the host pages, a policy is two figures of the pager, in force at every step and never in its way.

No pager runs here: it needs a CUDA or ROCm device. What stands in for it is `pager.py`, whose signatures are held
against those of comfy-aimdo 0.4.13 and 0.6.0 below, and against the package itself where it is installed.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui_dynamic as dynamic
from balanced_offload.offload.adapters import comfyui_host, comfyui_pager
from balanced_offload.offload.policy import ComponentInfo, Machine, OffloadPolicy

from .pager import PAGE, DynamicPatcher, Net, Pages, PagesThatRefuse, PagesWithoutCeiling, StaticPatcher, end_of_node

MIB, GIB = 1 << 20, 1 << 30
LEAF = 16 * MIB
CARD = 16 * GIB

# Parameters of the real methods, without self; "=" marks one that may be left out.
RECORDED = {
    "0.4.13": {
        "__init__": ["size", "device"],
        "prioritize": ["malloc_async_clamp="],
        "deprioritize": [],
        "alloc": ["num_bytes"],
        "fault": ["alloc", "size"],
        "unpin": ["alloc", "size"],
        "loaded_size": [],
        "set_watermark_limit": ["size_bytes"],
        "set_watermark": ["size_bytes"],
        "free_memory": ["size_bytes"],
        "get_nr_pages": [],
        "get_watermark": [],
        "get_residency": [],
    },
}
RECORDED["0.4.9"] = {**RECORDED["0.4.13"], "prioritize": []}
RECORDED["0.6.0"] = {**RECORDED["0.4.13"], "__init__": ["size", "device", "pageout_callback="], "close": []}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The parts of a paging host that the backend looks up; `free` bytes of a 16 GiB card."""
    here = SimpleNamespace(total=CARD, free=15 * GIB, paged=0)
    extension = ModuleType("comfy.patcher_extension")
    extension.CallbacksMP = type("CallbacksMP", (), {"ON_LOAD": "on_load"})  # type: ignore[attr-defined]
    extension.WrappersMP = type("WrappersMP", (), {"SAMPLER_SAMPLE": "sampler_sample"})  # type: ignore[attr-defined]
    patchers = ModuleType("comfy.model_patcher")
    patchers.ModelPatcher = StaticPatcher  # type: ignore[attr-defined]
    patchers.ModelPatcherDynamic = DynamicPatcher  # type: ignore[attr-defined]
    pages = ModuleType("comfy_aimdo.model_vbar")
    pages.ModelVBAR = Pages  # type: ignore[attr-defined]
    comfy = ModuleType("comfy")
    comfy.patcher_extension, comfy.model_patcher = extension, patchers  # type: ignore[attr-defined]
    for module in (comfy, extension, patchers, pages):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    control = SimpleNamespace(get_total_vram_usage=lambda: here.paged)
    monkeypatch.setitem(sys.modules, "comfy_aimdo.control", control)  # type: ignore[misc]
    memory = SimpleNamespace(get_total_memory=lambda device: here.total, get_free_memory=lambda device: here.free)
    monkeypatch.setattr(comfyui_host, "model_management", lambda: memory)
    monkeypatch.setattr(comfyui_pager.metadata, "version", lambda name: "0.4.13")
    dynamic._owners.clear()
    dynamic._twins.clear()
    dynamic._living.clear()
    yield here
    dynamic._owners.clear()


def model(
    leaves: int = 32, leaf: int = LEAF, small: int = 0, pages: type[PagesWithoutCeiling] = Pages
) -> DynamicPatcher:
    """A MODEL of `leaves` x `leaf` bytes in pages and `small` bytes outside; 512 MiB by default."""
    return DynamicPatcher(Net(leaves, leaf, small), pages)


def under(patcher: DynamicPatcher, **policy: Any) -> DynamicPatcher:
    made, _ = dynamic.apply_dynamic(patcher, OffloadPolicy(**policy))
    return made


def calls(vbar: Pages, name: str) -> list[int]:
    return [entry[1] for entry in vbar.log if entry[0] == name]


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


# ---------------------------------------------------------------------- the pager's versions
def test_an_older_pager_without_a_ceiling_loads_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["comfy_aimdo.model_vbar"], "ModelVBAR", PagesWithoutCeiling)
    given = model(pages=PagesWithoutCeiling)
    patcher, notice = dynamic.apply_dynamic(
        given, OffloadPolicy(mode="balanced", high="128MiB", low="64MiB", use_core_dynamic="follow")
    )
    assert "takes no ceiling" in notice and "0.4.9" in notice and "at most" not in notice
    assert patcher.sample() == [[]]
    assert patcher._vbar_get().limit == 2
    found = dynamic.state(patcher.model)
    assert found["watermark"] is None  # not told by this pager
    assert found["failures"] == ["set_watermark: this comfy-aimdo does not have it"]


def test_a_pager_that_refuses_does_not_end_the_run() -> None:
    patcher = under(model(pages=PagesThatRefuse), mode="balanced", high="128MiB", low="64MiB")
    assert patcher.sample(steps=2) == [[], []]
    assert dynamic.state(patcher.model)["failures"] == ["set_watermark: VBAR set_watermark failed"]


def test_without_the_cards_figures_the_load_is_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no driver")

    patcher = under(model(), mode="balanced", high="128MiB")
    monkeypatch.setattr(comfyui_host, "model_management", broken)
    assert patcher.sample() == [[]]
    assert dynamic.state(patcher.model)["failures"] == ["limits: no driver"]


def _parameters(kind: type) -> dict[str, list[str]]:
    """Method -> parameters without self, "=" for one that may be left out."""
    return {
        name: [
            parameter.name + ("" if parameter.default is parameter.empty else "=")
            for parameter in list(inspect.signature(method).parameters.values())[1:]
        ]
        for name, method in inspect.getmembers(kind, inspect.isfunction)
    }


@pytest.mark.parametrize("version", sorted(RECORDED))
def test_the_stand_in_takes_what_every_version_takes(version: str) -> None:
    mine = _parameters(Pages)
    for name, parameters in RECORDED[version].items():
        if name in ("close",):  # nothing of ours calls it
            continue
        required = [parameter for parameter in parameters if not parameter.endswith("=")]
        assert [parameter for parameter in mine[name] if not parameter.endswith("=")] == required, name
    assert set(mine) == set(RECORDED["0.4.13"])


def test_the_record_is_what_the_installed_package_says() -> None:
    """Read, not imported: the package binds its native library when it is first imported."""
    spec = importlib.util.find_spec("comfy_aimdo")
    if spec is None:
        pytest.skip("comfy-aimdo is not installed, so the recorded signatures stand alone")
    file = Path(next(iter(spec.submodule_search_locations))) / "model_vbar.py"
    tree = ast.parse(file.read_text())
    vbar = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ModelVBAR")
    found: dict[str, list[str]] = {}
    for method in vbar.body:
        if isinstance(method, ast.FunctionDef) and method.name != "__del__":
            names = [argument.arg for argument in method.args.args][1:]
            optional = len(method.args.defaults)
            cut = len(names) - optional
            found[method.name] = names[:cut] + [f"{name}=" for name in names[cut:]]
    assert found in RECORDED.values()


def test_only_recorded_calls_are_made() -> None:
    """Every method that the backend calls on the pages exists in all recorded versions."""
    source = inspect.getsource(dynamic) + inspect.getsource(comfyui_pager)
    named = {call for call in RECORDED["0.6.0"] if f'"{call}"' in source}
    assert named == {
        "prioritize",
        "set_watermark",
        "set_watermark_limit",
        "get_watermark",
        "get_residency",
        "loaded_size",
    }
    assert all(named <= set(recorded) for recorded in RECORDED.values())


def test_without_the_pager_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "comfy_aimdo.model_vbar")
    assert comfyui_pager.pager() == (None, False, False)
    assert "comfy_aimdo.model_vbar" not in sys.modules


# ---------------------------------------------------------------------- static instead
@pytest.fixture
def reads() -> list[str]:
    return []


@pytest.fixture
def reloadable(reads: list[str]) -> DynamicPatcher:
    """A MODEL whose loader can read its files again; every read is noted."""

    def loader(path: str, disable_dynamic: bool = False) -> StaticPatcher:
        reads.append(path)
        assert disable_dynamic
        return StaticPatcher(Net(32, LEAF))

    made = model()
    made.cached_patcher_init = (loader, ("model.safetensors",))
    return made


def test_bypass_gives_a_static_clone_that_read_the_files_once(reloadable: DynamicPatcher, reads: list[str]) -> None:
    reloadable.patches["key"] = ("lora",)
    policy = OffloadPolicy(mode="balanced", high="50%", use_core_dynamic="bypass")
    made, notice = dynamic.apply_dynamic(reloadable, policy)
    assert not made.is_dynamic() and made.model is not reloadable.model
    assert made.patches == {"key": ("lora",)}
    assert "use_core_dynamic = bypass" in notice and "reads the files once more" in notice
    again, _ = dynamic.apply_dynamic(reloadable, OffloadPolicy(mode="sequential", use_core_dynamic="bypass"))
    assert again.model is made.model
    assert reads == ["model.safetensors"]


def test_a_static_clone_carries_none_of_our_marks(reloadable: DynamicPatcher) -> None:
    marked = under(reloadable, mode="sequential")
    made, _ = dynamic.apply_dynamic(marked, OffloadPolicy(use_core_dynamic="bypass"))
    assert dynamic.PAGER_KEY not in made.callbacks["on_load"]
    assert dynamic.PAGER_KEY not in made.wrappers["sampler_sample"]


def test_without_a_way_to_reload_it_follows_and_says_so() -> None:
    made, notice = dynamic.apply_dynamic(
        model(), OffloadPolicy(mode="balanced", high="128MiB", use_core_dynamic="bypass")
    )
    assert made.is_dynamic()
    assert "not static as asked for" in notice and "loaders" in notice
    assert made.sample() == [[LEAF] * 24]


def test_a_reload_that_fails_is_not_hidden(reloadable: DynamicPatcher) -> None:
    def gone(path: str, disable_dynamic: bool = False) -> StaticPatcher:
        raise FileNotFoundError(path)

    reloadable.cached_patcher_init = (gone, ("model.safetensors",))
    with pytest.raises(FileNotFoundError):
        dynamic.apply_dynamic(reloadable, OffloadPolicy(use_core_dynamic="bypass"))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"mode": "balanced", "low": 0}, "low = 0"),
        ({"mode": "balanced", "always": ["denoiser"]}, "always = denoiser"),
        ({"mode": "auto", "fit_aware": False}, "fit_aware off"),
    ],
)
def test_auto_goes_static_for_what_the_pager_cannot_do(
    reloadable: DynamicPatcher, policy: dict[str, Any], words: str
) -> None:
    made, notice = dynamic.apply_dynamic(reloadable, OffloadPolicy(**policy))
    assert not made.is_dynamic() and words in notice
    made, notice = dynamic.apply_dynamic(reloadable, OffloadPolicy(**policy, use_core_dynamic="follow"))
    assert made.is_dynamic() and f"it cannot do {words}" in notice


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"mode": "sequential"},
        {"mode": "balanced", "high": "50%", "low": "10%"},
        {"always": ["vae"]},
        {"mode": "model", "low": 0},
    ],
)
def test_auto_follows_where_the_pager_can(reloadable: DynamicPatcher, reads: list[str], policy: dict[str, Any]) -> None:
    made, _ = dynamic.apply_dynamic(reloadable, OffloadPolicy(**policy))
    assert made.is_dynamic() and reads == []


def test_twins_go_with_their_module_and_on_demand(reloadable: DynamicPatcher, reads: list[str]) -> None:
    policy = OffloadPolicy(use_core_dynamic="bypass")
    made, _ = dynamic.apply_dynamic(reloadable, policy)
    twin = weakref.ref(made.model)
    del made
    gc.collect()
    assert twin() is not None
    dynamic.drop_static_twins()
    gc.collect()
    assert twin() is None
    dynamic.apply_dynamic(reloadable, policy)
    assert len(reads) == 2


@pytest.mark.parametrize("inner", ["cond_stage_model", "first_stage_model"])
def test_clip_and_vae_follow_their_patcher(inner: str) -> None:
    """The host's own clone of a CLIP keeps the old module beside the new patcher."""

    class Wrapper:
        def __init__(self, patcher: StaticPatcher) -> None:
            self.patcher = patcher
            setattr(self, inner, patcher.model)

        def clone(self) -> Wrapper:
            made = Wrapper(self.patcher)
            setattr(made, inner, getattr(self, inner))
            return made

    given, static = Wrapper(model()), StaticPatcher(Net(1, LEAF))
    made = dynamic.with_patcher(given, static)
    assert made is not given and made.patcher is static and getattr(made, inner) is static.model
    assert getattr(given, inner) is given.patcher.model is not static.model
    assert dynamic.with_patcher(static, given.patcher) is given.patcher


# ---------------------------------------------------------------------- said and shown
@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"mode": "auto"}, "core default, nothing is set."),
        ({"mode": "none"}, "core default, nothing is set."),
        ({"mode": "model"}, "first in line for VRAM while it samples."),
        ({"mode": "sequential"}, "nothing of it stays in VRAM, every layer streams."),
        (
            {"mode": "balanced", "high": "128MiB", "low": "64MiB"},
            "at most 128.0 MiB of it stay in VRAM and 64.0 MiB of it are kept while a node runs.",
        ),
    ],
)
def test_the_notice_names_the_world_and_what_the_mode_means_in_it(policy: dict[str, Any], words: str) -> None:
    _, notice = dynamic.apply_dynamic(model(), OffloadPolicy(**policy))
    assert notice.startswith("ComfyUI pages this model itself (dynamic VRAM, comfy-aimdo 0.4.13)")
    assert notice.endswith(words)


def test_state_gives_the_pagers_figures_in_bytes() -> None:
    patcher = under(model(small=MIB), mode="balanced", high="129MiB", low="33MiB")
    assert dynamic.state(patcher.model) is None
    patcher.sample()
    found = dynamic.state(patcher.model, pages=True)
    assert found == {
        "name": "denoiser",
        "class_name": "Net",
        "mode": "balanced",
        "weights": 513 * MIB,
        "loaded": 129 * MIB,
        "outside": MIB,
        "watermark": 128 * MIB,
        "asked": {"watermark": 128 * MIB, "watermark_limit": 32 * MIB},
        "failures": [],
        "pages": {"total": -(-5130 // 32), "resident": 4, "pinned": 0},
    }
    assert dynamic.states() == [{name: value for name, value in found.items() if name != "pages"}]


def test_the_hosts_reserve_and_its_pages_count_once(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    host.free, host.paged = 9 * GIB, 4 * GIB
    monkeypatch.setattr(comfyui_host, "reserve", lambda: GIB)
    assert comfyui_pager.card_of(model()).others == (16 - 9 - 4 + 1) * GIB


def test_limits_is_pure_arithmetic() -> None:
    here = Machine("card", "cuda", CARD, vram_free=CARD, others=0)
    info = ComponentInfo("denoiser", "Flux", "denoiser", 24 * GIB)
    limits = comfyui_pager.limits_for(OffloadPolicy(mode="balanced", high="60%", low="20%"), here, info, 7 * MIB)
    assert limits.watermark == (CARD * 6 // 10 - 7 * MIB) // PAGE * PAGE
    assert limits.floor == -(-(CARD // 5 - 7 * MIB) // PAGE) * PAGE
