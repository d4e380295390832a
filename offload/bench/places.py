"""Where a bench runs: the cap, the clock and the counters. Invariant: every strategy is timed by the same few lines.

A place is one device. Times are seconds of its clock (virtual on the simulated accelerator, wall on a GPU), sizes are
bytes. What a place cannot know is None.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch

from ..sizes import GIB
from .shapes import remembered_shapes

Step = Callable[[], Any]
SIMULATED_RAM = 64 * GIB
_NO_CAP = 1 << 50
_TOY = 1 << 29
INSTANT = 1e30
"""A rate so high that what it governs takes no time."""


@dataclass(frozen=True)
class Counts:
    """What happened since a place's counters were last looked at; per step after `per`. None is not known."""

    bytes_h2d: float | None = None
    bytes_d2h: float | None = None
    host_syncs: float | None = None
    allocations: float | None = None

    def per(self, steps: int) -> Counts:
        """Divided by `steps`."""

        def share(value: float | None) -> float | None:
            return None if value is None else value / steps

        return Counts(share(self.bytes_h2d), share(self.bytes_d2h), share(self.host_syncs), share(self.allocations))

    def less(self, other: Counts) -> Counts:
        """Without the host syncs and allocations of `other`, which are the model's own; bytes stay."""

        def beyond(mine: float | None, theirs: float | None) -> float | None:
            return mine if mine is None or theirs is None else mine - theirs

        return Counts(
            self.bytes_h2d,
            self.bytes_d2h,
            beyond(self.host_syncs, other.host_syncs),
            beyond(self.allocations, other.allocations),
        )


