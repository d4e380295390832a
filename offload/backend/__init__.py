"""Choosing the one device that is used. Invariant: one accelerator is used, the others are named and never touched."""

from __future__ import annotations

import torch

from .base import Backend, DeviceMemory, Mark, is_out_of_memory
from .cpu import CpuBackend
from .generic import AcceleratorBackend
from .link import driver_version
from .mps import MpsBackend

__all__ = [
    "Backend",
    "CpuBackend",
    "DeviceMemory",
    "Mark",
    "NoAcceleratorError",
    "driver_version",
    "is_out_of_memory",
    "open_backend",
]


class NoAcceleratorError(RuntimeError):
    """No accelerator is present, so there is nothing to offload from."""


def open_backend(device: str | torch.device | None = None) -> Backend:
    """The backend of `device`, or of the current accelerator.

    Raises:
        NoAcceleratorError: (a RuntimeError) no device was named and torch sees no accelerator.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            raise NoAcceleratorError(
                "Offloading requires an accelerator, but torch found none. Install a torch build for your GPU, "
                "or pass device='cpu' to run everything from system memory (mode none)."
            )
        device = found
    wanted = torch.device(device)
    if wanted.type == "cpu":
        return CpuBackend()
    if wanted.type == "mps":
        return MpsBackend()
    return AcceleratorBackend(wanted)
