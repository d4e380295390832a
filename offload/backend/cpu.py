"""The host as a device. Invariant: device memory is host memory here, so nothing is ever moved."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch

from .base import DeviceMemory, Mark


class _HostStream:
    """The host runs in order: every event has passed when it is recorded."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""


class _HostEvent:
    """A point in the host's time that can be set again."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def __float__(self) -> float:
        return self.at


class CpuBackend:
    """Weights stay where they are; memory figures are the system's, times are perf_counter's."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.kind = "cpu"
        self.name = platform.processor() or platform.machine() or "CPU"
        self.rung = "cpu"
        self.shared_memory = True
        self.can_register = False
        self.others: tuple[str, ...] = ()
        self._stream = _HostStream()
        self._peak = 0

    def memory(self) -> DeviceMemory:
        system = psutil.virtual_memory()
        used = int(psutil.Process().memory_info().rss)
        self._peak = max(self._peak, used)
        return DeviceMemory(free=int(system.available), total=int(system.total), allocated=used, reserved=used)

    def link(self) -> str | None:
        return None

    def link_rates(self) -> tuple[float, float, float] | None:
        return None

    def peak_allocated(self) -> int:
        self.memory()
        return self._peak

    def reset_peak(self) -> None:
        self._peak = 0

    def empty_cache(self) -> None:
        """The host has no cache of ours."""

    def synchronize(self) -> None:
        """The host is always in step with itself."""

    def mark(self) -> Mark:
        return time.perf_counter()

    def ready(self, mark: Mark) -> bool:
        return True

    def seconds(self, start: Mark, end: Mark) -> float:
        return float(end) - float(start)

    def current_stream(self) -> Any:
        return self._stream

    def new_stream(self) -> Any:
        return self._stream

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def set_stream(self, stream: Any) -> None:
        """There is one stream."""

    def record(self, stream: Any, timed: bool = False) -> Any:
        return time.perf_counter()

    def event(self, timed: bool = False) -> Any:
        return _HostEvent()

    def rng_state(self) -> Callable[[], None]:
        state = torch.get_rng_state()
        return lambda: torch.set_rng_state(state)

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pinned_empty(self, nbytes: int) -> torch.Tensor | None:
        return None

    def register(self, address: int, nbytes: int) -> bool:
        return False

    def unregister(self, address: int) -> None:
        """Nothing is ever registered."""
