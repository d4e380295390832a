"""Invariant: what no run could hold is refused while the prompt is queued, by field, and links are left to the run."""

from __future__ import annotations

from typing import Any

import pytest

import balanced_offload.nodes.summary as summary
from balanced_offload.offload.backend import NoAcceleratorError
from balanced_offload.offload.policy import Machine

GIB = 1 << 30


@pytest.fixture
def node(nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """OffloadPolicy on a 16 GiB card."""
    here = Machine("Test Card", "cuda", 16 * GIB, vram_free=15 * GIB, others=GIB, ram_total=32 * GIB)
    monkeypatch.setattr(summary, "open_backend", lambda device: object())
    monkeypatch.setattr(summary, "machine", lambda backend: here)
    return nodes["OffloadPolicy"]


@pytest.mark.parametrize(
    ("widgets", "field"),
    [
        ({"mode": "turbo"}, "mode"),
        ({"mode": "balanced", "high": "101%"}, "high"),
        ({"mode": "balanced", "high": "20%", "low": "60%"}, "low"),
        ({"reserve": "100%"}, "reserve"),
        ({"reserve": "16GiB"}, "reserve"),
        ({"headroom": "20GiB"}, "headroom"),
        ({"headroom": "6GiB", "reserve": "10GiB"}, "headroom"),
        ({"fit_aware": "perhaps"}, "fit_aware"),
    ],
)
def test_refused(node: Any, widgets: dict[str, Any], field: str) -> None:
    message = node.validate_inputs(**widgets)
    assert isinstance(message, str) and message.startswith(f"{field}: got ") and "allowed: " in message


@pytest.mark.parametrize(
    "widgets",
    [
        {},
        {"mode": "balanced", "high": "200GiB"},  # clamped to the card with a notice: another card may have it
        {"mode": None, "high": None, "low": "60%"},
        {"reserve": "15GiB", "headroom": "auto"},
    ],
)
def test_taken(node: Any, widgets: dict[str, Any]) -> None:
    assert node.validate_inputs(**widgets) is True


def test_without_an_accelerator_only_the_fields_are_judged(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(device: Any) -> None:
        raise NoAcceleratorError("none")

    monkeypatch.setattr(summary, "open_backend", none_here)
    assert node.validate_inputs(reserve="16GiB") is True
    assert node.validate_inputs(mode="turbo").startswith("mode: got ")
