"""Guards: the demo says where it runs and why, before anything runs; what was not asked for is never loaded.

A real accelerator first, else the simulated one, else the plain CPU, where the table can only be predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from ..backend import NoAcceleratorError, open_backend

Rung = Literal["gpu", "simulated", "cpu"]
CHOICES = ("auto", "simulated", "cuda", "cpu")
SIMULATED = "vram"


class PlaceError(ValueError):
    """A device was asked for that this machine does not have."""


@dataclass(frozen=True)
class Place:
    """Where the demo runs. `reason` ends the first line that it prints; `simulator` is the module `torch.vram`."""

    rung: Rung
    device: torch.device
    name: str
    reason: str
    simulator: ModuleType | None = None

    @property
    def sentence(self) -> str:
        """The first line."""
        kind = {"gpu": "the GPU", "simulated": "the simulated accelerator", "cpu": "the plain CPU"}[self.rung]
        return f"Running on {kind} ({self.name}): {self.reason}."


def find_place(wanted: str = "auto", card: str | None = None) -> Place:
    """The place for `wanted` (auto, simulated, cuda, cpu). `card` sets the clock of the simulated accelerator.

    Raises:
        PlaceError: (a ValueError) it is not here, an unknown card, or a card for something that is not simulated.
    """
    if wanted not in CHOICES:
        raise PlaceError(f"--device: got {wanted!r}, allowed: {', '.join(CHOICES)}")
    if wanted == "cpu":
        return _on_cpu("as asked with --device cpu; the modes' figures are predicted, not run", card)
    absent = "as asked with --device simulated"
    if wanted in ("auto", "cuda"):
        place, absent = _on_gpu(wanted)
        if place is not None:
            if card is not None:
                raise PlaceError(f"--card: got {card!r}, but the demo runs on {place.name}; add --device simulated")
            return place
        if wanted == "cuda":
            raise PlaceError(f"--device: got 'cuda', but {absent}; allowed here: auto, simulated, cpu")
    module, why_not = _load_simulator()
    if module is not None:
        return _on_simulator(module, card, absent)
    if wanted == "simulated":
        raise PlaceError(f"--device: got 'simulated', but {why_not}; allowed here: auto, cpu")
    return _on_cpu(f"{absent}, and {why_not}; the modes' figures are predicted, not run", card)


def _on_gpu(wanted: str) -> tuple[Place | None, str]:
    """The real accelerator, or None and why not."""
    try:
        backend = open_backend()
    except NoAcceleratorError:
        return None, f"torch {torch.__version__} finds no accelerator"
    if backend.rung != "gpu":
        return None, f"torch {torch.__version__} finds no accelerator"
    if backend.shared_memory:
        return None, f"{backend.name} shares its memory with the host, so there is nothing to offload"
    if wanted == "cuda" and backend.kind != "cuda":
        return None, f"the accelerator here is {backend.name} ({backend.kind})"
    reason = "the accelerator that torch found" if wanted == "auto" else "as asked with --device cuda"
    if backend.others:
        reason += f"; not used: {', '.join(backend.others)}"
    return Place("gpu", backend.device, backend.name, reason), ""


def _load_simulator() -> tuple[ModuleType | None, str]:
    """`torch.vram`, or None and why not. Builds it on first use."""
    try:
        from .. import simulator
    except ImportError:  # the registry package leaves it out
        return None, "this package comes without the simulated accelerator (the repository has it)"
    try:
        return simulator.load(SIMULATED), ""
    except simulator.SimulatorUnavailable as error:
        return None, str(error)


def _on_simulator(module: ModuleType, card: str | None, reason: str) -> Place:
    key = module.card().key if card is None else card
    if key not in module.CARDS:
        raise PlaceError(f"--card: got {card!r}, allowed: {', '.join(sorted(module.CARDS))}")
    reason += f"; times are virtual, by the clock of a {module.CARDS[key].name}"
    if card is None:
        reason = f"{reason.split(';')[0]}; bytes are exact, times are those of a virtual clock"
    return Place(
        "simulated", torch.device(SIMULATED, 0), f"card {key}" if card else module.card().device_name, reason, module
    )


def _on_cpu(reason: str, card: str | None) -> Place:
    if card is not None:
        raise PlaceError(f"--card: got {card!r}, which only the simulated accelerator has; {reason}")
    from ..backend import CpuBackend

    return Place("cpu", torch.device("cpu"), CpuBackend().name, reason)
