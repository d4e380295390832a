"""Invariant: a figure here was measured or is None; "could not find out" is never 0.

RAM is what this process may use, not what the board carries: inside a container the smallest cgroup limit on the way
up (version 1 and 2) counts as well as the total, and memory the group already uses counts against what is available.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from .policy import Machine
from .sizes import Size, read_size

_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as the largest page-aligned integer; no machine has an exabyte."""

_PINNED_PERCENT = {"Windows": 40}  # Windows refuses more than about half of RAM, and fails earlier under pressure.
_PINNED_PERCENT_ELSEWHERE = 50

_DRIVER_LOCKS_ITSELF = ("cuda", "simulated", "cpu")
"""Kinds whose page locking is not charged to RLIMIT_MEMLOCK: the CUDA and ROCm drivers pin through the kernel's own
page pinning, the simulator and the CPU lock nothing. Taking the limit at its word there would leave 8 MiB, the usual
desktop default, of the gigabytes that can be pinned."""


@dataclass(frozen=True)
class RamInfo:
    """Host memory in bytes; None where unknown. `limit` is the smallest cgroup limit, None when there is none."""

    total: int | None
    available: int | None
    limit: int | None
    process_rss: int | None
    peak_rss: int | None

    @property
    def usable(self) -> int | None:
        """What this process could ever have: the total, or the cgroup limit where that is smaller."""
        return smallest(self.total, self.limit)


@dataclass(frozen=True)
class CgroupMemory:
    """The binding cgroup: its limit and what may still be taken before some level's limit is hit, in bytes."""

    limit: int | None
    available: int | None


class _DeviceMemory(Protocol):
    @property
    def free(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def reserved(self) -> int: ...


class MemorySource(Protocol):
    """The part of the Backend protocol that describes the machine; any Backend fits."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def shared_memory(self) -> bool: ...
    def memory(self) -> _DeviceMemory: ...


def smallest(*values: int | None) -> int | None:
    """The smallest of the known values, None when none is known."""
    known = [value for value in values if value is not None]
    return min(known) if known else None


def ram(root: Path = Path("/")) -> RamInfo:
    """Host memory now. `root` is where /proc/self/cgroup and /sys/fs/cgroup are looked for."""
    group = cgroup_memory(root)
    try:
        virtual = psutil.virtual_memory()
        total: int | None = int(virtual.total)
        available: int | None = int(virtual.available)
    except (OSError, psutil.Error):
        total, available = None, None
    rss, peak = _process_rss(), peak_rss()
    if rss is not None and peak is not None:
        peak = max(rss, peak)  # the kernel updates the peak lazily, so it may trail the present
    return RamInfo(total, smallest(available, group.available), group.limit, rss, peak)


def peak_rss() -> int | None:
    """The largest resident size of this process so far, bytes; None where the system does not say."""
    if sys.platform == "win32":
        try:
            return int(psutil.Process().memory_info().peak_wset)
        except (OSError, psutil.Error, AttributeError):
            return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def memlock() -> int | None:
    """The soft RLIMIT_MEMLOCK in bytes; None when unlimited and where there is no such limit (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or soft < 0 else int(soft)


def pinned_budget(policy_value: Size, ram: RamInfo, *, memlock: int | None = None, os: str | None = None) -> int | None:
    """Bytes of page-locked memory the masters may take; None when RAM is unknown and the policy gives no bytes.

    auto is 40 % of RAM on Windows, 50 % elsewhere; a share is a share of RAM. Never more than `ram.usable` (total and
    cgroup limit) and `memlock`. `os` is platform.system()'s word, this machine's when left out.
    """
    usable = ram.usable
    read = read_size("pinned_ram", policy_value)
    if read.kind.value == "bytes":
        return smallest(read.to_bytes("pinned_ram", None), usable, memlock)
    if usable is None:
        return None
    wanted = read.to_bytes("pinned_ram", usable)
    if wanted is None:
        percent = _PINNED_PERCENT.get(os or platform.system(), _PINNED_PERCENT_ELSEWHERE)
        wanted = usable * percent // 100
    return smallest(wanted, usable, memlock)


def machine(backend: MemorySource, root: Path = Path("/")) -> Machine:
    """The machine as `resolve` wants it, measured now.

    `others` is what the driver counts as used beyond our allocator's reserve: other programs and driver contexts,
    ours too, as no weights can go there. None when the driver's figures contradict each other.
    """
    device = backend.memory()
    host = ram(root)
    free = device.free if 0 <= device.free <= device.total else None
    others = None if free is None else max(0, device.total - free - device.reserved)
    return Machine(
        name=backend.name,
        kind=backend.kind,
        vram_total=device.total,
        vram_free=free,
        others=others,
        ram_total=host.total,
        ram_limit=host.limit,
        memlock=None if backend.kind in _DRIVER_LOCKS_ITSELF else memlock(),
        shared_memory=backend.shared_memory,
        os=platform.system(),
    )


def cgroup_memory(root: Path = Path("/")) -> CgroupMemory:
    """The memory limit of this process's cgroup, versions 1 and 2, over every level up to the mounted root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return CgroupMemory(None, None)
    levels: list[CgroupMemory] = []
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        base = root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):
            v1 = base / "memory"
            levels += [_level_v1(level) for level in _upwards(v1, path)]
        elif hierarchy == "0" and controllers == "":
            # On hybrid systems the version 2 tree hangs beside the old ones.
            for v2 in (base, base / "unified"):
                levels += [_level_v2(level) for level in _upwards(v2, path)]
    limits = [level.limit for level in levels]
    return CgroupMemory(smallest(*limits), smallest(*(level.available for level in levels)))


def _upwards(base: Path, path: str) -> list[Path]:
    """The group's folder and its parents up to `base`; folders that a container hides drop out by themselves."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:  # a group outside our namespace: only the mounted root can be read
        parts = []
    return [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _level_v2(folder: Path) -> CgroupMemory:
    limit = _read_bytes(folder / "memory.max")
    used = _read_bytes(folder / "memory.current")
    idle = _read_stat(folder / "memory.stat", "inactive_file")
    return _level(limit, used, idle)


def _level_v1(folder: Path) -> CgroupMemory:
    # Parents may be hidden from a container; the kernel repeats their effective limit in memory.stat.
    stated = _read_stat(folder / "memory.stat", "hierarchical_memory_limit")
    if stated is not None and stated >= _UNLIMITED:
        stated = None
    limit = smallest(_read_bytes(folder / "memory.limit_in_bytes"), stated)
    used = _read_bytes(folder / "memory.usage_in_bytes")
    idle = _read_stat(folder / "memory.stat", "total_inactive_file")
    return _level(limit, used, idle)


def _level(limit: int | None, used: int | None, idle: int | None) -> CgroupMemory:
    if limit is None or used is None:
        return CgroupMemory(limit, None)
    # File cache that nobody reads is given up before anything is killed, so it counts as free.
    return CgroupMemory(limit, max(0, limit - used + (idle or 0)))


def _read_bytes(file: Path) -> int | None:
    """The number in a cgroup file; None for "max", for no limit, for no file and for anything else."""
    try:
        value = int(file.read_text().strip())
    except (OSError, ValueError):
        return None
    return None if value < 0 or value >= _UNLIMITED else value


def _read_stat(file: Path, key: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        name, _, value = line.partition(" ")
        if name == key and value.strip().isdigit():
            return int(value)
    return None


def _process_rss() -> int | None:
    try:
        return int(psutil.Process().memory_info().rss)
    except (OSError, psutil.Error):
        return None
