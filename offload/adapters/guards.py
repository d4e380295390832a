"""What must be so before a pipeline is attached, and stay so while it is. Invariant: one offloader per pipeline.

The checks mean what diffusers' own mean, in both directions: we refuse a pipeline that another offloader holds, and
while ours is attached the pipeline's own switches refuse, each naming the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..units import ComponentError, build_component
from .parts import Part, modules_of

# Names under which diffusers registers the hooks that move or convert weights by themselves.
_GROUP_OFFLOADING = "group_offloading"
_LAYERWISE_CASTING = "layerwise_casting"

OFFLOAD_SWITCHES = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")


class ExecutionDevice:
    """Sits on a component as `_hf_hook` and says where it runs, which is all that a pipeline asks of ours.

    Not one of accelerate's hooks, without `hooks` and `pre_forward`: nothing takes it for an offloader of theirs.
    """

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """accelerate's `remove_hook_from_module` calls it before it takes the attribute off."""
        return module


def check_pipeline(pipe: Any) -> None:
    """Refuse what is no pipeline, what is spread over devices, and what another offloader holds.

    Raises:
        TypeError: not a diffusers pipeline.
        ValueError: a device map, or another offloader; names the call that takes it off.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"pipe: got {type(pipe).__name__}, allowed is a diffusers DiffusionPipeline; "
            "for a plain module use Session.add"
        )
    device_map = getattr(pipe, "hf_device_map", None)
    if isinstance(device_map, dict) and len(device_map) > 1:
        raise ValueError(
            "This pipeline is spread by a device map, so it cannot be offloaded as well. "
            "Call `pipe.reset_device_map()` first."
        )
    for name, module in modules_of(pipe).items():
        _check_module(name, module)


def _check_module(name: str, module: nn.Module) -> None:
    device_map = getattr(module, "hf_device_map", None)
    spread = isinstance(device_map, dict) and len(device_map) > 1
    for child in module.modules():
        hook = child.__dict__.get("_hf_hook")
        if hook is not None and not isinstance(hook, ExecutionDevice):
            remedy = (
                f"load '{name}' again without device_map"
                if spread
                else "call `pipe.remove_all_hooks()` (takes off enable_model_cpu_offload and "
                "enable_sequential_cpu_offload)"
            )
            raise ValueError(
                f"component '{name}' is offloaded by accelerate already ({type(hook).__name__}). "
                f"Two offloaders on one model undo each other: {remedy} first."
            )
        registry = child.__dict__.get("_diffusers_hook")
        hooks = getattr(registry, "hooks", None) or {}
        if any(key.startswith(_GROUP_OFFLOADING) for key in hooks):
            raise ValueError(
                f"component '{name}' has group offloading on. Two offloaders on one model undo each other: build the "
                "pipeline again without enable_group_offload() first, as diffusers has no call that takes it off."
            )
        if _LAYERWISE_CASTING in hooks:
            raise ComponentError(
                f"component '{name}' has layerwise casting on, which replaces its weights in every forward. Load it "
                "without enable_layerwise_casting()."
            )


def check_part(part: Part) -> None:
    """Refuse a model whose weights cannot be rebound, before anything is attached.

    Raises:
        ComponentError: quantized by a library that owns its weights, weights never loaded, an exotic tensor type.
    """
    module = part.module
    if getattr(module, "is_loaded_in_8bit", False) or getattr(module, "is_loaded_in_4bit", False):
        raise ComponentError(
            f"component '{part.name}' is quantized by bitsandbytes, which keeps state of its own beside the weights. "
            "Load it without that quantization."
        )
    build_component(part.name, module, part.role)


def refusals(pipe: Any) -> dict[str, Callable[..., Any]]:
    """Attributes to put on the pipeline while it is attached: other offloaders and moves refuse, naming `detach()`."""

    def refuse(name: str) -> Callable[..., Any]:
        def switch(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"{name}: Balanced Offload is attached to this pipeline and places its models. "
                "Call `detach()` on it first, or set its policy."
            )

        return switch

    to = pipe.to

    def move(*args: Any, **kwargs: Any) -> Any:
        """`.to(dtype)` converts the weights as ever; a device is ours to choose."""
        named = [kwargs.get("device"), *(a for a in args if not isinstance(a, torch.dtype))]
        if any(device is not None for device in named):
            return refuse("to(device)")()
        return to(*args, **kwargs)

    return {name: refuse(name) for name in OFFLOAD_SWITCHES if hasattr(pipe, name)} | {"to": move}
