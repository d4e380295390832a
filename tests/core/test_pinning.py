"""Invariant: memory is page-locked exactly as long as something views it, and budgets count what is really locked.

`Book` is a device that registers: it reads the first and last byte at the very moment it is told to let go, so that a
slab which was freed too early ends the test run, and it refuses what no device would accept.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from balanced_offload.offload import pinning
from balanced_offload.offload.backend import Backend, CpuBackend, open_backend
from balanced_offload.offload.pinning import PAGE, Pinner

MIB = 1 << 20
GIB = 1 << 30


class Book(CpuBackend):
    """The host as a device that registers memory, up to `limit` bytes."""

    def __init__(self, limit: int = 64 * GIB) -> None:
        super().__init__()
        self.can_register = True
        self.limit = limit
        self.asked = 0
        self.held: dict[int, int] = {}

    def register(self, address: int, nbytes: int) -> bool:
        self.asked += 1
        assert address % PAGE == 0 and nbytes > 0
        assert all(address + nbytes <= a or a + n <= address for a, n in self.held.items()), "registered twice"
        if sum(self.held.values()) + nbytes > self.limit:
            return False
        self.held[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        nbytes = self.held.pop(address)
        ctypes.string_at(address, 1), ctypes.string_at(address + nbytes - 1, 1)


class Rounding(CpuBackend):
    """A device that cannot register: torch's allocator pins for it, up to `limit` bytes."""

    def __init__(self, limit: int = GIB) -> None:
        super().__init__()
        self.limit = limit

    def pinned_empty(self, nbytes: int) -> torch.Tensor | None:
        return torch.empty(nbytes, dtype=torch.uint8) if nbytes <= self.limit else None


def pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


# ---------------------------------------------------------------------- slabs
@pytest.mark.parametrize("nbytes", [1, 511, PAGE, PAGE + 1, 65_537, 5_000_001])
def test_a_slab_is_exactly_what_was_asked_for(nbytes: int) -> None:
    backend = Book()
    pinner = Pinner(backend, GIB)
    slab = pinner.slab(nbytes)
    assert slab is not None
    assert (slab.dtype, slab.device.type, slab.shape) == (torch.uint8, "cpu", (nbytes,))
    assert slab.untyped_storage().nbytes() == nbytes and slab.data_ptr() % PAGE == 0
    slab.fill_(7)
    assert slab[nbytes - 1] == 7
    assert backend.held == {slab.data_ptr(): nbytes} and pinner.used == pages(nbytes)
    del slab
    assert backend.held == {} and pinner.used == 0


def test_more_than_two_gib_and_nothing_of_it_touched() -> None:
    backend = Book()
    pinner = Pinner(backend, 4 * GIB)
    before = psutil.Process().memory_info().rss
    slab = pinner.slab(3 * GIB + 5)
    assert slab is not None and slab.numel() == 3 * GIB + 5
    slab[3 * GIB + 4] = 9
    assert slab[3 * GIB + 4] == 9
    assert psutil.Process().memory_info().rss - before < 64 * MIB, "untouched memory was touched"
    assert pinner.used == 3 * GIB + PAGE
    del slab
    assert pinner.used == 0


def test_nothing_is_no_slab() -> None:
    backend = Book()
    assert Pinner(backend, GIB).slab(0) is None and backend.asked == 0


def test_weights_on_a_slab_made_in_inference_mode_are_ordinary_tensors() -> None:
    with torch.inference_mode():
        slab = Pinner(Book(), GIB).slab(4096)
    assert slab is not None and not slab.is_inference()
    weight = torch.nn.Parameter(slab.view(torch.float32).zero_())
    (weight.sum() * 2).backward()
    assert weight.grad is not None


# ---------------------------------------------------------------------- lifetime
def test_registered_as_long_as_the_last_view() -> None:
    backend = Book()
    pinner = Pinner(backend, GIB)
    slab = pinner.slab(1 * MIB)
    assert slab is not None
    slab.zero_()
    module = torch.nn.Linear(16, 16, bias=False)
    module.weight.data = slab[512 : 512 + 1024].view(torch.float32).view(16, 16)
    kept = module.state_dict()
    raw = torch.empty(0, dtype=torch.uint8).set_(slab.untyped_storage(), 0, (8,), (1,))
    del slab, pinner, raw
    gc.collect()
    assert len(backend.held) == 1, "the module still views it"
    module.weight.data = torch.zeros(16, 16)
    assert len(backend.held) == 1, "the state_dict still views it"
    assert float(kept["weight"].sum()) == 0
    kept.clear()
    assert backend.held == {}


