"""The real libraries, called as their users call them. Invariant: nothing of a peer is imitated or helped.

One component in a denoising loop, so `enable_model_cpu_offload` and `enable_sequential_cpu_offload` of a pipeline come
down to the accelerate calls that they make for it (diffusers `pipeline_utils.py`), and group offload to
`diffusers.hooks.apply_group_offloading`, which `enable_group_offload` calls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .strategies import Applied, Room, Strategy

_NO_LIMIT = 1 << 50


@contextlib.contextmanager
def streams_allowed(device: torch.device) -> Iterator[None]:
    """diffusers up to 0.36 takes streams from CUDA and XPU only; its XPU branch is generic torch.

    The simulated accelerator is neither, so there (and only there) torch.xpu says yes while the hooks are made.
    """
    if device.type in ("cuda", "xpu"):
        yield
        return
    before = torch.xpu.is_available
    torch.xpu.is_available = lambda: True
    try:
        yield
    finally:
        torch.xpu.is_available = before


def whole(module: nn.Module, room: Room) -> Applied:
    """`.to(device)`."""
    return Applied(module.to(room.device))


def model_offload(module: nn.Module, room: Room) -> Applied:
    """What `enable_model_cpu_offload` does with one component; it stays on the device for the whole loop."""
    accelerate = importlib.import_module("accelerate")
    _, hook = accelerate.cpu_offload_with_hook(module, room.device)
    return Applied(module, close=hook.remove)


def sequential_offload(module: nn.Module, room: Room) -> Applied:
    """What `enable_sequential_cpu_offload` does with one component, `offload_buffers` as there."""
    accelerate = importlib.import_module("accelerate")
    accelerate.cpu_offload(module, room.device, offload_buffers=len(module._parameters) > 0)
    return Applied(module)


def group_offload(module: nn.Module, room: Room, **options: Any) -> Applied:
    """`apply_group_offloading` with these options; a streaming one traces the order in its first forward."""
    hooks = importlib.import_module("diffusers.hooks")
    known = inspect.signature(hooks.apply_group_offloading).parameters
    missing = [name for name in options if name not in known]
    if missing:
        raise ValueError(f"this diffusers' apply_group_offloading has no {', '.join(missing)}: update diffusers")
    with streams_allowed(room.device):
        hooks.apply_group_offloading(module, onload_device=room.device, offload_device=torch.device("cpu"), **options)
    return Applied(module)


def dispatch(module: nn.Module, room: Room, share: float = 1.0) -> Applied:
    """`infer_auto_device_map`, leaf by leaf, with what the cap leaves after activations; then `dispatch_model`.

    accelerate itself keeps room for its largest streamed layer within that.
    """
    accelerate = importlib.import_module("accelerate")
    free = _NO_LIMIT if room.cap is None else max(0, int(share * (room.cap - room.activations)))
    key = room.device.index or 0  # a plain number is torch's current accelerator, whatever its kind
    device_map = accelerate.infer_auto_device_map(module, max_memory={key: free, "cpu": _NO_LIMIT})
    on_device = sum(place == key for place in device_map.values())
    if on_device == 0:
        raise torch.OutOfMemoryError(f"accelerate.dispatch: not one layer fits beside the activations in {free} bytes")
    accelerate.dispatch_model(module, device_map, main_device=room.device)
    return Applied(module, facts=lambda: {"max_memory": free})


def _group(name: str, **options: Any) -> Strategy:
    written = ", ".join(f"{key}={value}" for key, value in options.items())
    apply = functools.partial(group_offload, **options)
    return Strategy(f"diffusers.{name}", False, apply, f"apply_group_offloading({written})")


_LEAF: dict[str, Any] = {"offload_type": "leaf_level"}
_BLOCK: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}

STRATEGIES: tuple[Strategy, ...] = (
    Strategy("diffusers.model", False, model_offload, "accelerate cpu_offload_with_hook, as enable_model_cpu_offload"),
    Strategy("diffusers.sequential", False, sequential_offload, "accelerate cpu_offload, as sequential offload"),
    _group("group_leaf", **_LEAF),
    _group("group_leaf_stream", **_LEAF, use_stream=True),
    _group("group_leaf_stream_record", **_LEAF, use_stream=True, record_stream=True),
    _group("group_leaf_stream_lowcpu", **_LEAF, use_stream=True, low_cpu_mem_usage=True),
    _group("group_block_stream", **_BLOCK, use_stream=True),
    _group("group_block_stream_record", **_BLOCK, use_stream=True, record_stream=True),
    Strategy(
        "accelerate.dispatch",
        False,
        dispatch,
        "infer_auto_device_map and dispatch_model, leaf by leaf",
        tuple(functools.partial(dispatch, share=share) for share in (0.95, 0.9, 0.8, 0.6, 0.3)),
    ),
    Strategy("torch.to", False, whole, ".to(device)"),
)
