"""What a ComfyUI host is and offers. Invariant: every name of the host that may be missing is looked up here, with a
plain answer where it is.

Imported by anybody, host or not: `comfy` and its kin are imported inside the functions.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

KEY = "balanced_offload"  # of our callbacks, wrappers and attachments in the host's objects


class Executing(NamedTuple):
    """The prompt and node that this thread executes; None outside of one."""

    prompt_id: str | None
    node_id: str | None


@dataclass(frozen=True)
class HostFacts:
    """What the report says of the host. `reserve`: bytes that the host's own flags keep free."""

    version: str | None
    dynamic_vram: bool
    flags: tuple[str, ...]
    reserve: int


def model_management() -> Any:
    """The host's `comfy.model_management`."""
    import comfy.model_management

    return comfy.model_management


def load_device() -> torch.device:
    """The device on which the host computes."""
    device = model_management().get_torch_device()
    return device if isinstance(device, torch.device) else torch.device(device)


def host_device() -> torch.device | None:
    """`load_device`, None where no host's memory management is loaded."""
    return load_device() if "comfy.model_management" in sys.modules else None


def facts() -> HostFacts:
    """The host as it is now; safe without one (version None)."""
    return HostFacts(version(), dynamic_vram(), flags(), reserve())


def version() -> str | None:
    """The host's version, None where it does not say."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    return str(__version__)


def dynamic_vram() -> bool:
    """Whether this host pages its models itself (`comfy-aimdo`)."""
    management = sys.modules.get("comfy.memory_management")  # never import it on a host that has not
    return bool(getattr(management, "aimdo_enabled", False))


def flags() -> tuple[str, ...]:
    """The command line switches that change how the host uses memory, as they were given."""
    args = _args()
    if args is None:
        return ()
    found = []
    for name in _FLAGS:
        value = getattr(args, name, None)
        if value not in (None, False, 0, []):
            found.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return tuple(found)


_FLAGS = (
    "cpu",
    "highvram",
    "gpu_only",
    "normalvram",
    "lowvram",
    "novram",
    "reserve_vram",
    "vram_headroom",
    "async_offload",
    "disable_async_offload",
    "disable_smart_memory",
    "disable_dynamic_vram",
    "enable_dynamic_vram",
    "disable_cuda_graphs",
    "disable_comfy_compiler",
    "cache_none",
    "cache_lru",
    "cache_ram",
)


def reserve() -> int:
    """Bytes that `--reserve-vram` and `--vram-headroom` keep free; 0 where the user gave none.

    The host's own default reserve is no user's wish: the core keeps its own slack and the learned activations.
    """
    args = _args()
    given = (getattr(args, name, None) for name in ("reserve_vram", "vram_headroom"))
    return max((int(value * 2**30) for value in given if value), default=0)


def _args() -> Any:
    module = sys.modules.get("comfy.cli_args")
    return getattr(module, "args", None)


# ---------------------------------------------------------------------- where we are
def executing() -> Executing:
    """The prompt and node that run on this thread."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return Executing(None, None)
    context = get_executing_context()
    return Executing(None, None) if context is None else Executing(context.prompt_id, context.node_id)


def server() -> Any:
    """`PromptServer.instance`, None where no server runs."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def throw_if_interrupted() -> None:
    """Raise the host's interrupt (a BaseException on newer hosts) if somebody asked for it."""
    model_management().throw_exception_if_processing_interrupted()


# ---------------------------------------------------------------------- patchers
def is_patcher(obj: Any) -> bool:
    """Whether `obj` is a host's MODEL, or what CLIP and VAE carry as `.patcher`."""
    import comfy.model_patcher

    return isinstance(obj, comfy.model_patcher.ModelPatcher)


def is_stock(patcher: Any) -> bool:
    """Whether nobody subclassed it: a foreign class (GGUF, nunchaku) has rules of its own, which we would break."""
    import comfy.model_patcher

    known = [comfy.model_patcher.ModelPatcher]
    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    return type(patcher) in ([*known, dynamic] if dynamic is not None else known)


def is_dynamic(patcher: Any) -> bool:
    """Whether the host pages this model itself."""
    return bool(getattr(patcher, "is_dynamic", lambda: False)())


def takes(function: Callable[..., Any], parameter: str) -> bool:
    """Whether `function` has a parameter of this name."""
    with contextlib.suppress(TypeError, ValueError):
        return parameter in inspect.signature(function).parameters
    return False


def ejected(patcher: Any) -> Any:
    """A context in which the patcher's injections are out and come back at its end."""
    return patcher.use_ejected(skip_and_inject_on_exit_only=True)


def lora_dtype(device: torch.device) -> torch.dtype:
    """What the host computes LoRA deltas in: newer hosts ask the device, older ones take float32."""
    found = getattr(model_management(), "lora_compute_dtype", None)
    return torch.float32 if found is None else found(device)


def pause_graph() -> contextlib.AbstractContextManager[Any]:
    """Around moves inside a forward: hosts from 0.35 on capture allocations there, and have to be told."""
    module = sys.modules.get("comfy.model_prefetch")
    pause = getattr(module, "pause_malloc_graph", None)
    return contextlib.nullcontext() if pause is None else pause(sync=True)
