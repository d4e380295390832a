"""The arbiter of one device: several components, one budget. Invariant: nothing is half done after an error.

Calls come in through the components' entry points. Before each, the stage is set (stages.py); a call that runs out
of memory is repeated one step further down (oom.py); after any exception the next call is as the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import memory
from .activation import Signature, signature
from .backend import Backend, is_out_of_memory, open_backend
from .ledger import Ledger, RunRecord
from .managed import Managed
from .oom import StepDown
from .pinning import Pinner
from .plan import full_plan
from .policy import OffloadPolicy, ResolvedPolicy, Role, WorkingSet, always_resident
from .rates import rate_book, rates_for
from .schedule import Rates
from .stages import Stages


class Session:
    """Places components on one accelerator under one policy.

    Args:
        policy: what the user wants; may be replaced at any time between calls.
        device: a torch device or its name; None takes the current accelerator.
        backend: the device as a backend, instead of `device`.

    Raises:
        NoAcceleratorError: (a RuntimeError) no device was named and there is no accelerator.
    """

    def __init__(
        self,
        policy: OffloadPolicy | None = None,
        *,
        device: str | torch.device | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.backend = backend or open_backend(device)
        self.ledger = Ledger(self.backend)
        self.machine = memory.machine(self.backend)
        self.components: dict[str, Managed] = {}
        self.record: RunRecord | None = None
        self.auto_runs = False  # a call outside any run opens one; whoever sets this closes it
        self._rates: Rates | None = None
        self.stages = Stages(
            self.backend, self.ledger, self.components, lambda: self._resolve(warn=True), lambda: self.rates
        )
        self.step_down = StepDown(self.backend, self.ledger, self.components, lambda: self.resolved)
        self._policy = policy or OffloadPolicy()
        self._copy_stream = self.backend.new_stream()
        self._step = 0
        self._warned = False
        self.resolved = self._resolve()
        self._pinner = Pinner(self.backend, self.resolved.pinned_ram)

    @property
    def rates(self) -> Rates:
        """What this machine moves: known from before, else measured when it is first asked for."""
        if self._rates is None:
            self._rates = rates_for(self.backend)
        return self._rates

    def _observe(self, nbytes: int, seconds: float, pinned: bool) -> None:
        rate_book().observe(self.backend, nbytes, seconds, pinned)
        self._rates = None  # until it is asked for again

    # ------------------------------------------------------------------ components
    def add(
        self, name: str, module: nn.Module, *, role: Role = "denoiser", entries: tuple[str, ...] = ("forward",)
    ) -> Managed:
        """Manage `module` as component `name`. The same module again is the same component.

        Raises:
            ComponentError: (a ValueError) it has no weights, or weights that cannot be rebound.
            ValueError: the name is taken by another module.
            torch.OutOfMemoryError: mode none, and it does not fit. The module is then as it was.
        """
        for known in self.components.values():
            if known.module is module:
                return known
        if name in self.components:
            raise ValueError(f"name: got '{name}', which is another component here; allowed is any name not in use")
        managed = Managed(
            name,
            module,
            role,
            entries,
            backend=self.backend,
            ledger=self.ledger,
            copy_stream=self._copy_stream,
            pinner=self._pinner,
            on_touch=self._touch,
        )
        self.components[name] = managed
        try:
            self._settle()
        except BaseException:
            self.remove(name)
            raise
        return managed

    def remove(self, name: str) -> None:
        """Give a component back, as it was."""
        self.stages.leave()
        self.components[name].release()
        del self.components[name]  # after it: a release that was interrupted can be repeated
        self.stages.forget(name)

    def refresh(self, name: str) -> None:
        """Take the weights of a component as they are now: something was added to them, or took their place."""
        self._renew(self.components[name])

    def _absorb(self) -> None:
        """Take over what was converted or moved while no hook of ours was there to see it (mode none)."""
        for managed in self.components.values():
            if not managed.running and managed.weights.foreign_change() is not None:
                self._renew(managed)

    def _renew(self, managed: Managed) -> None:
        self.stages.leave()
        managed.engine.abort()
        if managed.weights.foreign_change() is None:
            managed.engine.evict(None, "external")  # else the masters are out of date, and must not come back
        managed.rebuild()
        self.stages.peaks.forget(managed.name)
        if always_resident(self.resolved):
            self._load_whole(managed)

    def detach(self) -> None:
        """Give every component back, as it was."""
        self.close_run()
        for name in list(self.components):
            self.remove(name)
        rate_book().save()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    @property
    def device_bytes(self) -> Mapping[str, int]:
        """Device bytes of weights (ring included) by component."""
        return {name: m.engine.device_bytes for name, m in self.components.items()}

    def free(self, nbytes: int | None = None) -> int:
        """Give at least `nbytes` of device memory back (everything where None); the bytes that came free."""
        self._absorb()
        freed = self.stages.free(nbytes)
        if always_resident(self.resolved) and freed:
            self._shadow_all()  # in mode none nothing else would bring the weights back
        return freed

    # ------------------------------------------------------------------ policy
    @property
    def policy(self) -> OffloadPolicy:
        """What the user wants, as written. Setting it reloads nothing: the next stage goes by the new one."""
        return self._policy

    @policy.setter
    def policy(self, policy: OffloadPolicy) -> None:
        self._absorb()
        before, self._policy = self._policy, policy
        self._warned = False
        try:
            self._settle()
        except BaseException:
            self._policy = before
            self._settle()
            raise

    def _working_set(self) -> WorkingSet:
        peak, source = self.stages.peaks.largest()
        return WorkingSet(tuple(m.info for m in self.components.values()), peak, source)

    def _resolve(self, warn: bool = False) -> ResolvedPolicy:
        now = self.backend.memory()
        self.machine = dataclasses.replace(self.machine, vram_total=now.total, vram_free=now.free, others=now.others)
        with warnings.catch_warnings():
            if not warn or self._warned:  # once per policy, and when all components are there
                warnings.simplefilter("ignore")
            self.resolved = self._as_resolved().resolve(self.machine, self._working_set())
        self._warned = self._warned or warn
        return self.resolved

    def _as_resolved(self) -> OffloadPolicy:
        """The policy as it is resolved; a host may keep more free than it says."""
        return self._policy

    def _is_under_policy(self, managed: Managed) -> bool:
        """Whether the policy is this component's; in a host each may have its own."""
        return True

    def _settle(self) -> None:
        """Bring hooks and entry points in line with the policy; mode none also loads everything, now."""
        self.stages.leave()
        resolved = self._resolve()
        self._pinner.budget = resolved.pinned_ram
        for managed in self.components.values():
            managed.unplace()
            managed.plan = None
        if not always_resident(resolved):
            self._shadow_all()
            return
        for managed in self.components.values():
            if not self._is_under_policy(managed):
                continue
            if not self.ledger.active:
                self._unshadow(managed)
            self._load_whole(managed)

    def _load_whole(self, managed: Managed) -> None:
        if self.backend.device.type == "cpu":
            managed.engine.disarm()  # the masters are where the compute is
            return
        try:
            managed.engine.apply(full_plan(managed.component), "policy")
        except torch.OutOfMemoryError as error:
            text = self.step_down.figures(managed, "Mode none keeps everything resident.")
            raise torch.OutOfMemoryError(text) from error
        self.stages.note()

    def _shadow_all(self) -> None:
        for managed in self.components.values():
            self._shadow(managed)

    def _shadow(self, managed: Managed) -> None:
        managed.shadow(functools.partial(self._call, managed), functools.partial(self._convert, managed))

    def _unshadow(self, managed: Managed) -> None:
        managed.entries.detach()

    # ------------------------------------------------------------------ runs
    @contextlib.contextmanager
    def run(self, prompt_id: str | None = None) -> Iterator[None]:
        """Record everything in this block as one run; afterwards `record` has it."""
        self.open_run(prompt_id)
        try:
            yield
        except BaseException as error:
            self.close_run(error)
            raise
        self.close_run()

    def open_run(self, prompt_id: str | None = None) -> None:
        """Start to record. In mode none the entry points are shadowed until the run ends, to time the stages."""
        self.stages.begin_run()
        self._step = 0
        self.ledger.open_run(prompt_id)
        if always_resident(self.resolved):
            self._shadow_all()

    def close_run(self, error: BaseException | None = None) -> RunRecord | None:
        """End the recorded run, if one is open. Waits for the device once."""
        if not self.ledger.active:
            return None
        self.stages.leave()
        if always_resident(self.resolved):
            for managed in self.components.values():
                self._unshadow(managed)
        self.stages.note_peak()
        self.record = self.ledger.close_run(error)
        return self.record

    # ------------------------------------------------------------------ calls
    def _call(
        self, managed: Managed, entry: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if managed.running:
            return method(*args, **kwargs)  # an entry point that calls another one of the same component
        implicit = self.auto_runs and not self.ledger.active
        if implicit:
            self.open_run()
        sig = signature(entry, args, kwargs)
        if managed.timing.settle(self._observe):
            self.stages.reconsider(managed, entry, sig)
        restore_rng = _random_state(self.backend, args, kwargs)
        watched = False
        managed.running += 1
        try:
            while True:
                try:
                    self.stages.enter(managed, entry, sig)
                    return self._forward(managed, entry, sig, method, args, kwargs)
                except RuntimeError as error:
                    stray = not watched and _OTHER_DEVICE in str(error) and managed.engine.watch()
                    if not stray and not is_out_of_memory(error):
                        raise
                    failure = str(error)
                # outside the except block: the traceback, and the activations that it kept alive, are gone
                self.stages.abandon(managed)
                managed.retrying = True
                if stray:  # a weight was used outside its module, for the first time: find out which
                    watched = True
                elif not self.step_down.take(managed):
                    raise torch.OutOfMemoryError(self.step_down.figures(managed, failure))
                restore_rng()
        except BaseException as error:
            self.stages.abandon(managed)
            if self.auto_runs:
                self.close_run(error)
            raise
        finally:
            managed.retrying = False
            managed.running -= 1
            if always_resident(self.resolved) and not self.ledger.active:
                self._unshadow(managed)  # it was only there to bring the weights back

    def _forward(
        self,
        managed: Managed,
        entry: str,
        sig: Signature,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        managed.calls += 1
        stepping = managed.role == "denoiser"
        if stepping:
            self.ledger.step_begin(self._step)
            self._step += 1
        try:
            timing = managed.timing.around(sig)
            with self.ledger.span(managed.category(entry)), managed.engine.forward(entry, timing):
                return method(*args, **kwargs)
        finally:
            if stepping:
                self.ledger.step_end()

    def _touch(self, managed: Managed) -> None:
        """A part of a component that is not resident is used outside any entry point: begin a stage for it."""
        if not managed.running:
            self.stages.enter(managed, "<part>", ("<part>",))

    def _convert(
        self, managed: Managed, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`.to(dtype)` and its kin on the whole module: convert the masters, then manage what came out."""
        self.stages.leave()
        managed.engine.abort()
        managed.engine.evict(None, "external")
        try:
            return method(*args, **kwargs)
        finally:
            self._renew(managed)


_OTHER_DEVICE = "Expected all tensors to be on the same device"


def _random_state(backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    """Capture the default generators and those that are passed in; the result puts them back, to repeat a call."""
    restore = backend.rng_state()
    found: list[torch.Generator] = []
    for value in (*args, *kwargs.values()):
        values = value if isinstance(value, (list, tuple)) else (value,)
        found += [item for item in values if isinstance(item, torch.Generator)]
    states = [generator.get_state() for generator in found]

    def put_back() -> None:
        restore()
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)

    return put_back
