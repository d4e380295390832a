"""What the host's own pager is told of a policy. Invariant: bytes of one model on one card, in whole pages, capped.

Where a ComfyUI host pages its models itself (dynamic VRAM, comfy-aimdo), the weights of a model lie in a range of
32 MiB pages, the *vbar*. Its *watermark* is the most that may be resident, in load order from the front: the high
mark. Its *watermark limit* is what pressure may not take: the low mark. Small weights and buffers lie outside the pages
and count against the marks. Both figures round up to pages there, so a high mark is rounded down here, or it would not
cap.

Nothing here talks to the pager's device: limits are arithmetic, and what it did is read from its counters.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from importlib import metadata
from typing import Any, NamedTuple

from ..memory import ram
from ..names import match
from ..policy import ComponentInfo, Machine, OffloadMode, OffloadPolicy, Role, WorkingSet
from ..sizes import MIB, SizeKind, format_size, read_size
from . import comfyui_host

PAGE = 32 * MIB
"""Bytes of one page of the pager."""


class Limits(NamedTuple):
    """What is asked of the pager for one model, bytes in whole pages. watermark None: the host's own, the whole."""

    watermark: int | None = None
    floor: int = 0
    prioritize: bool = False


class Pager(NamedTuple):
    """What the installed pager offers. version: None where it does not say; ceiling: it takes a watermark."""

    version: str | None
    ceiling: bool
    floor: bool


# ---------------------------------------------------------------------- what the pager can do
def pager() -> Pager:
    """The host's comfy-aimdo, by what its range of pages offers; all missing where the host did not load it.

    Never imported from here: it binds its library when it is first imported, which is the host's to time.
    """
    vbar = getattr(sys.modules.get("comfy_aimdo.model_vbar"), "ModelVBAR", None)
    if vbar is None:
        return Pager(None, False, False)
    version: str | None = None
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = metadata.version("comfy-aimdo")
    return Pager(version, hasattr(vbar, "set_watermark"), hasattr(vbar, "set_watermark_limit"))


def beyond(policy: OffloadPolicy, info: ComponentInfo | None = None) -> list[str]:
    """What `policy` asks for that the host's pager cannot do, as words; empty when it can do all of it.

    `info` is the component in question. Without one (before its file is read) the lists of names are left out.
    """
    asks: list[str] = []
    if policy.mode in (OffloadMode.NONE, OffloadMode.MODEL):
        return asks
    if read_size("low", policy.low).is_zero:
        asks.append("low = 0 (always evict at a stage change)")
    if not policy.fit_aware:
        asks.append("fit_aware off (evict by percent in use)")
    if info is not None and info.name in match(policy.always, [info]).names - match(policy.never, [info]).names:
        asks.append(f"always = {', '.join(policy.always)}")
    if not pager().ceiling:
        if policy.mode is OffloadMode.SEQUENTIAL:
            asks.append("mode sequential (this comfy-aimdo takes no ceiling; 0.4.9 does)")
        elif read_size("high", policy.high).kind is not SizeKind.AUTO:
            asks.append(f"high = {policy.high} (this comfy-aimdo takes no ceiling; 0.4.9 does)")
    return asks


def wants_static(policy: OffloadPolicy, info: ComponentInfo | None = None) -> list[str]:
    """Why the model should be loaded static and be ours, as words; empty to follow the host."""
    if policy.use_core_dynamic == "bypass":
        return ["use_core_dynamic = bypass"]
    return beyond(policy, info) if policy.use_core_dynamic == "auto" else []


# ---------------------------------------------------------------------- what a policy means here
def limits_for(policy: OffloadPolicy, here: Machine, info: ComponentInfo, outside: int = 0) -> Limits:
    """The mode table's dynamic column in bytes of this model on this card.

    `outside`: bytes of its weights that do not lie in pages. Auto states only what the user wrote: the pager fits by
    itself. Pure.
    """
    if policy.mode is OffloadMode.NONE:
        return Limits()
    if policy.mode is OffloadMode.MODEL:
        return Limits(prioritize=True)
    if policy.mode is OffloadMode.SEQUENTIAL:
        return Limits(watermark=0)
    resolved = replace(policy, never=(), always=()).resolve(here, WorkingSet((info,)))
    stated = policy.mode is OffloadMode.BALANCED
    high = resolved.high if stated or resolved.sources["high"] == "user" else None
    low = resolved.low if stated or resolved.sources["low"] == "user" else 0
    if info.name in match(policy.never, [info]).names:
        low = info.weight_bytes
    whole = pages_up(max(0, info.weight_bytes - outside))
    watermark = None if high is None else max(0, high - outside) // PAGE * PAGE
    if watermark is not None and watermark >= whole:
        watermark = None  # a mark that caps nothing: lowering to it would only make the pager wait
    floor = min(pages_up(max(0, low - outside)), whole)
    return Limits(watermark, floor if watermark is None else min(floor, watermark))


