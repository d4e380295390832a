"""Invariant: tests see this checkout as `balanced_offload`, never the network, and leave the simulated device empty.

The root `__init__.py` makes the repo a package under any folder name; it is registered here, so that `pytest` works
without an install and an installed copy of another version is never tested by mistake.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Before torch is imported: small tests on many workers are faster on one thread each, and sums come out in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "balanced_offload"
HOST_TESTS = "tests/host/"
TOLD = "BALANCED_OFFLOAD_HOST_TESTS_TOLD"
"""Names a file that gets the line about the host's tests too; run.py ends with it."""
SIM_CAP = 8 << 30
"""Bytes of simulated VRAM that a test starts with."""
_PASSED = pytest.StashKey[bool]()

torch.set_num_threads(1)


def _register_checkout() -> None:
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


if PACKAGE not in sys.modules:
    _register_checkout()


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line says what became of the tests that need a ComfyUI: how many ran, how many did not, and why."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    counts: dict[str, int] = {}
    reasons: set[str] = set()
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        ours = [report for report in reporter.stats.get(outcome, []) if report.nodeid.startswith(HOST_TESTS)]
        counts[outcome] = len(ours)
        if outcome == "skipped":
            reasons = {str(report.longrepr[2]).removeprefix("Skipped: ") for report in ours}
    if not any(counts.values()):
        return
    named = Path(os.environ.get("COMFYUI_PATH", "")).name
    line = f"host tests{f' ({named})' if named else ''}: " + ", ".join(
        f"{count} {outcome}" for outcome, count in counts.items() if count
    )
    if reasons:
        line += f" ({'; '.join(sorted(reasons))})"
    reporter.write_line(line)
    if os.environ.get(TOLD):
        with Path(os.environ[TOLD]).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's top folder."""
    return ROOT


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keeps whether the test itself passed: after a failure its traceback holds tensors, which is no leak."""
    report = yield
    if call.when == "call":
        item.stash[_PASSED] = report.passed
    return report


@pytest.fixture(scope="session")
def vram() -> ModuleType:
    """The simulated accelerator, `torch.vram`; built on first use, skipped with the reason where it cannot be had."""
    simulator = importlib.import_module(f"{PACKAGE}.offload.simulator")
    try:
        return simulator.load("vram")
    except simulator.SimulatorUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def sim(vram: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """`torch.vram` with 8 GiB, strict races, real arithmetic, clock and logs at zero.

    A test that passes but leaves device bytes, a race, or another stream than the default one behind fails.
    """
    options = vram.configuration()
    _clean(vram)
    before = vram.memory_allocated()
    vram.configure(strict_races=1, ghost=0)
    yield vram
    if request.node.stash.get(_PASSED, False):
        # Fixtures that are finished by now may still be referred to as arguments of the test.
        request.node.funcargs.clear()
        gc.collect()
        vram.synchronize()
        vram.empty_cache()
        until = time.monotonic() + 5  # autograd's own thread lets go of its last tensor in its own time
        while vram.memory_allocated() > before and time.monotonic() < until:
            time.sleep(0.01)
            gc.collect()
        races, last, left = vram.races(), vram.last_race(), vram.memory_allocated() - before
        on_default = vram.current_stream() == vram.default_stream()
    else:
        races, last, left, on_default = 0, "", 0, True
    vram.configure(**options)
    _clean(vram)
    assert races == 0, f"{races} races, the last: {last}"
    # fewer than before: what an earlier test's traceback held is gone by now
    assert left <= 0, f"{left} device bytes are still allocated after the test"
    assert on_default, "the test left another stream than the default one as the current one"


def forget_the_last_failure() -> None:
    """Drop what the runner keeps for a debugger: its traceback keeps the failed test's tensors into later tests."""
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        sys.__dict__.pop(name, None)
    gc.collect()


def _clean(vram: ModuleType) -> None:
    forget_the_last_failure()
    vram.set_stream(vram.default_stream())
    vram.synchronize()
    vram.empty_cache()
    vram.set_others(0)
    vram.set_memory_cap(SIM_CAP)
    vram.reset_clock()
    vram.clear_copy_log()
    vram.clear_races()
    vram.reset_peak_memory_stats()
