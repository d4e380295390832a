"""An event model of one compute engine and one copy engine. Invariant: it never promises a step below its bound.

A *walk* is the units of a component in the order in which a step runs them. Resident ones only compute; the others
flow through the ring, laid out by the very `layout.lay_out` that the engine carries out:

- one copy stream, in order: a copy starts when the one before it is done and the release that its bytes wait for has
  passed; it takes a fixed latency plus bytes / rate;
- a unit computes when the piece before it is done, its copy is there and the host has launched it;
- it is released at the end of its own forward: what follows it without weights (attention) no longer needs its bytes;
- the host runs ahead of the device; it issues a copy where it passes the release that the copy waits for. A copy from
  pageable memory holds it until the copy is done.

All of this is sums and maxima of times, so a steady state is an eigenvalue in max-plus algebra: the largest mean of
the circuits of the step (Baccelli, Cohen, Olsder, Quadrat: Synchronization and Linearity, 1992). The three circuits
that only one engine closes (compute, copies, host) are sums. Where no other is longer, one of them is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from .layout import lay_out

SURE_STEPS = 6  # steps in which a bound that holds shows as a fixed point; in practice it takes two or three
QUICK_STEPS = 4  # the same for a limit that is not to be exceeded: beyond, it counts as exceeded
MOST_STEPS = 96  # steps until a steady state that is no bound has settled
LONGEST_PERIOD = 4  # steps after which a settled state may recur
INFINITE = float("inf")
EXACT = 1e-12  # relative: what float sums of a step lose


@dataclass(frozen=True)
class Rates:
    """What a machine moves. Measured where it can be; `source` is "measured", "stored" or "assumed"."""

    h2d: float  # bytes/s from pinned memory
    h2d_pageable: float  # bytes/s from pageable memory; the call holds the host
    copy_latency: float = 8e-6  # s, the fixed part of every copy
    hook: float = 0.0  # host seconds per streamed unit: our Python
    source: str = "assumed"


@dataclass(frozen=True)
class Piece:
    """A unit where the walk passes it.

    `compute_s` runs from the start of its forward until the next piece's forward starts, so weightless work counts to
    the unit before it. `own_s` is the part until its own forward ends, where its bytes are free again (None: all of
    it). `tensors` is how many tensors it has: who copies them one by one pays the latency for each.
    """

    nbytes: int  # device bytes = bytes copied
    compute_s: float
    index: int = -1  # Unit.index
    host_s: float = 0.0  # host time to launch that work
    pinned: bool = True
    own_s: float | None = None
    tensors: int = 1


@dataclass(frozen=True)
class StepTime:
    """One step of the steady state, seconds.

    `stall_s` is what the copies add to the step as it were with every copy done beforehand. `bound_s` is the floor of
    this resident set, max(C, S / B): no schedule computes and copies it faster.
    """

    step_s: float
    stall_s: float
    compute_s: float
    bound_s: float
    copied_bytes: int


def predict_step(
    walk: Sequence[Piece], resident: AbstractSet[int], ring_bytes: int, rates: Rates, *, wrap: bool = True
) -> StepTime:
    """The time of a step with the pieces at the positions `resident` of `walk` on the device, the rest streamed.

    `wrap`: copies run on over the step boundary, and the time is that of the steady state. Otherwise a step starts
    with nothing ahead: its first copies begin when it begins.

    Raises:
        ValueError: a streamed piece is larger than `ring_bytes`.
    """
    return Schedule(walk, rates).predict(resident, ring_bytes, wrap=wrap)


class Schedule:
    """A walk under some rates, prepared for many predictions."""

    def __init__(self, walk: Sequence[Piece], rates: Rates) -> None:
        self.rates = rates
        self.nbytes = [p.nbytes for p in walk]
        self.compute = [max(0.0, p.compute_s) for p in walk]
        self.own = [
            c if p.own_s is None else min(max(0.0, p.own_s), c) for p, c in zip(walk, self.compute, strict=True)
        ]
        self.host = [max(0.0, p.host_s) for p in walk]
        # launches are spread over a piece as its work is: the host passes the release behind that share of them
        shares = (own / c if c > 0 else 1.0 for own, c in zip(self.own, self.compute, strict=True))
        self.own_host = [host * share for host, share in zip(self.host, shares, strict=True)]
        self.held = [not p.pinned for p in walk]
        speed = [rates.h2d if p.pinned else rates.h2d_pageable for p in walk]
        self.moving = [n / v for n, v in zip(self.nbytes, speed, strict=True)]
        self.copying = [rates.copy_latency + t for t in self.moving]
        self.compute_s = sum(self.compute)
        self.host_s = sum(self.host)

    def __len__(self) -> int:
        return len(self.nbytes)

    def predict(self, resident: AbstractSet[int], ring_bytes: int, *, wrap: bool = True) -> StepTime:
        """As `predict_step`."""
        flow = [i for i, n in enumerate(self.nbytes) if n > 0 and i not in resident]
        step = self.step(flow, ring_bytes, wrap=wrap)
        bound = max(self.compute_s, sum(self.moving[i] for i in flow))
        alone = max(self.compute_s, self.host_s + self.rates.hook * len(flow))
        step = max(step, bound)  # by the last bit of a float sum
        copied = sum(self.nbytes[i] for i in flow)
        return StepTime(step, max(0.0, step - alone), self.compute_s, bound, copied)

    def step(self, flow: Sequence[int], ring_bytes: int, *, wrap: bool = True, below: float = INFINITE) -> float:
        """Seconds of a step that streams the positions `flow` (ascending, of more than 0 bytes).

        `below`: only faster steps are asked for; infinite where it is not below that, which is known much sooner.
        """
        if self.floor(flow) >= below:
            return INFINITE
        if not flow:
            return max(self.compute_s, self._chain(0, len(self))[2])
        return _Run(self, flow, self._after(flow, ring_bytes)).step(wrap, below)

    def step_after(self, flow: Sequence[int], after: Sequence[int], *, wrap: bool = True) -> float:
        """As `step`, with the releases that the copies wait for given, as in `Layout.after`."""
        return _Run(self, flow, after).step(wrap, INFINITE)

    def _after(self, flow: Sequence[int], ring_bytes: int) -> Sequence[int]:
        return lay_out([self.nbytes[i] for i in flow], ring_bytes).after

    def stalls(self, flow: Sequence[int], ring_bytes: int, *, wrap: bool = True) -> list[float]:
        """Seconds that compute waits for the copy of each position of `flow`, once the steps have settled."""
        return _Run(self, flow, self._after(flow, ring_bytes)).stalls(wrap)

    def floor(self, flow: Sequence[int]) -> float:
        """The longest circuit that one engine closes: compute, copies with their latency, or the host."""
        copies = sum(self.copying[i] for i in flow)
        held = sum(self.copying[i] for i in flow if self.held[i])
        return max(self.compute_s, copies, self.host_s + self.rates.hook * len(flow) + held)

    def _chain(self, begin: int, end: int) -> tuple[float, float, float]:
        """Pieces that all are there: compute seconds, host seconds, and the longest way from the host's begin to the
        last kernel's end."""
        if self.host_s == 0.0:
            total = sum(self.compute[begin:end])
            return total, 0.0, total
        compute = host = longest = 0.0
        for c, h in zip(self.compute[begin:end], self.host[begin:end], strict=True):
            longest = max(longest + c, host + max(c, h))
            compute += c
            host += h
        return compute, host, longest


