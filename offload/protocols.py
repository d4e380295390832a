"""What a planner hands to an engine, and what a session asks of one. Invariant: the session knows no more than this."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Protocol

from .record import Reason


class Plan(Protocol):
    """What an engine executes for one component."""

    @property
    def resident(self) -> frozenset[int]:
        """Indexes of the units that stay on the device during the stage."""
        ...

    @property
    def ring_bytes(self) -> int:
        """Device bytes for streamed units; 0 when nothing streams."""
        ...

    @property
    def wrap(self) -> bool:
        """Whether the lookahead runs across the end of a forward into the next."""
        ...

    @property
    def device_bytes(self) -> int:
        """Resident bytes plus ring."""
        ...

    @property
    def sentence(self) -> str:
        """The plan in words."""
        ...


class Engine(Protocol):
    """What a session asks of whatever moves a component's weights. Sizes are device bytes, units are indexes."""

    held_units: set[int]  # units that cannot flow

    @property
    def loaded(self) -> frozenset[int]: ...

    @property
    def device_bytes(self) -> int: ...

    @property
    def most_beside(self) -> int: ...

    def take_most_beside(self) -> int: ...

    def missing_bytes(self, plan: Plan) -> int: ...

    def surplus_bytes(self, plan: Plan) -> int: ...

    def order_of(self, entry: str) -> list[int] | None: ...

    def apply(self, plan: Plan, reason: Reason, *, avoidable: bool = False) -> None: ...

    def bring_early(self, plan: Plan, room: int, avoidable: bool = False) -> int: ...

    def evict(self, nbytes: int | None, reason: Reason) -> int: ...

    def hold(self, indexes: Iterable[int]) -> None: ...

    def drop(self, indexes: Iterable[int], reason: Reason) -> None: ...

    def forward(
        self, entry: str, timing: contextlib.AbstractContextManager[None] | None = None
    ) -> contextlib.AbstractContextManager[None]: ...

    def abort(self) -> None: ...

    def watch(self) -> bool: ...

    def disarm(self) -> None: ...

    def detach(self) -> None: ...
