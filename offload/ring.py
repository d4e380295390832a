"""VRAM slots that streamed units pass through. Invariant: one allocation, made before the stage; none inside a step.

A slot is a streamed unit's place in one buffer, the same in every step (layout.py). All that a step needs of it is
made with it: the copy that fills it, the views that its tensors take, and two events. `copied` says that the bytes are
there; `released` says that the compute stream is done with them. Both are recorded anew in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backend import Backend
from .binding import Binding
from .layout import lay_out
from .units import Unit, aligned
from .weights import Weights


class Slot:
    """One streamed unit's place in the ring."""

    __slots__ = ("after", "at", "binding", "copied", "copies", "lead", "nbytes", "pinned", "released", "start", "unit")

    def __init__(
        self, unit: Unit, at: int, after: int, start: int, buffer: torch.Tensor, weights: Weights, backend: Backend
    ) -> None:
        room = buffer[start : start + unit.slot_bytes]
        self.unit = unit
        self.at = at  # its position in the walk
        self.after = after  # the release that its copy waits for, see layout.Layout
        self.lead = after - at  # the same, counted from its own place
        self.start = start
        self.binding = Binding(weights, unit.storages, room)
        self.copies = weights.copies(unit.storages, room)
        self.nbytes = sum(source.numel() for _, source in self.copies)
        self.pinned = all(weights.is_pinned(storage) for storage in unit.storages)
        self.copied: Any = backend.event()
        self.released: Any = backend.event()


class Ring:
    """One device buffer of `capacity` bytes."""

    def __init__(self, backend: Backend, capacity: int) -> None:
        self.capacity = aligned(capacity)
        self._backend = backend
        with torch.inference_mode(False):
            self.buffer = backend.empty(self.capacity)

    def lay(self, units: Sequence[Unit], weights: Weights) -> list[Slot]:
        """Slots for `units` in the order in which they run. What is larger than the ring gets none."""
        flowing = [unit for unit in units if unit.slot_bytes <= self.capacity]
        layout = lay_out([unit.slot_bytes for unit in flowing], self.capacity)
        return [
            Slot(unit, at, layout.after[at], layout.starts[at], self.buffer, weights, self._backend)
            for at, unit in enumerate(flowing)
        ]

    def spot(self, unit: Unit, number: int, start: int, weights: Weights) -> Slot:
        """A slot for a unit whose turn nobody knows yet, at a place of the caller's choice; `at` is -1 - `number`."""
        return Slot(unit, -1 - number, 0, start, self.buffer, weights, self._backend)
