"""Invariant: what a host asks is done to the byte: a component ahead of its call, by its own policy, and back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from balanced_offload.offload import OffloadPolicy
from balanced_offload.offload.backend import open_backend
from balanced_offload.offload.hosting import HostSession

from .test_session import Vae
from .toys import DEVICE, MIB, Chain, build, clone, device_bytes, hooks, weight_bytes

AUTO = OffloadPolicy()


def h2d(sim: ModuleType) -> int:
    """Bytes that went up so far."""
    return int(sim.copy_totals()["h2d_bytes"])


class Hosts:
    """Three components as a host knows them, and what each computes on the plain CPU."""

    def __init__(self, session: HostSession) -> None:
        self.session = session
        self.parts = {"clip": build(lambda: Chain(3, 128), seed=1), "unet": build(lambda: Chain(24, 128), seed=2)}
        self.parts["vae"] = build(Vae, seed=3)
        self.twins = {name: clone(part) for name, part in self.parts.items()}
        self.roles: dict[str, Any] = {"clip": "text_encoder", "unet": "denoiser", "vae": "vae"}

    def host(self, name: str, policy: OffloadPolicy = AUTO) -> None:
        entries = ("decode",) if name == "vae" else ("forward",)
        self.session.host(name, self.parts[name], policy, role=self.roles[name], entries=entries)

    def check(self, name: str) -> None:
        x = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(4))
        method = "decode" if name == "vae" else "forward"
        with torch.no_grad():
            got = getattr(self.parts[name], method)(x.to(DEVICE)).cpu()
            assert torch.equal(got, getattr(self.twins[name], method)(x))


@pytest.fixture
def hosts(sim: ModuleType) -> Any:
    sim.set_memory_cap(16 * MIB)
    session = HostSession(open_backend(DEVICE))
    yield Hosts(session)
    session.detach()


def test_prepared_means_on_the_device_before_the_call(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet")
    assert device_bytes(sim) == 0, "nothing moves before its stage"
    hosts.session.prepare("unet", MIB)
    assert h2d(sim) == weight_bytes(hosts.parts["unet"])
    assert not hooks(hosts.parts["unet"])
    before = h2d(sim)
    hosts.session.prepare("unet", MIB)
    hosts.check("unet")
    assert h2d(sim) - before == 4096, "the input, and no weight"


def test_a_hosts_word_makes_room_for_the_activations(hosts: Hosts, sim: ModuleType) -> None:
    whole = weight_bytes(hosts.parts["unet"])
    sim.set_memory_cap(3 * whole)
    hosts.host("unet")
    hosts.session.prepare("unet", int(2.4 * whole))
    assert 0 < hosts.session.device_bytes["unet"] < 0.6 * whole
    hosts.check("unet")
    hosts.session.prepare("unet", MIB // 4)
    hosts.check("unet")
    assert hosts.session.device_bytes["unet"] >= whole, "a smaller picture: all of it fits"


def test_what_was_measured_takes_the_place_of_the_hosts_word(hosts: Hosts, sim: ModuleType) -> None:
    whole = weight_bytes(hosts.parts["unet"])
    sim.set_memory_cap(2 * whole)
    hosts.host("unet")
    hosts.host("clip")
    for _ in range(3):
        hosts.session.prepare("clip", MIB // 4)
        hosts.check("clip")
        hosts.session.prepare("unet", int(1.2 * whole))  # far more than it takes
        hosts.check("unet")
    assert hosts.session.device_bytes["unet"] >= whole


def test_without_a_word_the_first_call_places_it(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet")
    hosts.session.prepare("unet")
    assert device_bytes(sim) == 0
    hosts.check("unet")
    assert hosts.session.device_bytes["unet"] >= weight_bytes(hosts.parts["unet"])
    hosts.session.evict("unet")
    assert device_bytes(sim) == 0
    hosts.session.prepare("unet")  # as it was called last
    assert hosts.session.device_bytes["unet"] >= weight_bytes(hosts.parts["unet"])


def test_each_goes_by_its_own_policy(hosts: Hosts, sim: ModuleType) -> None:
    whole = weight_bytes(hosts.parts["unet"])
    hosts.host("unet", OffloadPolicy(mode="balanced", high=f"{whole // 2}B"))
    hosts.host("clip", OffloadPolicy(mode="none"))
    assert hosts.session.device_bytes["clip"] == 0 or hosts.session.device_bytes["unet"] == 0
    for _ in range(2):
        for name in ("clip", "unet", "clip"):
            hosts.session.prepare(name, MIB // 4)
            hosts.check(name)
            assert hosts.session.device_bytes["unet"] <= whole // 2
    assert hosts.session.device_bytes["clip"] >= weight_bytes(hosts.parts["clip"])
    assert not hooks(hosts.parts["clip"]) and hooks(hosts.parts["unet"])


def test_a_policy_is_changed_without_a_move(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet")
    hosts.session.prepare("unet", MIB)
    hosts.check("unet")
    before = h2d(sim)
    for mode in ("none", "balanced", "model", "auto"):
        hosts.session.set_policy("unet", OffloadPolicy(mode=mode, high="100%"))
        hosts.session.prepare("unet", MIB)
        hosts.check("unet")
    assert h2d(sim) - before == 4 * 4096


def test_a_hosts_reserve_counts_once(sim: ModuleType) -> None:
    sim.set_memory_cap(16 * MIB)
    with HostSession(open_backend(DEVICE), reserve=3 * MIB) as session:
        session.host(
            "unet",
            build(lambda: Chain(8, 128), seed=1),
            OffloadPolicy(reserve="1MiB"),
            role="denoiser",
            entries=("forward",),
        )
        session.prepare("unet", MIB)
        free = session.backend.memory().free
        assert session.resolved.reserve == 4 * MIB
        assert session.resolved.available == session.machine.vram_total - session.machine.others - 4 * MIB
        assert free >= 4 * MIB
        assert session.policy.to_json()["reserve"] == "1MiB", "the policy stays as written"


def test_only_the_run_counts_for_the_fit(hosts: Hosts, sim: ModuleType) -> None:
    whole = weight_bytes(hosts.parts["unet"])
    sim.set_memory_cap(whole + weight_bytes(hosts.parts["clip"]) // 2 + MIB)
    hosts.host("clip")
    hosts.host("unet")
    hosts.session.in_run = {"unet"}.__contains__
    hosts.session.prepare("unet", MIB // 2)
    assert hosts.session.resolved.fits
    hosts.session.in_run = {"unet", "clip"}.__contains__
    hosts.session.prepare("clip", MIB)
    assert not hosts.session.resolved.fits


def test_eviction_gives_what_was_asked_and_copies_nothing(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet")
    hosts.session.prepare("unet", MIB)
    hosts.check("unet")
    there = hosts.session.device_bytes["unet"]
    freed = hosts.session.evict("unet", there // 3)
    assert there // 3 <= freed < there // 2
    assert hosts.session.device_bytes["unet"] == there - freed
    assert sim.copy_totals()["d2h_bytes"] == 4096, "one output, checked above"
    hosts.check("unet")
    assert hosts.session.device_bytes["unet"] == there


def test_a_running_component_is_not_evicted(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet")
    seen = []
    hosts.parts["unet"].layers[3].register_forward_hook(lambda *_: seen.append(hosts.session.evict("unet")))
    hosts.session.prepare("unet", MIB)
    hosts.check("unet")
    assert seen == [0]


def test_what_is_free_already_frees_nothing(hosts: Hosts, sim: ModuleType) -> None:
    for name in ("clip", "unet"):
        hosts.host(name)
        hosts.session.prepare(name, MIB)
        hosts.check(name)
    done = hosts.session.free_to_fit(MIB)
    assert done.freed == 0 and done.enough
    assert dict(done.kept) == {n: hosts.session.device_bytes[n] for n in ("clip", "unet")}
    short = done.have + MIB // 2
    done = hosts.session.free_to_fit(short)
    assert done.enough and MIB // 2 <= done.freed < MIB
    assert sum(nbytes for _, nbytes in done.kept) > 0


def test_asking_for_the_next_stage(hosts: Hosts, sim: ModuleType) -> None:
    hosts.parts["vae"].room = 13 * MIB
    for name in ("clip", "unet", "vae"):
        hosts.host(name)
    for _ in range(2):
        for name in ("clip", "unet"):
            hosts.session.prepare(name, MIB // 4)
            hosts.check(name)
        done = hosts.session.free_to_fit()
        hosts.session.prepare("vae", None)
        hosts.check("vae")
    assert done.need >= 13 * MIB and done.enough, "the decode's peak was learned"


def test_units_are_brought_anew(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet")
    hosts.session.prepare("unet", MIB)
    hosts.check("unet")
    units = hosts.session.components["unet"].component.units
    before = h2d(sim)
    hosts.session.reload("unet", {0, 2})
    hosts.session.prepare("unet", MIB)
    assert h2d(sim) - before == sum(units[i].slot_bytes for i in (0, 2)) or h2d(sim) - before == sum(
        units[i].nbytes for i in (0, 2)
    )
    hosts.check("unet")


def test_somebody_else_takes_the_module(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet")
    hosts.session.prepare("unet", MIB)
    managed = hosts.session.components["unet"]

    def let_go() -> None:
        managed.on_foreign = None
        hosts.session.remove("unet")

    managed.on_foreign = let_go
    hosts.parts["unet"].to(DEVICE)
    assert "unet" not in hosts.session.components
    assert {p.device.type for p in hosts.parts["unet"].parameters()} == {"vram"}
    hosts.check("unet")
    hosts.parts["unet"].to("cpu")


def test_placement_is_told(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet")
    managed, told = hosts.session.components["unet"], []
    managed.on_placed = lambda: told.append(len(managed.engine.loaded))
    hosts.session.prepare("unet", MIB)
    hosts.session.evict("unet")
    assert told[-1] == 0 and len(managed.component.units) in told


def test_no_room_is_an_error_with_the_figures(hosts: Hosts, sim: ModuleType) -> None:
    hosts.host("unet", OffloadPolicy(mode="none"))
    hosts.session.evict("unet")
    hold = torch.empty(15 * MIB, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError, match=r"unet .* ran out of memory .* free of 16.0 MiB"):
        hosts.session.prepare("unet", MIB)
    del hold
    hosts.session.prepare("unet", MIB)
    hosts.check("unet")
