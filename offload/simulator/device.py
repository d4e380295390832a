"""The module behind ``torch.<name>``: what ``torch.cuda`` offers, plus everything in ``controls``.

Invariant: it only forwards to torch and ``controls``, and it is imported only through ``load``, which opens the C++
library first.

Memory is in bytes, times are in seconds of virtual time.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend

from .cards import CARDS, Card
from .controls import (
    Copy,
    TraceEntry,
    advance_host,
    card,
    clear_copy_log,
    clear_races,
    clock,
    configuration,
    configure,
    copy_log,
    copy_totals,
    counters,
    delay_copy,
    host_clock,
    host_register,
    host_unregister,
    last_race,
    memory_cap,
    others,
    races,
    refuse_allocation,
    refuse_pinning,
    reset_clock,
    set_memory_cap,
    set_others,
    storage_serial,
    trace,
    use_card,
)

__all__ = [
    "CARDS",
    "Card",
    "Copy",
    "Event",
    "Properties",
    "Stream",
    "TraceEntry",
    "advance_host",
    "card",
    "clear_copy_log",
    "clear_races",
    "clock",
    "configuration",
    "configure",
    "copy_log",
    "copy_totals",
    "counters",
    "delay_copy",
    "host_clock",
    "host_register",
    "host_unregister",
    "last_race",
    "memory_cap",
    "others",
    "races",
    "refuse_allocation",
    "refuse_pinning",
    "reset_clock",
    "set_memory_cap",
    "set_others",
    "storage_serial",
    "trace",
    "use_card",
]

OutOfMemoryError = torch.OutOfMemoryError

_accelerator = torch.accelerator
_device = torch.device("privateuseone", 0)
_PRIVATE_USE_1 = 20  # c10::DeviceType::PrivateUse1, which Stream's constructor wants as a number


@dataclass(frozen=True)
class Properties:
    """What ``torch.cuda.get_device_properties`` would tell."""

    name: str
    total_memory: int
    major: int = 8
    minor: int = 9
    multi_processor_count: int = 64


class Stream(torch.Stream):
    """A stream of the simulated device. There are 32, handed out in turn; ``priority`` is ignored."""

    def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> Stream:
        return torch.Stream.__new__(cls, device=_device, priority=priority)


def Event(enable_timing: bool = True, blocking: bool = False, interprocess: bool = False) -> torch.Event:
    """An event of the simulated device, timed unless told otherwise.

    Not a class: ``torch.Event.elapsed_time`` takes no subclass of itself.
    """
    return torch.Event(device=_device, enable_timing=enable_timing)


class device:
    """Context manager for code that selects a device. There is one."""

    def __init__(self, device: Any) -> None:
        self.idx = 0

    def __enter__(self) -> device:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def init() -> None:
    """Nothing to do: loading did it."""


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    """There is one device."""


def synchronize(device: Any = None) -> None:
    """The host waits for all streams."""
    _accelerator.synchronize()


def empty_cache() -> None:
    """Gives back memory whose recorded streams are done. There is no other cache."""
    _accelerator.empty_cache()


def ipc_collect() -> None:
    """No memory is shared between processes."""


def memory_allocated(device: Any = None) -> int:
    """Bytes of living storages, each rounded up to 512."""
    return int(_accelerator.memory_allocated())


def max_memory_allocated(device: Any = None) -> int:
    return int(_accelerator.max_memory_allocated())


def memory_reserved(device: Any = None) -> int:
    """As ``memory_allocated``, plus what was freed but is still in use by a recorded stream."""
    return int(_accelerator.memory_reserved())


def max_memory_reserved(device: Any = None) -> int:
    return int(_accelerator.max_memory_reserved())


def memory_stats(device: Any = None) -> dict[str, Any]:
    return dict(_accelerator.memory_stats())


def reset_peak_memory_stats(device: Any = None) -> None:
    _accelerator.reset_peak_memory_stats()


reset_max_memory_allocated = reset_peak_memory_stats


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(free, total) as the driver would tell: free is the capacity less ours and less ``others()``."""
    free, total = _accelerator.get_memory_info()
    return int(free), int(total)


def get_device_name(device: Any = None) -> str:
    return card().device_name


def get_device_properties(device: Any = None) -> Properties:
    return Properties(get_device_name(), memory_cap())


def get_device_capability(device: Any = None) -> tuple[int, int]:
    return 8, 9


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def is_bf16_supported(*_: Any) -> bool:
    return True


def current_stream(device: Any = None) -> torch.Stream:
    return _accelerator.current_stream()


def default_stream(device: Any = None) -> torch.Stream:
    return torch.Stream(stream_id=0, device_index=0, device_type=_PRIVATE_USE_1)


def set_stream(stream: torch.Stream) -> None:
    _accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[torch.Stream | None]:
    """Queues the work of the block on ``stream``; None leaves the current one."""
    if stream is None:
        yield None
        return
    previous = _accelerator.current_stream()
    _accelerator.set_stream(stream)
    try:
        yield stream
    finally:
        _accelerator.set_stream(previous)


def manual_seed(seed: int) -> None:
    """The same seed gives the same numbers as on the CPU."""
    torch.ops.balanced_offload_simulator.manual_seed(int(seed) & 0x7FFF_FFFF_FFFF_FFFF)


manual_seed_all = manual_seed


def initial_seed() -> int:
    return int(torch.ops.balanced_offload_simulator.initial_seed())


def get_rng_state(device: Any = None) -> torch.Tensor:
    state = torch.ops.balanced_offload_simulator.rng_state()
    assert isinstance(state, torch.Tensor)
    return state


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.ops.balanced_offload_simulator.set_rng_state(state)


def register(name: str) -> None:
    """Makes this module ``torch.<name>``. Called once, by ``load``."""
    global _device
    _device = torch.device(name, 0)
    module = sys.modules[__name__]
    torch._register_device_module(name, module)  # type: ignore[no-untyped-call]
    sys.modules[f"torch.{name}"] = module
    generate_methods_for_privateuse1_backend(unsupported_dtype=None)
