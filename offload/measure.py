"""How fast a machine copies to its card, by timed copies. Invariant: nothing stays allocated, and nobody else waits.

A copy takes latency + bytes / rate: the rate is the slope between two sizes, the latency what the smallest leaves.
Pinned copies are queued behind a large one, so that the host's own pace at issuing them is not in their times.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from .backend import Backend, is_out_of_memory
from .pinning import Pinner
from .schedule import Rates

LIMIT_S = 0.3
SMALL, MIDDLE, LARGE = 256 << 10, 4 << 20, 16 << 20
PAGEABLE_SMALL, PAGEABLE_LARGE = 2 << 20, 8 << 20
REPEATS = 5
MOST_LATENCY_S = 1e-3
_SETTLED = 0.03  # relative: an idle link is slow, and takes some copies to come up

# What PCIe 3.0 x16 reaches with an ordinary CPU: where nothing can be measured, better too careful than too bold.
ASSUMED = Rates(h2d=12e9, h2d_pageable=5e9, copy_latency=8e-6, source="assumed")


def measure(backend: Backend, limit_s: float = LIMIT_S) -> Rates:
    """The rates from host to device of `backend`, from copies of some 40 MiB of memory in at most `limit_s` seconds.

    Where the device is too full for that, or shares its memory with the host, `ASSUMED`. Without page-locked memory
    both rates are the pageable one. `hook` is left 0.
    """
    if backend.shared_memory:
        return ASSUMED
    reserved = backend.memory().reserved
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _measure(backend, perf_counter() + limit_s)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return ASSUMED
    finally:
        if backend.memory().reserved > reserved:
            backend.empty_cache()


def _measure(backend: Backend, deadline: float) -> Rates:
    lane = _Lane(backend)
    try:
        pageable, latency = _pageable(lane, deadline - (deadline - perf_counter()) / 2)
        pinned = _pinned(lane, backend, deadline)
    finally:
        lane.close()
    if pinned is None:
        return Rates(pageable, pageable, latency, source="measured")
    return Rates(pinned[0], pageable, pinned[1], source="measured")


def _pinned(lane: _Lane, backend: Backend, deadline: float) -> tuple[float, float] | None:
    """(bytes/s, seconds per copy) from page-locked memory; None where the system locks none."""
    source = Pinner(backend, 2 * LARGE).slab(LARGE)
    if source is None:
        return None
    lane.settle(source, deadline - (deadline - perf_counter()) / 2)
    large = _typical(lambda: lane.time(source, LARGE, 1, ahead=True), deadline)
    middle = _typical(lambda: lane.time(source, MIDDLE, 2, ahead=True), deadline)
    small = _typical(lambda: lane.time(source, SMALL, 8, ahead=True), deadline)
    return _fit((MIDDLE, middle), (LARGE, large), (SMALL, small))


def _pageable(lane: _Lane, deadline: float) -> tuple[float, float]:
    """(bytes/s, seconds per copy) from pageable memory."""
    source = torch.empty(PAGEABLE_LARGE, dtype=torch.uint8).fill_(1)  # written: untouched pages are faster than real
    lane.time(source, PAGEABLE_LARGE, 1)
    large = _typical(lambda: lane.time(source, PAGEABLE_LARGE, 1), deadline)
    small = _typical(lambda: lane.time(source, PAGEABLE_SMALL, 1), deadline)
    return _fit((PAGEABLE_SMALL, small), (PAGEABLE_LARGE, large), (PAGEABLE_SMALL, small))


def _typical(take: Callable[[], float], deadline: float) -> float:
    """The median of some takes, at least one."""
    taken = [take()]
    while len(taken) < REPEATS and perf_counter() < deadline:
        taken.append(take())
    return median(taken)


def _fit(less: tuple[int, float], more: tuple[int, float], least: tuple[int, float]) -> tuple[float, float]:
    """(bytes/s, seconds) of a copy, from the (bytes, seconds) of three, of which two may be the same."""
    plain = more[0] / more[1]
    gained = more[1] - less[1]
    slope = (more[0] - less[0]) / gained if gained > 0 else plain
    rate = min(max(slope, plain), 2 * plain)  # the latency is no less than nothing, and noise no more than the copy
    return rate, min(max(0.0, least[1] - least[0] / rate), MOST_LATENCY_S)


class _Lane:
    """A stream of its own with a device buffer to copy into."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._compute = backend.current_stream()
        self._target = backend.empty(LARGE)
        self._stream: Any = backend.new_stream()
        self._stream.wait_event(backend.record(self._compute))  # the allocator may hand out bytes still in use there
        self._start, self._end = backend.event(timed=True), backend.event(timed=True)

    def time(self, source: torch.Tensor, nbytes: int, count: int, *, ahead: bool = False) -> float:
        """Seconds of one of `count` copies in a row; `ahead` queues a large one first, which hides the host's pace."""
        target, source_part = self._target[:nbytes], source[:nbytes]
        with self._backend.on_stream(self._stream):
            if ahead:
                self._target[: source.numel()].copy_(source, non_blocking=True)
            self._start.record(self._stream)
            for _ in range(count):
                target.copy_(source_part, non_blocking=True)
            self._end.record(self._stream)
        self._stream.synchronize()
        return max(1e-9, self._backend.seconds(self._start, self._end) / count)

    def settle(self, source: torch.Tensor, deadline: float) -> None:
        """Copy until two in a row take the same time: the link has come up from its power saving."""
        before = self.time(source, source.numel(), 1)
        while perf_counter() < deadline:
            now = self.time(source, source.numel(), 1)
            if abs(now - before) <= _SETTLED * before:
                return
            before = now

    def close(self) -> None:
        """What comes next on the compute stream may reuse the buffer."""
        self._stream.synchronize()
        self._compute.wait_event(self._backend.record(self._stream))
