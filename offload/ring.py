"""VRAM slots that streamed units pass through. Invariant: one allocation, made before the stage; none inside a step.

The ring is one buffer, handed out in order and given back in order. A slot is reusable once the compute stream has
passed the event recorded at its release; since that stream runs in order, the event of the latest release covers all
earlier ones, so a copy into reused bytes waits for one event only. A slot given back out of order (a leaf that runs
inside another one) waits for the older ones: FIFO is what makes the buffer free of fragmentation.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from .backend import Backend
from .units import aligned


class Slot:
    """A stretch of the ring: where it lies, and the event that says it is filled."""

    __slots__ = ("copied", "end", "given_back", "nbytes", "start")

    def __init__(self, start: int, end: int, nbytes: int) -> None:
        self.start = start
        self.end = end  # aligned
        self.nbytes = nbytes
        self.copied: Any = None  # event on the copy stream: the bytes are here
        self.given_back = False


class Ring:
    """A FIFO of slots in one device buffer of `capacity` bytes."""

    def __init__(self, backend: Backend, capacity: int) -> None:
        self.capacity = aligned(capacity)
        with torch.inference_mode(False):
            self.buffer = backend.empty(self.capacity)
        self._live: deque[Slot] = deque()
        self._head = 0  # next free byte
        # what a copy into the ring has to wait for: at first, whatever used these bytes before they were the ring's
        self.reusable_after: Any = backend.record(backend.current_stream())
        self._latest: Any = self.reusable_after  # event of the latest release, in time and not by place in the ring

    def reserve(self, nbytes: int) -> Slot | None:
        """The next slot of `nbytes`, or None while the bytes it would take are still in use."""
        size = aligned(nbytes)
        self._collect()
        if size > self.capacity:
            return None
        if not self._live:
            start = self._head if self._head + size <= self.capacity else 0
        else:
            tail = self._live[0].start
            if self._head > tail:  # used: [tail, head)
                if self._head + size <= self.capacity:
                    start = self._head
                elif size <= tail:
                    start = 0
                else:
                    return None
            elif self._head + size <= tail:  # used: [tail, end) and [0, head); equal ends mean full
                start = self._head
            else:
                return None
        slot = Slot(start, start + size, nbytes)
        self._live.append(slot)
        self._head = slot.end if slot.end < self.capacity else 0
        return slot

    def view(self, slot: Slot, offset: int, nbytes: int) -> torch.Tensor:
        """`nbytes` of the slot from `offset` on, as uint8."""
        return self.buffer[slot.start + offset : slot.start + offset + nbytes]

    def release(self, slot: Slot, event: Any) -> None:
        """The slot may be reused once the compute stream has passed `event`."""
        slot.given_back = True
        self._latest = event
        self._collect()

    def _collect(self) -> None:
        while self._live and self._live[0].given_back:
            self._live.popleft()
            self.reusable_after = self._latest

    @property
    def in_use(self) -> int:
        """Slots that are not given back."""
        return len(self._live)