class _Run:
    """One resident set and ring. The state between two steps is where compute, the host and the copies that are ahead
    of the boundary are; a step maps it on the next one."""

    def __init__(self, schedule: Schedule, flow: Sequence[int], after: Sequence[int]) -> None:
        s = schedule
        count = len(flow)
        self.floor = s.floor(flow)
        self.lead = s._chain(0, flow[0])
        self.hook = s.rates.hook
        ends = [*flow[1:], len(s)]
        self.own = [s.own[i] for i in flow]
        self.own_host = [s.own_host[i] for i in flow]
        self.rest: list[float] = []  # compute between the release and the next streamed unit, and likewise:
        self.rest_host: list[float] = []
        self.rest_longest: list[float] = []
        for i, end in zip(flow, ends, strict=True):
            compute, host, longest = s._chain(i + 1, end)
            tail, tail_host = s.compute[i] - s.own[i], s.host[i] - s.own_host[i]
            self.rest.append(tail + compute)
            self.rest_host.append(tail_host + host)
            self.rest_longest.append(max(max(tail, tail_host) + compute, tail_host + longest))
        self.copying = [s.copying[i] for i in flow]
        self.held = [s.held[i] for i in flow]
        self.any_held = any(self.held)
        self.ahead = sum(1 for a in after if a < 0)  # copies that the step before issues
        # which copies the release of each unit lets go, in the order of the copy stream: of this step, then the next
        waits = [*after[self.ahead :], *(a + count for a in after[: self.ahead])]
        self.letting = [0] * count
        self.letting_own = [0] * count  # of this step alone
        latest = 0
        for at, wait in enumerate(waits):
            latest = max(latest, wait)
            self.letting[latest] += 1
            self.letting_own[latest] += at < count - self.ahead

    def step(self, wrap: bool, below: float) -> float:
        if not wrap:
            return self._cold()
        state = [0.0] * (self.ahead + 2)
        if below < INFINITE and not self._reaches(below, state, QUICK_STEPS):
            return INFINITE
        if self._reaches(self.floor, state, SURE_STEPS):
            return self.floor
        return self._settle(state)

    def _reaches(self, period: float, state: list[float], steps: int) -> bool:
        """Whether no circuit takes longer than `period`: then times less a period per step stop growing.

        Within as many steps as a simple circuit may take, which is rarely more than two; `state` moves on.
        """
        slack = EXACT * period
        for _ in range(steps):
            grown = False
            for at, (old, new) in enumerate(zip(state, self._advance(state), strict=True)):
                if new - period > old + slack:
                    state[at] = new - period
                    grown = True
            if not grown:
                return True
        return False

    def _settle(self, state: list[float]) -> float:
        """Follow the steps until all that moves with the compute engine moves by the same time per step."""
        past = [state]
        for _ in range(MOST_STEPS):
            past.append(self._advance(past[-1]))
            for period in range(1, min(LONGEST_PERIOD, len(past) - 1) + 1):
                old, new = past[-1 - period], past[-1]
                moves = [b - a for at, (a, b) in enumerate(zip(old, new, strict=True)) if at != 1]
                if max(moves) - min(moves) <= EXACT * max(new):
                    return max(self.floor, moves[0] / period)
            del past[: -1 - MOST_STEPS // 2]
        return max(self.floor, (past[-1][0] - past[0][0]) / (len(past) - 1))

    def stalls(self, wrap: bool) -> list[float]:
        if not wrap:
            return self._waits(self._nothing(), self.letting_own)
        state = [0.0] * (self.ahead + 2)
        for _ in range(SURE_STEPS):
            state = self._advance(state)
        return self._waits(state, self.letting)

    def _waits(self, state: Sequence[float], letting: Sequence[int]) -> list[float]:
        waits: list[float] = []
        self._advance(state, letting, waits)
        return waits

    def _cold(self) -> float:
        """A single step, from nothing."""
        return self._advance(self._nothing(), self.letting_own)[0]

    def _nothing(self) -> list[float]:
        """The state of a step that starts with no copy done: its first copies are issued when it begins."""
        pending: list[float] = []
        at = 0.0
        for seconds in self.copying[: self.ahead]:
            at += seconds
            pending.append(at)
        held = [end for end, held in zip(pending, self.held, strict=False) if held]
        return [0.0, held[-1] if held else 0.0, *pending]

    def _advance(
        self, state: Sequence[float], letting: Sequence[int] | None = None, waits: list[float] | None = None
    ) -> list[float]:
        """The state a step later: when compute is done, the host, and each copy that is ahead of the boundary.

        `waits` is filled with what compute waited for each copy.
        """
        compute, host = state[0], state[1]
        done = list(state[2:])
        last = done[-1]
        copying, held, any_held = self.copying, self.held, self.any_held
        count = len(copying)
        hook = self.hook
        place = self.ahead  # the copy to be issued next, counted from the first of this step
        c, h, longest = self.lead
        compute = max(compute + c, host + longest)
        host += h
        lets = self.letting if letting is None else letting
        for unit, (own, own_host, rest, rest_host, rest_longest, let) in enumerate(
            zip(self.own, self.own_host, self.rest, self.rest_host, self.rest_longest, lets, strict=True)
        ):
            host += hook
            start = compute if compute > host else host
            if done[unit] > start:
                if waits is not None:
                    waits.append(done[unit] - start)
                start = done[unit]
            elif waits is not None:
                waits.append(0.0)
            start += own
            host += own_host
            release = start if start > host else host
            for _ in range(let):
                at = place if place < count else place - count
                last = (last if last > release else release) + copying[at]
                done.append(last)
                if any_held and held[at] and last > host:
                    host = last
                place += 1
            compute = release + rest
            if host + rest_longest > compute:
                compute = host + rest_longest
            host += rest_host
        return [compute, host, *done[count:]]
