"""Invariant: installing the pack never replaces the host's torch, not even an older one.

The host's torch is played by a tiny wheel with torch's name and an old version: pip decides by metadata alone.
accelerate, a dependency of ours, itself asks for torch, so the dependencies are the real ones from the package index.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

OLD = "2.7.0"


def old_torch(folder: Path) -> Path:
    files = {
        "torch/__init__.py": f'__version__ = "{OLD}"\n',
        f"torch-{OLD}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {OLD}\n",
        f"torch-{OLD}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"torch-{OLD}.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in [*files, record])
    wheel = folder / f"torch-{OLD}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def fingerprint(site: Path) -> dict[str, str]:
    """File -> hash for all that belongs to torch, whichever version is there."""
    found = [path for path in site.glob("torch*/**/*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(site).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.timeout(600)
def test_an_older_torch_stays_as_it_was(root: Path, wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "host"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (site,) = environment.glob("Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages")

    def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "--python", str(python), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    reached = pip("download", "-q", "--no-deps", "-d", str(tmp_path / "reach"), "psutil")
    if reached.returncode != 0:
        pytest.skip(f"no package index can be reached: {reached.stderr.strip().splitlines()[-1:]}")

    assert pip("install", "-q", "--no-index", str(old_torch(tmp_path))).returncode == 0
    before = fingerprint(site)
    assert "torch/__init__.py" in before

    for arguments in (["-r", str(root / "requirements.txt")], [str(wheel)]):
        installed = pip("install", "-q", "--no-compile", *arguments)
        assert installed.returncode == 0, installed.stderr
        assert fingerprint(site) == before

    names = "accelerate", "safetensors", "psutil", "balanced_offload"
    assert [name for name in names if not (site / name).is_dir()] == []
    check = "import importlib.metadata as m; print(m.version('torch'))"
    version = subprocess.run([str(python), "-I", "-c", check], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == OLD
