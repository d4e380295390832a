"""Units that stay on the device. Invariant: what is counted has its memory, and what is bound has its bytes there.

A unit has a buffer of its own, so that evicting it gives memory back. Units may be brought up early, while another
component computes: they have their memory and their copies are under way, but no tensor points at them before the
component's own stage takes them, and the compute stream waits for them then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch

from .backend import Backend, Mark
from .binding import stretches
from .copies import copies_ordered
from .ledger import Ledger, Reason
from .units import Component, Unit, counts_writes
from .weights import Weights


class Residents:
    """The resident units of one component."""

    def __init__(
        self, component: Component, weights: Weights, backend: Backend, ledger: Ledger, copy_stream: Any
    ) -> None:
        self.loaded: dict[int, torch.Tensor] = {}  # unit index -> its buffer; its tensors point there
        self.moved: set[int] = set()  # units that were loaded before: what moved twice will move again
        self._early: dict[int, torch.Tensor] = {}  # likewise, but nothing points there yet
        self._early_versions: dict[int, list[int]] = {}  # what their copies were made of
        self._arrival: Any = None  # event on the copy stream behind the last early copy
        self._component = component
        self._weights = weights
        self._backend = backend
        self._ledger = ledger
        self._copy_stream = copy_stream

    @property
    def nbytes(self) -> int:
        """Device bytes, those of units brought up early included."""
        return sum(buffer.numel() for held in (self.loaded, self._early) for buffer in held.values())

    def missing_bytes(self, wanted: Collection[int]) -> int:
        """Device bytes that the units of `wanted` lack."""
        here = self.loaded.keys() | self._early.keys()
        return sum(self._component.units[i].slot_bytes for i in set(wanted) - here)

    def surplus_bytes(self, wanted: Collection[int]) -> int:
        """Device bytes of units that are here and not in `wanted`."""
        here = self.loaded.keys() | self._early.keys()
        return sum(self._component.units[i].slot_bytes for i in here - set(wanted))

    # ------------------------------------------------------------------ up
    def load(self, wanted: Iterable[int], reason: Reason, avoidable: bool) -> None:
        """Bring up units that are not here. All memory is allocated before anything is copied.

        Raises:
            torch.OutOfMemoryError: there is no room; what was here before is as it was.
        """
        units = [self._component.units[index] for index in wanted]
        with torch.inference_mode(False), torch.no_grad():
            buffers = {unit.index: self._backend.empty(unit.slot_bytes) for unit in units}
            if not buffers:
                return
            with self._ledger.span("onload"):
                with copies_ordered(self._backend, self._copy_stream):
                    self._copy(units, buffers, reason, avoidable=avoidable)
                self._bind(units, buffers)
        self.loaded.update(buffers)
        self.moved.update(buffers)

    def bring_early(self, wanted: Iterable[int], room: int, avoidable: bool = False) -> int:
        """Start to bring up units within `room` bytes, behind whatever computes now; the device bytes they take.

        Only page-locked masters: a copy from others would hold the host, and with it what computes now.
        """
        units: list[Unit] = []
        for index in wanted:
            unit = self._component.units[index]
            pinned = all(self._weights.is_pinned(storage) for storage in unit.storages)
            if pinned and unit.slot_bytes <= room and index not in self.loaded and index not in self._early:
                units.append(unit)
                room -= unit.slot_bytes
        if not units:
            return 0
        buffers: dict[int, torch.Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            try:
                for unit in units:
                    buffers[unit.index] = self._backend.empty(unit.slot_bytes)
            except torch.OutOfMemoryError:  # what has a buffer is brought up, the rest comes in its own time
                units = [unit for unit in units if unit.index in buffers]
            # queued kernels may still use bytes that the allocator hands out again
            compute = self._backend.current_stream()
            ready = self._backend.record(compute)
            versions = {unit.index: self._versions(unit) for unit in units}
            try:
                with self._backend.on_stream(self._copy_stream):
                    self._copy_stream.wait_event(ready)
                    self._copy(units, buffers, "stage", avoidable=avoidable, overlapped=True)
                self._arrival = self._backend.record(self._copy_stream)
            except BaseException:  # the buffers go, and may be somebody else's before what was queued has run
                compute.wait_event(self._backend.record(self._copy_stream))
                raise
        self._early_versions.update(versions)
        self._early.update(buffers)  # last: what counts as early has its copy under way
        self.moved.update(buffers)
        return sum(buffer.numel() for buffer in buffers.values())

    def take_early(self, wanted: Collection[int]) -> None:
        """The component's own stage begins: point at the early units it wants, let the others go."""
        if not self._early:
            return
        with self._ledger.wait("onload"):
            self._backend.current_stream().wait_event(self._arrival)
        buffers, self._early = self._early, {}
        versions, self._early_versions = self._early_versions, {}
        kept = {
            index: buffer
            for index, buffer in buffers.items()
            # what was written since its copy was started comes up again
            if index in wanted and versions[index] == self._versions(self._component.units[index])
        }
        with torch.inference_mode(False), torch.no_grad():
            self._bind([self._component.units[index] for index in kept], kept)
        self.loaded.update(kept)

    @staticmethod
    def _versions(unit: Unit) -> list[int]:
        """How often each tensor of a unit was written in place; -1 where that is not counted."""
        counters = [ref.writes for storage in unit.storages for ref in storage.refs]
        return [counter._version if counts_writes(counter) else -1 for counter in counters]

    def _copy(
        self,
        units: Iterable[Unit],
        buffers: dict[int, torch.Tensor],
        reason: Reason,
        *,
        avoidable: bool = False,
        overlapped: bool = False,
    ) -> None:
        copies = [pair for unit in units for pair in self._weights.copies(unit.storages, buffers[unit.index])]
        start: Mark = self._backend.record(self._copy_stream, timed=True)
        for target, source in copies:
            target.copy_(source, non_blocking=True)
        end: Mark = self._backend.record(self._copy_stream, timed=True)
        self._ledger.move(
            self._component.name,
            "h2d",
            sum(source.numel() for _, source in copies),
            reason,
            copy_start=start,
            copy_end=end,
            avoidable=avoidable,
            overlapped=overlapped,
            count=len(copies),
        )

    def _bind(self, units: Iterable[Unit], buffers: dict[int, torch.Tensor]) -> None:
        for unit in units:
            for storage, part in zip(unit.storages, stretches(unit.storages, buffers[unit.index]), strict=True):
                self._weights.bind(storage, part)

    # ------------------------------------------------------------------ down
    def drop(self, indexes: Iterable[int], reason: Reason) -> None:
        """Evict units; nothing is copied."""
        gone = list(indexes)
        if not gone:
            return
        with self._ledger.span("evict"):
            freed = 0
            for index in gone:
                unit = self._component.units[index]
                del self.loaded[index]  # first: a unit may be bound and not counted, never counted and not bound
                for storage in unit.storages:
                    self._weights.unbind(storage, keep_foreign=True)
                freed += unit.nbytes
        self._ledger.move(self._component.name, "drop", freed, reason, count=len(gone))

    def drop_early(self) -> None:
        """Let what was brought up early go. Its copies may be under way: the memory goes to nobody before they end."""
        if self._early:
            self._backend.current_stream().wait_event(self._arrival)
            freed = sum(self._component.units[index].nbytes for index in self._early)
            count = len(self._early)
            self._early.clear()
            self._early_versions.clear()
            self._ledger.move(self._component.name, "drop", freed, "need", count=count)
