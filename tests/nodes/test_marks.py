"""Invariant: what the route says is what the resolver says, the validator's words included, and no device is asked."""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict, fields
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from balanced_offload.nodes import marks as route
from balanced_offload.nodes import summary
from balanced_offload.nodes.marks import known_machine, marks, read_query
from balanced_offload.nodes.widgets import POLICY_WIDGETS, read_policy
from balanced_offload.offload.backend import open_backend
from balanced_offload.offload.hosting import HostSession
from balanced_offload.offload.policy import ComponentInfo, Machine, OffloadPolicy, WorkingSet

GIB = 1 << 30
CARD = Machine("Test Card", "cuda", 16 * GIB, vram_free=15 * GIB, others=GIB, ram_total=32 * GIB)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host, and nobody has asked for the machine yet."""
    monkeypatch.setattr(summary, "_known", None)
    monkeypatch.delitem(sys.modules, "comfy.model_management", raising=False)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(summary, "_known", CARD)
    return CARD


def session_of(*components: ComponentInfo, reserve: int = 0) -> Any:
    return SimpleNamespace(machine=CARD, _working_set=lambda: WorkingSet(components, 2 * GIB), _reserve=reserve)


def written(policy: OffloadPolicy) -> dict[str, str]:
    """A query as a page makes it of the node's widgets."""
    values = {}
    for field in fields(policy):
        value = getattr(policy, field.name)
        value = ", ".join(value) if isinstance(value, tuple) else value
        values[field.name] = str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))
    return values


