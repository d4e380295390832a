"""Invariant: one command on a machine with Python and pip does all the set-up, and touches nothing outside this folder.

    python run.py demo [arguments]    set up, then run the demo (`balanced-offload demo`)
    python run.py test [arguments]    set up, then ruff, mypy and pytest; arguments go to pytest

The set-up is a virtual environment in `.venv`. torch is installed first and then pinned by a constraint, so that
nothing that follows can replace it. BALANCED_OFFLOAD_TORCH names another torch, in pip's words ("torch==2.9.1").
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
# The simulated accelerator is built against this torch; with another one the demo may have to use the plain CPU.
TORCH = "torch==2.13.0"
TORCH_FALLBACK = "torch>=2.7"
EXTRAS = {"demo": "demo", "test": "dev"}


def say(text: str) -> None:
    print(f"run.py: {text}", file=sys.stderr, flush=True)


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv() -> None:
    has_pip = [str(venv_python()), "-m", "pip", "--version"]
    if venv_python().exists() and subprocess.run(has_pip, capture_output=True).returncode == 0:
        return
    say(f"making a virtual environment in {VENV.name}")
    if importlib.util.find_spec("ensurepip"):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        return
    # Debian and Ubuntu split ensurepip off into python3-venv. The pip that is there, however old, can fetch another
    # one, and a pip wheel installs itself.
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)], check=True)
    folder = VENV / "pip"
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "pip"], check=True)
    (wheel,) = folder.glob("pip-*.whl")
    subprocess.run([str(venv_python()), str(wheel / "pip"), "install", "-q", "--no-index", str(wheel)], check=True)


def pip(*arguments: str) -> bool:
    return subprocess.run([str(venv_python()), "-m", "pip", "install", *arguments], cwd=ROOT).returncode == 0


def torch_version() -> str | None:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    found = subprocess.run([str(venv_python()), "-c", code], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def install_torch() -> str:
    wanted = os.environ.get("BALANCED_OFFLOAD_TORCH")
    attempts = [shlex.split(wanted)] if wanted else [[TORCH], [TORCH_FALLBACK]]
    for requirement in attempts:
        say(f"installing {' '.join(requirement)} (the largest download, once)")
        if pip(*requirement):
            version = torch_version()
            if version:
                return version
    sys.exit(
        "run.py: torch could not be installed; pip's message is above. BALANCED_OFFLOAD_TORCH can name another one."
    )


def set_up(command: str) -> None:
    """Bring `.venv` to what pyproject.toml asks for; a stamp makes the second run skip all of it."""
    wanted = os.environ.get("BALANCED_OFFLOAD_TORCH", "")
    state = (ROOT / "pyproject.toml").read_bytes() + f"{sys.version_info[:2]} {ROOT} {wanted}".encode()
    key = hashlib.sha256(state).hexdigest()
    stamp = VENV / f"set-up-{EXTRAS[command]}.txt"
    if stamp.is_file() and stamp.read_text() == key and venv_python().exists():
        return
    make_venv()
    version = torch_version()
    if version is None or wanted:
        version = install_torch()
    constraint = VENV / "constraints.txt"
    constraint.write_text(f"torch=={version}\n")
    if not pip("-c", str(constraint), "-e", f".[{EXTRAS[command]}]"):
        sys.exit("run.py: the dependencies could not be installed; pip's message is above.")
    stamp.write_text(key)


def run(*command: str) -> int:
    say(" ".join(command))
    return subprocess.run([str(venv_python()), "-m", *command], cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - this file is run by whatever Python is there
        sys.exit(f"run.py: Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    if not arguments or arguments[0] not in EXTRAS:
        print(__doc__)
        return 2
    command, rest = arguments[0], arguments[1:]
    set_up(command)
    if command == "demo":
        return run("balanced_offload", "demo", *rest)
    results = {
        "ruff check": run("ruff", "check", "."),
        "ruff format": run("ruff", "format", "--check", "."),
        "mypy": run("mypy"),
        "pytest": run("pytest", "-n", "2", *rest),
    }
    for name, code in results.items():
        say(f"{name}: {'ok' if code == 0 else f'FAILED (exit code {code})'}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
