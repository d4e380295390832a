"""Any accelerator that torch knows (CUDA, ROCm, XPU, MPS, the simulated one) through torch's device-generic API.

Invariant: no call here blocks the host, `synchronize` and `empty_cache` aside, so that watching stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from .base import DeviceMemory, Mark

SIMULATOR_MARK = "advance_host"  # only a device with a clock of its own can have its clock advanced


class AcceleratorBackend:
    """One accelerator, through `torch.get_device_module`; nothing here is specific to a vendor."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        current = getattr(self._module, "current_device", None)  # MPS has one device and no such question
        index = device.index if device.index is not None else int(current()) if current is not None else 0
        self.device = torch.device(device.type, index)
        self.name = self._device_name()
        simulated = hasattr(self._module, SIMULATOR_MARK)
        self.kind = "simulated" if simulated else device.type
        self.rung = "simulated" if simulated else "gpu"
        self.shared_memory = device.type == "mps" or self._is_integrated()
        self.others = self._other_accelerators()
        self._baseline = self.memory()

    def _properties(self) -> Any:
        get = getattr(self._module, "get_device_properties", None)
        return get(self.device) if get is not None else None

    def _device_name(self) -> str:
        get = getattr(self._module, "get_device_name", None)
        return str(get(self.device)) if get is not None else self.device.type.upper()

    def _is_integrated(self) -> bool:
        return bool(getattr(self._properties(), "is_integrated", 0))

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
        if hasattr(module, "mem_get_info"):
            free, total = module.mem_get_info(self.device)
            allocated, reserved = module.memory_allocated(self.device), module.memory_reserved(self.device)
        else:  # MPS: the driver tells what it gave us and what it recommends
            total = int(module.recommended_max_memory())
            allocated, reserved = int(module.current_allocated_memory()), int(module.driver_allocated_memory())
            free = max(0, total - reserved)
        return DeviceMemory(int(free), int(total), int(allocated), int(reserved))

    def peak_allocated(self) -> int:
        get = getattr(self._module, "max_memory_allocated", None)
        return int(get(self.device)) if get is not None else self.memory().allocated

    def reset_peak(self) -> None:
        reset = getattr(self._module, "reset_peak_memory_stats", None)
        if reset is not None:
            reset(self.device)

    def empty_cache(self) -> None:
        self._module.empty_cache()

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.device)

    def mark(self) -> Mark:
        return self.record(self.current_stream(), timed=True)

    def ready(self, mark: Mark) -> bool:
        return bool(mark.query())

    def seconds(self, start: Mark, end: Mark) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def current_stream(self) -> Any:
        return torch.accelerator.current_stream(self.device)

    def new_stream(self) -> Any:
        return torch.Stream(device=self.device)

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        enter = getattr(self._module, "stream", None)
        return cast("AbstractContextManager[Any]", enter(stream) if enter is not None else stream)

    def record(self, stream: Any, timed: bool = False) -> Any:
        event = torch.Event(device=self.device, enable_timing=timed)
        event.record(stream)
        return event

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
        except (
            RuntimeError,
            NotImplementedError,
        ):  # the system's limit on locked memory: pageable is slower, not wrong
            return None
