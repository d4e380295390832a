"""The schedule once more, written for reading: it knows addresses and tenants instead of waits, and simply runs."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from balanced_offload.offload.schedule import Piece, Rates


@dataclass
class Tenant:
    """A streamed unit in the ring."""

    begin: int
    end: int
    arrives: float = 0.0
    leaves: float | None = None  # None: not released yet


@dataclass
class Machine:
    """Two engines, a host and a ring, in time."""

    walk: Sequence[Piece]
    resident: AbstractSet[int]
    ring: int
    rates: Rates
    wrap: bool
    compute: float = 0.0
    copies: float = 0.0
    host: float = 0.0
    tenants: list[Tenant] = field(default_factory=list)  # in the order of the copy stream, over all steps
    head: int = 0
    used: int = 0  # tenants whose forward began

    def __post_init__(self) -> None:
        self.flow = [p for i, p in enumerate(self.walk) if i not in self.resident and p.nbytes > 0]

    def pump(self, limit: int) -> None:
        """Issue copies as long as the ring has room for the next one, up to `limit` in all."""
        while len(self.tenants) < limit:
            at = len(self.tenants) % len(self.flow)
            piece = self.flow[at]
            begin = 0 if at == 0 or self.head + piece.nbytes > self.ring else self.head
            end = begin + piece.nbytes
            latest = self.tenants[-2 * len(self.flow) :]  # a step before those, the same addresses had other tenants
            overlapped = [t for t in latest if t.begin < end and begin < t.end]
            if any(t.leaves is None for t in overlapped):
                return
            start = max([self.copies, self.host, *(t.leaves for t in overlapped if t.leaves is not None)])
            rate = self.rates.h2d if piece.pinned else self.rates.h2d_pageable
            self.copies = start + self.rates.copy_latency + piece.nbytes / rate
            if not piece.pinned:
                self.host = self.copies
            self.tenants.append(Tenant(begin, end, self.copies))
            self.head = end

    def step(self, index: int) -> float:
        """Run one step; when its last kernel ends, seconds."""
        ahead = (index + (2 if self.wrap else 1)) * len(self.flow)
        for i, piece in enumerate(self.walk):
            streamed = piece.nbytes > 0 and i not in self.resident
            if not streamed:
                begin = max(self.compute, self.host)
                self.host += piece.host_s
                self.compute = max(begin + piece.compute_s, self.host)
                continue
            if self.used == len(self.tenants):
                self.pump(ahead)
            tenant = self.tenants[self.used]
            self.used += 1
            self.host += self.rates.hook
            begin = max(self.compute, self.host, tenant.arrives)
            own = piece.compute_s if piece.own_s is None else piece.own_s
            share = own / piece.compute_s if piece.compute_s else 1.0
            self.host += piece.host_s * share
            tenant.leaves = max(begin + own, self.host)
            self.pump(ahead)
            launched = self.host
            self.host += piece.host_s * (1 - share)
            self.compute = max(max(tenant.leaves, launched) + piece.compute_s - own, self.host)
        return self.compute


def steady(
    walk: Sequence[Piece], resident: AbstractSet[int], ring: int, rates: Rates, steps: int = 60, over: int = 24
) -> float:
    """Seconds per step, over the last `over` of `steps` steps."""
    machine = Machine(walk, resident, ring, rates, wrap=True)
    if machine.flow:
        machine.pump(len(machine.flow))
    ends = [machine.step(i) for i in range(steps)]
    return (ends[-1] - ends[-1 - over]) / over


def cold(walk: Sequence[Piece], resident: AbstractSet[int], ring: int, rates: Rates) -> float:
    """Seconds of one step from nothing."""
    machine = Machine(walk, resident, ring, rates, wrap=False)
    if machine.flow:
        machine.pump(len(machine.flow))
    return machine.step(0)
