"""A device whose clock the test moves by hand. Times are chosen as binary fractions, so sums are exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class HandClock:
    """The part of a Backend that the ledger asks for. A mark is ready once it is not newer than `passed`."""

    kind = "fake"
    rung = "cpu"
    name = "Hand clock"

    def __init__(self) -> None:
        self.now = 0.0
        self.lag = 0.0  # the device reports marks ready this many seconds late, until it is synchronised
        self.marks = 0
        self.syncs = 0
        self.blind = False  # ready() says no: only synchronize() lets marks through
        self.broken: Exception | None = None

    def tick(self, seconds: float) -> None:
        self.now += seconds

    def mark(self) -> Any:
        self.marks += 1
        return [self.now]

    def at(self, t: float) -> Any:
        """A mark of the copy stream."""
        return [t]

    def ready(self, mark: Any) -> bool:
        return not self.blind and mark[0] <= self.now - self.lag

    def seconds(self, start: Any, end: Any) -> float:
        assert self.ready(start) and self.ready(end), "asked for the time of a mark that has not been passed"
        return float(end[0] - start[0])

    def synchronize(self) -> None:
        self.syncs += 1
        if self.broken is not None:
            raise self.broken
        self.blind, self.lag = False, 0.0


def fractions() -> Iterator[float]:
    """1/64, 2/64, ... so that every interval is of another length and every sum is exact."""
    n = 0
    while True:
        n += 1
        yield n / 64
