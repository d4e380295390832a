"""Page-locked host memory, exactly as much as asked for. Invariant: what is registered is unregistered exactly when
the last tensor that views it dies, wherever that happens, and is never freed before.

A slab is anonymous memory of the system that is registered with the device: torch's own pinned allocator rounds every
request up to a power of two (2.25 GiB take 4) and keeps it for good. The memory is a buffer object that the storage
made by `torch.frombuffer` keeps alive, so its finaliser runs when the storage goes, and not a moment earlier or later.
Where a device cannot register (XPU and others), torch's allocator is used, and charged with what it really locks.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .backend import Backend

PAGE = mmap.PAGESIZE
_HUGE_PAGE = 2 << 20


class _Slab(mmap.mmap):
    """Anonymous memory that gives its registration back before the system takes the memory."""

    _release: Callable[[], None] | None = None

    def __del__(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()


class Pinner:
    """Hands out page-locked host memory within one RAM budget (bytes), shared by all components of a session.

    May be used from several threads. Bytes come back by themselves when the last tensor that views a slab dies.
    """

    def __init__(self, backend: Backend, budget: int) -> None:
        self._backend = backend
        self.budget = budget
        self.refused = False
        """Whether the system refused to lock more. No further slab is asked for until bytes have come back."""
        self._asking = threading.Lock()
        # Slab -> bytes locked for it. Finalisers may run inside any line of any thread: only single operations of a
        # dict are safe against them, and a lock taken there could be held already by the very same thread.
        self._locked: dict[int, int] = {}
        self._next = 0

    @property
    def used(self) -> int:
        """Bytes that are really locked now."""
        return sum(list(self._locked.values()))

    @property
    def room(self) -> int:
        """Bytes that may still be locked; 0 after the system refused."""
        return 0 if self.refused else max(0, self.budget - self.used)

    def charge(self, nbytes: int) -> int:
        """Bytes that a slab of `nbytes` locks: whole pages, or a power of two where torch's allocator has to do."""
        pages = -(-nbytes // PAGE) * PAGE
        return pages if self._backend.can_register else max(pages, 1 << max(0, nbytes - 1).bit_length())

    def slab(self, nbytes: int) -> torch.Tensor | None:
        """A pinned uint8 CPU tensor of exactly `nbytes` bytes, its contents undefined, aligned to a page.

        None where the budget or the system says no; then nothing is locked, and `refused` tells which it was.
        """
        with self._asking:
            charge = self.charge(nbytes)
            if nbytes <= 0 or charge > self.room:
                return None
            self._next += 1
            slab = self._registered(nbytes, charge) if self._backend.can_register else self._allocated(nbytes, charge)
            self.refused = slab is None
            return slab

    def _registered(self, nbytes: int, charge: int) -> torch.Tensor | None:
        try:
            memory = _anonymous(nbytes)
        except (OSError, ValueError, OverflowError, MemoryError):  # no address space, or no memory to back it
            return None
        if self._backend.rung == "gpu":  # every page will be locked anyway: the fewer there are the faster that goes
            _ask_for_huge_pages(memory, nbytes)
        with torch.inference_mode(False):  # a view of an inference tensor would make the model's weights such tensors
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
        address = tensor.data_ptr()
        if not self._backend.register(address, nbytes):
            return None
        key = self._next
        self._locked[key] = charge
        # all that is needed is at hand here: while the interpreter ends, a module may have lost its names
        unregister, give_back, getpid, process = self._backend.unregister, self._give_back, os.getpid, os.getpid()

        def release() -> None:
            if getpid() == process:  # a forked child has the memory, but not the device it is registered with
                unregister(address)
            give_back(key)

        memory._release = release
        return tensor

    def _allocated(self, nbytes: int, charge: int) -> torch.Tensor | None:
        with torch.inference_mode(False):
            tensor = self._backend.pinned_empty(nbytes)
        if tensor is None:
            return None
        self._locked[self._next] = charge
        # the Python object of a storage lives as long as the storage
        weakref.finalize(tensor.untyped_storage(), self._give_back, self._next).atexit = False
        return tensor

    def _give_back(self, key: int) -> None:
        if self._locked.pop(key, None) is not None:
            self.refused = False


def _anonymous(nbytes: int) -> _Slab:
    """Zero pages of the system's, none of them touched. Private: shared ones could not be huge, and count as files."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return _Slab(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return _Slab(-1, nbytes)


def _ask_for_huge_pages(memory: Any, nbytes: int) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or nbytes < _HUGE_PAGE:
        return
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without them
        return