def test_a_slab_in_a_cycle_goes_with_the_cycle() -> None:
    backend = Book()
    slab = Pinner(backend, GIB).slab(4096)
    cycle: list[object] = [slab]
    cycle.append(cycle)
    del slab, cycle
    gc.collect()
    assert backend.held == {}


def test_the_last_view_may_die_in_another_thread() -> None:
    backend = Book()
    pinner = Pinner(backend, GIB)
    box = [pinner.slab(4096)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert backend.held == {} and pinner.used == 0


def test_many_threads_stay_within_the_budget() -> None:
    backend = Book()
    pinner = Pinner(backend, 8 * PAGE)
    seen: list[int] = []

    def work() -> None:
        for _ in range(200):
            slab = pinner.slab(3 * PAGE)
            seen.append(sum(list(backend.held.values())))
            del slab

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < max(seen) <= 8 * PAGE
    assert backend.held == {} and pinner.used == 0


def ended(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    """`script` in a fresh process, after the package and `Book` are imported."""
    start = f"""
import importlib.util, os, sys
def load(name, path, **more):
    spec = importlib.util.spec_from_file_location(name, path, **more)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
load("balanced_offload", {str(root / "__init__.py")!r}, submodule_search_locations=[{str(root)!r}])
here = load("here", {__file__!r})
backend = here.Book()
pinner = here.Pinner(backend, 1 << 30)
slab = pinner.slab(1 << 20)
slab[0] = 5
"""
    return subprocess.run([sys.executable, "-c", start + script], capture_output=True, text=True, timeout=120)


def test_a_slab_that_is_left_at_the_end_of_the_process_is_no_error(root: Path) -> None:
    done = ended("import builtins\nbuiltins.kept = slab[1:]\nprint('done')", root)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "done", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_reads_it_and_leaves_the_registration_to_its_parent(root: Path) -> None:
    script = """
child = os.fork()
if child == 0:
    seen = int(slab[0])
    slab[0] = 6
    del slab
    os._exit(seen * 10 + len(backend.held))
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), int(slab[0]), len(backend.held))
del slab
print(len(backend.held))
"""
    done = ended(script, root)
    assert done.stdout.split() == ["51", "5", "1", "0"], done.stderr


# ---------------------------------------------------------------------- budget and refusals
def test_the_budget_is_kept_and_is_no_refusal_of_the_system() -> None:
    backend = Book()
    pinner = Pinner(backend, 3 * PAGE)
    first = pinner.slab(PAGE + 1)
    assert (pinner.used, pinner.room) == (2 * PAGE, PAGE)
    assert pinner.slab(PAGE + 1) is None
    assert not pinner.refused and backend.asked == 1
    pinner.budget = 4 * PAGE
    second = pinner.slab(PAGE + 1)
    assert first is not None and second is not None and pinner.room == 0
    del first
    assert pinner.used == pinner.room == 2 * PAGE


def test_a_refusal_is_remembered_until_bytes_come_back() -> None:
    backend = Book(limit=MIB)
    pinner = Pinner(backend, GIB)
    first = pinner.slab(MIB)
    assert first is not None
    assert pinner.slab(4096) is None and pinner.refused and pinner.room == 0
    asked = backend.asked
    assert [pinner.slab(4096) for _ in range(50)] == [None] * 50
    assert backend.asked == asked, "a storm of requests after a refusal"
    assert backend.held == {first.data_ptr(): MIB} and pinner.used == MIB, "a refusal left something registered"
    del first
    assert not pinner.refused
    again = pinner.slab(4096)
    assert again is not None and backend.asked == asked + 1


def test_memory_that_the_system_does_not_have_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(nbytes: int) -> object:
        raise OSError(12, "Cannot allocate memory")

    backend = Book()
    pinner = Pinner(backend, GIB)
    monkeypatch.setattr(pinning, "_anonymous", none)
    assert pinner.slab(4096) is None
    assert pinner.refused and backend.asked == 0 and pinner.used == 0


def test_without_registration_the_power_of_two_is_charged_and_comes_back_with_the_last_view() -> None:
    pinner = Pinner(Rounding(), 10 * MIB)
    assert pinner.charge(5 * MIB) == 8 * MIB
    slab = pinner.slab(5 * MIB)
    assert slab is not None and slab.numel() == 5 * MIB and pinner.used == 8 * MIB
    assert pinner.slab(3 * MIB) is None and not pinner.refused
    weight = torch.nn.Parameter(slab[:4096].view(torch.float32), requires_grad=False)
    del slab
    gc.collect()
    assert pinner.used == 8 * MIB
    weight.data = torch.zeros(1)
    assert pinner.used == 0


def test_without_registration_a_refusal_is_remembered_too() -> None:
    pinner = Pinner(Rounding(limit=0), GIB)
    assert pinner.slab(1) is None and pinner.refused


# ---------------------------------------------------------------------- CUDA's manners
class Cudart:
    """`torch.cuda.cudart()`: codes instead of exceptions, and an error that stays until a kernel raises it."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[object, ...]] = []
        self.error = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", nbytes, flags))
        self.error = self.code
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister",))
        return 0


@pytest.mark.parametrize("code", [0, 2, 712])
def test_cuda_registers_for_all_cards_and_no_error_stays(code: int, sim: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The simulated card with CUDA's registration in the place of its own."""
    backend = open_backend("vram")
    runtime = Cudart(code)
    monkeypatch.setattr(sim, "cudart", lambda: runtime, raising=False)
    monkeypatch.setattr(backend, "_registers_itself", False)
    monkeypatch.setattr(backend, "can_register", True)
    ones = torch.ones

    def launch(*size: int, **kind: object) -> torch.Tensor:
        error, runtime.error = runtime.error, 0
        if error:
            raise RuntimeError(f"CUDA error: {error}")
        return ones(*size, **kind)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "ones", launch)
    slab = Pinner(backend, GIB).slab(MIB)
    assert (slab is None) is (code != 0)
    assert runtime.calls == [("register", MIB, 1)]
    assert runtime.error == 0, "the next kernel of the model would raise the error of a refused registration"
    del slab
    assert runtime.calls[1:] == ([("unregister",)] if code == 0 else [])


# ---------------------------------------------------------------------- the simulated accelerator
@pytest.fixture
def card(sim: ModuleType) -> Backend:
    backend = open_backend("vram")
    if not backend.can_register:
        pytest.skip("this simulated accelerator does not register host memory")
    return backend


def test_copies_from_a_slab_run_beside_the_host(card: Backend, sim: ModuleType) -> None:
    pinner = Pinner(card, GIB)
    slab = pinner.slab(3 * MIB + 1)
    assert slab is not None and slab.is_pinned() and slab[MIB:].is_pinned()
    slab.copy_(torch.randint(0, 255, slab.shape, dtype=torch.uint8))
    sim.clear_copy_log()
    host = sim.host_clock()
    up = card.empty(slab.numel())
    up.copy_(slab, non_blocking=True)
    assert sim.host_clock() - host < 50e-6, "the copy held the host"
    assert [(c.direction, c.nbytes, c.pinned) for c in sim.copy_log()] == [("h2d", 3 * MIB + 1, True)]
    assert torch.equal(up.cpu(), slab)
    view = slab[5:9]
    counted = sim.counters()["pinned"]
    del slab
    assert view.is_pinned() and sim.counters()["pinned"] == counted
    del view
    assert sim.counters()["pinned"] == counted - (3 * MIB + 1) and pinner.used == 0


def test_a_slab_that_dies_while_it_is_copied_from_waits_for_the_copy(card: Backend, sim: ModuleType) -> None:
    pinner = Pinner(card, GIB)
    slab = pinner.slab(16 * MIB)
    assert slab is not None
    up = card.empty(slab.numel())
    up.copy_(slab, non_blocking=True)
    done = sim.clock()
    assert sim.host_clock() < done
    del slab
    assert sim.host_clock() >= done and pinner.used == 0


def test_ghost_slabs_stay_untouched(card: Backend, sim: ModuleType) -> None:
    sim.configure(ghost=1 * MIB)
    sim.set_memory_cap(6 * GIB)
    before = psutil.Process().memory_info().rss
    slab = Pinner(card, 8 * GIB).slab(2 * GIB + 1)
    assert slab is not None and slab.is_pinned()
    up = card.empty(slab.numel())
    up.copy_(slab, non_blocking=True)
    assert psutil.Process().memory_info().rss - before < 64 * MIB


def test_the_cards_limit_is_a_refusal_until_bytes_come_back(card: Backend, sim: ModuleType) -> None:
    sim.configure(pin_limit=4 * MIB)
    pinner = Pinner(card, GIB)
    first, second = pinner.slab(3 * MIB), pinner.slab(2 * MIB)
    assert first is not None and second is None and pinner.refused
    assert sim.counters()["pinned"] == pinner.used == 3 * MIB
    del first
    third = pinner.slab(2 * MIB)
    assert third is not None and not pinner.refused


def test_a_refusal_half_way_leaves_what_was_locked_before(card: Backend, sim: ModuleType) -> None:
    pinner = Pinner(card, GIB)
    sim.refuse_pinning(2)
    slabs = [pinner.slab(MIB) for _ in range(6)]
    assert [slab is not None for slab in slabs] == [True, True, False, False, False, False]
    assert sim.counters()["pinned"] == pinner.used == 2 * MIB
