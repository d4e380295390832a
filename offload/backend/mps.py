"""Apple's MPS. Invariant: a mark is asked for its time only after a `synchronize`, and only once.

There is one stream, which runs in order, so that waiting for an event on it is nothing to do. What differs from the
other accelerators is the time between two events: asking synchronises the device, raises unless the second event is
later than the first, and never returns when the same event is asked for again as the end. So every mark is measured
once, from a common origin, when the device is known to have passed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .base import DeviceMemory, Mark


class _Passed:
    """An event that nobody asks for its time: on one stream it orders nothing."""

    def record(self, stream: Any = None) -> None:
        """Nothing to record."""

    def query(self) -> bool:
        return True


_PASSED = _Passed()


class _InOrderStream:
    """The one stream: everything on it already comes after everything before it."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""


class _Mark:
    """An event, how many synchronisations came before it, and its time once it was measured (seconds)."""

    __slots__ = ("_backend", "at", "event", "turn")

    def __init__(self, backend: MpsBackend) -> None:
        self._backend = backend
        self.event: Any = None
        self.turn = 0
        self.at: float | None = None

    def record(self, stream: Any = None) -> None:
        self.event, self.turn = self._backend.point()
        self.at = None

    def query(self) -> bool:
        return self._backend.ready(self)


class MpsBackend:
    """Device memory is host memory here, so the policy resolves to mode none and nothing is streamed."""

    def __init__(self) -> None:
        self._module: Any = torch.get_device_module("mps")
        self.device = torch.device("mps", 0)
        self.kind = "mps"
        self.name = "Apple MPS"
        self.rung = "gpu"
        self.shared_memory = True
        self.can_register = False
        self.others: tuple[str, ...] = ()
        self._stream = _InOrderStream()
        self._origin: Any = None
        self._turn = 0
        self._peak = 0

    def memory(self) -> DeviceMemory:
        total = int(self._module.recommended_max_memory())
        allocated = int(self._module.current_allocated_memory())
        reserved = int(self._module.driver_allocated_memory())
        self._peak = max(self._peak, allocated)
        return DeviceMemory(max(0, total - reserved), total, allocated, reserved)

    def link(self) -> str | None:
        return None

    def link_rates(self) -> tuple[float, float, float] | None:
        return None

    def peak_allocated(self) -> int:
        """The most that `memory` has seen: MPS keeps no peak of its own."""
        self.memory()
        return self._peak

    def reset_peak(self) -> None:
        self._peak = 0

    def empty_cache(self) -> None:
        self._module.empty_cache()

    def synchronize(self) -> None:
        self._module.synchronize()
        self._turn += 1

    def mark(self) -> Mark:
        mark = _Mark(self)
        mark.record()
        return mark

    def point(self) -> tuple[Any, int]:
        """A recorded event, and how many synchronisations came before it."""
        if self._origin is None:
            self._origin = self._event()
        return self._event(), self._turn

    def ready(self, mark: Mark) -> bool:
        return bool(mark.turn < self._turn)

    def seconds(self, start: Mark, end: Mark) -> float:
        return self._at(end) - self._at(start)

    def _at(self, mark: _Mark) -> float:
        if mark.at is None:
            mark.at = float(self._origin.elapsed_time(mark.event)) / 1e3
            mark.event = None  # back to the pool
        return mark.at

    def _event(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def current_stream(self) -> Any:
        return self._stream

    def new_stream(self) -> Any:
        return self._stream

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def set_stream(self, stream: Any) -> None:
        """There is one stream."""

    def record(self, stream: Any, timed: bool = False) -> Any:
        return self.mark() if timed else _PASSED

    def event(self, timed: bool = False) -> Any:
        return _Mark(self) if timed else _PASSED

    def rng_state(self) -> Callable[[], None]:
        host, module = torch.get_rng_state(), self._module
        state = module.get_rng_state()

        def restore() -> None:
            torch.set_rng_state(host)
            module.set_rng_state(state)

        return restore

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned_empty(self, nbytes: int) -> torch.Tensor | None:
        return None

    def register(self, address: int, nbytes: int) -> bool:
        return False

    def unregister(self, address: int) -> None:
        """Nothing is ever registered."""
