"""Which units stay, which flow. Invariant: a pure function of sizes and budget; the resident set is fixed for a stage.

What does not fit flows through the ring every forward, so what stays is chosen once: never by recency, which on a
cyclic walk hits nothing. Streamed bytes are spread evenly over the execution order (error diffusion), so that the
compute between two streamed units is the time to copy the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .sizes import format_size
from .units import Component, Unit

LOOKAHEAD_UNITS = 3  # ring size in largest streamed units: one in use, one arriving, one more to ride out the wrap


class Plan(Protocol):
    """What an engine executes for one component."""

    @property
    def resident(self) -> frozenset[int]:
        """Indexes of the units that stay on the device during the stage."""
        ...

    @property
    def ring_bytes(self) -> int:
        """Device bytes for streamed units; 0 when nothing streams."""
        ...

    @property
    def wrap(self) -> bool:
        """Whether the lookahead runs across the end of a forward into the next."""
        ...

    @property
    def device_bytes(self) -> int:
        """Resident bytes plus ring."""
        ...

    @property
    def sentence(self) -> str:
        """The plan in words."""
        ...


@dataclass(frozen=True)
class StagePlan:
    """A resident set and a ring. Sizes are device bytes (each storage aligned)."""

    resident: frozenset[int]
    ring_bytes: int
    wrap: bool
    resident_bytes: int
    streamed_bytes: int
    sentence: str

    @property
    def device_bytes(self) -> int:
        """Resident bytes plus ring."""
        return self.resident_bytes + self.ring_bytes

    @property
    def streams(self) -> bool:
        """Whether a unit flows through the ring."""
        return self.streamed_bytes > 0

    def within(self, loaded: frozenset[int]) -> StagePlan:
        """The part of this plan that needs no loading: what is on the device already, and no ring yet."""
        return dataclasses.replace(self, resident=self.resident & loaded, ring_bytes=0)


def full_plan(component: Component) -> StagePlan:
    """Everything resident, nothing streamed."""
    nbytes = component.device_bytes
    everything = frozenset(u.index for u in component.units)
    return StagePlan(everything, 0, False, nbytes, 0, f"{component.name}: all {format_size(nbytes)} resident")


def sequential_plan(component: Component, held: Iterable[int] = (), prefetch: int | None = None) -> StagePlan:
    """Nothing resident: leaf by leaf through a ring that holds the running leaf and the next ones.

    `held` units (ties, repeats, tensors of modules with children) are brought up once per forward, beside the ring.
    """
    skip = set(held)
    flowing = [u.slot_bytes for u in component.units if u.index not in skip]
    ring = max(_ring_bytes(flowing, prefetch), 0)
    nbytes = component.device_bytes
    return StagePlan(
        frozenset(),
        ring,
        False,
        0,
        nbytes,
        f"{component.name}: streams {format_size(nbytes)} through {format_size(ring)}",
    )


def _ring_bytes(sizes: Sequence[int], prefetch: int | None) -> int:
    largest = max(sizes, default=0)
    if prefetch is not None:
        return max(prefetch, largest)
    return min(LOOKAHEAD_UNITS * largest, sum(sizes))


def stream_plan(
    component: Component,
    budget: int,
    held: Iterable[int] = (),
    prefetch: int | None = None,
    order: Sequence[int] | None = None,
) -> StagePlan:
    """Keep what `budget` (device bytes, ring included) allows, stream the rest.

    Units in `held` stay first: they cannot flow (ties, repeats, tensors used outside their module's forward).
    `order` is the order of execution as unit indexes, definition order where it is not known yet.
    Falls back to `sequential_plan` where the budget does not even hold a ring.
    """
    if component.device_bytes <= budget:
        return full_plan(component)
    by_index = {u.index: u for u in component.units}
    fixed = {i for i in held if i in by_index}
    walk = [by_index[i] for i in order if i in by_index] if order else []
    walked = {u.index for u in walk}
    walk += [u for u in component.units if u.index not in walked]
    candidates = [u for u in walk if u.index not in fixed]
    fixed_bytes = sum(by_index[i].slot_bytes for i in fixed)
    ring = _ring_bytes([u.slot_bytes for u in candidates], prefetch)
    room = budget - fixed_bytes - ring
    if room < 0:  # a shorter lookahead before no residency: two leaves still overlap
        ring = _ring_bytes([u.slot_bytes for u in candidates], 0)
        room = budget - fixed_bytes - ring
    if room < 0:
        return sequential_plan(component, held, prefetch)
    keep = _spread(candidates, room) | fixed
    resident = sum(by_index[i].slot_bytes for i in keep)
    flowing = [u.slot_bytes for u in component.units if u.index not in keep]
    ring = min(ring, sum(flowing))
    streamed = sum(flowing)
    sentence = (
        f"{component.name}: needs {format_size(component.device_bytes)}, {format_size(budget)} allowed: keeps "
        f"{format_size(resident)}, streams {format_size(streamed)} through {format_size(ring)}"
    )
    return StagePlan(frozenset(keep), ring, True, resident, streamed, sentence)


def _spread(candidates: Sequence[Unit], room: int) -> set[int]:
    """The units to keep within `room` bytes, so that the streamed bytes are spread evenly over the walk."""
    total = sum(u.slot_bytes for u in candidates)
    if total == 0:
        return set()
    share = min(1.0, room / total)
    keep: set[int] = set()
    kept, due = 0, 0.0
    for unit in candidates:
        due += unit.slot_bytes * share
        if kept + unit.slot_bytes <= min(due + unit.slot_bytes / 2, room):
            keep.add(unit.index)
            kept += unit.slot_bytes
    for unit in sorted(candidates, key=lambda u: -u.slot_bytes):  # what rounding left over
        if unit.index not in keep and kept + unit.slot_bytes <= room:
            keep.add(unit.index)
            kept += unit.slot_bytes
    return keep


def units_to_free(component: Component, loaded: Iterable[int], nbytes: int) -> list[int]:
    """Units to evict so that at least `nbytes` come free, with little more: largest first while they fit under the
    need, then the smallest one that covers the rest."""
    by_size = sorted((component.units[i] for i in loaded), key=lambda u: -u.slot_bytes)
    chosen: list[int] = []
    missing = nbytes
    for unit in by_size:
        if 0 < unit.slot_bytes <= missing:
            chosen.append(unit.index)
            missing -= unit.slot_bytes
    if missing > 0:
        rest = [u for u in by_size if u.index not in set(chosen) and u.slot_bytes > 0]
        if rest:
            chosen.append(min(rest, key=lambda u: u.slot_bytes).index)
    return chosen
