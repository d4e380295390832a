"""What a component's units compute, learned from its calls. Invariant: one forward per shape is timed, none waited for.

The second forward of a shape that streams is timed (the first is traced, and warms caches). What it tells is read when
the device has passed it, in front of a later call: until then plans go by bytes, from then on by times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from .activation import GRADIENT, Signature
from .backend import Backend
from .calibration import Calibration, Costs
from .protocols import Plan
from .schedule import Piece, Rates, StepTime, predict_step
from .stream import Stream
from .units import Component

MOST_LEARNED = 64  # shapes that are remembered; the oldest go first

Observe = Callable[[int, float, bool], None]  # bytes, seconds, whether from pinned memory


class Timing:
    """The times of one component's units, by the shape of its calls."""

    def __init__(self, component: Component, backend: Backend, stream: Stream) -> None:
        self.learned: dict[Signature, Costs] = {}
        self._component = component
        self._backend = backend
        self._stream = stream
        self._calibration = Calibration(component, backend)
        self._seen: Signature | None = None  # the shape of the last forward
        self._pending: Signature | None = None  # the shape of the forward that was timed and is not read yet
        self._copies: list[tuple[int, bool, Any, Any]] = []

    def around(self, sig: Signature) -> Timing | None:
        """A context to run this forward in, if it is one to be timed."""
        again, self._seen = sig == self._seen, sig
        if not again or sig in self.learned or self._pending is not None or GRADIENT in sig:
            return None
        return self

    def __enter__(self) -> None:
        self._calibration.start()
        self._stream.walk.watched = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calibration.stop(whole=error is None)
        walk = self._stream.walk
        self._copies, walk.watched = walk.watched or [], None
        self._pending = self._seen if error is None else None

    def settle(self, observe: Observe) -> bool:
        """Read what was timed, if the device has passed it; True if there is something new. Never blocks.

        `observe` is told how long the copies of that forward took.
        """
        if self._pending is None:
            return False
        costs = self._calibration.read()
        if costs is None:
            return False
        copies, self._copies = self._copies, []
        for nbytes, pinned, start, end in copies:
            if self._backend.ready(end):
                observe(nbytes, self._backend.seconds(start, end), pinned)
        self.learned[self._pending] = costs
        self._pending = None
        while len(self.learned) > MOST_LEARNED:
            del self.learned[next(iter(self.learned))]
        return True

    def expect(self, sig: Signature | None) -> Costs | None:
        """The times of a call of this shape; of the latest other one of the same entry point where it is new."""
        if sig is None:
            return None
        found = self.learned.get(sig)
        if found is None:
            found = next((costs for other, costs in reversed(self.learned.items()) if other[:1] == sig[:1]), None)
        return found

    def predict(
        self, plan: Plan, sig: Signature, held: set[int], rates: Rates, pageable: Collection[int] = ()
    ) -> StepTime | None:
        """The time of a forward under a plan that was made without knowing it; None where that cannot be told."""
        costs = self.expect(sig)
        if costs is None:
            return None
        units = self._component.units
        walk = [
            Piece(units[i].slot_bytes, s, i, own_s=costs.own.get(i), pinned=i not in pageable) for i, s in costs.walk
        ]
        stays = plan.resident | held
        resident = {at for at, piece in enumerate(walk) if piece.index in stays or not piece.nbytes}
        if any(piece.nbytes > plan.ring_bytes for at, piece in enumerate(walk) if at not in resident):
            return None
        return predict_step(walk, resident, plan.ring_bytes, rates, wrap=plan.wrap)