class Place(Protocol):
    """One device with an artificial cap. Sizes are bytes, times seconds."""

    device: torch.device
    rung: str  # "simulated" | "gpu"
    timed_blocks: int  # how often a block of steps is timed, for the spread
    sees_registered: bool  # `pinned` has memory that was registered where it lies; else a strategy tells it

    @property
    def name(self) -> str: ...

    def parameters(self) -> dict[str, Any]:
        """What the place's clock goes by: the simulated card's table, or the GPU's measured link."""
        ...

    def use(self, card: str | None, cap: int | None) -> None:
        """Take `card`'s rates (simulated only) and let the run use `cap` bytes; None lifts the cap."""
        ...

    @property
    def reserve(self) -> int:
        """What a policy must be told that others use, since the driver does not show the cap."""
        ...

    @property
    def ram(self) -> int | None:
        """System memory of the machine that a simulated card sits in, bytes; None is the machine at hand."""
        ...

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a long copy from page-locked memory reaches."""
        ...

    def ghost(self, on: bool) -> contextlib.AbstractContextManager[None]:
        """Leave large arithmetic out (simulated only); values are garbage then."""
        ...

    def time(self, step: Step, steps: int) -> tuple[float, Counts]:
        """Seconds per step of `steps` steps back to back, waited for once at the end, and the counts of one step."""
        ...

    def count(self, step: Step) -> Counts:
        """Counts of one step where `time` cannot count without disturbing; empty where it can."""
        ...

    def time_with_python(self, step: Step, steps: int) -> float | None:
        """As `time`, with the CPU time of Python on the clock; None where the clock always has it."""
        ...

    def python_seconds(self, step: Step, steps: int) -> float:
        """Host seconds per step of Python and libraries alone, as far as the place can tell them from the device."""
        ...

    def synchronize(self) -> None: ...

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        """Most bytes that the card had to have since `reset_peak`: freed ones too that a stream may still use."""
        ...

    def pinned(self) -> int | None:
        """Page-locked host bytes now."""
        ...

    def races(self) -> int | None:
        """Races since `clean`, where the place can see them."""
        ...

    def allocated(self) -> int: ...

    def clean(self) -> None:
        """Free what nobody refers to, caches of the device and of page-locked memory too; forget races."""
        ...


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection in between: it walks every object that the libraries ever made, and is nobody's cost."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class SimulatedPlace:
    """The simulated accelerator: virtual clock, exact counters."""

    rung = "simulated"
    timed_blocks = 1  # virtual time repeats to the digit
    sees_registered = True

    def __init__(self, vram: ModuleType, ghost_bytes: int = 1 << 17) -> None:
        self._vram = vram
        self._ghost_bytes = ghost_bytes
        self.device = torch.device("vram", 0)
        self.use(None, None)

    @property
    def name(self) -> str:
        return str(self._vram.get_device_name())

    def parameters(self) -> dict[str, Any]:
        card = self._vram.card()
        return {
            "card": card.key,
            "card_name": card.name,
            "link": card.link,
            "vram": card.vram,
            "ram": SIMULATED_RAM,
            **{key: value for key, value in self._vram.configuration().items() if key in _RATES},
        }

    def use(self, card: str | None, cap: int | None) -> None:
        if card is not None:
            self._vram.use_card(card)
        total = max(int(self._vram.card().vram), cap or _NO_CAP)
        if cap is not None and cap < _TOY:
            total = cap
        self._vram.set_memory_cap(total)
        # What is left of a larger card, so that its profile applies, and not that of a card of the cap's size; a toy's
        # cap is a card of its own, since of a real one it would be less than the slack that nobody plans with.
        self._vram.set_others(0 if cap is None else total - cap)

    @property
    def reserve(self) -> int:
        return 0  # the driver shows the cap

    @property
    def ram(self) -> int:
        return SIMULATED_RAM  # peers lock what they like: in ghost mode nothing of it is real

    @property
    def bandwidth(self) -> float:
        return float(self._vram.configuration()["h2d_pinned"])

    @contextlib.contextmanager
    def _configured(self, **options: float) -> Iterator[None]:
        before = self._vram.configuration()
        self._vram.configure(**options)
        try:
            yield
        finally:
            self._vram.configure(**{key: before[key] for key in options})

    @contextlib.contextmanager
    def ghost(self, on: bool) -> Iterator[None]:
        memory = remembered_shapes() if on else contextlib.nullcontext()
        with self._configured(ghost=self._ghost_bytes if on else 0), memory:
            yield

    def time(self, step: Step, steps: int) -> tuple[float, Counts]:
        self._vram.reset_clock()
        before = self._totals()
        for _ in range(steps):
            step()
        seconds = self._vram.clock() / steps
        after = self._totals()
        counted = {key: after[key] - before[key] for key in before}
        return seconds, Counts(**counted).per(steps)

    def _totals(self) -> dict[str, float]:
        counters, copies = self._vram.counters(), self._vram.copy_totals()
        found = {"bytes_h2d": copies["h2d_bytes"], "bytes_d2h": copies["d2h_bytes"]}
        return found | {key: int(counters[key]) for key in ("host_syncs", "allocations") if key in counters}

    def count(self, step: Step) -> Counts:
        return Counts()

    def time_with_python(self, step: Step, steps: int) -> float:
        with self._configured(python_time=1), no_collection():
            return self.time(step, steps)[0]

    def python_seconds(self, step: Step, steps: int) -> float:
        """With a device that takes no time, what is left on the clock is the thread's CPU time outside of it."""
        instant = dict.fromkeys(_PER_SECOND, INSTANT) | dict.fromkeys(_LATENCIES, 0.0)
        with self._configured(python_time=1, **instant), no_collection():
            return self.time(step, steps)[0]

    def synchronize(self) -> None:
        self._vram.synchronize()

    def reset_peak(self) -> None:
        self._vram.reset_peak_memory_stats()

    def peak(self) -> int:
        return int(self._vram.max_memory_reserved())

    def pinned(self) -> int:
        return int(self._vram.counters()["pinned"])

    def races(self) -> int:
        return int(self._vram.races())

    def allocated(self) -> int:
        return int(self._vram.memory_allocated())

    def clean(self) -> None:
        gc.collect()
        self._vram.set_stream(self._vram.default_stream())
        self._vram.synchronize()
        self._vram.empty_cache()
        self._vram.clear_copy_log()
        self._vram.clear_races()


_PER_SECOND = (
    "h2d_pinned",
    "h2d_pageable",
    "d2h_pinned",
    "d2h_pageable",
    "hbm",
    "flops16",
    "flops32",
    "host_memcpy",
)
_LATENCIES = ("launch", "copy_lat", "kernel_min", "sync_lat", "query_lat")
_RATES = {*_PER_SECOND, *_LATENCIES}


def open_place(device: str) -> Place:
    """The place of `--device`: "vram", the simulated accelerator, or "cuda".

    Raises:
        ValueError: another word, or no such device here, with the remedy.
    """
    if device == "vram":
        from .. import simulator

        try:
            return SimulatedPlace(simulator.load("vram"))
        except simulator.SimulatorUnavailable as error:
            raise ValueError(f"--device: {error}") from error
    if device.split(":")[0] == "cuda":
        from .gpu import GpuPlace

        if not torch.cuda.is_available():
            raise ValueError("--device: got 'cuda', but torch finds no CUDA device; allowed here: vram (simulated)")
        return GpuPlace(torch.device(device))
    raise ValueError(f"--device: got {device!r}; allowed: vram (the simulated accelerator), cuda, cuda:N")


def shown_cap(cap: int | None) -> str:
    """ "12 GiB", "9.5 GiB"; "no cap"."""
    return "no cap" if cap is None else f"{cap / GIB:.4g} GiB"
