"""One component under management. Invariant: after `release` its module is as it was before `Managed` took it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .activation import Signature
from .backend import Backend
from .calibration import Costs
from .engine import StreamEngine
from .entries import Call, EntryPoints
from .ledger import Category, Ledger
from .pinning import Pinner
from .plan import StagePlan
from .policy import ComponentInfo, OffloadMode, OffloadPolicy, ResolvedPolicy, Role
from .protocols import Engine
from .timing import Timing
from .units import Component, ComponentError, build_component
from .weights import Weights

HOST = "<host>"  # the entry point of a stage that a host begins ahead of the call
# A plan is kept while the budget moves by less than this share of the component: a new one would only shuffle weights.
STICKY_SHARE = 0.05


class Planned(NamedTuple):
    """A plan and the figures that it was made from: the same ones would give the same, and planning takes long."""

    plan: StagePlan
    room: int
    costs: Costs | None
    mode: OffloadMode
    high: int | None

    def holds(self, plan: StagePlan, room: int, costs: Costs | None, policy: ResolvedPolicy, margin: int) -> bool:
        """Whether `plan` is this one, or has its resident set, and `room` is within `margin` bytes of what it was."""
        return (
            self.plan.resident is plan.resident
            and self.costs is costs
            and (self.mode, self.high) == (policy.mode, policy.high)
            and plan.device_bytes + plan.held_bytes <= room
            and abs(room - self.room) < margin
        )


class Managed:
    """A component, its weights and engine, and where it stands in the current stage."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        role: Role,
        entries: tuple[str, ...],
        *,
        backend: Backend,
        ledger: Ledger,
        copy_stream: Any,
        pinner: Pinner,
        on_touch: Callable[[Managed], None],
    ) -> None:
        self.name = name
        self.module = module
        self.role: Role = role
        self.entries = EntryPoints(module, entries)
        self._make = (backend, ledger, copy_stream, pinner)
        self._on_touch = on_touch
        self.policy: OffloadPolicy | None = None  # its own, where a host gave it one
        self.on_placed: Callable[[], None] | None = None  # called when units have come to the device, or left it
        self.on_foreign: Callable[[], None] | None = None  # called before somebody else moves or converts all of it
        self._build(build_component(name, module, role))
        # the stage
        self.plan: StagePlan | None = None
        self.planned: Planned | None = None  # the last plan that was made for it
        self.placed = False  # the plan is on the device, and nothing was evicted from it since
        self.reserved = 0  # activation bytes kept free in the current placement
        self.lead: Signature | None = None  # the signature that asked for this placement
        self.accepted: set[Signature] = set()  # signatures that this placement has room for
        self.calls = 0  # calls in the current stage
        self.most_calls = 0  # in any stage so far
        self.running = 0  # depth of calls in progress
        self.rungs: set[str] = set()  # steps down taken in the current stage
        self.limit: int | None = None  # device bytes that the last step down left it
        self.retrying = False  # the call is being repeated after a step down
        self.evicted_for: str | None = None  # reason of the last eviction, until it is loaded again

    def _build(
        self,
        component: Component,
        origins: Mapping[str, torch.device] | None = None,
        slabs: Mapping[int, tuple[torch.Tensor, int]] | None = None,
    ) -> None:
        backend, ledger, copy_stream, pinner = self._make
        self.component = component
        self.weights = Weights(component, backend, pinner, origins, slabs)
        engine = StreamEngine(component, self.weights, backend, ledger, copy_stream, lambda: self._on_touch(self))
        self.engine: Engine = engine
        engine.on_placed = self._placed
        self.timing = Timing(component, backend, engine.stream)

    def _placed(self) -> None:
        if self.on_placed is not None:
            self.on_placed()

    @property
    def leads(self) -> tuple[Signature, ...]:
        """The signatures of which the present stage tells the peak: what began it, and where that was a host's word
        ahead of the call, the call itself."""
        if self.lead is None:
            return ()
        calls = self.accepted - {self.lead}
        return (self.lead, *calls) if self.lead[0] == HOST and len(calls) == 1 else (self.lead,)

    @property
    def info(self) -> ComponentInfo:
        """What the policy needs to know of it."""
        # what the weights take on the device, as the fit rule has to hold there
        return ComponentInfo(self.name, type(self.module).__name__, self.role, self.component.device_bytes)

    def left_needlessly(self, policy: ResolvedPolicy) -> bool:
        """Whether it was evicted though the run fits, so that bringing it up again could have been spared."""
        return policy.fits and self.evicted_for in ("low", "always", "policy", "external")

    def category(self, entry: str) -> Category:
        """What its time counts as in the report."""
        if self.role == "vae":
            return "encode" if entry.endswith("encode") else "decode"
        if self.role == "text_encoder" or (self.role == "other" and "encoder" in self.name):
            return "encode"
        return "other" if self.role == "other" else "denoise"

    def shadow(self, call: Call, on_apply: Call) -> None:
        """Take calls of the entry points, and what rewrites all weights: `.to`, `.half`, `load_state_dict`."""
        if not self.entries.attached:
            self.entries.attach(call)
            self.entries.shadow("_apply", on_apply)
            self.entries.shadow("load_state_dict", on_apply)

    def unplace(self) -> None:
        """The device no longer holds what the plan says, or the plan may no longer hold."""
        self.placed = False
        self.accepted.clear()

    def rebuild(self) -> None:
        """Something else replaced or converted the weights: take them as they are now."""
        self.engine.abort()
        self.engine.evict(None, "external")  # what nobody replaced lies in a buffer of its unit: not one storage
        component = build_component(self.name, self.module, self.role)
        origins, slabs = self.weights.origins, self.weights.places
        self.engine.disarm()
        self.weights.abandon()
        self._build(component, origins, slabs)
        self.plan = None
        self.unplace()

    def release(self) -> None:
        """Give the module back."""
        self.entries.detach()
        if self.weights.foreign_change() is not None:  # converted where no hook of ours saw it: as it is now
            with contextlib.suppress(ComponentError):  # or taken by another offloader: left to that one
                self.rebuild()
        self.engine.detach()
