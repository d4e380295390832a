"""Which units stay and how large the ring is. Invariant: the planner evaluates, it does not believe.

Every placement of `candidates` with every ring size that could pay goes through the event model, the fastest wins, and
a local search goes on from there. A ring byte is a byte that does not stay, so its size is a variable like the rest:
where links are slow it should be as small as one unit, where copies and compute are near each other it has to even
out what their order leaves uneven. Rings are tried whose laps come out even, since every step starts at the front.

Equal times (compute-bound plans) are decided by how the plan bears a link that is a little slower than measured, then
by fewer bytes in the ring, then by fewer bytes copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .candidates import Choice, families, tiny_units
from .schedule import Piece, Rates, Schedule, StepTime
from .search import SOME, Board, Score, even_ring, improve
from .sizes import format_size

RINGS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # ring sizes to try, in largest streamed units
LARGEST_CLASSES = 2  # of the largest sizes, how many may stay whole for the sake of a smaller ring
STARTS = 8  # placements that the search starts from on a short walk
CAUTION = 0.95  # of the measured rate: what a plan should bear without a loss
EVEN = 1e-9  # relative: times that count as equal
NEARLY = 1e-3
ENOUGH = 1.0002  # of the floor that no plan can go below: no search beyond
NOTCHES = 24  # sizes between one unit and the ring that are tried when it is shrunk


@dataclass(frozen=True)
class Placement:
    """What stays, and the ring for the rest. `name` is the family that it came from."""

    name: str
    resident: frozenset[int]  # Unit.index, the fixed ones included
    ring_bytes: int
    step: StepTime


class CannotFit(ValueError):
    """Not even the largest unit has room."""


def plan_walk(
    walk: Sequence[Piece],
    budget: int,
    fixed: Iterable[int],
    rates: Rates,
    prefetch: int | None = None,
    wrap: bool = True,
) -> Placement:
    """The fastest plan within `budget` device bytes, which the ring and the units in `fixed` (indexes) count into.

    `prefetch` is the user's ring size; it grows to the largest streamed unit, and shrinks where there is no room.

    Raises:
        CannotFit: the fixed units and a ring of one unit take more than the budget.
        ValueError: a piece has no index, or one index comes with two sizes.
    """
    return _Planner(walk, budget, frozenset(fixed), rates, prefetch, wrap).plan()


def _places(walk: Sequence[Piece]) -> dict[int, list[int]]:
    """Unit index -> its positions in the walk, in the order in which the walk first passes them."""
    places: dict[int, list[int]] = {}
    for at, piece in enumerate(walk):
        if piece.index < 0:
            raise ValueError(f"walk: piece {at} has the index {piece.index}; allowed: a unit's index, 0 or more")
        places.setdefault(piece.index, []).append(at)
        first = walk[places[piece.index][0]]
        if first.nbytes != piece.nbytes:
            raise ValueError(
                f"walk: unit {piece.index} has {first.nbytes} bytes, and {piece.nbytes} at position {at}; allowed: one "
                "size per unit"
            )
    return places


class _Planner:
    def __init__(
        self, walk: Sequence[Piece], budget: int, fixed: frozenset[int], rates: Rates, prefetch: int | None, wrap: bool
    ) -> None:
        self.rates = rates
        self.wrap = wrap
        self.prefetch = prefetch
        self.schedule = Schedule(walk, rates)
        slower = dataclasses.replace(rates, h2d=CAUTION * rates.h2d, h2d_pageable=CAUTION * rates.h2d_pageable)
        self.slower = Schedule(walk, slower)
        places = _places(walk)
        free = [i for i, at in places.items() if i not in fixed and walk[at[0]].nbytes > 0]
        self.always = frozenset(places) - frozenset(free)
        self.choices = [
            Choice(i, walk[places[i][0]].nbytes, walk[places[i][0]].nbytes * len(places[i]), _compute(walk, places[i]))
            for i in free
        ]
        held = sum(walk[places[i][0]].nbytes for i in self.always)
        self.board = Board(self.schedule, self.choices, [places[i] for i in free], budget - held, prefetch, wrap)
        self.best: Score | None = None
        self.cautious = 0.0
        self.name = ""
        self.starts: dict[str, Score] = {}
        largest = max((c.nbytes for c in self.choices), default=0)
        if self.board.total > self.board.room < largest:
            beside = f" beside {format_size(held)} that cannot flow" if held else ""
            raise CannotFit(
                f"cannot fit: largest unit needs {format_size(largest)}{beside}, and the budget is "
                f"{format_size(max(budget, 0))}; raise the budget, or take a smaller model"
            )

    def plan(self) -> Placement:
        board = self.board
        if board.total <= board.room:
            return self._placement("resident", frozenset(range(len(self.choices))), 0)
        for name, keep in self._candidates():
            self._try(name, board.score(keep, self._limit()))
            if self._settled():
                break
        else:
            self._search()
        self._shrink()
        assert self.best is not None  # the ring of a single unit beside nothing was a candidate, and fits
        return self._placement(self.name, self.best.keep, self.best.ring)

    def _placement(self, name: str, keep: frozenset[int], ring: int) -> Placement:
        flow = set(self.board.flow(keep))
        resident = frozenset(at for at in range(len(self.schedule)) if at not in flow)
        step = self.schedule.predict(resident, ring, wrap=self.wrap)
        return Placement(name, self.always | {self.choices[at].index for at in keep}, ring, step)

    # ------------------------------------------------------------------ candidates
    def _candidates(self) -> Iterator[tuple[str, frozenset[int]]]:
        """Placements by name, those with small rings first."""
        choices, room = self.choices, self.board.room
        everything = range(len(choices))
        tiny = self._tiny()
        sizes = sorted({c.nbytes for c in choices}, reverse=True)
        targets: list[tuple[int, frozenset[int]]] = []
        for bar in sizes[: LARGEST_CLASSES + 1]:  # units above the bar stay
            base = tiny | {at for at in everything if choices[at].nbytes > bar}
            left = room - sum(choices[at].nbytes for at in base)
            for factor in RINGS:
                ring = int(factor * bar)
                if self.prefetch is not None:
                    ring = max(self.prefetch, bar)
                if ring <= left:
                    targets.append((ring, base))
        if not targets:  # the tiny ones have to flow as well
            targets.append((sizes[0], frozenset()))
        for ring, base in sorted(dict.fromkeys(targets), key=lambda t: (t[0], len(t[1]))):
            rest = [at for at in everything if at not in base]
            left = room - ring - sum(choices[at].nbytes for at in base)
            part = [choices[at] for at in rest]
            for name, keep in families(part, left, ring, self.rates, self.wrap):
                yield name, base | {rest[at] for at in keep}

    def _tiny(self) -> frozenset[int]:
        cost = (self.rates.copy_latency + self.rates.hook) * self.rates.h2d
        room = self.board.room - max(self.board.sizes, default=0)
        return frozenset(tiny_units(self.board.sizes, cost, room))

    # ------------------------------------------------------------------ the best
    def _limit(self) -> float:
        """Slower than this is of no interest; what is as fast still is."""
        return float("inf") if self.best is None else self.best.step * (1 + EVEN)

    def _try(self, name: str, score: Score | None) -> None:
        if score is None:
            return
        family = self.starts.get(name)
        if family is None or score.step < family.step:
            self.starts[name] = score
        cautious = self._cautiously(score)
        if self._better(score, cautious):
            self.best, self.cautious, self.name = score, cautious, name

    def _cautiously(self, score: Score) -> float:
        return self.slower.step(self.board.flow(score.keep), score.ring, wrap=self.wrap)

    def _better(self, score: Score, cautious: float) -> bool:
        best = self.best
        if best is None or score.step < best.step * (1 - EVEN):
            return True
        if abs(cautious - self.cautious) > NEARLY * self.cautious:
            return cautious < self.cautious
        return (score.ring, -sum(self.board.sizes[at] for at in score.keep)) < (
            best.ring,
            -sum(self.board.sizes[at] for at in best.keep),
        )

    def _settled(self) -> bool:
        """As fast as the device computes, on a slower link as well."""
        least = self.schedule.floor(())
        return self.best is not None and max(self.best.step, self.cautious) <= least * (1 + EVEN)

    def _search(self) -> None:
        """Go on from the best, on a short walk from the best of several families."""
        board = self.board
        floor = max(self.schedule.floor(()), (board.total - board.room) / self.rates.h2d)
        starts = sorted(self.starts.items(), key=lambda item: item[1].step)
        if self.best is None or self.best.step <= floor * ENOUGH:
            return
        chosen = starts[: STARTS if len(self.choices) <= SOME else 1]
        for name, start in chosen:
            self._try(name, improve(board, start, floor * ENOUGH))

    def _shrink(self) -> None:
        """Take from the ring what it does not need, and give it to units that may stay for it."""
        if self.best is None or self.best.ring == 0 or self.prefetch is not None:
            return
        best = self.best
        ring = _smallest(self.schedule, self.board.flow(best.keep), best.ring, self._as_good)
        self.best = dataclasses.replace(best, ring=ring)
        self._fill()

    def _as_good(self, flow: Sequence[int], ring: int) -> bool:
        assert self.best is not None
        step = self.schedule.step(flow, ring, wrap=self.wrap, below=self.best.step * (1 + EVEN))
        bears = self.cautious * (1 + NEARLY)
        return step <= self.best.step * (1 + EVEN) and self.slower.step(flow, ring, wrap=self.wrap, below=bears) < bears

    def _fill(self) -> None:
        """Units that fit beside a ring that became smaller, as long as no step becomes longer."""
        assert self.best is not None
        best = self.best
        left = self.board.left(best.keep) - best.ring
        keep = set(best.keep)
        for at in sorted(set(range(len(self.choices))) - keep, key=lambda at: -self.board.sizes[at]):
            if self.board.sizes[at] <= left and len(keep) + 1 < len(self.choices):
                keep.add(at)
                left -= self.board.sizes[at]
        if keep != best.keep and self._as_good(self.board.flow(keep), best.ring):
            self.best = Score(frozenset(keep), best.ring, best.step)


def smallest_ring(schedule: Schedule, flow: Sequence[int], most: int, *, wrap: bool = True) -> int:
    """The smallest ring up to `most` bytes that streams the positions `flow` as fast as `most` does."""
    limit = schedule.step(flow, most, wrap=wrap) * (1 + EVEN)

    def as_good(flow: Sequence[int], ring: int) -> bool:
        return schedule.step(flow, ring, wrap=wrap) <= limit

    return _smallest(schedule, flow, most, as_good)


def _smallest(schedule: Schedule, flow: Sequence[int], most: int, as_good: Callable[[Sequence[int], int], bool]) -> int:
    """By bisection over rings whose laps come out even: a ring a little larger is rarely slower."""
    sizes = [schedule.nbytes[p] for p in flow if schedule.nbytes[p]]
    if not sizes:
        return 0
    least = max(sizes)
    rings = sorted({even_ring(sizes, least + (most - least) * n // NOTCHES) for n in range(NOTCHES + 1)})
    low, high = 0, len(rings) - 1
    while low < high:
        middle = (low + high) // 2
        if as_good(flow, rings[middle]):
            high = middle
        else:
            low = middle + 1
    return rings[low] if as_good(flow, rings[low]) else most


def _compute(walk: Sequence[Piece], positions: Sequence[int]) -> float:
    return sum(walk[p].compute_s for p in positions)
