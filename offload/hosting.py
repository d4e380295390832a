"""A session inside a host that loads and evicts models itself. Invariant: each component goes by its own policy.

A host says "this model will run" before it calls it, asks for memory back when another model of its own needs it, and
may run several graphs whose nodes carry different policies. `HostSession` takes these requests; all else is Session's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from .activation import Signature
from .arbiter import Eviction, Other, for_need
from .backend import Backend
from .managed import HOST, STICKY_SHARE, Managed
from .policy import OffloadPolicy, Role, WorkingSet
from .session import Session

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Freed:
    """What `HostSession.free_to_fit` did. Bytes; `kept` is what stays on the device, by component."""

    need: int
    have: int  # free before
    freed: int
    kept: tuple[tuple[str, int], ...]

    @property
    def enough(self) -> bool:
        """Whether the need is met now."""
        return self.have + self.freed >= self.need


class HostSession(Session):
    """Places the models of a host. `ask_host` is told how many bytes are short, and returns what the host gave.

    `reserve`: bytes that the host's own flags keep free, beyond the policy's.
    """

    def __init__(self, backend: Backend, *, reserve: int = 0, ask_host: Callable[[int], int] | None = None) -> None:
        self._reserve = reserve
        self.in_run: Callable[[str], bool] = lambda name: True  # whether a component belongs to the present run
        super().__init__(OffloadPolicy(), backend=backend)
        self.step_down.ask_host = ask_host

    # ------------------------------------------------------------------ components
    def host(
        self, name: str, module: nn.Module, policy: OffloadPolicy, *, role: Role, entries: tuple[str, ...]
    ) -> Managed:
        """Manage a module under a policy of its own. Raises as `add` does."""
        self._change_policy(policy)
        managed = self.add(name, module, role=role, entries=entries)
        managed.policy = policy
        self._shadow(managed)
        return managed

    def set_policy(self, name: str, policy: OffloadPolicy) -> None:
        """From now on this component goes by `policy`; nothing moves before its next stage."""
        managed = self.components[name]
        if managed.policy != policy:
            managed.policy = policy
            managed.unplace()

    def _change_policy(self, policy: OffloadPolicy) -> None:
        if policy != self.policy:
            self.policy = policy

    def _adopt(self, managed: Managed) -> None:
        """The stage that comes is this component's: its policy is the one that counts."""
        if managed.policy is not None:
            self._change_policy(managed.policy)

    def _is_under_policy(self, managed: Managed) -> bool:
        return managed.policy is None or managed.policy == self.policy

    def _working_set(self) -> WorkingSet:
        """The components of this run: a host keeps models in RAM that no present graph uses."""
        whole = super()._working_set()
        used = tuple(info for info in whole.components if self.in_run(info.name))
        return dataclasses.replace(whole, components=used)

    def _as_resolved(self) -> OffloadPolicy:
        if not self._reserve:
            return self._policy
        given = self._policy.resolve(self.machine, WorkingSet(())).reserve
        return dataclasses.replace(self._policy, reserve=given + self._reserve)

    def _load_whole(self, managed: Managed) -> None:
        """Mode none too loads with the stage: the host says when, once it has made room, and evicts when it likes."""
        if self.backend.device.type == "cpu":
            super()._load_whole(managed)

    def _unshadow(self, managed: Managed) -> None:
        """Never while a host may come back with another policy, or take the module over behind our back."""

    # ------------------------------------------------------------------ what a host asks
    def prepare(self, name: str, activations: int | None = None) -> None:
        """Begin the stage of a component ahead of its call: what it keeps resident is on the device afterwards.

        Args:
            name: the component.
            activations: bytes that the host expects the call to need beside weights; None where it does not say.

        Raises:
            torch.OutOfMemoryError: with the figures, after every step down of the policy.
        """
        managed = self.components[name]
        self._adopt(managed)
        if activations is not None:
            activations = -(-activations // MIB) * MIB
            self.stages.peaks.hint(name, activations)
        if managed.role == "vae" or (activations is None and managed.lead is None):
            return  # its call places it: only that tells whether it decodes, and on what
        sig = (HOST, activations) if activations is not None else managed.lead or (HOST, None)
        self._outgrow(managed, sig)
        try:
            while True:
                try:
                    self.stages.enter(managed, HOST, sig)
                    return
                except torch.OutOfMemoryError as error:
                    failure = str(error)
                self.stages.abandon(managed)
                managed.retrying = True
                if not self.step_down.take(managed):
                    raise torch.OutOfMemoryError(self.step_down.figures(managed, failure))
        except BaseException:
            self.stages.abandon(managed)
            raise
        finally:
            managed.retrying = False

    def _outgrow(self, managed: Managed, sig: Signature) -> None:
        """It streams because its last call wanted more room than this one will: have it placed anew."""
        if managed.placed and managed.plan is not None and managed.plan.streams:
            need, _ = self.stages.peaks.expect(managed.component, str(sig[0]), sig, self.resolved.headroom)
            if managed.reserved - need > STICKY_SHARE * managed.component.device_bytes:
                self.stages.leave()
                managed.unplace()

    def evict(self, name: str, nbytes: int | None = None) -> int:
        """The host wants memory back from this component: at least `nbytes`, or all. The device bytes that came free.

        A component that is in the middle of a call keeps what it has.
        """
        managed = self.components[name]
        if managed.running or not managed.engine.device_bytes:
            return 0
        self.stages.leave()
        freed = self.stages.evict([Eviction(name, nbytes, "external")])
        self._shadow(managed)  # mode none too: its next call brings the weights back
        return freed

    def reload(self, name: str, units: Collection[int]) -> None:
        """Weights of these units are to be on the device anew: what is there is dropped, and comes with its stage."""
        managed = self.components[name]
        if managed.engine.loaded & set(units):
            self.stages.leave()
            managed.engine.drop(units, "lora")
            managed.unplace()

    def free_to_fit(self, need: int | None = None) -> Freed:
        """Free what is missing to `need` bytes, and keep the rest. None: what the next stage wants, by the last run."""
        now = self.backend.memory()
        have = max(0, now.free + now.reclaimable - self._reserve)
        if need is None:
            need = self._next_need()
        freed, others, follower = 0, [], self.stages.follower()
        for managed in self.components.values():
            if managed.engine.device_bytes and not managed.running:
                others.append(Other(managed.name, managed.engine.device_bytes, int(managed is not follower)))
        for eviction in for_need(others, need - have):
            freed += self.evict(eviction.name, eviction.nbytes)
        kept = tuple((m.name, m.engine.device_bytes) for m in self.components.values() if m.engine.device_bytes)
        return Freed(need, have, freed, kept)

    def _next_need(self) -> int:
        managed = self.stages.follower()
        if managed is None:
            return 0
        missing = 0 if managed.plan is None else managed.engine.missing_bytes(managed.plan)
        if managed.lead is None:
            return missing
        activations, _ = self.stages.peaks.expect(managed.component, str(managed.lead[0]), managed.lead, None)
        return missing + activations

    # ------------------------------------------------------------------ calls
    def _call(
        self, managed: Managed, entry: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not managed.running:
            self._adopt(managed)
        try:
            return super()._call(managed, entry, method, args, kwargs)
        except torch.OutOfMemoryError:
            if managed.role == "vae":  # the host takes this for its sign to go on in tiles
                self.ledger.event(
                    "tiled", f"{managed.name}: no room for the whole picture; what follows is up to the host"
                )
            raise

    def _convert(
        self, managed: Managed, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Somebody else moves or converts the whole module: where a host's adapter wants to know, it lets go first."""
        if managed.on_foreign is None or managed.running:
            return super()._convert(managed, name, method, args, kwargs)
        managed.on_foreign()
        if self.components.get(managed.name) is managed:  # nobody let go
            return super()._convert(managed, name, method, args, kwargs)
        return getattr(managed.module, name)(*args, **kwargs)
