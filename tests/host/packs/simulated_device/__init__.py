"""Invariant: after `install`, a ComfyUI host takes the simulated accelerator for its load device, and knows no more.

Test only. Nothing of the host's decisions is replaced but what it asks a device: which one, how much memory, which
number types. Masters stay on the CPU, as on a card with little memory, so `load_models_gpu` runs its real budget.

As a custom node pack it makes a whole server run so (`SIMULATED_VRAM` = bytes), with routes that read the counters.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

MIB = 1 << 20
RESERVED = 0
"""Bytes that the host keeps free beside the activations. Its own 0.4 GiB is meant for cards, not for tiny models."""
ACTIVATIONS = 8 * MIB
NODE_CLASS_MAPPINGS: dict[str, type] = {}


def load_device() -> torch.device:
    """With an index, as `torch.device(torch.cuda.current_device())` gives it."""
    return torch.device("vram", 0)


def replacements(host: ModuleType, vram: ModuleType) -> dict[str, Any]:
    """What takes the place of which attribute of `comfy.model_management`."""
    device = load_device()
    real_total, real_free, real_synchronize = (
        host.get_total_memory,
        host.get_free_memory,
        getattr(host, "synchronize", None),
    )

    def is_ours(dev: Any) -> bool:
        return dev is None or getattr(dev, "type", None) == device.type

    def get_total_memory(dev: Any = None, torch_total_too: bool = False) -> Any:
        if not is_ours(dev):
            return real_total(dev, torch_total_too)
        total = vram.mem_get_info()[1]
        return (total, vram.memory_reserved()) if torch_total_too else total

    def get_free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        if not is_ours(dev):
            return real_free(dev, torch_free_too)
        cached = vram.memory_reserved() - vram.memory_allocated()
        free = vram.mem_get_info()[0] + cached
        return (free, cached) if torch_free_too else free

    def number_type(*_: Any, **__: Any) -> bool:
        return False  # as on the CPU: otherwise fp16 files would be computed in another type than by the reference

    def always(answer: Any) -> Callable[..., Any]:
        return lambda *_, **__: answer

    new = {
        "get_torch_device": always(device),
        "get_all_torch_devices": lambda exclude_current=False: [] if exclude_current else [device],
        "get_total_memory": get_total_memory,
        "get_free_memory": get_free_memory,
        "text_encoder_device": always(device),
        "vae_device": always(device),
        "vram_state": host.VRAMState.NORMAL_VRAM,
        "EXTRA_RESERVED_VRAM": RESERVED,
        "minimum_inference_memory": lambda: ACTIVATIONS + host.extra_reserved_memory(),
        "should_use_fp16": number_type,
        "should_use_bf16": number_type,
        "soft_empty_cache": lambda force=False: vram.empty_cache(),
        "total_vram": vram.mem_get_info()[1] / MIB,
    }
    if real_synchronize is not None:
        new["synchronize"] = vram.synchronize
    return {name: value for name, value in new.items() if hasattr(host, name)}


def install(host: ModuleType, vram: ModuleType, put: Callable[[Any, str, Any], None] = setattr) -> torch.device:
    """Makes `vram` the load device of `host` (`comfy.model_management`); `put` may be `monkeypatch.setattr`."""
    for name, value in replacements(host, vram).items():
        put(host, name, value)
    return load_device()


def checkout() -> ModuleType:
    """The package with the simulator, under its usual name, from the folder that the environment names."""
    name = "balanced_offload"
    if name not in sys.modules:
        root = Path(os.environ["BALANCED_OFFLOAD_CHECKOUT"])
        spec = importlib.util.spec_from_file_location(
            name, root / "__init__.py", submodule_search_locations=[str(root)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def in_server(cap: int) -> None:
    """The pack's own work when a host imports it."""
    host = importlib.import_module("comfy.model_management")
    vram = importlib.import_module(f"{checkout().__name__}.offload.simulator").load("vram")
    vram.set_memory_cap(cap)
    install(host, vram)
    from aiohttp import web
    from server import PromptServer

    @PromptServer.instance.routes.get("/simulated/counters")
    async def counters(request: Any) -> Any:
        totals = vram.copy_totals()
        return web.json_response(
            {"allocated": vram.memory_allocated(), "peak": vram.max_memory_allocated(), "copied": totals}
        )

    @PromptServer.instance.routes.post("/simulated/reset")
    async def reset(request: Any) -> Any:
        vram.clear_copy_log()
        vram.reset_peak_memory_stats()
        return web.json_response({})


if os.environ.get("SIMULATED_VRAM") and "comfy.model_management" in sys.modules and "server" in sys.modules:
    in_server(int(os.environ["SIMULATED_VRAM"]))
