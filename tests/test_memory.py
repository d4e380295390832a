"""Memory figures are measured or None: cgroups of both versions from a fake root, the pinned budget, the machine."""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from balanced_offload.offload import memory
from balanced_offload.offload.memory import CgroupMemory, RamInfo, cgroup_memory, pinned_budget, ram
from balanced_offload.offload.policy import OffloadPolicy, WorkingSet
from balanced_offload.offload.sizes import GIB, MIB

V1_NO_LIMIT = 9223372036854771712  # what version 1 prints for "no limit"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


def v2(folder: str, limit: object, used: int | None = None, idle: int | None = None) -> dict[str, object]:
    base = f"sys/fs/cgroup/{folder}".rstrip("/")
    files: dict[str, object] = {f"{base}/memory.max": limit}
    if used is not None:
        files[f"{base}/memory.current"] = used
    if idle is not None:
        files[f"{base}/memory.stat"] = f"anon 12\ninactive_anon 5\ninactive_file {idle}\nactive_file 9"
    return files


def v1(folder: str, limit: object, used: int | None = None, stat: str | None = None) -> dict[str, object]:
    base = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    files: dict[str, object] = {f"{base}/memory.limit_in_bytes": limit}
    if used is not None:
        files[f"{base}/memory.usage_in_bytes"] = used
    if stat is not None:
        files[f"{base}/memory.stat"] = stat
    return files


def test_no_cgroup_files_means_unknown(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path) == CgroupMemory(None, None)


def test_version_2_in_a_container_reads_the_mounted_root(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", **v2("", 8 * GIB, used=3 * GIB, idle=GIB)})
    # 8 - 3 + 1 of cache that nobody reads
    assert cgroup_memory(tmp_path) == CgroupMemory(8 * GIB, 6 * GIB)


def test_version_2_takes_the_smallest_limit_on_the_way_up(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/session.scope",
            **v2("user.slice/session.scope", 12 * GIB, used=1 * GIB),
            **v2("user.slice", 10 * GIB, used=9 * GIB),
            **v2("other.slice", 1 * GIB, used=0),  # a neighbour's limit is not ours
        },
    )
    # limits 12 and 10; room 11 and 1
    assert cgroup_memory(tmp_path) == CgroupMemory(10 * GIB, 1 * GIB)


def test_version_2_max_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/a", **v2("a", "max", used=GIB)})
    assert cgroup_memory(tmp_path) == CgroupMemory(None, None)


