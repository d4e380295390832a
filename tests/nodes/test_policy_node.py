"""Invariant: the node shows every field of the policy in its order, and gives back the policy that was typed."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest

import balanced_offload.nodes.summary as summary
from balanced_offload.offload.backend import NoAcceleratorError
from balanced_offload.offload.policy import Machine, OffloadPolicy

# The order of the table in the design, advanced ones last. Written out: it is a promise to saved workflows.
ORDER = ["mode", "high", "low", "never", "always", "vae_tiling", "before_decode", "on_oom"]
ADVANCED = ["headroom", "reserve", "pinned_ram", "gc_threshold", "prefetch", "fit_aware", "use_core_dynamic"]
GIB = 1 << 30


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A 16 GiB card, which the node finds in place of this machine's."""
    here = Machine(
        "Test Card", "cuda", 16 * GIB, vram_free=15 * GIB, others=GIB, ram_total=32 * GIB, ram_limit=None, memlock=None
    )
    monkeypatch.setattr(summary, "open_backend", lambda device: object())
    monkeypatch.setattr(summary, "machine", lambda backend: here)
    return here


def defaults(node: Any) -> dict[str, Any]:
    return {entry.id: entry.default for entry in node.define_schema().inputs}


def test_the_schema(nodes: dict[str, Any]) -> None:
    schema = nodes["OffloadPolicy"].define_schema()
    assert schema.display_name == "Offload Policy"
    assert [entry.id for entry in schema.inputs] == ORDER + ADVANCED
    assert [entry.id for entry in schema.inputs if entry.advanced] == ADVANCED
    assert [entry.io_type for entry in schema.outputs] == ["OFFLOAD_POLICY", "STRING"]
    assert {"vram", "lowvram", "offload"} <= set(schema.search_aliases)


def test_every_field_has_its_widget(nodes: dict[str, Any]) -> None:
    widgets = [entry.id for entry in nodes["OffloadPolicy"].define_schema().inputs]
    assert widgets == [field.name for field in dataclasses.fields(OffloadPolicy)]


def test_every_input_and_output_explains_itself(nodes: dict[str, Any]) -> None:
    schema = nodes["OffloadPolicy"].define_schema()
    for entry in schema.inputs:
        assert entry.display_name and entry.tooltip and entry.tooltip.endswith("."), entry.id
        assert "watermark" not in (entry.display_name + entry.tooltip).lower()
    assert all(entry.display_name and entry.tooltip for entry in schema.outputs)


def test_choices_offer_every_value_and_start_at_the_default(nodes: dict[str, Any]) -> None:
    options = {
        entry.id: entry.options for entry in nodes["OffloadPolicy"].define_schema().inputs if "options" in vars(entry)
    }
    assert options == {
        "mode": ["auto", "none", "balanced", "model", "sequential"],
        "vae_tiling": ["auto", "on", "off"],
        "before_decode": ["fit", "free_all", "keep"],
        "on_oom": ["step_down", "stop"],
        "use_core_dynamic": ["auto", "follow", "bypass"],
    }
    start = defaults(nodes["OffloadPolicy"])
    assert all(start[name] == values[0] for name, values in options.items())


def test_untouched_widgets_give_a_policy_that_means_the_default(nodes: dict[str, Any], card: Machine) -> None:
    node = nodes["OffloadPolicy"]
    made = node.execute(**defaults(node)).result[0]
    # The reserve is typed as text, "0", and a policy keeps what was written.
    assert dataclasses.replace(made, reserve=0) == OffloadPolicy()
    assert made.reserve == "0"


def test_only_the_mode_must_be_given(nodes: dict[str, Any], card: Machine) -> None:
    node = nodes["OffloadPolicy"]
    assert [entry.id for entry in node.define_schema().inputs if not entry.optional] == ["mode"]
    assert node.execute(mode="model").result[0] == OffloadPolicy(mode="model")


