"""Invariant: each connected thing goes out under the policy, nothing else does, and what was done is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui, comfyui_runs
from balanced_offload.offload.policy import OffloadPolicy

from .stock_host import Patcher, Wrapper


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the report hears."""
    found: list[Any] = []
    runs = SimpleNamespace(
        on_idle=lambda call: None,
        touch=lambda world, policy: found.append((world, policy)),
        note=lambda kind, text: found.append((kind, text)),
    )
    monkeypatch.setattr(comfyui_runs, "runs", lambda: runs)
    return found


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """what -> world; static where nothing is said."""
    found: dict[str, str] = {}

    def apply_policy(policy: OffloadPolicy, obj: Any) -> comfyui.Applied:
        world = found.get(obj.what, "static")
        if world == "foreign":
            return comfyui.Applied(obj, world, "Passed through: GGUFModelPatcher places its own weights.")
        return comfyui.Applied(obj.clone(), world, f"{world}, {policy.mode.value}")

    monkeypatch.setattr(comfyui, "apply_policy", apply_policy)
    return found


@pytest.fixture
def apply(nodes: dict[str, Any], notes: list[Any], worlds: dict[str, str]) -> Any:
    return nodes["ApplyOffloadPolicy"]


def test_all_three(apply: Any, notes: list[Any], worlds: dict[str, str]) -> None:
    worlds["m"] = "dynamic"
    given = (Patcher("m"), Wrapper("c", "cond_stage_model"), Wrapper("v", "first_stage_model"))
    policy = OffloadPolicy(mode="balanced")
    made = apply.execute(policy=policy, model=given[0], clip=given[1], vae=given[2])
    assert [out.what for out in made.result] == ["m", "c", "v"]
    assert all(out is not obj for out, obj in zip(made.result, given, strict=True))
    lines = ["model: dynamic, balanced", "clip: static, balanced", "vae: static, balanced"]
    assert made.ui == {"text": lines}
    assert notes == [
        item
        for world, line in zip(("dynamic", "static", "static"), lines, strict=True)
        for item in ((world, policy), ("policy", line))
    ]


@pytest.mark.parametrize("name", ["model", "clip", "vae"])
def test_one_alone(apply: Any, name: str) -> None:
    made = apply.execute(policy=OffloadPolicy(), **{name: Patcher("x")})
    assert [out is not None for out in made.result] == [name == each for each in ("model", "clip", "vae")]


def test_a_foreign_patcher_passes_through_and_is_noted(apply: Any, notes: list[Any], worlds: dict[str, str]) -> None:
    worlds["gguf"] = "foreign"
    given = Patcher("gguf")
    made = apply.execute(policy=OffloadPolicy(), model=given)
    assert made.result == (given, None, None)
    assert notes[-1][0] == "foreign" and "GGUFModelPatcher" in made.ui["text"][0]


def test_nothing_connected(apply: Any) -> None:
    made = apply.execute(policy=OffloadPolicy())
    assert made.result == (None, None, None)
    assert made.ui["text"] == ["Nothing is connected: connect a model, a clip or a vae."]


def test_a_missing_part_stays_missing_and_says_why(apply: Any) -> None:
    from balanced_offload.nodes.missing import Missing

    missing = Missing("choose its VAE at 'vae'")
    made = apply.execute(policy=OffloadPolicy(), vae=missing)
    assert made.result[2] is missing and made.ui["text"] == ["choose its VAE at 'vae'"]


def test_the_same_notice_is_said_once(nodes: dict[str, Any]) -> None:
    from balanced_offload.nodes import words

    assert words.say(["a", "b", "a", ""]) == {"text": ["a", "b"]}


def test_it_appears_below_the_node_while_it_runs(nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from balanced_offload.nodes import words
    from balanced_offload.offload.adapters import comfyui_host

    sent: list[Any] = []
    server = SimpleNamespace(send_progress_text=lambda text, node: sent.append((text, node)))
    monkeypatch.setattr(comfyui_host, "server", lambda: server)
    monkeypatch.setattr(comfyui_host, "executing", lambda: comfyui_host.Executing("p", "7"))
    words.say(["a", "b"])
    assert sent == [("a\nb", "7")]

    def gone(*_: Any) -> None:
        raise ConnectionError

    server.send_progress_text = gone
    assert words.say(["a"]) == {"text": ["a"]}


def test_the_schema(apply: Any) -> None:
    schema = apply.define_schema()
    assert [entry.id for entry in schema.inputs] == ["policy", "model", "clip", "vae"]
    assert [entry.optional for entry in schema.inputs] == [False, True, True, True]
    assert [entry.id for entry in schema.outputs] == ["model_out", "clip_out", "vae_out"]
    assert all(entry.tooltip.endswith(".") for entry in (*schema.inputs, *schema.outputs))
    assert not {entry.id for entry in schema.inputs} & {entry.id for entry in schema.outputs}
