"""A GPU as the place of a bench. Invariant: nothing is waited for inside a timed block, only at its two ends.

The cap is the allocator's (`set_per_process_memory_fraction`), which the driver does not show: what is planned from
the driver's figures has to be told of it (`reserve`). Copies and syncs are counted in one more step under torch's
profiler, after the timed ones.
"""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..backend import open_backend
from .places import Counts, Step, no_collection

_PROBE_BYTES = 256 << 20
_SYNCS = {f"{kind}{what}Synchronize" for kind in ("cuda", "hip") for what in ("Stream", "Device", "Event")}


class GpuPlace:
    """One CUDA (or ROCm) device through torch's own module for it."""

    rung = "gpu"
    timed_blocks = 3
    sees_registered = False  # torch counts what its own allocator locks, not what was registered where it lies

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._backend = open_backend(device)
        self.device = self._backend.device
        self.total = self._backend.memory().total
        self._cap: int | None = None
        self._bandwidth: float | None = None

    @property
    def name(self) -> str:
        return self._backend.name

    def parameters(self) -> dict[str, Any]:
        return {
            "card_name": self.name,
            "vram": self.total,
            "h2d_pinned": self.bandwidth,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }

    def use(self, card: str | None, cap: int | None) -> None:
        if card is not None:
            raise ValueError(f"--card: got {card!r}; a card's rates are for the simulated accelerator, this is a GPU")
        self._cap = cap
        share = 1.0 if cap is None else min(1.0, cap / self.total)
        self._module.set_per_process_memory_fraction(share, self.device)

    @property
    def reserve(self) -> int:
        return 0 if self._cap is None else max(0, self.total - self._cap)

    @property
    def ram(self) -> None:
        return None

    @property
    def bandwidth(self) -> float:
        if self._bandwidth is None:
            source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
            target = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=self.device)
            rates = []
            for _ in range(5):
                begin, end = self._backend.mark(), None
                target.copy_(source, non_blocking=True)
                end = self._backend.mark()
                self._backend.synchronize()
                rates.append(_PROBE_BYTES / self._backend.seconds(begin, end))
            self._bandwidth = sorted(rates)[len(rates) // 2]
        return self._bandwidth

    @contextlib.contextmanager
    def ghost(self, on: bool) -> Iterator[None]:
        yield  # a GPU always computes

    def time(self, step: Step, steps: int) -> tuple[float, Counts]:
        self._backend.synchronize()
        before = self._allocations()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        self._backend.synchronize()
        seconds = (time.perf_counter() - begin) / steps
        return seconds, Counts(allocations=self._allocations() - before).per(steps)

    def _allocations(self) -> int:
        return int(self._module.memory_stats(self.device).get("allocation.all.allocated", 0))

    def count(self, step: Step) -> Counts:
        try:
            return self._profiled(step)
        except (RuntimeError, OSError, ValueError, KeyError):  # no profiler in this build or on this driver
            return Counts()

    def _profiled(self, step: Step) -> Counts:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self._backend.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            step()
            # the wait at the end is the profiler's and ours, not the strategy's: it is taken off below
            self._backend.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        return counts_of_trace(events)

    def time_with_python(self, step: Step, steps: int) -> None:
        return None  # wall time has it

    def python_seconds(self, step: Step, steps: int) -> float:
        """CPU seconds of this thread per step: what a wait spins away is in it."""
        self._backend.synchronize()
        with no_collection():
            begin = time.thread_time()
            for _ in range(steps):
                step()
            spent = (time.thread_time() - begin) / steps
        self._backend.synchronize()
        return spent

    def synchronize(self) -> None:
        self._backend.synchronize()

    def reset_peak(self) -> None:
        self._backend.reset_peak()

    def peak(self) -> int:
        return self._backend.peak_allocated()

    def pinned(self) -> int | None:
        stats = getattr(self._module, "host_memory_stats", None)
        if stats is None:
            return None
        found: Mapping[str, int] = stats()
        # what the host allocator really locks: it rounds up, and keeps what was given back
        value = found.get("segment_bytes.current", found.get("allocated_bytes.current"))
        return None if value is None else int(value)

    def races(self) -> None:
        return None  # a race on a GPU is silent; unequal outputs are what shows

    def allocated(self) -> int:
        return self._backend.memory().allocated

    def clean(self) -> None:
        gc.collect()
        self._backend.synchronize()
        self._backend.empty_cache()
        empty_host = getattr(torch._C, "_host_emptyCache", None)
        if empty_host is not None:
            empty_host()


def counts_of_trace(events: Iterable[Mapping[str, Any]]) -> Counts:
    """Copies and waits in a profiler's trace of one step that ends with one wait; unknown where it saw no kernel."""
    up = down = kernels = 0
    syncs = -1  # the last one is the bench's own
    for event in events:
        name = str(event.get("name", ""))
        kernels += event.get("cat") == "kernel"
        if event.get("cat") == "gpu_memcpy":
            nbytes = int(event.get("args", {}).get("bytes", 0))
            up += nbytes * ("HtoD" in name)
            down += nbytes * ("DtoH" in name)
        elif event.get("cat") in ("cuda_runtime", "cuda_driver") and name in _SYNCS:
            syncs += 1
    if not kernels:
        return Counts()
    return Counts(bytes_h2d=up, bytes_d2h=down, host_syncs=max(0, syncs))
