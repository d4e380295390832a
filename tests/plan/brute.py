"""The best plan there is, by trying them all: every resident set with every ring that lays the rest out otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from balanced_offload.offload.schedule import INFINITE, Piece, Rates, Schedule


def rings(sizes: Sequence[int], most: int) -> list[int]:
    """Ring sizes up to `most` that make different layouts: where a lap ends depends on sums of neighbours alone."""
    sums = {sum(sizes[i:j]) for i in range(len(sizes)) for j in range(i + 1, len(sizes) + 1)}
    return sorted((s for s in sums if max(sizes) <= s <= most), reverse=True)


def resident_sets(walk: Sequence[Piece], budget: int, fixed: frozenset[int]) -> Iterator[frozenset[int]]:
    """Sets of positions that fit the budget and hold the fixed ones."""
    free = [at for at in range(len(walk)) if at not in fixed]
    for count in range(len(free) + 1):
        for more in combinations(free, count):
            keep = fixed.union(more)
            if sum(walk[at].nbytes for at in keep) <= budget:
                yield keep


def best(
    walk: Sequence[Piece], budget: int, rates: Rates, *, wrap: bool = True, fixed: frozenset[int] = frozenset()
) -> float:
    """Seconds of the fastest step within `budget` bytes; infinite where nothing fits."""
    schedule = Schedule(walk, rates)
    found = INFINITE
    for keep in resident_sets(walk, budget, fixed):
        flow = [at for at in range(len(walk)) if at not in keep]
        left = budget - sum(walk[at].nbytes for at in keep)
        if not flow:
            return min(found, schedule.step((), 0, wrap=wrap))
        for ring in rings([walk[at].nbytes for at in flow], left):
            if schedule.floor(flow) < found:
                found = min(found, schedule.step(flow, ring, wrap=wrap))
    return found
