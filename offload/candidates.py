"""Which units could stay: the placements that the planner tries. Invariant: each stays within the room it is given.

Every candidate is a set of units that stay beside a ring. None is believed in: `placement` lets the schedule score
them. On a cyclic walk a fixed set beats any recency, and where its bytes sit matters as much as how many they are: the
copies that gather in a stretch of the walk must fit into its compute time and the ring (a leaky bucket), so a resident
prefix leaves all copies to the rest, while an even spread lets every copy hide behind the compute before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .schedule import Rates

BISECTIONS = 12
MOST_STRETCH = 1e6
TINY_SHARE = 0.01  # of all bytes: units that cost more time to start than to copy stay up to here


@dataclass(frozen=True)
class Choice:
    """A unit that may stay or flow; the order of a list of them is the order in which the walk first passes them."""

    index: int
    nbytes: int  # while it stays
    flow_bytes: int  # copied per step, once per use
    compute_s: float  # of its pieces, weightless work behind them included


Keep = set[int]  # positions in the list of choices


def interleaved(choices: Sequence[Choice], room: int) -> Keep:
    """Error diffusion by bytes: the share that stays is the same in each stretch (Floyd, Steinberg 1976)."""
    total = sum(c.nbytes for c in choices)
    share = min(1.0, room / total) if total else 0.0
    keep: Keep = set()
    kept, due = 0, 0.0
    for at, choice in enumerate(choices):
        due += choice.nbytes * share
        if kept + choice.nbytes <= min(due + choice.nbytes / 2, room):
            keep.add(at)
            kept += choice.nbytes
    return keep


def paced(choices: Sequence[Choice], room: int) -> Keep:
    """Error diffusion by time: copied bytes grow as the compute time does that hides them."""
    total, compute = sum(c.nbytes for c in choices), sum(c.compute_s for c in choices)
    flowing = total - room
    keep: Keep = set()
    kept, streamed, due = 0, 0, 0.0
    for at, choice in enumerate(choices):
        due += flowing * (choice.compute_s / compute if compute else choice.nbytes / total)
        if streamed + choice.nbytes / 2 > due and kept + choice.nbytes <= room:
            keep.add(at)
            kept += choice.nbytes
        else:
            streamed += choice.nbytes
    return keep


def prefix(choices: Sequence[Choice], room: int) -> Keep:
    """The first ones, as a device map has it."""
    keep: Keep = set()
    for at, choice in enumerate(choices):
        if choice.nbytes > room:
            break
        keep.add(at)
        room -= choice.nbytes
    return keep


def by_class(key: Callable[[Choice], float]) -> Callable[[Sequence[Choice], int], Keep]:
    """Least `key` first; the class of equal keys that fits only in part is spread evenly over the walk."""

    def choose(choices: Sequence[Choice], room: int) -> Keep:
        classes: dict[float, list[int]] = {}
        for at, choice in enumerate(choices):
            classes.setdefault(key(choice), []).append(at)
        keep: Keep = set()
        for value in sorted(classes):
            members = classes[value]
            nbytes = sum(choices[at].nbytes for at in members)
            if nbytes <= room:
                keep.update(members)
                room -= nbytes
                continue
            part = [members[i] for i in interleaved([choices[at] for at in members], room)]
            keep.update(part)
            room -= sum(choices[at].nbytes for at in part)
        return keep

    return choose


largest_first = by_class(lambda c: -c.nbytes)
smallest_first = by_class(lambda c: c.nbytes)
# what hides least of its own copy stays: modulations of one token, embeddings, text layers
exposed_first = by_class(lambda c: round(c.compute_s / c.nbytes, 15))


def leaky_bucket(choices: Sequence[Choice], room: int, ring: int, rates: Rates, wrap: bool) -> Keep:
    """Stream whatever a bucket of the ring's size allows that fills at the link's rate while the device computes.

    Where that leaves more to stay than `room`, time is stretched (the step becomes longer than its compute) until it
    does not: the least stretch is found by bisection. A step that starts with nothing ahead starts with the bucket
    empty.
    """
    extra = rates.copy_latency * rates.h2d

    def pour(stretch: float) -> tuple[Keep, int]:
        return _bucket(choices, ring, rates.h2d * stretch, extra, wrap)

    low, high = 0.0, 1.0
    while high < MOST_STRETCH and pour(high)[1] > room:
        low, high = high, high * 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if pour(middle)[1] > room:
            low = middle
        else:
            high = middle
    keep, nbytes = pour(high)
    return keep if nbytes <= room else set()


def _bucket(choices: Sequence[Choice], ring: int, rate: float, extra: float, wrap: bool) -> tuple[Keep, int]:
    keep: Keep = set()
    kept = 0
    most = float(ring)
    level = most if wrap else 0.0
    for _ in range(2 if wrap else 1):  # the second turn begins with what the first left
        keep, kept = set(), 0
        for at, choice in enumerate(choices):
            if level >= min(choice.flow_bytes + extra, most):
                level = max(0.0, level - choice.flow_bytes - extra)
            else:
                keep.add(at)
                kept += choice.nbytes
            level = min(most, level + rate * choice.compute_s)
    return keep, kept


def tiny_units(sizes: Sequence[int], cost: float, room: float = float("inf")) -> set[int]:
    """Positions of the units of at most `cost` bytes, the smallest first, up to a share of all bytes and to `room`:
    what takes longer to start copying than to copy."""
    left = min(TINY_SHARE * sum(sizes), room)
    found: set[int] = set()
    for at in sorted(range(len(sizes)), key=lambda at: sizes[at]):
        if sizes[at] > min(cost, left):
            break
        found.add(at)
        left -= sizes[at]
    return found


def fill(choices: Sequence[Choice], keep: Keep, room: int, order: Iterable[int]) -> Keep:
    """`keep`, and whatever of `order` still fits into `room` bytes."""
    left = room - sum(choices[at].nbytes for at in keep)
    more = set(keep)
    for at in order:
        if at not in more and choices[at].nbytes <= left:
            more.add(at)
            left -= choices[at].nbytes
    return more


SIMPLE: tuple[tuple[str, Callable[[Sequence[Choice], int], Keep]], ...] = (
    ("paced", paced),
    ("interleaved", interleaved),
    ("largest-first", largest_first),
    ("exposed-first", exposed_first),
    ("smallest-first", smallest_first),
    ("prefix", prefix),
)


def families(choices: Sequence[Choice], room: int, ring: int, rates: Rates, wrap: bool) -> Iterator[tuple[str, Keep]]:
    """Every placement by name, within `room` bytes beside a ring of `ring` bytes."""
    by_size = sorted(range(len(choices)), key=lambda at: -choices[at].nbytes)
    yield "leaky-bucket", fill(choices, leaky_bucket(choices, room, ring, rates, wrap), room, by_size)
    for name, choose in SIMPLE:
        yield name, fill(choices, choose(choices, room), room, by_size)