def test_typed_values_arrive_as_written(nodes: dict[str, Any], card: Machine) -> None:
    node = nodes["OffloadPolicy"]
    typed = {
        "mode": "balanced",
        "high": "9.5GiB",
        "low": "10%",
        "never": "vae, clip-l",
        "always": "t5",
        "vae_tiling": "off",
        "before_decode": "keep",
        "on_oom": "stop",
        "headroom": "2GiB",
        "reserve": "512MiB",
        "pinned_ram": "8GiB",
        "gc_threshold": "0.5",
        "prefetch": "256MiB",
        "fit_aware": False,
        "use_core_dynamic": "bypass",
    }
    assert set(typed) == set(defaults(node))
    made = node.execute(**typed).result[0]
    assert made == OffloadPolicy(**{**typed, "never": ["vae", "clip-l"], "always": ["t5"]})
    assert made.high == "9.5GiB"
    assert OffloadPolicy.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("mode", "turbo"),
        ("high", "110%"),
        ("low", "-1GiB"),
        ("headroom", "nan"),
        ("reserve", "much"),
        ("gc_threshold", "2"),
        ("vae_tiling", "maybe"),
    ],
)
def test_a_bad_value_names_its_field(nodes: dict[str, Any], card: Machine, field: str, given: str) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        nodes["OffloadPolicy"].execute(**{"mode": "auto", field: given})
    assert given in str(caught.value)


def test_low_over_high_is_refused(nodes: dict[str, Any], card: Machine) -> None:
    with pytest.raises(ValueError, match="low"):
        nodes["OffloadPolicy"].execute(mode="balanced", high="20%", low="60%")


def test_the_sentence_for_auto_says_both_outcomes(nodes: dict[str, Any], card: Machine) -> None:
    sentence = nodes["OffloadPolicy"].execute(mode="auto").result[1]
    assert sentence == (
        "On Test Card (16.0 GiB): none while the run fits, else balanced (high 9.6 GiB, low 3.2 GiB, profile default)."
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mode": "none"}, "none."),
        ({"mode": "sequential"}, "sequential."),
        ({"mode": "balanced", "high": "8GiB", "low": "0"}, "balanced (high 8.0 GiB, always evict at a stage change)."),
        ({"mode": "balanced", "high": "50%", "low": "25%", "never": "vae"}, "balanced (high 8.0 GiB, low 4.0 GiB)."),
    ],
)
def test_the_sentence_for_a_fixed_mode(
    nodes: dict[str, Any], card: Machine, values: dict[str, str], expected: str
) -> None:
    assert nodes["OffloadPolicy"].execute(**values).result[1] == f"On Test Card (16.0 GiB): {expected}"


def test_without_an_accelerator_the_sentence_says_so(nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(device: Any) -> None:
        raise NoAcceleratorError("none")

    monkeypatch.setattr(summary, "open_backend", none_here)
    assert nodes["OffloadPolicy"].execute(mode="balanced").result[1] == summary.NO_ACCELERATOR


def test_an_older_host_gets_only_what_it_knows(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3.64 knows neither `advanced` nor `search_aliases`, and refuses unknown arguments."""
    from balanced_offload.nodes.policy import OffloadPolicyNode

    io = host.io

    def plain_input(id: str, display_name: str, tooltip: str, default: Any, optional: bool) -> dict[str, Any]:
        return {"id": id, "default": default, "tooltip": tooltip}

    def old_schema(
        node_id: str, display_name: str, category: str, description: str, inputs: list, outputs: list
    ) -> dict:
        return {"node_id": node_id, "inputs": inputs}

    monkeypatch.setattr(io.String, "Input", plain_input)
    monkeypatch.setattr(io.Boolean, "Input", plain_input)
    monkeypatch.setattr(io, "Schema", old_schema)
    schema = OffloadPolicyNode.define_schema()
    assert schema["node_id"] == "OffloadPolicy"
    assert len(schema["inputs"]) == len(ORDER + ADVANCED)
