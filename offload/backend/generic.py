"""Any accelerator with streams (CUDA, ROCm, XPU, the simulated one) through torch's device modules.

Invariant: no call here blocks the host, `synchronize` and `empty_cache` aside, so that watching stays cheap.

Streams come from the device's own module, so that libraries which look at a current stream find the class they know.
Events are the generic `torch.Event`, which records on and waits with both kinds of stream: all device classes derive
from `torch.Stream`. `torch.accelerator` knows one device type per process; where that is another one than ours (two
accelerators of different kinds in one process), every question goes to the device's own module instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from .base import DeviceMemory, Mark
from .link import pci_link

_REGISTER_FOR_ALL = 1  # cudaHostRegisterPortable: pinned for every card's context, as torch's own allocator has it
SIMULATOR_MARK = "advance_host"  # only a device with a clock of its own can have its clock advanced


class AcceleratorBackend:
    """One accelerator, through `torch.get_device_module`; nothing here is specific to a vendor."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        current = getattr(self._module, "current_device", None)
        index = device.index if device.index is not None else int(current()) if current is not None else 0
        self.device = torch.device(device.type, index)
        known = torch.accelerator.current_accelerator()
        self._is_torchs_accelerator = known is not None and known.type == device.type
        # the function itself: it is called twice per streamed unit
        self.set_stream: Callable[[Any], None] = (
            torch.accelerator.set_stream if self._is_torchs_accelerator else self._module.set_stream
        )
        self._driver_tells = hasattr(self._module, "mem_get_info")
        self.name = self._device_name()
        simulated = hasattr(self._module, SIMULATOR_MARK)
        self.kind = "simulated" if simulated else device.type
        self.rung = "simulated" if simulated else "gpu"
        self.shared_memory = self._is_integrated()
        self._registers_itself = hasattr(self._module, "host_register")
        self.can_register = self._registers_itself or (device.type == "cuda" and hasattr(self._module, "cudart"))
        self.others = self._other_accelerators()

    def _properties(self) -> Any:
        get = getattr(self._module, "get_device_properties", None)
        return get(self.device) if get is not None else None

    def _device_name(self) -> str:
        get = getattr(self._module, "get_device_name", None)
        return str(get(self.device)) if get is not None else self.device.type.upper()

    def _is_integrated(self) -> bool:
        properties = self._properties()
        # CUDA and ROCm call it is_integrated; XPU is_integrated_gpu, in newer torch only
        return any(bool(getattr(properties, name, False)) for name in ("is_integrated", "is_integrated_gpu"))

    def _other_accelerators(self) -> tuple[str, ...]:
        count = int(self._module.device_count())
        names = []
        for index in range(count):
            if index != self.device.index:
                get = getattr(self._module, "get_device_name", None)
                names.append(f"{self.device.type}:{index} {get(index) if get else ''}".strip())
        return tuple(names)

    def memory(self) -> DeviceMemory:
        module = self._module
        allocated, reserved = int(module.memory_allocated(self.device)), int(module.memory_reserved(self.device))
        if self._driver_tells:
            try:
                free, total = module.mem_get_info(self.device)
                return DeviceMemory(int(free), int(total), allocated, reserved)
            except RuntimeError:  # some Intel devices and drivers cannot be asked; others' use stays unseen there
                self._driver_tells = False
        total = int(self._properties().total_memory)
        return DeviceMemory(max(0, total - reserved), total, allocated, reserved)

    def link(self) -> str | None:
        return None if self.kind == "simulated" else pci_link(self._properties())

    def link_rates(self) -> tuple[float, float, float] | None:
        if self.kind != "simulated":
            return None
        clock = self._module.configuration()
        return float(clock["h2d_pinned"]), float(clock["h2d_pageable"]), float(clock["copy_lat"])

    def peak_allocated(self) -> int:
        return int(self._module.max_memory_allocated(self.device))

    def reset_peak(self) -> None:
        self._module.reset_peak_memory_stats(self.device)

    def empty_cache(self) -> None:
        self._module.empty_cache()

    def synchronize(self) -> None:
        self._module.synchronize(self.device)

    def mark(self) -> Mark:
        event = torch.Event(device=self.device, enable_timing=True)
        event.record()  # on the current stream: asking for that one first would cost more than the event
        return event

    def ready(self, mark: Mark) -> bool:
        return bool(mark.query())

    def seconds(self, start: Mark, end: Mark) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def current_stream(self) -> Any:
        if self._is_torchs_accelerator:  # one call into C++, by number: a device would be looked at in Python first
            return torch.accelerator.current_stream(self.device.index)
        return self._module.current_stream(self.device)

    def new_stream(self) -> Any:
        own = getattr(self._module, "Stream", None)
        return own(device=self.device) if own is not None else torch.Stream(device=self.device)

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        return cast("AbstractContextManager[Any]", self._module.stream(stream))

    def record(self, stream: Any, timed: bool = False) -> Any:
        event = torch.Event(device=self.device, enable_timing=timed)
        event.record(stream)
        return event

    def event(self, timed: bool = False) -> Any:
        return torch.Event(device=self.device, enable_timing=timed)

    def rng_state(self) -> Callable[[], None]:
        host = torch.get_rng_state()
        module, device = self._module, self.device
        state = module.get_rng_state(device) if hasattr(module, "get_rng_state") else None

        def restore() -> None:
            torch.set_rng_state(host)
            if state is not None:
                module.set_rng_state(state, device)

        return restore

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned_empty(self, nbytes: int) -> torch.Tensor | None:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # the system's limit on locked memory: pageable is slower, not wrong
            return None

    def register(self, address: int, nbytes: int) -> bool:
        if not self.can_register:
            return False
        if self._registers_itself:
            torch.empty(0, pin_memory=True)  # sets the device up: before that torch says that nothing is pinned for it
            return bool(self._module.host_register(address, nbytes))
        with self._module.device(self.device):  # else a context would be made on the first card, which is not ours
            try:
                done = int(self._module.cudart().cudaHostRegister(address, nbytes, _REGISTER_FOR_ALL)) == 0
            except RuntimeError:
                done = False
            if not done:
                self._clear_error()
        return done

    def unregister(self, address: int) -> None:
        with contextlib.suppress(Exception):
            self._module.synchronize(self.device)  # copies from there may still be under way
        with contextlib.suppress(Exception):  # a device that failed, a process that ends: the driver lets go by itself
            if self._registers_itself:
                self._module.host_unregister(address)
                return
            with self._module.device(self.device):
                if int(self._module.cudart().cudaHostUnregister(address)) != 0:
                    self._clear_error()

    def _clear_error(self) -> None:
        """CUDA keeps the error of a failed call, and the next kernel that is launched raises it: be that kernel."""
        for _ in range(2):
            try:
                torch.ones(1, device=self.device)
            except RuntimeError:
                continue
            return
