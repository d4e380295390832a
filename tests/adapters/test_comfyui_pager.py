"""Invariant: every version of the pager is met as it is, the way around it is the host's own, and both are told.

The stand-in's signatures are held against those of comfy-aimdo 0.4.9, 0.4.13 and 0.6.0 as recorded here, and against
the package itself where it is installed.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui_dynamic as dynamic
from balanced_offload.offload.adapters import comfyui_host, comfyui_pager
from balanced_offload.offload.policy import ComponentInfo, Machine, OffloadPolicy

from . import paging_host
from .pager import PAGE, DynamicPatcher, Net, Pages, PagesThatRefuse, PagesWithoutCeiling, StaticPatcher
from .paging_host import CARD, GIB, LEAF, MIB, model, under

host = paging_host.host

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
