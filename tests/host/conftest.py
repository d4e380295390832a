"""Invariant: a test below here runs against a real ComfyUI, or skips with the reason; it never runs against a double.

One host per process: `COMFYUI_PATH` selects it (`hosts.py`). The host's top-level modules (`nodes`, `server`, `app`)
would get in the way of other tests, so these run in a process of their own and skip beside others.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from . import hosts, inprocess, tiny
from .server import HostServer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BESIDE = f"host tests need a process of their own: {hosts.APART}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is below here, and skips it with the reason where there is no host for it."""
    ours = [item for item in items if HERE in Path(item.path).parents]
    reason = hosts.why_not(ROOT, os.environ, Path.home())
    if reason is None and len(ours) < len(items):
        reason = BESIDE
    for item in ours:
        item.add_marker(pytest.mark.host)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


class Host(NamedTuple):
    """The checkout that is tested against. `version`: as numbers."""

    path: Path
    version: tuple[int, ...]

    @property
    def old(self) -> bool:
        """A host of the time before dynamic VRAM."""
        return self.version < (0, 16)


@pytest.fixture(scope="session")
def host() -> Host:
    path, reason = hosts.host_for(ROOT, os.environ, Path.home())
    assert path is not None, reason
    return Host(path, tuple(int(part) for part in hosts.version(path).split(".")))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base folder of the host in this process: input, output and models below it."""
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="session")
def management(host: Host, base: Path) -> ModuleType:
    """The host in this process, on the CPU: `comfy.model_management`."""
    return inprocess.open_host(host.path, base)


@pytest.fixture(scope="session")
def models(management: ModuleType, base: Path) -> Path:
    """The host's `models` folder with the tiny models in it."""
    tiny.make_all(base / "models")
    importlib.import_module("nodes")
    gc.collect()
    gc.freeze()  # what the host imports is left out of every later collection: half a second each
    return base / "models"


@pytest.fixture
def in_process(management: ModuleType, models: Path) -> Iterator[ModuleType]:
    """The host in this process on the CPU, with nothing loaded before and after."""
    inprocess.close_models()
    yield management
    inprocess.close_models()


class SimulatedHost(NamedTuple):
    """The host in this process with the simulated accelerator as its load device."""

    management: ModuleType
    vram: ModuleType
    device: torch.device

    def moved(self) -> dict[str, int]:
        """Copies and bytes since the last call, by the device's own log."""
        totals: dict[str, int] = self.vram.copy_totals()
        self.vram.clear_copy_log()
        return totals

    def peak(self) -> int:
        """Most bytes on the device since the last call."""
        most: int = self.vram.max_memory_allocated()
        self.vram.reset_peak_memory_stats()
        return most


@pytest.fixture
def sim_host(management: ModuleType, models: Path, sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As `in_process`, on the simulated accelerator with 8 GiB; `sim.set_memory_cap` makes it smaller."""
    pack = inprocess.load_file(HERE / "packs" / "simulated_device" / "__init__.py", "host_simulated_device")
    inprocess.close_models()
    sim.configure(strict_races=1)
    with monkeypatch.context() as patch:
        device = pack.install(management, sim, patch.setattr)
        yield SimulatedHost(management, sim, device)
        inprocess.close_models()
        gc.collect()


@pytest.fixture
def cap(sim_host: SimulatedHost) -> Callable[[int], None]:
    """Sets the capacity of the simulated device, bytes."""
    return sim_host.vram.set_memory_cap  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def pack() -> Callable[[str], ModuleType]:
    """Imports a module of this checkout: `pack("offload.adapters.comfyui")`."""
    return lambda name: importlib.import_module(f"balanced_offload.{name}" if name else "balanced_offload")


# ---------------------------------------------------------------------- servers
@pytest.fixture(scope="session")
def servers(host: Host, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., HostServer]]:
    """Makes servers of the host; one of every kind at a time, each stopped at the end."""
    running: dict[Any, HostServer] = {}

    def start(
        *arguments: str, packs: tuple[Path, ...] = (), environment: dict[str, str] | None = None, fresh: bool = False
    ) -> HostServer:
        key = (arguments, packs, tuple(sorted((environment or {}).items())))
        known = running.get(key)
        if known is not None and known.alive() and not fresh:
            return known
        if known is not None:
            known.stop()
        base = tmp_path_factory.mktemp("server")
        running[key] = HostServer(host.path, base, models, ROOT, arguments, packs, environment or {})
        running[key].start()
        return running[key]

    yield start
    for server in running.values():
        server.stop()


@pytest.fixture(scope="session")
def server(servers: Callable[..., HostServer]) -> HostServer:
    """The host as a server on the CPU, with the pack in its custom_nodes."""
    return servers()


@pytest.fixture(scope="session")
def sim_server(servers: Callable[..., HostServer], vram: ModuleType) -> HostServer:
    """The same on the simulated accelerator with 1 GiB."""
    simulated = HERE / "packs" / "simulated_device"
    environment = {"SIMULATED_VRAM": str(1 << 30), "BALANCED_OFFLOAD_CHECKOUT": str(ROOT)}
    return servers(packs=(simulated,), environment=environment)