def pages_up(size: int) -> int:
    """`size` bytes in whole pages, as the pager rounds."""
    return -(-size // PAGE) * PAGE


_NAMES: dict[Role, str] = {
    "denoiser": "denoiser",
    "text_encoder": "text_encoder",
    "vae": "vae",
    "controlnet": "controlnet",
    "other": "model",
}


def component_of(patcher: Any, name: str | None = None, role: Role | None = None) -> ComponentInfo:
    """The patcher's model as the policy's lists see it."""
    found = role or _role_of(patcher)
    return ComponentInfo(name or _NAMES[found], type(patcher.model).__name__, found, int(patcher.model_size()))


def _role_of(patcher: Any) -> Role:
    if getattr(patcher, "is_clip", False):
        return "text_encoder"
    return "denoiser" if hasattr(patcher.model, "diffusion_model") else "vae"


def card_of(patcher: Any) -> Machine:
    """The card that the patcher loads to, measured now; no synchronisation."""
    management = comfyui_host.model_management()
    device = patcher.load_device
    total = int(management.get_total_memory(device))
    free: int | None = None
    with contextlib.suppress(Exception):  # without it the fit rule counts nobody else, and says so
        free = int(management.get_free_memory(device))
    # What the pager holds is neither free by the host's count nor another program's. The host's own reserve is held
    # back like another program's share: there it counts, and once.
    others = None if free is None else max(0, total - free - _paged_bytes()) + comfyui_host.reserve()
    host = ram()
    return Machine(
        name=str(device),
        kind=device.type,
        vram_total=total,
        vram_free=free,
        others=others,
        ram_total=host.total,
        ram_limit=host.limit,
    )


def _paged_bytes() -> int:
    usage = getattr(sys.modules.get("comfy_aimdo.control"), "get_total_vram_usage", None)
    with contextlib.suppress(Exception):
        return 0 if usage is None else int(usage())
    return 0


# ---------------------------------------------------------------------- what it did
def watermark(vbar: Any) -> int | None:
    """Bytes that may be resident now, None where this pager does not say. It counts this figure in pages."""
    count = figure(vbar, "get_watermark")
    return None if count is None else count * PAGE


def figure(vbar: Any, call: str) -> int | None:
    """A counter of the pager, None where it has none of this name."""
    method = getattr(vbar, call, None)
    with contextlib.suppress(Exception):
        return None if method is None else int(method())
    return None


def residency(vbar: Any) -> dict[str, int] | None:
    """How many pages are resident and pinned, None where this pager does not say."""
    method = getattr(vbar, "get_residency", None)
    with contextlib.suppress(Exception):
        if method is not None:
            flags = method()
            return {
                "total": len(flags),
                "resident": sum(1 for flag in flags if flag & 1),
                "pinned": sum(1 for flag in flags if flag & 2),
            }
    return None


# ---------------------------------------------------------------------- in words
def words(policy: OffloadPolicy, limits: Limits | None) -> str:
    """What is stated to the pager, for the user; None for "not known yet"."""
    if policy.mode is OffloadMode.NONE:
        return "core default, nothing is set"
    if limits is None:
        return "its limits are set when it loads"
    if limits.prioritize:
        return "core default, and first in line for VRAM while it samples"
    if limits.watermark == 0:
        return "nothing of it stays in VRAM, every layer streams"
    stated = []
    if limits.watermark is not None:
        stated.append(f"at most {format_size(limits.watermark)} of it stay in VRAM")
    if limits.floor:
        stated.append(f"{format_size(limits.floor)} of it are kept while a node runs")
    return "core default, but " + " and ".join(stated) if stated else "core default, nothing is set"
