"""Invariant: the pack opens in any folder, without an install, a GPU, diffusers, a compiler or a running server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

# What ComfyUI's loader does with a folder of custom_nodes, then a look at what came with it.
LOADER = """
import importlib, importlib.util, json, sys
folder, core = sys.argv[1], json.loads(sys.argv[2])
name = folder.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
door = sorted(m for m in sys.modules if m.split(".")[0] in ("torch", "accelerate", "safetensors", "psutil"))
for part in core:
    importlib.import_module(name + "." + part)
print(json.dumps({
    "names": [n for n in ("WEB_DIRECTORY", "comfy_entrypoint", "NODE_CLASS_MAPPINGS") if hasattr(module, n)],
    "web": module.WEB_DIRECTORY, "door": door, "loaded": sorted({m.split(".")[0] for m in sys.modules}),
    "ours": sorted(m for m in sys.modules if m.startswith(name + ".")),
    "folder_name": name,
}))
"""
FORBIDDEN = {
    "diffusers",
    "transformers",
    "matplotlib",
    "sklearn",
    "pynvml",
    "comfy",
    "aiohttp",
    "server",
    "folder_paths",
}


# Only a host imports such a module: it takes the host's classes when it is read.
NEEDS_HOST = re.compile(r"^(?:from|import) comfy(?:_api)?\b", flags=re.MULTILINE)


def modules_of(folder: Path) -> list[str]:
    """Every module of the core and the nodes, less the simulator, scripts, and what only a host imports."""
    names = []
    for path in sorted([*folder.glob("offload/**/*.py"), *folder.glob("nodes/**/*.py")]):
        parts = path.relative_to(folder).with_suffix("").parts
        if "simulator" in parts or "__main__" in parts:
            continue
        if NEEDS_HOST.search(path.read_text(encoding="utf-8")):
            continue
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def load(folder: Path, modules: list[str]) -> dict:
    # An empty PATH: no compiler can be found. No visible device: no GPU can be used.
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    environment |= {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    command = [sys.executable, "-I", "-c", LOADER, str(folder), json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_only_these_need_a_host(pack_copy: Path) -> None:
    """The nodes, and what takes the host's classes as bases; the core never does."""
    needing = {
        path.relative_to(pack_copy).as_posix()
        for path in [*pack_copy.glob("offload/**/*.py"), *pack_copy.glob("nodes/**/*.py")]
        if NEEDS_HOST.search(path.read_text(encoding="utf-8"))
    }
    assert {name for name in needing if name.startswith("offload/")} <= {"offload/adapters/comfyui_static.py"}
    assert len({name for name in needing if name.startswith("nodes/")}) < len(list(pack_copy.glob("nodes/*.py")))


def test_the_door_opens_the_way_comfyui_opens_it(pack_copy: Path) -> None:
    found = load(pack_copy, [])
    assert "-" in Path(found["folder_name"]).name
    assert found["names"] == ["WEB_DIRECTORY", "comfy_entrypoint"]
    assert (pack_copy / found["web"]).is_dir()
    assert found["door"] == [] and found["ours"] == []
    assert "balanced_offload" not in found["loaded"]


def test_every_module_imports_without_optional_libraries_or_host(pack_copy: Path) -> None:
    modules = modules_of(pack_copy)
    assert "offload" in modules and "nodes" in modules
    found = load(pack_copy, modules)
    assert FORBIDDEN & set(found["loaded"]) == set()
    assert "balanced_offload" not in found["loaded"]
    missing = {f"{found['folder_name']}.{name}" for name in modules} - set(found["ours"])
    assert missing == set()
    assert [name for name in found["ours"] if ".simulator" in name] == []


def test_the_registry_package_is_whole_without_the_simulator(registry_copy: Path) -> None:
    assert not (registry_copy / "offload" / "simulator").exists()
    assert not (registry_copy / "tests").exists()
    modules = modules_of(registry_copy)
    found = load(registry_copy, modules)
    assert {f"{found['folder_name']}.{name}" for name in modules} <= set(found["ours"])
