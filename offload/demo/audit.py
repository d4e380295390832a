"""Guards: the demo's proof is not the engine's own word: bytes come from the device's copy log, hooks from the modules.

On the simulated accelerator every copy between host and device is logged with the storage that it entered or left. A
copy down counts as a weight's when its storage ever received a weight; on a real card only the ledger is there to ask.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from ..engine import hooks_on
from ..session import Session


@dataclass
class Looks:
    """What was seen by looking, over one mode. Bytes."""

    hooks_on_resident: int = 0
    component_peak: int = 0
    log_h2d: int | None = None
    log_d2h: int | None = None
    races: int | None = None
    lost: int = 0  # copies that the bounded log dropped before we read it


@dataclass
class Auditor:
    """Reads the copy log and looks at modules. `simulator` is `torch.vram`, None on a real card."""

    session: Session
    simulator: ModuleType | None
    looks: Looks = field(default_factory=Looks)
    _weights: set[int] = field(default_factory=set)  # serials of device storages that ever received a weight
    _dropped: int = 0
    _races: int = 0

    def begin(self) -> None:
        """A new mode: counts start again. Which storages received weights is kept, as serials are never reused."""
        self.looks = Looks()
        if self.simulator is None:
            return
        self.looks.log_h2d = self.looks.log_d2h = self.looks.races = 0
        self.simulator.synchronize()
        self.simulator.clear_copy_log()
        self._dropped = self.simulator.counters()["copies_dropped"]
        self._races = self.simulator.races()

    def look(self) -> None:
        """Look at every module: hooks where the weights are resident, bytes per component. No device call."""
        device = self.session.backend.device.type
        for managed in self.session.components.values():
            self.looks.component_peak = max(self.looks.component_peak, managed.engine.device_bytes)
            hooks = sum(hooks_on(module) for module in managed.module.modules() if _resident(module, device))
            self.looks.hooks_on_resident = max(self.looks.hooks_on_resident, hooks)

    def drain(self) -> None:
        """Take over what the copy log holds and empty it, so that its bound is never reached."""
        if self.simulator is None:
            return
        starts, ends = self._masters()
        looks = self.looks
        assert looks.log_h2d is not None and looks.log_d2h is not None
        for copy in self.simulator.copy_log():
            if copy.direction == "h2d":
                at = bisect_right(starts, copy.host_ptr) - 1
                if at >= 0 and copy.host_ptr < ends[at]:
                    self._weights.add(copy.storage)
                    looks.log_h2d += copy.nbytes
            elif copy.storage in self._weights:
                looks.log_d2h += copy.nbytes
        dropped = self.simulator.counters()["copies_dropped"]
        looks.lost += max(0, dropped - self._dropped)
        self._dropped = dropped
        looks.races = self.simulator.races() - self._races
        self.simulator.clear_copy_log()

    def _masters(self) -> tuple[list[int], list[int]]:
        """Host address ranges of all masters, by start."""
        masters = (m for managed in self.session.components.values() for m in managed.weights.masters)
        ranges = sorted((m.data_ptr(), m.data_ptr() + m.numel()) for m in masters if m.numel())
        return [start for start, _ in ranges], [end for _, end in ranges]


def _resident(module: nn.Module, device: str) -> bool:
    """Whether it owns tensors, and all of them are on the device."""
    own: list[torch.Tensor] = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return bool(own) and all(t.device.type == device for t in own)
