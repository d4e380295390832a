"""Executes a plan on a module tree. Invariant: a module carries our hooks if and only if its weights are not resident.

A resident leaf runs exactly as it would without us. A unit that is not resident carries a hook before and after its
forward: in a stage that streams, the pair passes it through the ring; otherwise the first touch asks the session for
a stage. Some units cannot flow: tied storages, modules called twice in a forward, tensors used outside their own
module's forward. They are *held*: brought up once per forward, and released when it ends.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .backend import Backend
from .demand import DemandPaging
from .ledger import Ledger, Reason
from .plan import units_to_free
from .protocols import Plan
from .residents import Residents
from .stream import Order, Stream
from .units import Component, Unit, aligned
from .weights import Weights

WATCHED_FORWARDS = 2  # forwards that are watched for stray uses while some streamed units have not run yet


class StreamEngine:
    """The engine of one component: resident buffers, held buffers, a stream, hooks.

    `on_touch` is called when a unit without its weights is used while no entry point of the component is running.
    """

    def __init__(
        self,
        component: Component,
        weights: Weights,
        backend: Backend,
        ledger: Ledger,
        copy_stream: Any,
        on_touch: Callable[[], None],
    ) -> None:
        self.component = component
        self.weights = weights
        self.plan: Plan | None = None
        self.stream = Stream(component, weights, backend, ledger, copy_stream)
        self.stream.otherwise = (self._before, self._after)
        self.held_units = {u.index for u in component.units if u.tied or not u.is_leaf}
        # held from the start of every forward: nobody calls their module, or its hooks would change what runs
        self._upfront = {u.index for u in component.units if not u.hookable}
        self.held_units |= self._upfront
        self._backend = backend
        self._ledger = ledger
        self._copy_stream = copy_stream
        self._on_touch = on_touch
        self.on_placed: Callable[[], None] | None = None  # called when units have come to the device, or left it
        self._residents = Residents(component, weights, backend, ledger, copy_stream)
        self._loaded = self._residents.loaded  # unit index -> its resident buffer
        self._held: dict[int, torch.Tensor] = {}  # storage index -> its buffer, for this forward
        self._held_buffers: list[torch.Tensor] = []
        self._hooks: dict[int, list[Any]] = {}
        self._orders: dict[str, Order] = {}
        self._open = False  # a forward is running
        self._implicit: Unit | None = None  # a unit called from outside any entry point: its call is the forward
        self._implicit_units: set[int] = set()  # it, and the units inside it
        self._watched_last = False  # the last forward was watched
        self._moving = False  # we are rebinding tensors, which demand paging must not take for a use
        self._owners = {
            id(tensor): storage for storage in component.storages for ref in storage.refs for tensor in ref.objects
        }
        self._arm_all()
        self._log_came_down()

    # ------------------------------------------------------------------ figures
    @property
    def loaded(self) -> frozenset[int]:
        """Indexes of the resident units."""
        return frozenset(self._loaded)

    @property
    def device_bytes(self) -> int:
        """Device bytes of resident units, those brought up early included, ring and held storages."""
        held = sum(aligned(buffer.numel()) for buffer in self._held.values())
        return self._residents.nbytes + self.stream.device_bytes + held

    @property
    def most_beside(self) -> int:
        """What `take_most_beside` would say, without asking."""
        return self.stream.most_beside

    def take_most_beside(self) -> int:
        """The most device bytes of weights beside the ring and the residents since this was asked last."""
        most, self.stream.most_beside = self.stream.most_beside, 0
        return most

    def missing_bytes(self, plan: Plan) -> int:
        """Device bytes that `apply(plan)` would allocate, the ring included."""
        ring = max(0, aligned(plan.ring_bytes) - self.stream.device_bytes)
        return self._residents.missing_bytes(plan.resident) + ring

    def surplus_bytes(self, plan: Plan) -> int:
        """Device bytes that `apply(plan)` would give back before it allocates."""
        ring = max(0, self.stream.device_bytes - aligned(plan.ring_bytes))
        return self._residents.surplus_bytes(plan.resident) + ring

    def order_of(self, entry: str) -> list[int] | None:
        """The recorded order of streamed units (indexes) for an entry point."""
        order = self._orders.get(entry)
        return order.known if order else None

    # ------------------------------------------------------------------ placement
    def apply(self, plan: Plan, reason: Reason, *, avoidable: bool = False) -> None:
        """Make the resident set and the ring what `plan` says.

        All device memory is allocated before anything is copied: where there is no room, `torch.OutOfMemoryError`
        leaves what was loaded before as it was.
        """
        self._residents.take_early(plan.resident)
        self._drop(self._loaded.keys() - plan.resident, reason)
        missing = sorted(plan.resident - self._loaded.keys())
        if missing:
            self.stream.forget()
        self._pin(plan, missing)
        try:
            self.stream.resize(plan.ring_bytes)
            self._residents.load(missing, reason, avoidable)
        finally:
            self._arm_all()
        self.plan = plan

    def bring_early(self, plan: Plan, room: int, avoidable: bool = False) -> int:
        """Start to bring up what the next stage of this component will want, behind what computes now.

        Takes at most `room` device bytes, and nothing that would hold the host; the device bytes it took.
        """
        return self._residents.bring_early(sorted(plan.resident), room, avoidable)

    def _pin(self, plan: Plan, missing: Iterable[int]) -> None:
        """Page-lock the masters that will be copied again and again, in the order in which they will be."""
        order = next((o.known for o in self._orders.values() if o.known), None) or []
        flowing = dict.fromkeys([*order, *range(len(self.component.units))]).keys() - plan.resident
        again = [i for i in (*order, *range(len(self.component.units))) if i in flowing]
        again += [i for i in missing if i in self._residents.moved]
        if self.weights.pin(self.component.units[i] for i in dict.fromkeys(again)):
            self.stream.forget_places()

    def evict(self, nbytes: int | None, reason: Reason) -> int:
        """Free at least `nbytes` of device memory (all of it where None) without copying anything.

        Takes the ring first: outside a stage it holds nothing of value. Returns the device bytes that came free.
        """
        before = self.device_bytes
        self.stream.drop()
        self._residents.drop_early()
        freed = before - self.device_bytes
        if nbytes is None:
            self._drop(self._loaded.keys(), reason)
        elif freed < nbytes:
            self._drop(units_to_free(self.component, self._loaded, nbytes - freed), reason)
        self._arm_all()
        return before - self.device_bytes

    def drop(self, indexes: Iterable[int], reason: Reason) -> None:
        """Evict these units, as far as they are resident, and what was copied ahead."""
        self.stream.forget()
        self._residents.drop_early()
        self._drop(self._loaded.keys() & set(indexes), reason)
        self._arm_all()

    def _drop(self, indexes: Iterable[int], reason: Reason) -> None:
        self._residents.drop(indexes, reason)
        self._log_came_down()

    def _log_came_down(self) -> None:
        """Copies from the device: weights that were found there, or that somebody wrote while they were there."""
        nbytes, self.weights.came_down = self.weights.came_down, 0
        if nbytes:
            self._ledger.move(self.component.name, "d2h", nbytes, "external")
            self._ledger.event("state", f"{self.component.name}: {nbytes} bytes were written on the device, and kept")

    # ------------------------------------------------------------------ hooks
    def _arm_all(self) -> None:
        """Hooks on exactly the units whose weights are not resident."""
        self._armed = True
        loaded = self._loaded
        for unit in self.component.units:
            resident = unit.index in loaded or (not unit.storages and bool(unit.borrowed))
            if resident and unit.borrowed:
                resident = all(storage.unit in loaded for storage in unit.borrowed)
            if resident:
                for handle in self._hooks.pop(unit.index, ()):
                    handle.remove()
            elif unit.index not in self._hooks and unit.hookable:
                self._arm(unit)
        if self.on_placed is not None:
            self.on_placed()

    def _arm(self, unit: Unit) -> None:
        handles = self._hooks[unit.index] = []
        handles.append(unit.module.register_forward_pre_hook(functools.partial(self.stream.before, unit)))
        handles.append(unit.module.register_forward_hook(functools.partial(self.stream.after, unit)))

    def _before(self, unit: Unit) -> None:
        if (not self._open or self._implicit is not None) and not self._begin_part(unit):
            return
        self._moving = True
        try:
            if unit.index in self.held_units:
                self._hold(unit)
            else:
                self.stream.take(unit)
        finally:
            self._moving = False

    def _after(self, unit: Unit) -> None:
        self._moving = True
        try:
            self.stream.give(unit)
        finally:
            self._moving = False
        if self._implicit is unit:
            self._close_forward()

    def _begin_part(self, unit: Unit) -> bool:
        """A unit is called from outside any entry point: its call is the forward. False if it is resident by now."""
        if self._implicit is not None and unit.index not in self._implicit_units:
            self._recover()  # that call raised, and nothing told us
        if self._open:
            return True
        self._on_touch()
        if unit.index not in self._hooks:
            return False  # the session made the component resident
        self._implicit = unit
        inside = {id(module) for module in unit.module.modules()}
        self._implicit_units = {u.index for u in self.component.units if id(u.module) in inside}
        self._open_forward(f"<{unit.name}>", wrap=False)
        return True

    # ------------------------------------------------------------------ a forward
    @contextlib.contextmanager
    def forward(self, entry: str, timing: contextlib.AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Run one call of an entry point of the component inside this. `timing` is entered if the call streams."""
        if self._implicit is not None:
            self._recover()  # a part that was called by itself raised, and nothing told us
        if self._open or not self._armed or len(self._loaded) == len(self.component.units):
            yield  # an entry point that calls another one, or everything is resident
            return
        order = self._open_forward(entry, wrap=self.plan is not None and self.plan.wrap)
        try:
            with self._watch(order), self._guard_gradients():
                if timing is None or self._watched_last:  # to watch takes time, which is none of the units'
                    self.stream.direct = not self._watched_last and not self._ledger.active
                    yield
                else:
                    with timing:
                        yield
        except BaseException:
            self.abort()
            raise
        self._close_forward()

    def _guard_gradients(self) -> contextlib.AbstractContextManager[Any]:
        """Autograd may not keep a tensor of a forward that streams: its bytes will be another unit's by then."""
        if not torch.is_grad_enabled():
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _refuse_backward)

    def _recover(self) -> None:
        """A call of a part, from outside any entry point, raised and left its unit up."""
        self.abort()
        self.stream.resize(self.plan.ring_bytes if self.plan is not None else 0)

    def hold(self, indexes: Iterable[int]) -> None:
        """Units that may not flow: where they are not resident, each forward brings them up when it begins."""
        self._upfront |= set(indexes)
        self.held_units |= self._upfront

    def watch(self) -> bool:
        """Watch the next forwards for tensors that are used outside their module; False where that is done already."""
        if self._watched_last:
            return False
        for order in self._orders.values():
            order.known, order.forwards = None, 0
        return True

    def _watch(self, order: Order) -> contextlib.AbstractContextManager[Any]:
        self._watched_last = False
        if order.known is not None and not order.deviated:
            flowing = self._hooks.keys() - self.held_units
            if order.forwards >= WATCHED_FORWARDS or flowing <= set(order.known):
                return contextlib.nullcontext()
        self._watched_last = True
        return DemandPaging(self.demand)

    def _open_forward(self, entry: str, wrap: bool) -> Order:
        if self.stream.busy or self._held:
            self._recover()
        order = self._orders.setdefault(entry, Order())
        everything = frozenset(unit.index for unit in self.component.units)
        self.stream.open(order, wrap, everything - self._loaded.keys() - self.held_units)
        self._open = self._moving = True
        try:
            for index in self._upfront - self._loaded.keys():
                self._hold(self.component.units[index])
        except BaseException:
            self.abort()
            raise
        self._moving = False
        return order

    def _close_forward(self) -> None:
        self.held_units |= self.stream.close()
        self._end_forward()

    def _end_forward(self) -> None:
        for index in self._held:
            self.weights.unbind(self.component.storages[index])
        self._held.clear()
        for buffer in self._held_buffers:
            self.stream.gone_aside(buffer)
        self._held_buffers.clear()
        self._open = self._moving = False
        self._implicit = None
        self._log_came_down()

    def abort(self) -> None:
        """After an exception: no ring, nothing held, no forward open. Resident units stay."""
        self.stream.abort()
        self._end_forward()

    def _hold(self, unit: Unit) -> None:
        """Bring up what `unit` needs and is not on the device, until the forward ends."""
        missing = [s for s in (*unit.storages, *unit.borrowed) if self.weights.bound(s) is None]
        if missing:
            buffer = self.stream.copy_aside(missing, sum(aligned(s.nbytes) for s in missing))
            start = 0
            for storage in missing:
                self._held[storage.index] = buffer[start : start + storage.nbytes]
                start += aligned(storage.nbytes)
            self._held_buffers.append(buffer)

    def demand(self, tensor: torch.Tensor) -> None:
        """`tensor` is about to be used: if it is a weight that is not on the device, hold its unit from now on."""
        storage = self._owners.get(id(tensor))
        if storage is None or self._moving or self.weights.bound(storage) is not None:
            return
        unit = self.component.units[storage.unit]
        self._moving = True
        try:
            self.held_units.add(unit.index)
            self._upfront.add(unit.index)
            self._hold(unit)
        finally:
            self._moving = False

    # ------------------------------------------------------------------ the end
    def disarm(self) -> None:
        """Take every hook off, whatever is resident: from here on the modules run on the weights they have."""
        self._armed = False
        for handles in self._hooks.values():
            for handle in handles:
                handle.remove()
        self._hooks.clear()

    def detach(self) -> None:
        """Every module as it was before: no hook, weights in memory of their own, on the device they came from."""
        self.abort()
        self.evict(None, "policy")
        self.disarm()
        self.weights.restore()
        self._log_came_down()


def _refuse_backward(packed: None) -> Any:
    raise RuntimeError(
        "backward through a component whose weights stream: they are not on the device any more. Choose mode `model` "
        "or `none`, or let more of it stay (`high`), so that the component is resident."
    )


def hooks_on(module: nn.Module) -> int:
    """Forward hooks on one module, whoever put them there: counted by looking, for reports and tests."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks)
