"""Compiles the C++ part of the simulated accelerator once and keeps it.

Invariant: a library in the cache was built from exactly these sources, this torch and this compiler, and was complete
when it got its name (it is renamed into place). Any number of processes may ask at once: one builds, the others wait.

The cache is ``$BALANCED_OFFLOAD_SIM_CACHE``, else ``balanced-offload/simulator`` in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
ENTRY = SOURCES / "simulator.cpp"
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w")
BUILD_TIMEOUT_S = 600


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message names the command's complaint and the remedy."""


def find_compiler() -> str | None:
    """The C++ compiler to use: ``$CXX``, else the first of g++, c++ and clang++ on the path; None without any."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shutil.which(chosen)
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def cache_dir() -> Path:
    """Where built libraries are kept. Not created by this call."""
    chosen = os.environ.get("BALANCED_OFFLOAD_SIM_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "balanced-offload" / "simulator"


def library_path(compiler: str) -> Path:
    """The file that ``build_library`` makes or finds, named after torch's version and a digest of all that goes in."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for part in (torch.__version__, str(torch.version.git_version), platform.machine(), version, *FLAGS):
        digest.update(part.encode() + b"\0")
    return cache_dir() / f"simulator-torch{torch.__version__}-{digest.hexdigest()[:16]}.so"


def build_library() -> Path:
    """The path of the compiled library, compiling it first when the cache has none (some 20 s, about 1 GB of RAM).

    Raises:
        BuildError: without a compiler, when it fails, or when the cache folder cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++), or set CXX to one")
    target = library_path(compiler)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():  # another process may have built it while we waited
                _compile(compiler, target)
    except OSError as error:
        raise BuildError(
            f"cannot write the simulator's cache {target.parent}: {error}. "
            "Set BALANCED_OFFLOAD_SIM_CACHE to a folder that can be written."
        ) from error
    return target


def _compile(compiler: str, target: Path) -> None:
    print("balanced-offload: building the simulated accelerator, once (about 20 s) ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    torch_dir = Path(torch.__file__).parent
    partial = target.with_suffix(f".{os.getpid()}.partial")
    command = [
        compiler,
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        "-isystem",
        str(torch_dir / "include"),
        str(ENTRY),
        "-o",
        str(partial),
        f"-L{torch_dir / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise BuildError(
                f"{compiler} could not build the simulated accelerator (exit {done.returncode}): "
                + " / ".join(errors[:3])
                + ". It needs a compiler with C++20 (g++ 11 or newer); set CXX to choose one."
            )
        os.replace(partial, target)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler} did not finish within {BUILD_TIMEOUT_S} s") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"balanced-offload: built in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock between processes. Only reached on Linux: ``available`` refuses other systems."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
