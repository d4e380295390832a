"""Invariant: the node passes on what came in, frees what was asked for, and says what was kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui_device, comfyui_runs

GIB = 1 << 30


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `free_to_fit` was asked for, and what the report heard."""
    found: list[Any] = []

    def free_to_fit(need: int | None) -> comfyui_device.FreedHere:
        found.append(need)
        return comfyui_device.FreedHere(need or 0, 0, (("denoiser", 3 * GIB),), "Nothing had to go.")

    monkeypatch.setattr(comfyui_device, "free_to_fit", free_to_fit)
    runs = SimpleNamespace(touch=lambda *_: None, note=lambda kind, text: found.append((kind, text)))
    monkeypatch.setattr(comfyui_runs, "runs", lambda: runs)
    return found


@pytest.fixture
def free(nodes: dict[str, Any], asked: list[Any]) -> Any:
    return nodes["FreeVRAMToFit"]


@pytest.mark.parametrize(("given", "need"), [(0.0, None), (4.0, 4 * GIB), (0.25, GIB // 4), (0, None)])
def test_gib_become_bytes_and_0_asks_the_next_stage(
    free: Any, asked: list[Any], given: float, need: int | None
) -> None:
    anything = object()
    made = free.execute(anything=anything, need_gib=given)
    assert made.result == (anything, "Nothing had to go.")
    assert made.ui == {"text": ["Nothing had to go."]}
    assert asked == [need, ("free", "Nothing had to go.")]


def test_nothing_need_be_connected(free: Any) -> None:
    assert free.execute().result[0] is None


@pytest.mark.parametrize("given", [-1.0, 1025.0, float("nan"), float("inf")])
def test_out_of_range_is_refused_before_the_run(free: Any, asked: list[Any], given: float) -> None:
    message = free.validate_inputs(need_gib=given)
    assert message.startswith("need_gib: got ") and "allowed: 0 to 1024 GiB" in message
    with pytest.raises(ValueError, match="need_gib"):
        free.execute(need_gib=given)
    assert asked == []


def test_a_link_is_judged_when_the_node_runs(free: Any) -> None:
    assert free.validate_inputs(need_gib=None) is True
    assert free.validate_inputs() is True


def test_the_schema(free: Any) -> None:
    schema = free.define_schema()
    assert [entry.id for entry in schema.inputs] == ["anything", "need_gib"]
    assert [entry.io_type for entry in schema.outputs] == ["*", "STRING"]
    assert [entry.id for entry in schema.outputs] == ["out", "kept"]
    assert "purge" in schema.search_aliases and "unload" in schema.search_aliases
