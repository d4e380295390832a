"""The walk of streamed units through the ring. Invariant: a unit is bound to its slot from just before its forward
until just after it; copies run ahead on the copy stream as far as the ring has room, and never over bytes in use.

The order of execution is recorded in each forward and foreseen for the next one; the slots are laid out for it. The
first forward copies each unit when it is called; from the second on, the copies run ahead, past the end of a forward
too. A unit that was foreseen and skipped costs its copy at most; one that was not foreseen is copied on the spot into
memory of its own, and the walk goes on behind it.

Places are counted through all forwards: unit `at` of forward f is place f * n + at. Three counters say it all: copies
are issued up to `_issued`, units were given back up to `_given`, and the forward stands at `_place`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .backend import Backend
from .binding import stretches
from .ledger import Ledger
from .ring import Ring, Slot
from .units import Component, Storage, Unit, aligned
from .weights import Weights

NEVER = 1 << 62  # a place that no walk comes to
MOST_TURNS = 4  # orders of execution whose slots are kept: a VAE's encode and decode, and a few more


class Order:
    """What one entry point of a component was seen to run."""

    def __init__(self) -> None:
        self.known: list[int] | None = None  # streamed units in the order of the last forward
        self.flowing: frozenset[int] = frozenset()  # the units that did not stay then, whether they ran or not
        self.seen: list[int] = []  # this forward, as it goes
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


class Stream:
    """Streams the units of one component through one ring."""

    def __init__(
        self, component: Component, weights: Weights, backend: Backend, ledger: Ledger, copy_stream: Any
    ) -> None:
        self.component = component
        self.ring: Ring | None = None
        self.watched: list[tuple[int, bool, Any, Any]] | None = None  # (bytes, pinned, start, end) of copies, if asked
        self._weights = weights
        self._backend = backend
        self._ledger = ledger
        self._copy_stream = copy_stream
        self._order: Order | None = None
        self._compute: Any = None
        self._slots: list[Slot] = []
        self._by_unit: dict[int, Slot] = {}
        self._turns: list[tuple[list[int], list[Slot]]] = []  # orders for which slots were laid out in this ring
        self._laid_for: list[int] | None = None  # the one that the slots at hand are for
        self._base = self._place = self._issued = self._given = self._limit = 0
        self._needed = NEVER  # the place whose release the next copy waits for
        self._early: set[int] = set()  # places given back before one in front of them
        self._ready: Any = None  # what the first copies wait for: whatever used these bytes before
        self._spots: list[tuple[int, Any]] = []  # while the order is not known: where units may lie, and since when
        self._next_spot = 0
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
            self.masters_moved()
            # the allocator owes these bytes to the compute stream only: let that one wait for the last copy
            self._backend.current_stream().wait_event(self._backend.record(self._copy_stream))
            self.ring = None

    def masters_moved(self) -> None:
        """Copies and views that were prepared point at places where no master, or no ring, lies any more."""
        self.forget()
        self._turns.clear()

    # ------------------------------------------------------------------ a forward
    def open(self, order: Order, wrap: bool, flowing: frozenset[int]) -> None:
        """A forward begins. `wrap`: copies run on into the next forward. `flowing`: the units that pass through."""
        order.restrict(flowing)
        self._order = order
        self._compute = self._backend.current_stream()  # asked once a forward: it costs as much as an event
        order.seen = []
        if order.known is None or self.ring is None:
            self.forget()
            self._make_spots(flowing)
            return
        if self._laid_for is not order.known:
            self._lay(order.known)
        count = len(self._slots)
        self._limit = self._base + (2 * count if wrap else count)
        self._look_ahead()
        self._pump()

    def _lay(self, known: list[int]) -> None:
        self.forget()
        assert self.ring is not None
        slots = next((slots for order, slots in self._turns if order == known), None)
        if slots is None:
            slots = self.ring.lay([self.component.units[i] for i in known], self._weights)
            self._turns = [*self._turns[1 - MOST_TURNS :], (known, slots)]
        self._slots, self._laid_for = slots, known
        self._by_unit = {slot.unit.index: slot for slot in slots}
        self._ready = self._backend.record(self._compute)

    def _make_spots(self, flowing: frozenset[int]) -> None:
        """Divide the ring into places for units of any size, taken in turn."""
        if self.ring is None:
            return
        sizes = [self.component.units[index].slot_bytes for index in flowing]
        largest = max((size for size in sizes if size <= self.ring.capacity), default=0)
        if largest:
            self._ready = self._backend.record(self._compute)
            self._spots = [(n * largest, self._ready) for n in range(self.ring.capacity // largest)]

    def close(self) -> set[int]:
        """The forward ended. Returns the units that ran more than once: those can not flow, and must be held."""
        order = self._order
        assert order is not None
        repeats = {i for i, n in Counter(order.seen).items() if n > 1}
        seen = [i for i in order.seen if i not in repeats] if repeats else order.seen
        order.deviated = order.known is not None and seen != order.known
        if seen != order.known:
            order.known = seen
            self.forget()
        else:
            self._base += len(self._slots)
            self._place = self._base
        order.forwards += 1
        self._order = None
        return repeats

    def abort(self) -> None:
        """The forward raised, at any point of it: unbind what may be bound, and give up the ring with whatever slot
        was in nobody's hands just then."""
        for index in list(self._live):
            place = self._live.pop(index)
            if isinstance(place, Slot):
                place.binding.down()
            else:
                for storage in self.component.units[index].storages:
                    self._weights.unbind(storage)
        self._beside = 0
        self.drop()
        self._order = None

    def take(self, unit: Unit) -> None:
        """Bind `unit` for its forward; the compute stream waits for its copy."""
        index = unit.index
        if index in self._live:
            return
        order = self._order
        assert order is not None
        order.seen.append(index)
        slot = self._by_unit.get(index)
        if slot is None:
            slot = self._on_the_spot(unit)
        elif self._base + slot.at == self._place < self._issued:  # as foreseen
            self._place += 1
        else:
            slot = self._reach(slot)
        if slot is None:
            self._live[index] = self.copy_aside(unit.storages, unit.slot_bytes)
            return
        # before it is bound: an exception in between leaves nothing bound that nobody knows of
        self._live[index] = slot
        if self._ledger.active:
            with self._ledger.wait("stall"):
                self._compute.wait_event(slot.copied)
        else:
            self._compute.wait_event(slot.copied)
        slot.binding.up()

    def give(self, unit: Unit) -> None:
        """The forward of `unit` is over: its bytes may be reused once the compute stream is past this point."""
        place = self._live.get(unit.index)
        if place is None:
            return
        if not isinstance(place, Slot):
            del self._live[unit.index]
            for storage in unit.storages:
                self._weights.unbind(storage)
            self.gone_aside(place)
            return
        place.binding.down()
        del self._live[unit.index]
        place.released.record(self._compute)
        if place.at < 0:
            self._spots[-1 - place.at] = (place.start, place.released)
            return
        here = self._base + place.at
        if here == self._given and not self._early:
            self._given = here + 1
        else:
            self._give_back(here)
        if self._needed < self._given:
            self._pump()

    def forget(self) -> None:
        """Discard what was copied ahead. Copies that are under way are no danger: later ones come behind them."""
        self._slots, self._by_unit, self._laid_for, self._spots = [], {}, None, []
        self._base = self._place = self._issued = self._given = self._limit = self._next_spot = 0
        self._needed = NEVER
        self._early.clear()

    # ------------------------------------------------------------------ beside the ring
    def copy_aside(self, storages: Sequence[Storage], nbytes: int) -> torch.Tensor:
        """Bring `storages` up in a buffer of their own and bind them; the compute stream waits for the copy."""
        with torch.inference_mode(False), torch.no_grad():
            buffer = self._backend.empty(nbytes)
        self._beside += nbytes
        self.most_beside = max(self.most_beside, self._beside)
        copies = self._weights.copies(storages, buffer)
        # queued kernels may still read bytes that the allocator hands out again
        with self._ledger.wait("stall"), copies_ordered(self._backend, self._copy_stream):
            start = self._backend.record(self._copy_stream, timed=True)
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            end = self._backend.record(self._copy_stream, timed=True)
        for storage, part in zip(storages, stretches(storages, buffer), strict=True):
            self._weights.bind(storage, part)
        self._log(sum(source.numel() for _, source in copies), len(copies), start, end, overlapped=False)
        return buffer

    def gone_aside(self, buffer: torch.Tensor) -> None:
        """A buffer that `copy_aside` made is not used any more."""
        self._beside -= buffer.numel()

    # ------------------------------------------------------------------ inside
    def _reach(self, slot: Slot) -> Slot | None:
        """Go on to `slot`; None if the walk is past it already, or its copy cannot start yet."""
        place = self._base + slot.at
        if place < self._place:
            return None
        while self._place < place:  # foreseen, but skipped this time
            self._pass(self._place)
        if place >= self._issued:
            self._pump()
            if place >= self._issued:  # units that run around it hold the bytes
                self._pass(place)
                return None
        self._place = place + 1
        return slot

    def _pass(self, place: int) -> None:
        """A place goes by unused. Released on the compute stream like all others, so that one event covers all that
        came before it; the copy, if it is under way, comes before the next one into these bytes."""
        self._slots[place % len(self._slots)].released.record(self._compute)
        self._issued = max(self._issued, place + 1)
        self._look_ahead()
        self._place = place + 1
        self._give_back(place)

    def _give_back(self, place: int) -> None:
        if place != self._given:
            self._early.add(place)
            return
        self._given += 1
        while (
            self._early and self._given in self._early
        ):  # given back before its turn: what waits for it waits for the others too
            self._early.remove(self._given)
            self._slots[self._given % len(self._slots)].released.record(self._compute)
            self._given += 1

    def _look_ahead(self) -> None:
        """What the next copy waits for."""
        if self._issued < self._limit:
            slot = self._slots[self._issued % len(self._slots)]
            self._needed = self._issued - slot.at + slot.after
        else:
            self._needed = NEVER

    def _pump(self) -> None:
        """Start the copies that come next, as far as what lay in their bytes was given back."""
        if self._needed >= self._given:
            return
        slots, count, stream = self._slots, len(self._slots), self._copy_stream
        timed = self._ledger.active or self.watched is not None
        if not timed:
            self._backend.set_stream(stream)
        try:
            while self._needed < self._given:
                slot = slots[self._issued % count]
                after = slots[self._needed % count].released if self._needed >= 0 else self._ready
                if timed:
                    self._timed_copy(slot, after)
                else:
                    stream.wait_event(after)
                    for target, source in slot.copies:
                        target.copy_(source, non_blocking=True)
                    slot.copied.record(stream)
                    self._ledger.total_moves += len(slot.copies)
                    self._ledger.total_bytes_h2d += slot.nbytes
                self._issued += 1
                self._look_ahead()
        finally:
            if not timed:
                self._backend.set_stream(self._compute)

    def _on_the_spot(self, unit: Unit) -> Slot | None:
        """Nobody foresaw this unit: copy it now, into a spot of the ring if there is one that is free."""
        if not self._spots or self.ring is None:
            return None
        number = self._next_spot % len(self._spots)
        start, released = self._spots[number]
        room = self._spots[1][0] if len(self._spots) > 1 else self.ring.capacity
        if released is None or unit.slot_bytes > room:  # another unit lies there and runs
            return None
        self._next_spot += 1
        slot = self.ring.spot(unit, number, start, self._weights)
        self._spots[number] = (start, None)
        self._timed_copy(slot, released)
        return slot

    def _timed_copy(self, slot: Slot, after: Any) -> None:
        """Fill a slot, with marks around the copy for whoever wants to know how long it takes."""
        # a copy from pageable memory holds the host: what the device waits meanwhile is a stall
        blocked = contextlib.nullcontext() if slot.pinned else self._ledger.wait("stall")
        with blocked, self._backend.on_stream(self._copy_stream):
            self._copy_stream.wait_event(after)
            start = self._backend.record(self._copy_stream, timed=True)
            for target, source in slot.copies:
                target.copy_(source, non_blocking=True)
            end = self._backend.record(self._copy_stream, timed=True)
            slot.copied.record(self._copy_stream)
        if self.watched is not None:
            self.watched.append((slot.nbytes, slot.pinned, start, end))
        self._log(slot.nbytes, len(slot.copies), start, end, overlapped=slot.at >= 0)

    def _log(self, nbytes: int, count: int, start: Any, end: Any, *, overlapped: bool) -> None:
        self._ledger.move(
            self.component.name,
            "h2d",
            nbytes,
            "forward",
            copy_start=start,
            copy_end=end,
            overlapped=overlapped,
            count=count,
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
