"""The walk of streamed units through the ring. Invariant: a unit is bound to a slot from just before its forward
until just after it; copies run ahead on the copy stream as far as the ring has room, and never over bytes in use.

The order of execution is recorded in each forward and foreseen for the next one. The first forward copies each unit
when it is called; from the second on, the copies run ahead. A unit that was foreseen and skipped costs its copy; one
that was not foreseen is copied on the spot, and the walk goes on behind it.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .backend import Backend
from .ledger import Ledger
from .ring import Ring, Slot
from .units import Component, Storage, Unit, aligned
from .weights import Weights


class InFlight(NamedTuple):
    """A unit on its way through the ring. The slot carries the two events that order copy and compute."""

    unit: Unit
    slot: Slot


class Order:
    """What one entry point of a component was seen to run, and how far the copies are ahead of it."""

    def __init__(self) -> None:
        self.known: list[int] | None = None  # streamed units in the order of the last forward
        self.flowing: frozenset[int] = frozenset()  # the units that did not stay then, whether they ran or not
        self.seen: list[int] = []  # this forward, as it goes
        self.ahead: int | None = 0  # position in `known` of the next unit to copy; None: lost, until the next forward
        self.deviated = False  # the last forward was not as foreseen
        self.forwards = 0

    def restrict(self, flowing: frozenset[int]) -> None:
        """Another resident set: what stays now is left out; with units whose place was never seen, all is unknown."""
        if flowing != self.flowing:
            if self.known is not None and flowing <= self.flowing:
                self.known = [index for index in self.known if index in flowing]
            else:
                self.known = None
            self.flowing = flowing

    def behind(self, index: int) -> int | None:
        """The position behind unit `index`, looking from where the walk was, then from the start."""
        if not self.known:
            return None
        start = self.ahead or 0
        places = [at for at, other in enumerate(self.known) if other == index]
        return next((at + 1 for at in places if at >= start), places[0] + 1 if places else None)


def parts(unit: Unit, buffer: torch.Tensor) -> Iterator[tuple[Storage, torch.Tensor]]:
    """The storages of `unit` with their stretch of `buffer`, each on an aligned start."""
    start = 0
    for storage in unit.storages:
        yield storage, buffer[start : start + storage.nbytes]
        start += aligned(storage.nbytes)


class Stream:
    """Streams the units of one component through one ring."""

    def __init__(
        self, component: Component, weights: Weights, backend: Backend, ledger: Ledger, copy_stream: Any
    ) -> None:
        self.component = component
        self.ring: Ring | None = None
        self._weights = weights
        self._backend = backend
        self._ledger = ledger
        self._copy_stream = copy_stream
        self._order: Order | None = None
        self._wrap = False
        self._compute: Any = None
        self._inflight: deque[InFlight] = deque()
        self._live: dict[int, Slot | torch.Tensor] = {}  # bound units: in the ring, or in a buffer beside it
        self._beside = 0  # bytes of such buffers now
        self.most_beside = 0  # and the most of them at once, until somebody resets it

    @property
    def device_bytes(self) -> int:
        """Bytes of the ring; buffers beside it live for one call and belong to the activations."""
        return self.ring.capacity if self.ring is not None else 0

    @property
    def busy(self) -> bool:
        """Whether a unit is bound to a slot now."""
        return bool(self._live)

    def resize(self, nbytes: int) -> None:
        """Have a ring of `nbytes` (0: none). An allocation, so only between forwards."""
        nbytes = aligned(nbytes)
        if self.device_bytes == nbytes:
            return
        self.drop()
        if nbytes:
            self.ring = Ring(self._backend, nbytes)

    def drop(self) -> None:
        """Give the ring's memory back; what was copied ahead is lost."""
        if self.ring is not None:
            self.forget()
            # the allocator owes these bytes to the compute stream only: let that one wait for the last copy
            self._backend.current_stream().wait_event(self._backend.record(self._copy_stream))
            self.ring = None

    def open(self, order: Order, wrap: bool, flowing: frozenset[int]) -> None:
        """A forward begins. `wrap`: copies run on into the next forward. `flowing`: the units that pass through."""
        order.restrict(flowing)
        first = self._inflight[0].unit.index if self._inflight else None
        if first is not None and (not order.known or order.known[0] != first):
            self.forget()
        self._order, self._wrap = order, wrap
        self._compute = self._backend.current_stream()  # asked once a forward: it costs as much as an event
        order.seen = []
        order.ahead = len(self._inflight)
        self._pump()

    def close(self) -> set[int]:
        """The forward ended. Returns the units that ran more than once: those can not flow, and must be held."""
        order = self._order
        assert order is not None
        repeats = {i for i, n in Counter(order.seen).items() if n > 1}
        seen = [i for i in order.seen if i not in repeats]
        order.deviated = order.known is not None and seen != order.known
        if seen != order.known:
            order.known = seen
            self.forget()
        order.forwards += 1
        self._order = None
        return repeats

    def abort(self) -> None:
        """The forward raised, at any point of it: unbind what may be bound, and give up the ring with whatever slot
        was in nobody's hands just then."""
        for index in list(self._live):
            self._live.pop(index)
            for storage in self.component.units[index].storages:
                self._weights.unbind(storage)
        self._inflight.clear()
        self._beside = 0
        self.drop()
        self._order = None

    def take(self, unit: Unit) -> None:
        """Bind `unit` for its forward; the compute stream waits for its copy."""
        if unit.index in self._live:
            return
        order = self._order
        assert order is not None
        order.seen.append(unit.index)
        if self._is_flying(unit):
            while self._inflight[0].unit is not unit:  # foreseen, but skipped this time
                self._discard(self._inflight.popleft())
            slot: Slot | None = self._inflight.popleft().slot
        else:
            self.forget()
            slot = self._start_copy(unit)
            order.ahead = order.behind(unit.index)
        self._pump()
        if slot is None or self.ring is None:  # larger than the ring, or the units around it hold all of it
            self._live[unit.index] = self.copy_aside(list(unit.storages), unit.slot_bytes)
            return
        self._live[unit.index] = slot
        with self._ledger.wait("stall"):
            self._compute.wait_event(slot.copied)
        for storage, part in parts(unit, self.ring.buffer[slot.start : slot.end]):
            self._weights.bind(storage, part)

    def give(self, unit: Unit) -> None:
        """The forward of `unit` is over: its bytes may be reused once the compute stream is past this point."""
        if unit.index in self._live:
            self._unbind(unit)
            self._pump()

    def forget(self) -> None:
        """Discard what was copied ahead."""
        while self._inflight:
            self._discard(self._inflight.popleft())

    def copy_aside(self, storages: list[Storage], nbytes: int) -> torch.Tensor:
        """Bring `storages` up in a buffer of their own and bind them; the compute stream waits for the copy."""
        with torch.inference_mode(False), torch.no_grad():
            buffer = self._backend.empty(nbytes)
        self._beside += nbytes
        self.most_beside = max(self.most_beside, self._beside)
        # queued kernels may still read bytes that the allocator hands out again
        with self._ledger.wait("stall"), copies_ordered(self._backend, self._copy_stream):
            start = self._backend.record(self._copy_stream, timed=True)
            offset = 0
            for storage in storages:
                part = buffer[offset : offset + storage.nbytes]
                self._weights.copy_to(storage, part)
                offset += aligned(storage.nbytes)
            end = self._backend.record(self._copy_stream, timed=True)
        offset = 0
        for storage in storages:
            self._weights.bind(storage, buffer[offset : offset + storage.nbytes])
            offset += aligned(storage.nbytes)
        self._log(storages, start, end, overlapped=False)
        return buffer

    def gone_aside(self, buffer: torch.Tensor) -> None:
        """A buffer that `copy_aside` made is not used any more."""
        self._beside -= buffer.numel()

    # ------------------------------------------------------------------ inside
    def _pump(self) -> None:
        """Start copies of the units that come next, as far as the ring has room."""
        order = self._order
        if order is None or self.ring is None or order.ahead is None or not order.known:
            return
        for _ in range(len(order.known)):
            if order.ahead >= len(order.known):
                if not self._wrap:
                    return
                order.ahead = 0
            unit = self.component.units[order.known[order.ahead]]
            if unit.index in self._live or self._is_flying(unit):
                return  # the ring holds a whole turn of the walk
            slot = self._start_copy(unit)
            if slot is None:
                return
            self._inflight.append(InFlight(unit, slot))
            order.ahead += 1

    def _is_flying(self, unit: Unit) -> bool:
        return any(flying.unit is unit for flying in self._inflight)

    def _start_copy(self, unit: Unit) -> Slot | None:
        """Reserve a slot for `unit` and start its copy; None if the ring has no room for it now."""
        ring = self.ring
        slot = ring.reserve(unit.slot_bytes) if ring is not None else None
        if ring is None or slot is None:
            return None
        with self._blocked(unit.storages), self._backend.on_stream(self._copy_stream):
            self._copy_stream.wait_event(ring.reusable_after)
            start = self._backend.record(self._copy_stream, timed=True)
            for storage, part in parts(unit, ring.buffer[slot.start : slot.end]):
                self._weights.copy_to(storage, part)
            slot.copied = self._backend.record(self._copy_stream, timed=True)
        self._log(unit.storages, start, slot.copied, overlapped=True)
        return slot

    def _blocked(self, storages: list[Storage]) -> contextlib.AbstractContextManager[None]:
        """A copy from pageable memory holds the host: what the device waits meanwhile is a stall."""
        if all(self._weights.is_pinned(s) for s in storages):
            return contextlib.nullcontext()
        return self._ledger.wait("stall")

    def _unbind(self, unit: Unit) -> None:
        slot = self._live.pop(unit.index)
        for storage in unit.storages:
            self._weights.unbind(storage)
        if not isinstance(slot, Slot):
            self.gone_aside(slot)
        elif self.ring is not None:
            self.ring.release(slot, self._backend.record(self._compute))

    def _discard(self, flying: InFlight) -> None:
        # Released on the compute stream like every other slot, so that one event covers all that came before it;
        # the copy itself is ordered by the copy stream, on which the next copy into these bytes runs too.
        if self.ring is not None:
            self.ring.release(flying.slot, self._backend.record(self._backend.current_stream()))

    def _log(self, storages: list[Storage], start: Any, end: Any, *, overlapped: bool) -> None:
        self._ledger.move(
            self.component.name,
            "h2d",
            sum(s.nbytes for s in storages),
            "forward",
            copy_start=start,
            copy_end=end,
            overlapped=overlapped,
            count=len(storages),
        )


@contextlib.contextmanager
def copies_ordered(backend: Backend, copy_stream: Any) -> Iterator[None]:
    """Copies in this block run on the copy stream, behind what the compute stream has queued before it and ahead of
    what it queues after; also when the block raises, as the memory they write to may be freed at once."""
    compute = backend.current_stream()
    ready = backend.record(compute)
    try:
        with backend.on_stream(copy_stream):
            copy_stream.wait_event(ready)
            yield
    finally:
        compute.wait_event(backend.record(copy_stream))
