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
    copy_log_limit in entries. ghost in bytes: operations touching more do no arithmetic, and copies between CPU
    tensors larger than that touch no memory and take bytes / host_memcpy of the host's time; 0 turns it off.
    pin_limit in bytes: page-locking more host memory than that is refused; 0 is no limit.

    Raises:
        KeyError: for an unknown option; options before it have been set.
    """
    for name, value in options.items():
        native.set_option(name, value)


def configuration() -> dict[str, float]:
    """Every option with its present value; may be handed back to ``configure``."""
    return native.options()


def host_register(address: int, nbytes: int) -> bool:
    """Page-locks existing host memory where it lies, as ``cudaHostRegister`` does: no copy, no rounding.

    Until ``host_unregister`` the range counts as pinned for copies that lie wholly inside it, and for
    ``Tensor.is_pinned()``, which asks about the first byte of the tensor's storage, on every device. The host spends
    nbytes / host_memcpy on it. Unregister it before the memory is freed: the range stays pinned otherwise.

    Returns False, and changes nothing, when a byte of the range is page-locked already, or past ``pin_limit``, or when
    ``refuse_pinning`` asks for it. ValueError for a range that cannot be one.
    """
    if address <= 0 or nbytes <= 0:
        raise ValueError(f"host memory to register needs an address and a size above 0, not {address} and {nbytes}")
    return bool(native.library().sim_host_register(int(address), int(nbytes)))


def host_unregister(address: int) -> bool:
    """Ends what ``host_register`` did at this address; False when no registered range begins there.

    Nothing waits: while a copy from or to the range is under way, this counts as a race.
    """
    return bool(native.library().sim_host_unregister(int(address)))


def delay_copy(after: int, factor: float) -> None:
    """Makes one copy ``factor`` times as long: the one that follows the next ``after`` entries of the copy log.

    Like every fault, it strikes once, then counts in ``counters()["faults"]``; arming it again replaces what was
    pending, and ``reset_clock`` disarms it.
    """
    _check_after(after)
    if factor < 0:
        raise ValueError(f"the factor of a delayed copy must be 0 or more, not {factor}")
    native.library().sim_delay_copy(int(after), float(factor))


def refuse_allocation(after: int) -> None:
    """Raises ``torch.OutOfMemoryError`` once, for the device storage that follows the next ``after`` ones.

    The results of kernels are storages too. See ``delay_copy`` for what all faults share.
    """
    _check_after(after)
    native.library().sim_refuse_allocation(int(after))


def refuse_pinning(after: int) -> None:
    """Refuses to page-lock once, after ``after`` more pinned allocations or registrations.

    An allocation raises ``torch.AcceleratorError`` (a RuntimeError), a registration returns False, as both do past
    ``pin_limit``. See ``delay_copy`` for what all faults share.
    """
    _check_after(after)
    native.library().sim_refuse_pinning(int(after))


def _check_after(after: int) -> None:
    if after < 0:
        raise ValueError(f"the number of cases that pass before a fault must be 0 or more, not {after}")


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
    """Waits for everything, then restarts time, per-run counters and trace at zero, and disarms all faults.

    The copy log stays.
    """
    native.library().sim_reset_clock()


def counters() -> dict[str, float]:
    """What was counted since ``reset_clock``, and present figures.

    Since ``reset_clock``: ops (kernels), h2d, d2h, h2d_bytes, d2h_bytes, flops, busy_compute, busy_h2d, busy_d2h
    (seconds for which an engine worked), trace (entries), and
    - host_syncs: calls in which the host waits for the device. Synchronising a device, a stream or an event that was
      recorded, whether or not it is done already; copies that block, as every pageable one does; ``.item()``; kernels
      whose result's size the host needs (``nonzero``, indexing with a mask); an allocation that waits for memory in
      use. A query is none.
    - allocations: device storages made, those for the results of kernels included; views are none.
    - faults: faults that struck (``delay_copy``, ``refuse_allocation``, ``refuse_pinning``).

    Since ``clear_copy_log``: copies (entries), copies_dropped, logged_h2d, logged_d2h, logged_h2d_bytes,
    logged_d2h_bytes. Since ``clear_races``: races. Present: pinned (bytes of host memory page-locked now, allocated or
    registered), streams. Since ``reset_peak_memory_stats``: pinned_peak.
    """
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