POLICIES = [
    OffloadPolicy(),
    OffloadPolicy(mode="none"),
    OffloadPolicy(mode="balanced", high="60%", low="2GiB"),
    OffloadPolicy(mode="balanced", high="200GiB"),
    OffloadPolicy(mode="model", low=0),
    OffloadPolicy(mode="sequential", reserve="1GiB", headroom="3GiB"),
    OffloadPolicy(fit_aware=False, before_decode="free_all", gc_threshold=0.5),
    OffloadPolicy(always=("unet",), never=("vae",), vae_tiling="on"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=[str(number) for number in range(len(POLICIES))])
def test_the_query_is_the_nodes_inputs(policy: OffloadPolicy) -> None:
    read = read_query(written(policy))
    assert read.to_json() == read_policy({**written(policy), "fit_aware": policy.fit_aware}).to_json()
    machine = CARD
    assert read.resolve(machine, WorkingSet(())) == policy.resolve(machine, WorkingSet(()))


@pytest.mark.parametrize("policy", POLICIES, ids=[str(number) for number in range(len(POLICIES))])
@pytest.mark.parametrize("weight", [1 * GIB, 30 * GIB])
def test_the_present_run(policy: OffloadPolicy, weight: int) -> None:
    infos = (ComponentInfo("unet", "UNet", "denoiser", weight), ComponentInfo("vae", "AutoencoderKL", "vae", GIB // 8))
    answer = marks(written(policy), session_of(*infos))
    resolved = policy.resolve(CARD, WorkingSet(infos, 2 * GIB))
    assert answer == {
        **{"total": 16 * GIB, "available": resolved.available, "high": resolved.high, "low": resolved.low},
        **{"low_always": resolved.low_always, "mode": resolved.mode.value, "fits": resolved.fits},
        **{"components": ["unet", "vae"], "sources": resolved.sources, "sentence": resolved.sentence, "error": None},
    }


def test_without_a_run_the_marks_are_those_of_one_that_does_not_fit(card: Machine) -> None:
    answer = marks({}, None)
    larger = ComponentInfo("model", "model", "denoiser", card.vram_total + 1)
    resolved = OffloadPolicy().resolve(card, WorkingSet((larger,)))
    assert resolved.mode.value == "balanced" and resolved.high is not None
    assert (answer["mode"], answer["high"], answer["low"]) == ("balanced", resolved.high, resolved.low)
    assert answer["fits"] is None and answer["components"] == []
    assert answer["sentence"] == summary.describe(OffloadPolicy(), card)
    assert "none while the run fits, else balanced (high 9.6 GiB" in answer["sentence"]


def test_the_hosts_own_reserve_counts_once() -> None:
    unet = ComponentInfo("unet", "UNet", "denoiser", GIB)
    assert marks({}, session_of(unet, reserve=2 * GIB))["available"] == 13 * GIB
    assert marks({"reserve": "1GiB"}, session_of(unet, reserve=2 * GIB))["available"] == 12 * GIB


def test_names_that_match_nothing_warn_nobody() -> None:
    """Warnings are the run's: they are switched off by what is global, and this is another thread."""
    unet = ComponentInfo("unet", "UNet", "denoiser", GIB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = marks({"never": "t5, nothing", "always": "unet"}, session_of(unet))
    assert answer["error"] is None and answer["mode"] == "balanced"


@pytest.mark.parametrize(
    ("query", "start"),
    [
        ({"mode": "turbo"}, "mode: got 'turbo'"),
        ({"high": "101%"}, "high: got '101%'"),
        ({"mode": "balanced", "high": "20%", "low": "60%"}, "low: got '60%'"),
        ({"reserve": "100%"}, "reserve: got '100%'"),
        ({"headroom": "20GiB"}, "headroom: got '20GiB'"),
        ({"fit_aware": "perhaps"}, "fit_aware: got 'perhaps'"),
        ({"high": "NaN"}, "high: got 'NaN'"),
        ({"high": ""}, "high: got ''"),
        ({"gc_threshold": "7"}, "gc_threshold: got '7'"),
        ({"colour": "red"}, "'colour' is no input of Offload Policy"),
        ({"<img src=x>": "1"}, "'<img src=x>' is no input"),
    ],
)
def test_a_wrong_value_is_said_in_the_validators_words(card: Machine, query: dict[str, str], start: str) -> None:
    answer = marks(query, None)
    assert answer["error"].startswith(start)
    assert answer["high"] is None and answer["low"] is None and answer["mode"] is None
    if set(query) <= {widget.name for widget in POLICY_WIDGETS}:
        with pytest.raises(ValueError, match=r".*") as caught:
            policy = read_policy(dict(query))
            raise ValueError(summary.cannot_hold(policy, card))
        assert answer["error"] == str(caught.value)


@pytest.mark.parametrize("text", ["true", "True", " TRUE ", "false", "False"])
def test_switches(text: str) -> None:
    assert read_query({"fit_aware": text}).fit_aware is (text.strip().lower() == "true")


# ---------------------------------------------------------------------- which machine
def host(total: float, state: str) -> ModuleType:
    made = ModuleType("comfy.model_management")
    made.total_vram, made.cpu_state = total, SimpleNamespace(name=state)  # type: ignore[attr-defined]
    made.get_torch_device = lambda: pytest.fail("a device was asked")  # type: ignore[attr-defined]
    return made


def test_the_hosts_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy.model_management", host(24 * 1024, "GPU"))
    assert known_machine() == Machine("this card", "cuda", 24 * GIB)
    answer = marks({"mode": "balanced", "high": "50%"}, None)
    assert (answer["total"], answer["available"], answer["high"]) == (24 * GIB, 24 * GIB, 12 * GIB)


def test_a_host_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy.model_management", host(64 * 1024, "CPU"))
    answer = marks({"mode": "balanced", "high": "50%"}, None)
    assert answer["sentence"] == summary.NO_ACCELERATOR and answer["mode"] == "none" and answer["error"] is None
    assert answer["total"] is None and answer["high"] is None, "RAM is no card's memory"


def test_a_device_that_shares_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy.model_management", host(32 * 1024, "MPS"))
    answer = marks({"mode": "balanced", "high": "50%"}, None)
    assert answer["mode"] == "none" and answer["high"] is None and answer["total"] == 32 * GIB


@pytest.mark.parametrize("total", [0, -1, None, "16"])
def test_nobody_knows(monkeypatch: pytest.MonkeyPatch, total: Any) -> None:
    monkeypatch.setitem(sys.modules, "comfy.model_management", host(total, "GPU"))
    answer = marks({}, None)
    assert answer["sentence"] == route.UNKNOWN
    assert {answer[key] for key in ("total", "available", "high", "low", "mode", "error")} == {None}
    assert marks({"mode": "turbo"}, None)["error"].startswith("mode: got"), "what is wrong everywhere is wrong here"


def test_what_a_node_asked_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "open_backend", lambda device: object())
    monkeypatch.setattr(summary, "machine", lambda backend: CARD)
    assert known_machine() is None
    summary.describe_here(OffloadPolicy())
    assert known_machine() is CARD


# ---------------------------------------------------------------------- a real session
def test_a_real_session_on_the_simulated_device(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sim.set_memory_cap(8 << 20)
    session = HostSession(open_backend("vram"))
    policy = OffloadPolicy(mode="balanced", high="25%")
    session.host("unet", nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))), policy, role="denoiser", entries=())
    for name in ("memory", "peak_allocated", "synchronize"):
        monkeypatch.setattr(session.backend, name, lambda name=name: pytest.fail(f"{name} was asked"))
    answer = marks({"mode": "balanced", "high": "25%"}, session)
    resolved = session.resolved
    assert answer["error"] is None and answer["components"] == ["unet"] and answer["fits"] is True
    assert (answer["high"], answer["low"], answer["available"]) == (resolved.high, resolved.low, resolved.available)
    assert answer["sentence"] == resolved.sentence and answer["high"] == 2 << 20
    assert asdict(session.machine)["vram_total"] == answer["total"]
