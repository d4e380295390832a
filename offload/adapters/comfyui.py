"""A policy on what a ComfyUI graph carries. Invariant: what came in is untouched, what goes out is of its kind.

    applied = apply_policy(OffloadPolicy(high="60%"), model)    # MODEL, CLIP or VAE
    applied.obj, applied.notice

Three worlds: a static patcher is placed by our session; a dynamic one is paged by the host, within limits that we set;
a patcher of a foreign class has rules of its own and passes through.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from ..policy import OffloadMode, OffloadPolicy, Role
from ..units import ComponentError, build_component
from . import comfyui_host as host
from .comfyui_device import host_module


@dataclass(frozen=True)
class Applied:
    """`obj` goes by the policy; `world` is static, dynamic or foreign; `notice` says so in a sentence, for the user."""

    obj: Any
    world: str
    notice: str


def apply_policy(policy: OffloadPolicy, obj: Any) -> Applied:
    """Put a MODEL, CLIP or VAE of the host under a policy.

    Raises:
        TypeError: none of the three.
    """
    patcher, role = _patcher_of(obj)
    from .comfyui_static import OffloadModelPatcher

    if isinstance(patcher, OffloadModelPatcher):
        clone = patcher.clone()
        clone.policy = policy
        return _done(_wrapped(obj, clone), "static", policy, role)
    if not host.is_stock(patcher):
        name = type(patcher).__name__
        return Applied(obj, "foreign", f"Passed through: {name} is loaded by its own pack, which places its weights.")
    if host.is_dynamic(patcher):
        return _dynamic(policy, obj, patcher, role)
    return _static(policy, obj, patcher, role)


def _patcher_of(obj: Any) -> tuple[Any, Role]:
    if host.is_patcher(obj):
        return obj, "denoiser"
    patcher = getattr(obj, "patcher", None)
    if patcher is not None and hasattr(obj, "cond_stage_model"):
        return patcher, "text_encoder"
    if patcher is not None and hasattr(obj, "first_stage_model"):
        return patcher, "vae"
    raise TypeError(f"model: got {type(obj).__name__}, allowed is what a MODEL, CLIP or VAE output carries.")


def _static(policy: OffloadPolicy, obj: Any, patcher: Any, role: Role) -> Applied:
    from .comfyui_static import OffloadModelPatcher, managed_module

    module = managed_module(patcher.model)
    try:
        build_component("probe", module, role)
    except ComponentError as error:
        return Applied(obj, "foreign", f"Passed through: {error}")
    if patcher.load_device != host.load_device():
        why = f"it is to run on {patcher.load_device}, by the host's or a node's choice."
        return Applied(obj, "foreign", f"Passed through: {why}")
    hosted = host_module(module, role, policy, "static")
    return _done(_wrapped(obj, OffloadModelPatcher.of(patcher, hosted)), "static", policy, role)


def _dynamic(policy: OffloadPolicy, obj: Any, patcher: Any, role: Role) -> Applied:
    from .comfyui_dynamic import apply_dynamic

    found, notice = apply_dynamic(patcher, policy)
    if host.is_dynamic(found):
        return Applied(_wrapped(obj, found), "dynamic", notice)
    applied = _static(policy, _wrapped(obj, found), found, role)  # bypass: loaded anew, and ours from here on
    return Applied(applied.obj, applied.world, f"{notice} {applied.notice}".strip())


def _wrapped(obj: Any, patcher: Any) -> Any:
    """The same kind of object around another patcher."""
    if host.is_patcher(obj):
        return patcher
    if hasattr(obj, "cond_stage_model"):
        clip = obj.clone()
        clip.patcher = patcher
        clip.cond_stage_model = patcher.model
        return clip
    vae = copy.copy(obj)
    vae.patcher = patcher
    vae.first_stage_model = patcher.model
    return vae


_MEANS = {
    OffloadMode.AUTO: "all of it stays on the device if the run fits, else your card's profile applies",
    OffloadMode.NONE: "all of it stays on the device",
    OffloadMode.BALANCED: "it stays up to the high mark, the rest streams",
    OffloadMode.MODEL: "it is on the device whole while it runs, and makes way for the next",
    OffloadMode.SEQUENTIAL: "it streams layer by layer",
}
_KIND = {"denoiser": "model", "text_encoder": "text encoder", "vae": "VAE"}


def _done(obj: Any, world: str, policy: OffloadPolicy, role: Role) -> Applied:
    if host.load_device().type == "cpu":
        return Applied(obj, world, "This host computes on the CPU: weights are where they are used, nothing is moved.")
    mode = OffloadMode(policy.mode)
    return Applied(obj, world, f"Placed by this pack ({_KIND.get(role, role)}, mode {mode.value}): {_MEANS[mode]}.")
