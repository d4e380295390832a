"""Who stays, who goes. Invariant: evict for a need, in order of cost, and stop when there is room.

The order of decision is never > always > low (with the fit rule) > keep. A stage needs the bytes still to load plus
its activations; it has what the driver has free plus what our allocator can reuse. These are pure functions of
figures: nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .calibration import Costs
from .ledger import Reason
from .plan import StagePlan, full_plan, sequential_plan, stream_plan
from .policy import OffloadMode, ResolvedPolicy
from .schedule import Rates
from .units import Component

# Room left for what an allocator loses to rounding and fragmentation, as a share of the card, and at most.
SLACK_SHARE = 0.01
SLACK_MOST = 256 << 20


@dataclass(frozen=True)
class Other:
    """Another component, as a candidate for eviction. Bytes are device bytes."""

    name: str
    nbytes: int
    distance: int  # stages until its next use; larger is later


@dataclass(frozen=True)
class Eviction:
    """Free `nbytes` of a component, or all of it where None."""

    name: str
    nbytes: int | None
    reason: Reason


def slack(total: int) -> int:
    """Bytes of a card of `total` bytes that no plan counts on."""
    return min(int(total * SLACK_SHARE), SLACK_MOST)


def at_stage_change(policy: ResolvedPolicy, others: Sequence[Other], *, decoding: bool, used: int) -> list[Eviction]:
    """What has to go whatever the need: by mode, by the always list, by a user's low = 0, by SD.Next's rule.

    `others` are the evictable components (not running, not in `never`); `used` is what is in use on the card, bytes.
    """
    if policy.mode is OffloadMode.NONE and policy.fits:
        return [Eviction(o.name, None, "always") for o in others if o.name in policy.always]
    if policy.mode in (OffloadMode.MODEL, OffloadMode.SEQUENTIAL):
        return [Eviction(o.name, None, "stage") for o in others]
    gone: list[Eviction] = []
    for other in sorted(others, key=lambda o: o.name):
        if other.name in policy.always:
            gone.append(Eviction(other.name, None, "always"))
        elif policy.low_always:
            gone.append(Eviction(other.name, None, "low"))
        elif decoding and policy.before_decode == "free_all":
            gone.append(Eviction(other.name, None, "policy"))
        elif not policy.fit_aware and used > policy.low:
            gone.append(Eviction(other.name, None, "low"))
        else:
            continue
        used -= other.nbytes
    return gone


def for_need(others: Sequence[Other], missing: int) -> list[Eviction]:
    """Evict until `missing` bytes come free: latest next use first, then the largest; only part of the last one."""
    gone: list[Eviction] = []
    for other in sorted(others, key=lambda o: (-o.distance, -o.nbytes, o.name)):
        if missing <= 0:
            break
        whole = other.nbytes <= missing
        gone.append(Eviction(other.name, None if whole else missing, "need"))
        missing -= other.nbytes
    return gone


def choose_plan(
    policy: ResolvedPolicy,
    component: Component,
    ceiling: int,
    held: frozenset[int],
    order: Sequence[int] | None,
    *,
    costs: Costs | None = None,
    rates: Rates | None = None,
    pageable: Collection[int] = (),
    activations: int | None = None,
) -> StagePlan:
    """The plan of a component that may hold `ceiling` device bytes of weights in this stage.

    `costs` are the times of its units where they are known, `pageable` the units whose masters cannot be pinned.
    """
    times = None if costs is None else costs.walk
    own = None if costs is None else costs.own
    if component.name in policy.never or policy.mode is OffloadMode.MODEL:
        return full_plan(component)
    if policy.mode is OffloadMode.NONE and not policy.fits:
        return full_plan(component)  # the user's own word; where it does not fit, the error says so
    if policy.high is not None:
        ceiling = min(ceiling, policy.high)
    if policy.mode is OffloadMode.SEQUENTIAL:
        return sequential_plan(
            component, held, policy.prefetch, ceiling, costs=times, rates=rates, own=own, pageable=pageable
        )
    return stream_plan(
        component,
        ceiling,
        held,
        policy.prefetch,
        order,
        costs=times,
        rates=rates,
        own=own,
        pageable=pageable,
        activations=activations,
    )


def shares(weights: dict[str, int], room: int) -> dict[str, int]:
    """Split `room` between components that run in turns: all they want if it fits, else in proportion."""
    total = sum(weights.values())
    if total <= room or total == 0:
        return dict(weights)
    return {name: nbytes * max(room, 0) // total for name, nbytes in weights.items()}


def in_turns(history: Sequence[tuple[str, int]], name: str, most_calls: int = 2, longest: int = 4) -> frozenset[str]:
    """The components that run in turns with `name`, itself included; empty when it does not take turns.

    `history` is the sequence of finished stages (component, calls); `name` is about to run. A control net and its
    denoiser alternate within every step: evicting one for the other at each turn would move everything twice a step,
    so they share a budget. Two whole rounds of the same components, with few calls each, are taken for turns.
    """
    past = list(history)
    for length in range(2, longest + 1):
        rounds = past[-2 * length :]
        if len(rounds) < 2 * length:
            return frozenset()
        names = [other for other, _ in rounds]
        if names[0] == name and names[:length] == names[length:] and len(set(names)) == length:
            return frozenset(names) if all(calls <= most_calls for _, calls in rounds) else frozenset()
    return frozenset()
