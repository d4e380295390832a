"""Which units stay, which flow. Invariant: a pure function of sizes and budget; the resident set is fixed for a stage.

What does not fit flows through the ring every forward, so what stays is chosen once: never by recency, which on a
cyclic walk hits nothing. Streamed bytes are spread evenly over the execution order (error diffusion), so that the
compute between two streamed units is the time to copy the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .sizes import format_size
from .units import Component, Unit

MOST_GIANTS = 3  # units that are tried as residents for the sake of a smaller ring
LOOKAHEAD_UNITS = 3  # ring size in largest streamed units: one in use, one arriving, one more to ride out the wrap


@dataclass(frozen=True)
class StagePlan:
    """A resident set and a ring. Sizes are device bytes (each storage aligned)."""

    resident: frozenset[int]
    ring_bytes: int
    wrap: bool
    resident_bytes: int
    streamed_bytes: int
    sentence: str
    held_bytes: int = 0  # of units that are brought up beside the ring in every forward

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


def sequential_plan(
    component: Component, held: Iterable[int] = (), prefetch: int | None = None, ceiling: int | None = None
) -> StagePlan:
    """Nothing resident: leaf by leaf through a ring that holds the running leaf and the next ones.

    `held` units (ties, repeats, tensors of modules with children) are brought up once per forward, beside the ring.
    `ceiling` is what the ring and they may take, device bytes: the ring shrinks to one leaf, and where not even that
    fits there is none, and each leaf has a buffer of its own for its call.
    """
    skip = set(held)
    flowing = [u.slot_bytes for u in component.units if u.index not in skip]
    nbytes = component.device_bytes
    beside = nbytes - sum(flowing)
    options = _ring_options(flowing, prefetch)
    ring = next((r for r in options if ceiling is None or r + beside <= ceiling), 0)
    sentence = f"{component.name}: streams {format_size(nbytes)} through {format_size(ring)}"
    return StagePlan(frozenset(), ring, False, 0, nbytes, sentence, held_bytes=beside)


def _ring_options(sizes: Sequence[int], prefetch: int | None) -> list[int]:
    """Ring sizes to try, the best first, bytes: the user's; a lookahead of units; two units; one."""
    largest = max(sizes, default=0)
    wishes = [LOOKAHEAD_UNITS * largest, 2 * largest, largest]
    if prefetch is not None:
        wishes = [max(prefetch, largest), *(min(wish, max(prefetch, largest)) for wish in wishes)]
    return [min(wish, sum(sizes)) for wish in wishes]


def stream_plan(
    component: Component,
    budget: int,
    held: Iterable[int] = (),
    prefetch: int | None = None,
    order: Sequence[int] | None = None,
) -> StagePlan:
    """Keep what `budget` (device bytes, ring included) allows, stream the rest.

    Units in `held` stay first: they cannot flow (ties, repeats, tensors used outside their module's forward). One or
    a few giants may stay too, where that makes the ring smaller than it keeps from staying (an embedding table).
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
    by_size = sorted((u for u in walk if u.index not in fixed), key=lambda u: -u.slot_bytes)
    best: tuple[int, int, frozenset[int]] | None = None  # resident bytes, ring, units that stay
    for lookahead in range(len(_ring_options([], prefetch))):
        for giants in range(min(MOST_GIANTS, len(by_size)) + 1):
            stay = fixed | {u.index for u in by_size[:giants]}
            candidates = [u for u in walk if u.index not in stay]
            ring = _ring_options([u.slot_bytes for u in candidates], prefetch)[lookahead]
            room = budget - sum(by_index[i].slot_bytes for i in stay) - ring
            if room < 0:
                continue
            keep = frozenset(_spread(candidates, room) | stay)
            resident = sum(by_index[i].slot_bytes for i in keep)
            if best is None or resident > best[0]:
                best = (resident, ring, keep)
        if best is not None:
            break  # a shorter lookahead only where a longer one has no room: copies must overlap
    if best is None:
        return sequential_plan(component, held, prefetch, budget)
    resident, ring, keep = best
    flowing = sum(u.slot_bytes for u in component.units if u.index not in keep)
    ring = min(ring, flowing)
    sentence = (
        f"{component.name}: needs {format_size(component.device_bytes)}, {format_size(budget)} allowed: keeps "
        f"{format_size(resident)}, streams {format_size(flowing)} through {format_size(ring)}"
    )
    return StagePlan(keep, ring, True, resident, flowing, sentence)


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
