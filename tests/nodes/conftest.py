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

NEEDS_HOST = ("balanced_offload.nodes.extension", "balanced_offload.nodes.policy")


def _forget() -> None:
    for name in list(sys.modules):
        if name in NEEDS_HOST or name.split(".")[0] == "comfy_api":
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
