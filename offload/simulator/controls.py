"""The controls of the simulation: capacity, cards, clock, counters, copy log, races. Part of ``torch.<name>``.

Invariant: it only forwards. State lives in the C++ part, so every number here is the library's own.

Memory is in bytes, times are in seconds of virtual time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import native
from .cards import CARDS, DEFAULT_CARD, Card

_card = CARDS[DEFAULT_CARD]


class TraceEntry(NamedTuple):
    """One kernel or copy on a stream's time line, kept while ``configure(trace=1)``."""

    name: str
    stream: int
    t0: float
    t1: float
    nbytes: int
    flops: float


class Copy(NamedTuple):
    """One copy between host and device.

    ``storage`` is the serial number of the device storage (see ``storage_serial``; never used twice), ``offset`` where
    in it the copied view begins. ``host_ptr`` is 0 for ``Tensor.item()``. A ``ghost`` copy moved no data.
    """

    direction: str  # "h2d" or "d2h"
    nbytes: int
    host_ptr: int
    storage: int
    offset: int
    stream: int
    t0: float
    t1: float
    pinned: bool
    ghost: bool


def memory_cap() -> int:
    """The capacity of the card, bytes."""
    return int(native.library().sim_capacity())


def set_memory_cap(nbytes: int) -> None:
    """Sets the capacity. Allocating past it (less ``others()``) raises ``torch.OutOfMemoryError``."""
    if nbytes < 0:
        raise ValueError(f"the memory cap must be 0 or more bytes, not {nbytes}")
    native.library().sim_set_capacity(int(nbytes))


def others() -> int:
    """Bytes that other programs hold on the card."""
    return int(native.library().sim_others())


def set_others(nbytes: int) -> None:
    """Lets other programs hold ``nbytes`` of the card: lowers what is free, not the total."""
    if nbytes < 0:
        raise ValueError(f"memory taken by other programs must be 0 or more bytes, not {nbytes}")
    native.library().sim_set_others(int(nbytes))


def use_card(key: str) -> Card:
    """Sets the clock's rates and the capacity to those of a card of ``CARDS``. KeyError for an unknown key."""
    global _card
    if key not in CARDS:
        raise KeyError(f"unknown card {key!r}; there are {', '.join(sorted(CARDS))}")
    card = CARDS[key]
    configure(**card.options())
    set_memory_cap(card.vram)
    _card = card
    return card


def card() -> Card:
    """The card in use. What ``configure`` and ``set_memory_cap`` changed since ``use_card`` is not reflected in it."""
    return _card


def configure(**options: float) -> None:
    """Sets options of the simulation by name; ``configuration()`` lists them with their values.

    Rates and times of the clock: h2d_pinned, h2d_pageable, d2h_pinned, d2h_pageable, hbm, host_memcpy (bytes/s),
    flops16, flops32 (FLOP/s), launch, copy_lat, kernel_min, sync_lat, query_lat (s). Switches: trace, copy_log,
    strict_races (raise at the racing operation; frees are only counted, since a deallocation must not raise),
    python_time with python_scale (the calling thread's CPU time between device calls advances the host clock).
    copy_log_limit in entries. ghost in bytes: operations touching more do no arithmetic; 0 turns it off.

    Raises:
        KeyError: for an unknown option; options before it have been set.
    """
    for name, value in options.items():
        native.set_option(name, value)


def configuration() -> dict[str, float]:
    """Every option with its present value; may be handed back to ``configure``."""
    return native.options()


def clock() -> float:
    """When everything queued so far will be done."""
    return float(native.library().sim_clock())


def host_clock() -> float:
    """How far the host has come."""
    return float(native.library().sim_host_clock())


def advance_host(seconds: float) -> None:
    """Lets the host spend time, as Python code or a scheduler would."""
    native.library().sim_advance_host(float(seconds))


def reset_clock() -> None:
    """Waits for everything, then restarts time, per-run counters and trace at zero. The copy log stays."""
    native.library().sim_reset_clock()


def counters() -> dict[str, float]:
    """Counts since ``reset_clock`` (ops, h2d, d2h, their bytes, flops, seconds busy per engine) and present figures."""
    return {**native.counters(), **native.engine_counters()}


def trace() -> list[TraceEntry]:
    """What ran since ``reset_clock`` while ``configure(trace=1)``, in the order of queueing."""
    return [TraceEntry(r.name.decode(), r.stream, r.start, r.end, r.bytes, r.flops) for r in native.trace()]


def copy_log() -> list[Copy]:
    """Every copy since ``clear_copy_log``, oldest first.

    At most ``copy_log_limit`` entries: ``counters()["copies_dropped"]`` says how many older ones are missing.
    """
    return [
        Copy(
            "h2d" if r.to_device else "d2h",
            r.bytes,
            r.host_address,
            r.storage,
            r.offset,
            r.stream,
            r.start,
            r.end,
            bool(r.pinned),
            bool(r.ghost),
        )
        for r in native.copies()
    ]


def copy_totals() -> dict[str, int]:
    """Number and bytes of all copies since ``clear_copy_log``: h2d, d2h, h2d_bytes, d2h_bytes. Exact, never dropped."""
    values = native.counters()
    return {name: values[f"logged_{name}"] for name in ("h2d", "d2h", "h2d_bytes", "d2h_bytes")}


def clear_copy_log() -> None:
    native.library().sim_clear_copies()


def storage_serial(tensor: torch.Tensor) -> int:
    """The serial number of a device tensor's storage, as in ``Copy.storage``; 0 for CPU tensors and empty storages."""
    return int(torch.ops.balanced_offload_simulator.storage_serial(tensor))


def races() -> int:
    """Races found since ``clear_races``."""
    return native.counters()["races"]


def last_race() -> str:
    """What the newest race was, or the empty string."""
    return native.last_race()


def clear_races() -> None:
    native.library().sim_clear_races()
