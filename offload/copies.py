"""Copies in their place between what computes before and after them. Invariant: memory is written to by nobody else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .backend import Backend


@contextlib.contextmanager
def copies_ordered(backend: Backend, copy_stream: Any) -> Iterator[None]:
    """Copies in this block run on the copy stream, behind what the compute stream has queued before it and ahead of
    what it queues after; also when the block raises, as the memory they write to may be freed at once."""
    compute = backend.current_stream()
    ready = backend.record(compute)
    try:
        with backend.on_stream(copy_stream):
            copy_stream.wait_event(ready)
            yield
    finally:
        compute.wait_event(backend.record(copy_stream))
