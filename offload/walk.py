"""How far a walk through the ring has come. Invariant: no copy starts before what lay in its bytes was given back.

Places are counted through all forwards: unit `at` of forward f is place f * n + at. Three counters say it all: copies
are issued up to `issued`, units were given back up to `given`, and the forward that began at place `base` has come to
its unit `at`. What the next copy waits for is one number, `needed` (see layout.Layout): it is due once that is given.
"""

from __future__ import annotations

import contextlib
from typing import Any

from .backend import Backend
from .ledger import Ledger
from .ring import Ring, Slot
from .units import Component
from .weights import Weights

NEVER = 1 << 62  # a place that no walk comes to
MOST_TURNS = 4  # orders of execution whose slots are kept: a VAE's encode and decode, and a few more


class Walk:
    """The slots of one order of execution, and the copies into them."""

    def __init__(self, component: Component, backend: Backend, ledger: Ledger, copy_stream: Any) -> None:
        self.slots: list[Slot] = []
        self.by_unit: dict[int, Slot] = {}
        self.base = self.at = self.issued = self.given = self.limit = 0
        self.needed = NEVER
        self.compute: Any = None  # the stream that computes in this forward
        self.watched: list[tuple[int, bool, Any, Any]] | None = None  # (bytes, pinned, start, end) of copies, if asked
        self.early: set[int] = set()  # places given back before one in front of them
        self._ready: Any = None  # what the first copies wait for: whatever used these bytes before
        self._turns: list[tuple[list[int], list[Slot]]] = []  # orders for which slots were laid out in this ring
        self._laid_for: list[int] | None = None  # the one that the slots at hand are for
        self._component = component
        self._backend = backend
        self._ledger = ledger
        self._copy_stream = copy_stream

    # ------------------------------------------------------------------ forwards
    def begin(self, known: list[int], ring: Ring, weights: Weights, wrap: bool) -> None:
        """A forward begins that is to run the units `known`. `wrap`: copies may run on into the next one."""
        if self._laid_for is not known:
            self.forget()
            slots = next((slots for order, slots in self._turns if order == known), None)
            if slots is None:
                slots = ring.lay([self._component.units[index] for index in known], weights)
                self._turns = [*self._turns[1 - MOST_TURNS :], (known, slots)]
            for slot in slots:
                slot.binding.versions = slot.binding.versions_now()
            self.slots, self._laid_for = slots, known
            self.by_unit = {slot.unit.index: slot for slot in slots}
            self._ready = self._backend.record(self.compute)
        elif any([slot.binding.versions_now() != slot.binding.versions for slot in self.slots]):
            self._written()
        self.limit = self.base + (2 if wrap else 1) * len(self.slots)
        self._look_ahead()
        self.pump()

    def _written(self) -> None:
        """Somebody wrote to masters since they were looked at: copies that ran ahead may be of before that."""
        known, slots, by_unit = self._laid_for, self.slots, self.by_unit
        self.forget()
        self.slots, self.by_unit, self._laid_for = slots, by_unit, known
        self._ready = self._backend.record(self.compute)
        for slot in slots:
            slot.binding.versions = slot.binding.versions_now()

    def end(self) -> None:
        """The forward ran as foreseen."""
        self.base += len(self.slots)
        self.at = 0

    def forget(self) -> None:
        """Discard what was copied ahead. Copies that are under way are no danger: later ones come behind them."""
        self.slots, self.by_unit, self._laid_for = [], {}, None
        self.base = self.at = self.issued = self.given = self.limit = 0
        self.needed = NEVER
        self.early.clear()

    def forget_places(self) -> None:
        """Copies and views that were prepared point at places where no master, or no ring, lies any more."""
        self.forget()
        self._turns.clear()

    # ------------------------------------------------------------------ steps
    def reach(self, slot: Slot) -> bool:
        """Go on to `slot`, wherever the walk is; False if it is past it already, or its copy cannot start yet."""
        if slot.at < self.at:
            return False
        while self.at < slot.at:  # foreseen, but skipped this time
            self._pass()
        if self.base + slot.at >= self.issued:
            self.pump()
            if self.base + slot.at >= self.issued:  # units that run around it hold the bytes
                self._pass()
                return False
        self.at += 1
        return True

    def _pass(self) -> None:
        """A place goes by unused. Released on the compute stream like all others, so that one event covers all that
        came before it; the copy, if it is under way, comes before the next one into these bytes."""
        place = self.base + self.at
        self.slots[self.at].released.record(self.compute)
        self.at += 1
        if self.issued <= place:
            self.issued = place + 1
            self._look_ahead()
        self.give_back(place)

    def give_back(self, place: int) -> None:
        """The bytes of `place` are free once the compute stream has passed its event, which is recorded."""
        if place != self.given:
            self.early.add(place)
            return
        self.given += 1
        while self.given in self.early:  # given back before its turn: its event has to come behind the others
            self.early.remove(self.given)
            self.slots[self.given % len(self.slots)].released.record(self.compute)
            self.given += 1

    # ------------------------------------------------------------------ copies
    def _look_ahead(self) -> None:
        """What the next copy waits for."""
        if self.issued < self.limit:
            slot = self.slots[self.issued % len(self.slots)]
            self.needed = self.issued - slot.at + slot.after
        else:
            self.needed = NEVER

    def pump(self) -> None:
        """Start the copies that come next, as far as what lay in their bytes was given back."""
        if self.needed >= self.given:
            return
        if self._ledger.active or self.watched is not None:
            while self.needed < self.given:
                self.timed_copy(self.slots[self.issued % len(self.slots)], self._after())
                self.issued += 1
                self._look_ahead()
            return
        slots, count, stream, ledger = self.slots, len(self.slots), self._copy_stream, self._ledger
        self._backend.set_stream(stream)
        try:
            while self.needed < self.given:
                slot = slots[self.issued % count]
                stream.wait_event(slots[self.needed % count].released if self.needed >= 0 else self._ready)
                for target, source in slot.copies:
                    target.copy_(source, non_blocking=True)
                slot.copied.record(stream)
                ledger.total_moves += len(slot.copies)
                ledger.total_bytes_h2d += slot.nbytes
                issued = self.issued = self.issued + 1
                if issued < self.limit:  # as in _look_ahead
                    self.needed = issued + slots[issued % count].lead
                else:
                    self.needed = NEVER
        finally:
            self._backend.set_stream(self.compute)

    def _after(self) -> Any:
        return self.slots[self.needed % len(self.slots)].released if self.needed >= 0 else self._ready

    def timed_copy(self, slot: Slot, after: Any) -> None:
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
        self._ledger.move(
            self._component.name,
            "h2d",
            slot.nbytes,
            "forward",
            copy_start=start,
            copy_end=end,
            overlapped=slot.at >= 0,
            pinned=slot.pinned,
            count=len(slot.copies),
        )
