"""Invariant: a test of the dynamic backend meets a host that pages, by stand-ins, and leaves nothing behind in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui_dynamic as dynamic
from balanced_offload.offload.adapters import comfyui_host, comfyui_pager
from balanced_offload.offload.policy import OffloadPolicy

from .pager import DynamicPatcher, Net, Pages, PagesWithoutCeiling, StaticPatcher

MIB, GIB = 1 << 20, 1 << 30
LEAF = 16 * MIB
CARD = 16 * GIB


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
