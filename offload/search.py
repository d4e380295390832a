"""The board that placements are scored on, and the search around the best. Invariant: a score is a plan that fits.

A placement is the set of units that stay; what they leave of the room is the ring. The search exchanges units between
the two sides. On a short walk it tries every exchange of a few units; on a long one, those that the schedule points at:
what was copied just before a stall stays, for units that stay where the copies have time to spare.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import combinations

from .candidates import Choice
from .schedule import INFINITE, Schedule

FEW = 14  # units whose every exchange is tried, with every ring whose laps come out even
SOME = 48  # units whose every exchange of one for one is tried
ROUNDS = 60  # exchanges at most
GUIDED = 24  # exchanges that are scored per round on a long walk
WINDOW = 4  # streamed units before a stall whose copies may be its cause
GAIN = 1e-7  # relative: what an exchange has to save


@dataclass(frozen=True)
class Score:
    """A placement with its best ring. Seconds and bytes."""

    keep: frozenset[int]  # positions in the list of choices
    ring: int
    step: float


class Board:
    """One walk, one room: scores sets of units that stay."""

    def __init__(
        self,
        schedule: Schedule,
        choices: Sequence[Choice],
        positions: Sequence[Sequence[int]],
        room: int,
        prefetch: int | None,
        wrap: bool,
    ) -> None:
        self.schedule = schedule
        self.choices = choices
        self.positions = positions  # of each choice in the walk
        self.room = room
        self.prefetch = prefetch
        self.wrap = wrap
        self.sizes = [c.nbytes for c in choices]
        self.total = sum(self.sizes)
        self._above: dict[frozenset[int], float] = {}  # what is known not to be faster than that
        self._known: dict[frozenset[int], Score] = {}
        self.single = all(len(p) == 1 for p in positions)

    def left(self, keep: AbstractSet[int]) -> int:
        """Bytes beside the units that stay."""
        return self.room - sum(self.sizes[at] for at in keep)

    def flow(self, keep: AbstractSet[int]) -> list[int]:
        """Positions in the walk that are streamed."""
        if self.single:
            return [self.positions[at][0] for at in range(len(self.choices)) if at not in keep]
        return sorted(p for at, places in enumerate(self.positions) if at not in keep for p in places)

    def rings(self, keep: AbstractSet[int]) -> list[int]:
        """Ring sizes worth a look, the largest first; none where a unit that flows does not fit."""
        flow = [self.schedule.nbytes[p] for p in self.flow(keep)]
        left = self.left(keep)
        if not flow:
            return [0] if left >= 0 else []
        most = min(left, sum(flow))
        largest = max(flow)
        if most < largest:
            return []
        if self.prefetch is not None:
            return [min(most, max(self.prefetch, largest))]
        return [most, *even_rings(flow, most)] if len(self.choices) <= FEW else [most]

    def score(self, keep: AbstractSet[int], below: float = INFINITE) -> Score | None:
        """The best of its rings, or None where it has no room or is not faster than `below`."""
        keep = frozenset(keep)
        known = self._known.get(keep)
        if known is not None:
            return known if known.step < below else None
        if self._above.get(keep, 0.0) >= below:
            return None
        flow = self.flow(keep)
        if self.schedule.floor(flow) >= below:
            return None
        limit, best = below, None
        for ring in self.rings(keep):
            step = self.schedule.step(flow, ring, wrap=self.wrap, below=below)
            if step < below:
                best, below = Score(keep, ring, step), step
        if best is None:
            self._above[keep] = limit
        else:
            self._known[keep] = best
        return best


def even_rings(sizes: Sequence[int], most: int) -> list[int]:
    """For each number of laps that a ring of up to `most` bytes can make the smallest such ring; largest first."""
    found: list[int] = []
    ring = most
    while ring >= max(sizes):
        ring = even_ring(sizes, ring)
        if ring < most:
            found.append(ring)
        ring -= 1
    return found


def even_ring(sizes: Sequence[int], ring: int) -> int:
    """The smallest ring that makes as few laps as `ring` does."""
    wanted = laps(sizes, ring)
    low, high = max(sizes) - 1, ring
    while high - low > 1:
        middle = (low + high) // 2
        if laps(sizes, middle) <= wanted:
            high = middle
        else:
            low = middle
    return high


def laps(sizes: Sequence[int], ring: int) -> int:
    """How often the layout starts at the front for units of `sizes`."""
    count, head = 1, 0
    for size in sizes:
        head += size
        if head > ring:
            count, head = count + 1, size
    return count


def improve(board: Board, start: Score, enough: float) -> Score:
    """Exchange units as long as it pays, or until a step takes no longer than `enough` seconds."""
    best = start
    for _ in range(ROUNDS):
        if best.step <= enough:
            break
        moves = _exchanges(board, best.keep) if len(board.choices) <= SOME else _guided(board, best)
        found: Score | None = None
        for keep in moves:
            limit = (found or best).step * (1 - GAIN)
            found = board.score(keep, limit) or found
        if found is None:
            break
        best = found
    return best


def _exchanges(board: Board, keep: frozenset[int]) -> Iterator[frozenset[int]]:
    """All sets that have a few units for as many others: up to two on a short walk, else one."""
    most = 2 if len(board.choices) <= FEW else 1
    inside, outside = sorted(keep), [at for at in range(len(board.choices)) if at not in keep]
    for gone in _up_to(most, inside):
        for more in _up_to(most, outside):
            if gone or more:
                yield (keep - gone) | more


def _up_to(most: int, members: Sequence[int]) -> list[frozenset[int]]:
    return [frozenset(c) for count in range(most + 1) for c in combinations(members, count)]


def _guided(board: Board, best: Score) -> Iterator[frozenset[int]]:
    """Exchanges that take copies away from before the longest stalls."""
    flow = board.flow(best.keep)
    owner = {p: at for at, places in enumerate(board.positions) for p in places}
    stalls = board.schedule.stalls(flow, best.ring, wrap=board.wrap)
    order = sorted(range(len(flow)), key=lambda i: -stalls[i])
    idle = sorted(best.keep, key=lambda at: _stall_near(board, flow, stalls, at))
    tried = 0
    for victim in order:
        if stalls[victim] <= 0.0:
            return
        for back in range(WINDOW):
            stays = owner[flow[(victim - back) % len(flow)]]
            need = board.sizes[stays] - board.left(best.keep) + best.ring
            if need <= 0:
                yield best.keep | {stays}
                tried += 1
            fits = [at for at in idle if need <= board.sizes[at] <= board.sizes[stays]]
            for goes in fits[:2]:
                yield (best.keep - {goes}) | {stays}
                tried += 1
            if tried >= GUIDED:
                return


def _stall_near(board: Board, flow: Sequence[int], stalls: Sequence[float], at: int) -> float:
    """How much the streamed units behind a unit that stays wait: where they do not, one more copy may fit."""
    behind = bisect_left(flow, board.positions[at][0])
    return sum(stalls[(behind + i) % len(flow)] for i in range(WINDOW))
