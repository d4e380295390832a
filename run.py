"""Invariant: one command on a machine with Python and pip does all the set-up, and touches nothing outside this folder.

    python run.py demo [arguments]    set up, then run the demo (`balanced-offload demo`)
    python run.py test [arguments]    set up, then ruff, mypy and pytest; arguments go to pytest

The set-up is a virtual environment in `.venv`. torch is installed first and then pinned by a constraint, so that
nothing that follows can replace it. BALANCED_OFFLOAD_TORCH names another torch, in pip's words ("torch==2.9.1").

Where there is a ComfyUI (COMFYUI_PATH, and an older one in COMFYUI_PATH_OLD; else the folder above `custom_nodes`, else
~/comfy/ComfyUI), its tests run once for each, in a process and an environment of their own: `.venv-host` is `.venv` and
the host's requirements (BALANCED_OFFLOAD_HOST_PYTHON names a Python that has all of them already). Without one they
are skipped, and the last line says so.

Browser tests need a Chromium on the path. The front ends that they run in come from PyPI into `.frontends`
(BALANCED_OFFLOAD_FRONTENDS names a folder that has them); the tools of `tests/browser/package.json` come by npm, where
there is one. What cannot be had is no failure: the tests that need it skip with the reason.
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_HOST = ROOT / ".venv-host"
# The simulated accelerator is built against this torch; with another one the demo may have to use the plain CPU.
TORCH = "torch==2.13.0"
TORCH_FALLBACK = "torch>=2.7"
EXTRAS = {"demo": "demo", "test": "dev"}
HOST_TESTS = "tests/host"
HOST_EXTRA = "host"
BROWSER_TESTS = "tests/browser"
NOTHING_RAN = 5
"""pytest's exit code when the arguments selected no test."""


def say(text: str) -> None:
    print(f"run.py: {text}", file=sys.stderr, flush=True)


def python_in(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_python() -> Path:
    return python_in(VENV)


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


def load(path: str) -> ModuleType:
    """A file of the tests that says where things are."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parent / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------- the browser's tests
def set_up_browser() -> None:
    """The front ends and Node's tools, each fetched once; what cannot be had is said and left out."""
    places = load(f"{BROWSER_TESTS}/places.py")
    for version in places.FRONTENDS:
        if (places.frontend(version) / "index.html").is_file() or places.named():
            continue
        target = str(places.folder() / version)
        say(f"fetching the front end {version} for the browser tests")
        if not pip("-q", "--no-deps", "--target", target, f"{places.PACKAGE}=={version}"):
            say(f"front end {version} could not be fetched; the tests that need it will skip and say so")
    npm = shutil.which("npm")
    if npm is None or places.NODE_TOOLS.is_dir():
        return
    command = [npm, "install", "--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
    say(f"{' '.join(['npm', *command[1:]])}, in {BROWSER_TESTS}")
    if subprocess.run(command, cwd=ROOT / BROWSER_TESTS).returncode != 0:
        say("npm failed; the tests that need its tools will skip and say so")


# ---------------------------------------------------------------------- the host's tests
def hosts() -> tuple[list[Path], str]:
    """The ComfyUI checkouts to test against, and a sentence: where the first was found, or why there is none."""
    places = load(f"{HOST_TESTS}/hosts.py")
    found: tuple[list[Path], str] = places.all_hosts(ROOT, os.environ, Path.home())
    return found


def site_packages(environment: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    found = subprocess.run([str(python_in(environment)), "-c", code], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


def vision_and_audio(torch: str) -> list[str]:
    """The releases that belong to a torch version; installed alone, since both would ask for their own torch."""
    minor = int(torch.split("+")[0].split(".")[1])
    return [f"torchvision==0.{minor + 15}.*", f"torchaudio<2.{minor + 1}"]


def set_up_host() -> Path | None:
    """The Python that has the host's requirements; makes `.venv-host` if it is not as pyproject.toml asks.

    None if something could not be installed; pip has said what.
    """
    named = os.environ.get("BALANCED_OFFLOAD_HOST_PYTHON")
    if named:
        return Path(named)
    python, stamp = python_in(VENV_HOST), VENV_HOST / "set-up.txt"
    key = (VENV / f"set-up-{EXTRAS['test']}.txt").read_text() + (torch_version() or "")
    if stamp.is_file() and stamp.read_text() == key and python.exists():
        return python
    say(f"making a virtual environment in {VENV_HOST.name}, with what ComfyUI needs")
    subprocess.run([str(venv_python()), "-m", "venv", "--clear", "--without-pip", str(VENV_HOST)], check=True)
    (site_packages(VENV_HOST) / "parent.pth").write_text(f"{site_packages(VENV)}\n")
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(VENV / "constraints.txt")]
    for wanted in (["--no-deps", *vision_and_audio(torch_version() or "")], ["-e", f".[{HOST_EXTRA}]"]):
        if subprocess.run([*install, *wanted], cwd=ROOT).returncode != 0:
            return None
    stamp.write_text(key)
    return python


def run_host_tests(host: Path, python: Path, arguments: list[str]) -> int:
    """The tests of `tests/host` against one host; 0 as well where the arguments select none of them."""
    environment = {**os.environ, "COMFYUI_PATH": str(host)}
    command = [str(python), "-m", "pytest", HOST_TESTS, "-n", "2", "--dist", "loadfile", *arguments]
    say(f"COMFYUI_PATH={host} pytest {' '.join(command[3:])}")
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    return 0 if arguments and code == NOTHING_RAN else code


def name_files(arguments: list[str]) -> bool:
    return any(not word.startswith("-") and (ROOT / word.split("::")[0]).exists() for word in arguments)


def test(arguments: list[str]) -> int:
    """Every check, one failure hiding no other; what became of the host's tests is in the last line."""
    found, reason = hosts()
    apart = bool(found) and not name_files(arguments)
    set_up_browser()
    told = VENV / "host-tests.txt"  # tests/conftest.py writes a line into it
    told.unlink(missing_ok=True)
    os.environ["BALANCED_OFFLOAD_HOST_TESTS_TOLD"] = str(told)
    # loadgroup: the files of the browser tests share pages, and each stays with one worker
    workers = ("-n", "2", "--dist", "loadgroup")
    results = {
        "ruff check": run("ruff", "check", "."),
        "ruff format": run("ruff", "format", "--check", "."),
        "mypy": run("mypy"),
        "pytest": run("pytest", *workers, *([f"--ignore={HOST_TESTS}"] if apart else []), *arguments),
    }
    python = set_up_host() if apart else None
    if apart and python is None:
        results["set-up for ComfyUI"] = 1
    if python is not None:
        results |= {f"pytest with {host.name}": run_host_tests(host, python, arguments) for host in found}
    for name, code in results.items():
        say(f"{name}: {'ok' if code == 0 else f'FAILED (exit code {code})'}")
    say(
        ", ".join(told.read_text(encoding="utf-8").splitlines())
        if told.is_file()
        else f"host tests: none ran; {reason}"
    )
    return int(any(results.values()))


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
    return test(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
