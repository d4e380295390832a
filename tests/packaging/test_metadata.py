"""Invariant: what the project says about itself in several places is the same everywhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_requirements_txt_equals_the_dependencies(root: Path, project: dict) -> None:
    assert (root / "requirements.txt").read_text(encoding="utf-8").split() == project["dependencies"]


def test_torch_is_the_hosts(project: dict) -> None:
    required = {Requirement(text).name for text in project["dependencies"]}
    assert required == {"accelerate", "safetensors", "psutil"}
    with_torch = [name for name, extra in project["optional-dependencies"].items() if "torch>=2.7" in extra]
    assert with_torch == ["torch"]


def test_extras_exist(project: dict) -> None:
    extras = project["optional-dependencies"]
    assert {"torch", "diffusers", "nvidia", "demo", "dev"} <= set(extras)
    assert {"diffusers", "transformers"} <= set(extras["demo"])
    assert "nvidia-ml-py" in extras["nvidia"]


def test_the_hosts_extra_leaves_torch_alone(project: dict) -> None:
    names = {Requirement(text).name for text in project["optional-dependencies"]["host"]}
    assert {"aiohttp", "torchsde", "requests", "comfyui-frontend-package", "comfy-aimdo"} <= names
    assert not names & {"torch", "torchvision", "torchaudio"}, "run.py installs the two without their dependencies"


def test_licence_is_the_full_apache_text(root: Path, project: dict) -> None:
    text = (root / "LICENSE").read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_run_py_installs_only_extras_that_exist(root: Path, project: dict) -> None:
    source = (root / "run.py").read_text(encoding="utf-8")
    (found,) = re.findall(r"^EXTRAS = \{(.*)\}$", source, flags=re.MULTILINE)
    installed = re.findall(r': "(\w+)"', found)
    assert installed == ["demo", "dev"]
    installed += re.findall(r'^HOST_EXTRA = "(\w+)"$', source, flags=re.MULTILINE)
    assert installed[-1] == "host"
    assert set(installed) <= set(project["optional-dependencies"])


def test_ci_runs_the_one_test_command(root: Path) -> None:
    script = root / ".ci" / "run"
    assert script.read_text(encoding="utf-8").rstrip().endswith("run.py test")
    assert script.stat().st_mode & 0o111


def test_no_absolute_import_of_the_package(root: Path) -> None:
    """The folder may have any name, so the package must not count on being called `balanced_offload`."""
    absolute = re.compile(r"^\s*(?:from|import)\s+balanced_offload\b", flags=re.MULTILINE)
    files = [root / "__init__.py", root / "__main__.py"]
    files += [path for folder in ("offload", "nodes") for path in sorted((root / folder).rglob("*.py"))]
    assert [str(path.relative_to(root)) for path in files if absolute.search(path.read_text(encoding="utf-8"))] == []
