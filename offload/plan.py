"""Which units stay, which flow. Invariant: a pure function of sizes, times and budget; a stage's resident set is fixed.

What does not fit flows through the ring every forward, so what stays is chosen once: never by recency, which on a
cyclic walk hits nothing. Where the time of each unit is known, the event model chooses (`placement`). Until then the
streamed bytes are spread evenly over the execution order (error diffusion), so that the compute between two streamed
units is about the time to copy the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .candidates import Choice, fill, interleaved, tiny_units
from .explain import plan_sentence
from .placement import CannotFit, plan_walk, smallest_ring
from .schedule import Piece, Rates, Schedule, StepTime
from .sizes import format_size
from .units import Component

MOST_GIANTS = 3  # units that are tried as residents for the sake of a smaller ring
LOOKAHEAD_UNITS = 3  # ring size in largest streamed units: one in use, one arriving, one more to ride out the wrap
SMALL_UNIT = 192 << 10  # bytes whose copy takes no longer than it takes to start it, on a common link
Times = Sequence[tuple[int, float]]  # (unit index, seconds) in order of execution


@dataclass(frozen=True)
class StagePlan:
    """A resident set and a ring. Sizes are device bytes (each storage aligned), times seconds per forward.

    `placement` names the family that the resident set came from. `step_s` is the predicted time of a forward, None
    where the units' times are not known; `bound_s` is its floor, max(compute, streamed bytes / bandwidth).
    """

    resident: frozenset[int]
    ring_bytes: int
    wrap: bool
    resident_bytes: int
    streamed_bytes: int
    sentence: str
    held_bytes: int = 0  # of units that are brought up beside the ring in every forward
    placement: str = ""
    step_s: float | None = None
    bound_s: float | None = None
    compute_s: float | None = None

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
    sentence = f"{component.name}: all {format_size(nbytes)} resident"
    return StagePlan(everything, 0, False, nbytes, 0, sentence, placement="resident")


def sequential_plan(
    component: Component,
    held: Iterable[int] = (),
    prefetch: int | None = None,
    ceiling: int | None = None,
    *,
    costs: Times | None = None,
    rates: Rates | None = None,
    own: Mapping[int, float] | None = None,
    pageable: Collection[int] = (),
) -> StagePlan:
    """Nothing resident: leaf by leaf through a ring that holds the running leaf and the next ones.

    `held` units (ties, repeats, tensors of modules with children) are brought up once per forward, beside the ring.
    `ceiling` is what the ring and they may take, device bytes: the ring shrinks to one leaf, and where not even that
    fits there is none, and each leaf has a buffer of its own for its call. With `costs` and `rates` (as in
    `stream_plan`) the ring is the smallest that is as fast as the largest one allowed, and the time is predicted.
    """
    skip = set(held)
    flowing = [u.slot_bytes for u in component.units if u.index not in skip]
    nbytes = component.device_bytes
    beside = nbytes - sum(flowing)
    options = _ring_options(flowing, prefetch)
    ring = next((r for r in options if ceiling is None or r + beside <= ceiling), 0)
    step: StepTime | None = None
    if ring and costs is not None and rates is not None:
        walk = _walk(component, costs, own, pageable)
        schedule = Schedule(walk, rates)
        here = {at for at, piece in enumerate(walk) if piece.index in skip or not piece.nbytes}
        if prefetch is None:
            ring = smallest_ring(schedule, [at for at in range(len(walk)) if at not in here], ring, wrap=False)
        step = _with_held(schedule.predict(here, ring, wrap=False), component, skip, rates)
    sentence = plan_sentence(component.name, nbytes, None, None, 0, nbytes, ring, step)
    return _predicted(StagePlan(frozenset(), ring, False, 0, nbytes, sentence, beside, "sequential"), step)


def _with_held(step: StepTime, component: Component, held: Collection[int], rates: Rates) -> StepTime:
    """The step with the units in front of it that a forward brings up before it begins."""
    sizes = [u.slot_bytes for u in component.units if u.index in held]
    extra = sum(sizes) / rates.h2d
    whole = step.step_s + extra + rates.copy_latency * len(sizes)
    copies = (step.copied_bytes + sum(sizes)) / rates.h2d
    return StepTime(
        whole,
        whole - step.step_s + step.stall_s,
        step.compute_s,
        max(step.bound_s, copies),
        step.copied_bytes + sum(sizes),
    )


def _predicted(plan: StagePlan, step: StepTime | None) -> StagePlan:
    if step is None:
        return plan
    return dataclasses.replace(plan, step_s=step.step_s, bound_s=step.bound_s, compute_s=step.compute_s)


def _walk(
    component: Component, costs: Times, own: Mapping[int, float] | None, pageable: Collection[int]
) -> list[Piece]:
    """The units of `costs` as pieces; what is not a unit of the component is left out."""
    by_index = {u.index: u for u in component.units}
    return [
        Piece(
            by_index[i].slot_bytes,
            seconds,
            i,
            pinned=i not in pageable,
            own_s=None if own is None else own.get(i),
            tensors=max(1, len(by_index[i].storages)),
        )
        for i, seconds in costs
        if i in by_index
    ]


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
    *,
    costs: Times | None = None,
    rates: Rates | None = None,
    own: Mapping[int, float] | None = None,
    pageable: Collection[int] = (),
    activations: int | None = None,
) -> StagePlan:
    """Keep what `budget` (device bytes, ring included) allows, stream the rest.

    Units in `held` stay first: they cannot flow (ties, repeats, tensors used outside their module's forward).
    `order` is the order of execution as unit indexes, definition order where it is not known yet.

    With `costs` (unit index and seconds, in order of execution) and `rates` the event model chooses what stays and
    the ring, and predicts the time. `own` has the seconds until a unit's own forward ends, which is when its place in
    the ring is free; `pageable` the units whose masters are not pinned. Units that `costs` lacks do not run: they get
    what is left. `activations` only serves the sentence, bytes.

    Falls back to `sequential_plan` where the budget does not even hold a ring.
    """
    if component.device_bytes <= budget:
        return _predicted(full_plan(component), _whole(component, costs, rates))
    held = list(held)
    if costs is not None and rates is not None:
        return _timed(
            component, budget, held, prefetch, _walk(component, costs, own, pageable), rates, activations
        ) or (sequential_plan(component, held, prefetch, budget, costs=costs, rates=rates, own=own, pageable=pageable))
    return _untimed(component, budget, held, prefetch, order, activations) or (
        sequential_plan(component, held, prefetch, budget)
    )


def _whole(component: Component, costs: Times | None, rates: Rates | None) -> StepTime | None:
    if costs is None or rates is None:
        return None
    walk = _walk(component, costs, None, ())
    return Schedule(walk, rates).predict(frozenset(range(len(walk))), 0)


def _timed(
    component: Component,
    budget: int,
    held: Iterable[int],
    prefetch: int | None,
    walk: Sequence[Piece],
    rates: Rates,
    activations: int | None,
) -> StagePlan | None:
    """The plan that the event model chooses, None where the budget holds no ring."""
    sizes = {u.index: u.slot_bytes for u in component.units}
    fixed = {i for i in held if i in sizes}
    runs = {piece.index for piece in walk}
    room = budget - sum(sizes[i] for i in fixed - runs)
    try:
        placed = plan_walk(walk, room, fixed, rates, prefetch)
    except CannotFit:
        return None
    keep = set(placed.resident | fixed)
    left = budget - sum(sizes[i] for i in keep) - placed.ring_bytes
    for i in sorted(sizes.keys() - keep - runs, key=lambda i: -sizes[i]):
        if sizes[i] <= left:
            keep.add(i)
            left -= sizes[i]
    return _stage_plan(component, frozenset(keep), placed.ring_bytes, budget, activations, placed.name, placed.step)


def _stage_plan(
    component: Component,
    keep: frozenset[int],
    ring: int,
    budget: int,
    activations: int | None,
    placement: str,
    step: StepTime | None,
) -> StagePlan:
    resident = sum(u.slot_bytes for u in component.units if u.index in keep)
    flowing = component.device_bytes - resident
    sentence = plan_sentence(component.name, component.device_bytes, budget, activations, resident, flowing, ring, step)
    return _predicted(StagePlan(keep, ring, True, resident, flowing, sentence, placement=placement), step)


def _untimed(
    component: Component,
    budget: int,
    held: Iterable[int],
    prefetch: int | None,
    order: Sequence[int] | None,
    activations: int | None,
) -> StagePlan | None:
    """The even spread. Small units stay first; one or a few giants may stay too, where that makes the ring smaller
    than it keeps from staying (an embedding table)."""
    sizes = {u.index: u.slot_bytes for u in component.units}
    fixed = {i for i in held if i in sizes}
    walk = list(dict.fromkeys([*(i for i in order or () if i in sizes), *sizes]))
    free = [i for i in walk if i not in fixed]
    small = {free[at] for at in tiny_units([sizes[i] for i in free], SMALL_UNIT)}
    best: tuple[int, int, frozenset[int]] | None = None  # resident bytes, ring, units that stay
    for lookahead in range(len(_ring_options([], prefetch))):
        for base in (fixed | small, fixed):
            found = _spreads([i for i in walk if i not in base], base, sizes, budget, prefetch, lookahead)
            best = max(found, key=lambda f: f[0], default=None)
            if best is not None:
                break  # small units flow only where they leave no room for the ring
        if best is not None:
            break  # a shorter lookahead only where a longer one has no room: copies must overlap
    if best is None:
        return None
    resident, ring, keep = best
    ring = min(ring, component.device_bytes - resident)
    return _stage_plan(component, keep, ring, budget, activations, "interleaved", None)


def _spreads(
    walk: Sequence[int], base: set[int], sizes: Mapping[int, int], budget: int, prefetch: int | None, lookahead: int
) -> Iterable[tuple[int, int, frozenset[int]]]:
    """Even spreads over the units of `walk` beside `base`, each with a number of giants that stay: resident bytes, the
    ring, and the units."""
    by_size = sorted(walk, key=lambda i: -sizes[i])
    for giants in range(min(MOST_GIANTS, len(by_size)) + 1):
        stay = base.union(by_size[:giants])
        rest = [Choice(i, sizes[i], sizes[i], 0.0) for i in walk if i not in stay]
        ring = _ring_options([c.nbytes for c in rest], prefetch)[lookahead]
        room = budget - sum(sizes[i] for i in stay) - ring
        if room < 0:
            continue
        largest_first = sorted(range(len(rest)), key=lambda at: -rest[at].nbytes)
        keep = stay.union(rest[at].index for at in fill(rest, interleaved(rest, room), room, largest_first))
        yield sum(sizes[i] for i in keep), ring, frozenset(keep)


def grown_plan(component: Component, plan: StagePlan, budget: int, order: Sequence[int] | None = None) -> StagePlan:
    """`plan` with more of it resident, where the budget has become larger: nothing that stays leaves, nothing else
    streams than did, and what still streams is spread evenly over the order of execution."""
    if component.device_bytes <= budget:
        return full_plan(component)
    by_index = {u.index: u for u in component.units}
    walk = [by_index[i] for i in order or () if i in by_index]
    walk += [u for u in component.units if u.index not in {u.index for u in walk}]
    rest = [Choice(u.index, u.slot_bytes, u.slot_bytes, 0.0) for u in walk if u.index not in plan.resident]
    room = budget - plan.device_bytes
    largest_first = sorted(range(len(rest)), key=lambda at: -rest[at].nbytes)
    more = fill(rest, interleaved(rest, room), room, largest_first) if room > 0 else frozenset()
    keep = plan.resident | {rest[at].index for at in more}
    return _stage_plan(component, keep, plan.ring_bytes, budget, None, plan.placement, None)


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
