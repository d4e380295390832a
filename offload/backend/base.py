"""What the core may ask of a device. Invariant: nothing outside this folder touches torch.cuda or torch.accelerator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# An opaque point on the compute stream's time line. Two of them give seconds, once both are ready.
Mark = Any


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. `free` and `total` are the driver's; `allocated` and `reserved` are our own allocator's."""

    free: int
    total: int
    allocated: int
    reserved: int

    @property
    def reclaimable(self) -> int:
        """Cached by our allocator and not in use: an allocation can have it without asking the driver."""
        return max(0, self.reserved - self.allocated)

    @property
    def others(self) -> int:
        """Used by other programs (and by the driver's own context)."""
        return max(0, self.total - self.free - self.reserved)


# Libraries below torch report a failed allocation of their own as a plain RuntimeError.
_ALLOCATION_FAILED = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "backend out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device has no room left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILED)


class Backend(Protocol):
    """One device. All sizes are bytes, all times seconds."""

    device: torch.device
    kind: str  # "cuda" | "xpu" | "mps" | "simulated" | "cpu" | other torch device types
    name: str  # the card's name, for people
    rung: str  # "gpu" | "simulated" | "cpu": what kind of evidence a figure from here is
    shared_memory: bool  # device memory is host memory: moving weights would gain nothing
    can_register: bool  # `register` can page-lock memory that the host already has
    others: tuple[str, ...]  # other accelerators: named in the report, never touched

    def memory(self) -> DeviceMemory: ...

    def link(self) -> str | None:
        """The bus between host and card, in words; None where the system does not tell, or there is none."""
        ...

    def link_rates(self) -> tuple[float, float, float] | None:
        """(bytes/s from pinned memory, bytes/s from pageable memory, s per copy) where the device itself defines
        them, as the simulated one does; None where they have to be measured."""
        ...

    def peak_allocated(self) -> int:
        """Most bytes allocated at once since `reset_peak()`."""
        ...

    def reset_peak(self) -> None: ...

    def empty_cache(self) -> None: ...

    def synchronize(self) -> None: ...

    def mark(self) -> Mark:
        """A timed point on the current (compute) stream. Never blocks."""
        ...

    def ready(self, mark: Mark) -> bool:
        """Whether the device has passed `mark`. Never blocks."""
        ...

    def seconds(self, start: Mark, end: Mark) -> float:
        """`end - start`; both must be ready."""
        ...

    def current_stream(self) -> Any: ...

    def new_stream(self) -> Any: ...

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Make `stream` current for the block."""
        ...

    def set_stream(self, stream: Any) -> None:
        """Make `stream` current until another one is: for a hot path that knows which one to put back."""
        ...

    def record(self, stream: Any, timed: bool = False) -> Any:
        """Record an event on `stream` now; `stream.wait_event(event)` orders another stream behind it."""
        ...

    def event(self, timed: bool = False) -> Any:
        """An event that is not recorded yet; `event.record(stream)` may be called again and again.

        A stream that was told to wait for it waits for what was recorded then, not for what is recorded later.
        One that is `timed` is a mark too once it is recorded: `ready` and `seconds` take it.
        """
        ...

    def rng_state(self) -> Callable[[], None]:
        """Capture the default generators (host and device); the result puts them back."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """An uninitialised uint8 tensor of `nbytes` on the device; `torch.OutOfMemoryError` if there is no room."""
        ...

    def pinned_empty(self, nbytes: int) -> torch.Tensor | None:
        """An uninitialised page-locked uint8 host tensor, or None where the system refuses to lock more."""
        ...

    def register(self, address: int, nbytes: int) -> bool:
        """Page-lock `nbytes` of host memory from `address` on, so that copies from there run beside the compute.

        False where the device cannot, or the system refuses: nothing is registered then, and no error is left behind.
        """
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`, once the device is done with every copy from there. Never raises: finalisers call it."""
        ...
