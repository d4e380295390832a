"""Invariant: the registry ships the whole pack and nothing of its development, and that opens in a host."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NODES = {
    *("OffloadPolicy", "ModelLoaderWithOffload", "ApplyOffloadPolicy", "PipelineLoaderWithOffload"),
    *("PipelineGenerate", "FreeVRAMToFit", "VRAMReport"),
}
MOST_BYTES = 16 << 20
# A host with the V3 API asks the folder for its nodes, with no library of development to be had.
HOST = """
import asyncio, importlib.abc, importlib.util, json, sys
folder, fake = sys.argv[1:3]

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"diffusers", "matplotlib", "sklearn", "pynvml", "pytest", "hypothesis", "jsonschema"}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, fake)
spec = importlib.util.spec_from_file_location("pack", folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
classes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
print(json.dumps({
    "nodes": [kind.define_schema().node_id for kind in classes],
    "simulator": [name for name in sys.modules if "simulator" in name],
    "from": sorted({str(m.__file__) for n, m in sys.modules.items() if n.startswith("pack") and m.__file__}),
}))
"""


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_what_the_registry_reads(project: dict) -> None:
    name, comfy = project["project"]["name"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) and len(name) < 100
    assert "comfyui" not in name.casefold()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert comfy["DisplayName"] == "Balanced Offload"
    assert comfy["requires-comfyui"] == ">=0.3.64"
    # WEB_DIRECTORY serves the folder; both together would serve and run every script twice.
    assert "web" not in comfy
    assert project["project"]["license"] == "Apache-2.0"
    systems = {entry for entry in project["project"]["classifiers"] if entry.startswith("Operating System")}
    assert systems == {"Operating System :: OS Independent"}


def test_the_pack_is_whole(shipped_files: list[str], root: Path) -> None:
    shipped = set(shipped_files)
    assert shipped >= {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"}
    assert shipped >= {f"web/docs/{name}.md" for name in NODES}
    assert shipped >= {"locales/en/nodeDefs.json", "offload/demo/digits/model_index.json"}
    examples = {path.stem for path in (root / "workflows" / "api").glob("*.json")}
    assert examples
    for name in examples:
        assert shipped >= {f"workflows/{name}.json", f"workflows/{name}.jpg", f"workflows/api/{name}.json"}
    assert shipped >= {path.relative_to(root).as_posix() for path in root.glob("offload/schemas/*.json")}


def test_nothing_of_the_development_is_in_it(shipped_files: list[str], root: Path) -> None:
    parts = {part for name in shipped_files for part in Path(name).parts}
    assert parts & {"tests", "simulator", ".ci", "run.py", "shared", "notes", "images", "__pycache__"} == set()
    allowed = {"md", "py", "json", "txt", "toml", "js", "css", "jpg", "safetensors", "comfyignore", "LICENSE"}
    assert {name.rsplit(".", 1)[-1] for name in shipped_files} <= allowed
    assert sum((root / name).stat().st_size for name in shipped_files) < MOST_BYTES


def imported(path: Path) -> set[str]:
    """The names that a file imports when it is read: what stands in a function is imported when that is called."""

    def walk(node: ast.AST) -> set[str]:
        found: set[str] = set()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found |= {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom):
                found |= {f"{child.module or ''}.{alias.name}" for alias in child.names}
            else:
                found |= walk(child)
        return found

    return walk(ast.parse(path.read_text(encoding="utf-8")))


def test_no_file_imports_what_is_left_out(shipped_files: list[str], root: Path) -> None:
    for name in shipped_files:
        if name.endswith(".py"):
            words = {part for found in imported(root / name) for part in found.split(".")}
            assert words & {"simulator", "tests", "pytest", "hypothesis"} == set(), name


def test_an_import_at_the_top_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("try:\n    from .simulator import card\nexcept ImportError:\n    pass\n", encoding="utf-8")
    assert imported(file) == {"simulator.card"}
    file.write_text("def f():\n    from .simulator import card\n", encoding="utf-8")
    assert imported(file) == set()


def test_a_host_gets_all_nodes_from_exactly_these_files(registry_copy: Path, root: Path) -> None:
    fake = root / "tests" / "nodes" / "fake_host"
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HOME": str(registry_copy)}
    environment |= {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-I", "-c", HOST, str(registry_copy), str(fake)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["nodes"]) == NODES and len(found["nodes"]) == len(NODES)
    assert found["simulator"] == []
    assert all(Path(file).is_relative_to(registry_copy) for file in found["from"])


def test_the_registrys_security_check_finds_nothing(registry_copy: Path) -> None:
    """The rules that `comfy node validate` runs: exec, eval, two statements on a line."""
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed: the registry's security rules are ruff's")
    rules = ["check", "--isolated", "--no-cache", "-q", "--select", "S102,S307,E702", str(registry_copy)]
    done = subprocess.run([ruff, *rules], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_comfy_cli_packs_the_same_files(root: Path, shipped_files: list[str], tmp_path: Path) -> None:
    comfy = os.environ.get("COMFY_CLI") or shutil.which("comfy")
    if comfy is None:
        pytest.skip("comfy-cli is not installed (on PATH, or COMFY_CLI): the list is compared with git's rules alone")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(root), str(clone)], check=True)
    environment = {**os.environ, "HOME": str(tmp_path), "DO_NOT_TRACK": "1"}
    for command in (["tracking", "disable"], ["node", "validate"], ["node", "pack"]):
        done = subprocess.run(
            [comfy, "--skip-prompt", "--no-json", *command], cwd=clone, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(clone / "node.zip") as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == set(shipped_files)
