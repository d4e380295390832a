"""Invariant: the nodes meet a host of the V3 API without ComfyUI being there, and each test loads them afresh."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import balanced_offload
from balanced_offload.offload.adapters import comfyui_runs
from balanced_offload.offload.adapters.comfyui_runs import PromptRuns

from .report_prompts import Prompts

# What a host brings; `nodes`, `server` and the like are its top-level modules, not the pack's.
OF_HOST = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server")


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        of_ours = name.startswith("balanced_offload.nodes.") and hasattr(module, "io")
        if of_ours or name.split(".")[0] in OF_HOST:
            del sys.modules[name]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The fake `comfy_api.latest`."""
    _forget()
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake_host"))
    import comfy_api.latest

    yield comfy_api.latest
    _forget()


@pytest.fixture
def nodes(host: ModuleType) -> dict[str, Any]:
    """Node id -> class, through the pack's door, as a host would get them."""
    extension = asyncio.run(balanced_offload.comfy_entrypoint())
    classes = asyncio.run(extension.get_node_list())
    return {kind.define_schema().node_id: kind for kind in classes}


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    """Prompts of a host in small."""
    return Prompts(tmp_path, monkeypatch)


@pytest.fixture
def runs(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> PromptRuns:
    """The runs of this process, with no session."""
    made = PromptRuns(session=lambda: None)
    monkeypatch.setattr(comfyui_runs, "_runs", made)
    monkeypatch.setattr(made, "_soon", lambda prompt_id: None)
    return made
