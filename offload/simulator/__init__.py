"""The simulated accelerator: a torch device on host memory with a virtual clock, a capacity and a race detector.

Invariant: importing this package builds nothing and registers nothing. Only ``load`` does, on a torch version that
the C++ part was written for; every other case is refused with a sentence that names the remedy.

It is for development, the demo and benchmarks. Nothing under ``nodes/`` may import it, and the registry package
leaves it out. Its times are simulated: they rank strategies, they do not predict a card's milliseconds.

What it does not see or model:
- races on host memory: a pinned source overwritten before its copy is done, a result read before it came down
  (registered memory that is let go under a copy is seen);
- the allocator's cache and fragmentation, and the scratch memory of kernels;
- kernels that run beside each other, and hardware queues that reorder copies: each engine works in queueing order;
- the copies that CUDA makes for CPU index tensors and CPU scalars;
- values in ghost mode: what is skipped holds no meaningful numbers, so nothing may branch on them. That goes for CPU
  tensors too: every copy between them above the limit is skipped, also those inside a CPU operation.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch.utils.backend_registration import rename_privateuse1_backend

from .build import BuildError, build_library, find_compiler

SUPPORTED_TORCH = ("2.13",)
"""The torch minor versions that the C++ part was built and tested with. It uses torch's internal C++ interfaces,
which change between minor versions."""

__all__ = ["SUPPORTED_TORCH", "SimulatorUnavailable", "available", "load", "loaded"]

_loaded: ModuleType | None = None
_loaded_name: str | None = None


class SimulatorUnavailable(RuntimeError):
    """The simulated accelerator cannot be used here. The message says why, and what to do about it."""


def available() -> tuple[bool, str]:
    """Whether ``load`` can be expected to work, and if not, why, in words. Builds nothing."""
    if _loaded is not None:
        return True, f"loaded as device {_loaded_name!r}"
    if not sys.platform.startswith("linux"):
        return False, f"the simulated accelerator has only been built on Linux, this is {sys.platform}"
    minor = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    if minor not in SUPPORTED_TORCH:
        wanted = " or ".join(SUPPORTED_TORCH)
        return False, (
            f"the simulated accelerator was built and tested with torch {wanted}, this is torch {torch.__version__}: "
            f"install torch {wanted} (the CPU build will do), or run without the simulator"
        )
    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        return False, f"torch's place for an external device is already taken by {taken!r}: use a fresh process"
    compiler = find_compiler()
    if compiler is None:
        return False, "no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++), or set CXX to one"
    return True, f"can be built with {compiler}"


def loaded() -> ModuleType | None:
    """The device module if ``load`` has run in this process, else None."""
    return _loaded


def load(name: str = "vram") -> ModuleType:
    """Registers the simulated accelerator as torch device ``name`` and returns ``torch.<name>``.

    The first call on a machine compiles the C++ part (some 20 seconds, cached afterwards; see ``build``). Later calls
    return the same module. One name per process: "npu" instead of "vram" lets code with a fixed list of device names
    (safetensors, ComfyUI) take it for a known kind.

    Raises:
        SimulatorUnavailable: on another torch version or system, without a compiler, when the compiler fails, or when
            it is already loaded under another name.
    """
    global _loaded, _loaded_name
    if _loaded is not None:
        if name != _loaded_name:
            raise SimulatorUnavailable(
                f"already loaded as {_loaded_name!r}, so it cannot become {name!r}: torch allows one name per process"
            )
        return _loaded
    possible, reason = available()
    if not possible:
        raise SimulatorUnavailable(reason)
    if not name.isidentifier() or hasattr(torch, name):
        raise SimulatorUnavailable(f"{name!r} cannot name the device: it must be an identifier that torch does not use")
    try:
        library = build_library()
    except BuildError as error:
        raise SimulatorUnavailable(str(error)) from error

    from . import device, native  # only now: device.py subclasses what the loaded library completes

    native.open_library(library)
    rename_privateuse1_backend(name)
    device.register(name)
    _loaded, _loaded_name = device, name
    return _loaded
