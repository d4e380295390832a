"""Invariant: the library is built once per source, torch and compiler; where it cannot be, one sentence says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from balanced_offload.offload import simulator
from balanced_offload.offload.simulator import build


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not loaded the simulator, so that reasons to refuse are looked for."""
    monkeypatch.setattr(simulator, "_loaded", None)
    monkeypatch.setattr(simulator, "_loaded_name", None)
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "privateuseone")


def fresh_process(root: Path, code: str) -> str:
    """Runs code in a new interpreter that sees this checkout as the package; returns what it printed."""
    prelude = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('balanced_offload', {str(root / '__init__.py')!r},"
        f" submodule_search_locations=[{str(root)!r}])\n"
        "package = importlib.util.module_from_spec(spec)\n"
        "sys.modules['balanced_offload'] = package\n"
        "spec.loader.exec_module(package)\n"
    )
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("version", ["2.12.1", "2.7.0+cu126", "2.14.0.dev20261101", "3.0.0"])
def test_another_torch_is_refused(not_loaded: None, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    possible, reason = simulator.available()
    assert not possible
    assert f"built and tested with torch 2.13, this is torch {version}" in reason
    with pytest.raises(simulator.SimulatorUnavailable, match=r"install torch 2\.13"):
        simulator.load()


def test_no_compiler(not_loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    possible, reason = simulator.available()
    assert not possible
    assert "install g++" in reason
    with pytest.raises(simulator.SimulatorUnavailable, match="set CXX"):
        simulator.load()


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_another_system(not_loaded: None, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    possible, reason = simulator.available()
    assert not possible
    assert system in reason


def test_the_place_is_taken_by_another_backend(not_loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    possible, reason = simulator.available()
    assert not possible
    assert "'npu'" in reason


@pytest.mark.parametrize("name", ["cuda", "nn", "not a name"])
def test_names_that_torch_uses(not_loaded: None, name: str) -> None:
    with pytest.raises(simulator.SimulatorUnavailable, match="cannot name the device"):
        simulator.load(name)


def test_loading_again_gives_the_same_module(vram: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_build() -> Path:
        raise AssertionError("built again")

    monkeypatch.setattr(simulator, "build_library", no_build)
    assert simulator.load() is vram is simulator.loaded()
    assert simulator.available() == (True, "loaded as device 'vram'")
    with pytest.raises(simulator.SimulatorUnavailable, match="one name per process"):
        simulator.load("npu")


def test_importing_registers_nothing(root: Path) -> None:
    out = fresh_process(
        root,
        "import sys, torch\n"
        "from balanced_offload.offload import simulator\n"
        "print(simulator.loaded(), hasattr(torch, 'vram'), torch._C._get_privateuse1_backend_name())\n"
        "print('balanced_offload.offload.simulator.device' in sys.modules)\n",
    )
    assert out.split() == ["None", "False", "privateuseone", "False"]


def test_another_process_takes_the_cached_library(vram: ModuleType, root: Path) -> None:
    """No compiler runs, and under the name 'npu' safetensors loads straight to the device."""
    out = fresh_process(
        root,
        "import tempfile, os, torch\n"
        "from balanced_offload.offload import simulator\n"
        "from balanced_offload.offload.simulator import build\n"
        "def no_compiler(*_):\n"
        "    raise AssertionError('compiled again')\n"
        "build._compile = no_compiler\n"
        "npu = simulator.load('npu')\n"
        "from safetensors.torch import load_file, save_file\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    file = os.path.join(folder, 'x.safetensors')\n"
        "    save_file({'x': torch.arange(4.0)}, file)\n"
        "    x = load_file(file, device='npu')['x']\n"
        "print(x.device, (x + 1).tolist(), npu is torch.npu)\n",
    )
    assert out.split("\n")[0] == "npu:0 [1.0, 2.0, 3.0, 4.0] True"


def test_what_the_cache_key_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = build.find_compiler() or "g++"
    monkeypatch.setenv("BALANCED_OFFLOAD_SIM_CACHE", str(tmp_path))
    path = build.library_path(compiler)
    assert path.parent == tmp_path
    assert torch.__version__ in path.name
    assert build.library_path(compiler) == path
    monkeypatch.setattr(torch, "__version__", "2.13.9")
    assert build.library_path(compiler) != path
    monkeypatch.undo()
    monkeypatch.setenv("BALANCED_OFFLOAD_SIM_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-O2",))
    assert build.library_path(compiler) != path


def test_a_changed_source_is_built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = build.find_compiler() or "g++"
    before = build.library_path(compiler)
    for source in build.SOURCES.glob("*"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.library_path(compiler) == before
    with (tmp_path / "clock.cpp").open("a") as file:
        file.write("// changed\n")
    assert build.library_path(compiler) != before


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return nothing; }\n")
    monkeypatch.setattr(build, "ENTRY", broken)
    monkeypatch.setenv("BALANCED_OFFLOAD_SIM_CACHE", str(tmp_path / "cache"))
    if build.find_compiler() is None:
        pytest.skip("no compiler on this machine")
    with pytest.raises(build.BuildError, match="nothing"):
        build.build_library()
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("BALANCED_OFFLOAD_SIM_CACHE", str(file / "cache"))
    if build.find_compiler() is None:
        pytest.skip("no compiler on this machine")
    with pytest.raises(build.BuildError, match="BALANCED_OFFLOAD_SIM_CACHE"):
        build.build_library()


def test_the_sources_are_listed_in_the_entry() -> None:
    """One translation unit: a file left out would compile to nothing and be missed only at load time."""
    included = {line.split('"')[1] for line in build.ENTRY.read_text().splitlines() if line.startswith("#include")}
    assert included == {file.name for file in build.SOURCES.glob("*.cpp")} - {build.ENTRY.name}
