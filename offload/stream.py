"""Streamed units while they run. Invariant: a unit is bound to its slot from just before its forward until just after
it; copies run ahead on the copy stream as far as the ring has room, and never over bytes in use.

The order of execution is recorded in each forward and foreseen for the next one; the slots are laid out for it, and
walk.py keeps the copies ahead. The first forward copies each unit when it is called; from the second on, the copies
run ahead, past the end of a forward too. A unit that was foreseen and skipped costs its copy at most; one that was not
foreseen is copied on the spot into memory of its own, and the walk goes on behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .backend import Backend
from .binding import stretches, version_of
from .copies import copies_ordered
from .ledger import Ledger
from .ring import Ring, Slot
from .units import Component, Storage, Unit, aligned
from .walk import Walk
from .weights import Weights


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
    """Streams the units of one component through one ring.

    `before` and `after` are the hooks around a unit's forward. They do what a step as foreseen needs, and hand over to
    the pair in `otherwise` in all other cases, and while `direct` is not set.
    """

    def __init__(
        self, component: Component, weights: Weights, backend: Backend, ledger: Ledger, copy_stream: Any
    ) -> None:
        self.component = component
        self.ring: Ring | None = None
        self.walk = Walk(component, backend, ledger, copy_stream)
        self.direct = False
        self.otherwise: tuple[Callable[[Unit], None], Callable[[Unit], None]] = (self.take, self.give)
        self._weights = weights
        self._backend = backend
        self._ledger = ledger
        self._copy_stream = copy_stream
        self._order: Order | None = None
        self._seen: list[int] = []  # its `seen`
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
            self.forget_places()
            # the allocator owes these bytes to the compute stream only: let that one wait for the last copy
            self._backend.current_stream().wait_event(self._backend.record(self._copy_stream))
            self.ring = None

    def forget(self) -> None:
        """Discard what was copied ahead."""
        self.walk.forget()
        self._spots, self._next_spot = [], 0

    def forget_places(self) -> None:
        """Masters have moved, or the ring goes: nothing that was prepared holds any more."""
        self.forget()
        self.walk.forget_places()

    # ------------------------------------------------------------------ a forward
    def open(self, order: Order, wrap: bool, flowing: frozenset[int]) -> None:
        """A forward begins. `wrap`: copies run on into the next forward. `flowing`: the units that pass through."""
        order.restrict(flowing)
        self._order = order
        order.seen = self._seen = []
        self.walk.compute = self._backend.current_stream()  # asked once a forward: it costs as much as an event
        if order.known is not None and self.ring is not None:
            self._spots = []
            self.walk.begin(order.known, self.ring, self._weights, wrap)
        else:
            self.forget()
            self._make_spots(flowing)

    def _make_spots(self, flowing: frozenset[int]) -> None:
        """Divide the ring into places for units of any size, taken in turn."""
        if self.ring is None:
            return
        sizes = [self.component.units[index].slot_bytes for index in flowing]
        largest = max((size for size in sizes if size <= self.ring.capacity), default=0)
        if largest:
            ready = self._backend.record(self.walk.compute)
            self._spots = [(n * largest, ready) for n in range(self.ring.capacity // largest)]

    def close(self) -> set[int]:
        """The forward ended. Returns the units that ran more than once: those can not flow, and must be held."""
        order = self._order
        assert order is not None
        self.direct = False
        seen, repeats = order.seen, set[int]()
        if seen != order.known:
            repeats = {i for i, n in Counter(seen).items() if n > 1}
            seen = [i for i in seen if i not in repeats]
        order.deviated = order.known is not None and seen != order.known
        if seen != order.known:
            order.known = seen
            self.forget()
        else:
            self.walk.end()
        order.forwards += 1
        self._order = None
        return repeats

    def abort(self) -> None:
        """The forward raised, at any point of it: unbind what may be bound, and give up the ring with whatever slot
        was in nobody's hands just then."""
        self.direct = False
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

    # ------------------------------------------------------------------ the hooks
    # Both are as flat as they are because Python is what a step of small layers is made of: a call costs as much as
    # three assignments to `.data`.
    def before(self, unit: Unit, *_: Any) -> None:
        """Bind `unit` for its forward; the compute stream waits for its copy."""
        walk = self.walk
        slot = walk.by_unit.get(unit.index)
        if slot is None or not self.direct or slot.at != walk.at or walk.base + slot.at >= walk.issued:
            self.otherwise[0](unit)
            return
        walk.at += 1
        self._seen.append(unit.index)
        self._live[unit.index] = slot
        walk.compute.wait_event(slot.copied)
        binding = slot.binding
        binding.bound = True  # its versions are those that `Walk.begin` looked at
        for tensor, view in binding.ups:
            tensor.data = view

    def after(self, unit: Unit, *_: Any) -> None:
        """The forward of `unit` is over: its bytes may be reused once the compute stream is past this point."""
        slot = self._live.get(unit.index)
        if not isinstance(slot, Slot) or not self.direct or slot.at < 0:
            self.otherwise[1](unit)
            return
        binding = slot.binding
        if binding.suspects or binding.versions != list(map(version_of, binding.counted)):
            binding.keep_writes()
        for tensor, home in binding.downs:
            tensor.data = home
        binding.bound = False
        del self._live[unit.index]
        walk = self.walk
        slot.released.record(walk.compute)
        if walk.base + slot.at == walk.given and not walk.early:
            walk.given += 1
        else:
            walk.give_back(walk.base + slot.at)
        if walk.needed < walk.given:
            walk.pump()

    def take(self, unit: Unit) -> None:
        """`before`, whatever the case."""
        index, walk = unit.index, self.walk
        if index in self._live:
            return
        order = self._order
        assert order is not None
        order.seen.append(index)
        slot = walk.by_unit.get(index)
        if slot is None:
            slot = self._on_the_spot(unit)
        elif not walk.reach(slot):
            slot = None
        if slot is None:
            self._live[index] = self.copy_aside(unit.storages, unit.slot_bytes)
            return
        # before it is bound: an exception in between leaves nothing bound that nobody knows of
        self._live[index] = slot
        with self._ledger.wait("stall"):
            walk.compute.wait_event(slot.copied)
        slot.binding.up()

    def give(self, unit: Unit) -> None:
        """`after`, whatever the case."""
        place, walk = self._live.get(unit.index), self.walk
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
        place.released.record(walk.compute)
        if place.at < 0:
            self._spots[-1 - place.at] = (place.start, place.released)
        else:
            walk.give_back(walk.base + place.at)
            walk.pump()

    # ------------------------------------------------------------------ what nobody foresaw
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
        self.walk.timed_copy(slot, released)
        return slot

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
        nbytes = sum(source.numel() for _, source in copies)
        self._ledger.move(
            self.component.name, "h2d", nbytes, "forward", copy_start=start, copy_end=end, count=len(copies)
        )
        return buffer

    def gone_aside(self, buffer: torch.Tensor) -> None:
        """A buffer that `copy_aside` made is not used any more."""
        self._beside -= buffer.numel()