def test_version_2_outside_the_namespace_still_reads_the_root(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/../../host", **v2("", 4 * GIB)})
    assert cgroup_memory(tmp_path) == CgroupMemory(4 * GIB, None)


def test_version_1(tmp_path: Path) -> None:
    lines = "12:pids:/docker/abc\n5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc"
    write(tmp_path, {"proc/self/cgroup": lines, **v1("docker/abc", 6 * GIB, used=2 * GIB), **v1("", V1_NO_LIMIT)})
    assert cgroup_memory(tmp_path) == CgroupMemory(6 * GIB, 4 * GIB)


def test_version_1_in_a_container_that_hides_its_own_path(tmp_path: Path) -> None:
    # The path is the host's and does not exist inside; the mounted root is the container's group.
    write(tmp_path, {"proc/self/cgroup": "4:memory:/docker/abc", **v1("", 6 * GIB, used=2 * GIB)})
    assert cgroup_memory(tmp_path) == CgroupMemory(6 * GIB, 4 * GIB)


def test_version_1_hidden_parents_are_repeated_in_memory_stat(tmp_path: Path) -> None:
    stat = f"cache 1\nhierarchical_memory_limit {5 * GIB}\ntotal_inactive_file {GIB}"
    write(tmp_path, {"proc/self/cgroup": "4:memory:/a", **v1("a", V1_NO_LIMIT, used=2 * GIB, stat=stat)})
    # 5 - 2 + 1
    assert cgroup_memory(tmp_path) == CgroupMemory(5 * GIB, 4 * GIB)


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    stat = f"hierarchical_memory_limit {V1_NO_LIMIT}"
    write(tmp_path, {"proc/self/cgroup": "4:memory:/a", **v1("a", V1_NO_LIMIT, used=GIB, stat=stat)})
    assert cgroup_memory(tmp_path) == CgroupMemory(None, None)


@pytest.mark.parametrize(("one", "two", "limit"), [(6, 8, 6), (8, 6, 6)])
def test_hybrid_takes_the_smaller_of_both_versions(tmp_path: Path, one: int, two: int, limit: int) -> None:
    write(
        tmp_path,
        {"proc/self/cgroup": "4:memory:/a\n0::/b", **v1("a", one * GIB), **v2("unified/b", two * GIB)},
    )
    assert cgroup_memory(tmp_path).limit == limit * GIB


@pytest.mark.parametrize("content", ["", "lots", "-1", "12 34", "0x10"])
def test_a_file_that_makes_no_sense_is_unknown(tmp_path: Path, content: str) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", **v2("", content, used=1)})
    assert cgroup_memory(tmp_path) == CgroupMemory(None, None)


def test_usage_over_the_limit_leaves_nothing_and_not_less(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", **v2("", GIB, used=2 * GIB)})
    assert cgroup_memory(tmp_path) == CgroupMemory(GIB, 0)


def test_ram_of_this_process(tmp_path: Path) -> None:
    info = ram(tmp_path)
    assert info.total == psutil.virtual_memory().total
    assert info.limit is None
    assert info.available is not None and info.total is not None and 0 < info.available <= info.total
    assert info.process_rss is not None and info.peak_rss is not None
    # A Python with torch is between 10 MiB and 64 GiB: a factor of 1,024 in the unit would fall outside.
    assert 10 * MIB < info.process_rss <= info.peak_rss < 64 * GIB


def test_peak_counts_memory_that_is_gone_again() -> None:
    before = memory.peak_rss()
    block = bytearray(b"x") * (200 * MIB)
    peak = memory.peak_rss()
    size = len(block)
    del block
    assert before is not None and peak is not None and size == 200 * MIB
    now = ram().peak_rss
    assert now is not None and now >= peak >= before
    assert now >= 200 * MIB


def test_ram_available_is_what_the_cgroup_leaves(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", **v2("", 64 * MIB, used=60 * MIB)})
    info = ram(tmp_path)
    assert (info.limit, info.available, info.usable) == (64 * MIB, 4 * MIB, 64 * MIB)


def test_ram_that_cannot_be_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no /proc")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    info = ram(tmp_path)
    assert (info.total, info.available, info.limit, info.usable) == (None, None, None, None)


def known(total: int | None, limit: int | None = None) -> RamInfo:
    return RamInfo(total, None, limit, None, None)


@pytest.mark.parametrize(
    ("value", "info", "memlock", "os", "expected"),
    [
        ("auto", known(64 * GIB), None, "Linux", 32 * GIB),
        ("auto", known(64 * GIB), None, "Darwin", 32 * GIB),
        ("auto", known(10 * GIB), None, "Windows", 4 * GIB),
        (None, known(64 * GIB), None, "Linux", 32 * GIB),
        ("auto", known(64 * GIB, 8 * GIB), None, "Linux", 4 * GIB),
        ("auto", known(8 * GIB, 64 * GIB), None, "Linux", 4 * GIB),  # a limit over the total is none
        ("auto", known(64 * GIB), 8 * MIB, "Linux", 8 * MIB),
        ("75%", known(64 * GIB), None, "Linux", 48 * GIB),
        (0.75, known(64 * GIB, 8 * GIB), None, "Linux", 6 * GIB),
        ("100GiB", known(64 * GIB), None, "Linux", 64 * GIB),
        (0, known(64 * GIB), None, "Linux", 0),
        ("2GiB", known(None), None, "Linux", 2 * GIB),
        ("2GiB", known(None), GIB, "Linux", GIB),
        ("auto", known(None), None, "Linux", None),
        ("50%", known(None), 8 * MIB, "Linux", None),  # half of an unknown is unknown, whatever may be locked
    ],
)
def test_pinned_budget(value: object, info: RamInfo, memlock: int | None, os: str, expected: int | None) -> None:
    assert pinned_budget(value, info, memlock=memlock, os=os) == expected  # type: ignore[arg-type]


def test_pinned_budget_defaults_to_this_system() -> None:
    percent = 40 if platform.system() == "Windows" else 50
    assert pinned_budget("auto", known(100 * GIB)) == percent * GIB


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_MEMLOCK")
def test_memlock_is_the_soft_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    asked = []

    def limit(which: int) -> tuple[int, int]:
        asked.append(which)
        return soft, hard

    monkeypatch.setattr(resource, "getrlimit", limit)
    soft, hard = 64 * MIB, 128 * MIB
    assert memory.memlock() == 64 * MIB
    soft = hard = resource.RLIM_INFINITY
    assert memory.memlock() is None
    assert asked == [resource.RLIMIT_MEMLOCK] * 2


@dataclass(frozen=True)
class Memory:
    free: int
    total: int
    allocated: int
    reserved: int


@dataclass(frozen=True)
class Card:
    """As much of a Backend as `machine` reads."""

    name: str = "Test card"
    kind: str = "cuda"
    shared_memory: bool = False
    figures: Memory = Memory(free=10 * GIB, total=16 * GIB, allocated=3 * GIB, reserved=4 * GIB)

    def memory(self) -> Memory:
        return self.figures


def test_machine_counts_others_once(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", **v2("", 8 * GIB)})
    machine = memory.machine(Card(), tmp_path)
    assert (machine.name, machine.kind, machine.shared_memory) == ("Test card", "cuda", False)
    assert (machine.vram_total, machine.vram_free) == (16 * GIB, 10 * GIB)
    # 16 - 10 free - 4 that our allocator holds: cached blocks are ours too
    assert machine.others == 2 * GIB
    assert machine.ram_limit == 8 * GIB
    assert machine.ram_total == psutil.virtual_memory().total
    assert machine.os == platform.system()


@pytest.mark.parametrize(
    ("figures", "free", "others"),
    [
        (Memory(16 * GIB, 16 * GIB, 0, 0), 16 * GIB, 0),
        # the driver's figure may be older than the allocator's: not negative
        (Memory(13 * GIB, 16 * GIB, 4 * GIB, 4 * GIB), 13 * GIB, 0),
        # figures that contradict each other are unknown, not nothing
        (Memory(-1, 16 * GIB, 0, 0), None, None),
        (Memory(17 * GIB, 16 * GIB, 0, 0), None, None),
    ],
)
def test_machine_with_odd_figures(figures: Memory, free: int | None, others: int | None, tmp_path: Path) -> None:
    machine = memory.machine(Card(figures=figures), tmp_path)
    assert (machine.vram_free, machine.others) == (free, others)


@pytest.mark.parametrize(("kind", "binds"), [("cuda", False), ("simulated", False), ("cpu", False), ("xpu", True)])
def test_memlock_binds_only_where_the_driver_does_not_lock_itself(
    kind: str, binds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memlock", lambda: 8 * MIB)
    machine = memory.machine(Card(kind=kind), tmp_path)
    assert machine.memlock == (8 * MIB if binds else None)
    pinned = OffloadPolicy().resolve(machine, WorkingSet(())).pinned_ram
    assert (pinned == 8 * MIB) == binds
