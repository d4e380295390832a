"""Invariant: a widget holds what the policy's field holds: nodes, JSON and Python mean the same by the same words.

Order, options and defaults come from OffloadPolicy itself; only the words that people read are written here. Nothing in
this file needs a host.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..offload.policy import CHOICES, OffloadMode, OffloadPolicy

SIZE = 'a percentage ("60%"), a size ("9.5GiB", "512MiB") or "auto"'


@dataclass(frozen=True)
class Widget:
    """One input of a node. `options` only for a choice; `advanced` ones are folded away by hosts that can."""

    name: str
    kind: Literal["choice", "text", "switch"]
    label: str
    tooltip: str
    default: Any
    options: tuple[str, ...] = ()
    advanced: bool = False


_WORDS: dict[str, tuple[str, str]] = {
    "mode": (
        "Mode",
        "How the weights share the card. auto: everything stays resident if the run fits, else your card's profile. "
        "none: everything resident. balanced: resident up to the high mark, the rest streams behind the compute. "
        "model: one component at a time. sequential: layer by layer, least VRAM, slowest.",
    ),
    "high": (
        "High mark (VRAM)",
        f"The most that one component's weights may occupy: {SIZE}. What is above it streams. auto: no mark while the "
        "run fits, else your card's profile.",
    ),
    "low": (
        "Low mark (VRAM)",
        f"Below this much VRAM in use nothing is offloaded: {SIZE}. 0 means: always evict when the stage changes.",
    ),
    "never": (
        "Never offload",
        "Components that stay in VRAM, with commas between them: a component or class name, or clip-l, clip-g, t5, "
        "vae, unet, denoiser, text-encoder. Never wins over always.",
    ),
    "always": (
        "Always offload",
        "Components that leave VRAM as soon as their stage is over, with commas between them; the same names as above.",
    ),
    "vae_tiling": (
        "VAE tiling",
        "Decode the picture in tiles, which needs less VRAM but changes pixels slightly at the seams. "
        "auto: only when the decode would not fit otherwise. For pipelines; ComfyUI's own VAEs are tiled by ComfyUI, "
        "which does so by itself when a decode runs out of memory.",
    ),
    "before_decode": (
        "Before decode",
        "What leaves VRAM before the VAE decodes. fit: only as much as the decode needs. free_all: everything else. "
        "keep: nothing.",
    ),
    "on_oom": (
        "On out of memory",
        "step_down: evict, then shrink, then tile, then go layer by layer, and say so in the report. "
        "stop: end with the error.",
    ),
    "headroom": (
        "Headroom (activations)",
        f"VRAM kept for what the model computes with: {SIZE}. Used until it is learned from a run. auto: estimated.",
    ),
    "reserve": (
        "Reserve (other programs)",
        "VRAM left to other programs, beyond what they hold now: a percentage or a size. The host's own reserve counts "
        "once, not twice.",
    ),
    "pinned_ram": (
        "Pinned RAM",
        f"RAM that may be page-locked for fast copies: {SIZE}, a percentage being a share of RAM. auto: 50 % of RAM, "
        "40 % on Windows.",
    ),
    "gc_threshold": (
        "GC threshold",
        "Share of available VRAM in use (0 to 1, or a percentage) above which torch's cached blocks return to the "
        "driver when the stage changes. 0: always. profile: your card's profile.",
    ),
    "prefetch": (
        "Prefetch (ring)",
        'VRAM through which streamed weights pass: a size ("512MiB") or "auto". More hides longer copies and leaves '
        "less for resident weights.",
    ),
    "fit_aware": (
        "Fit-aware",
        "On: nothing is moved when the run fits. Off: SD.Next's rule, for comparison: more VRAM in use than the low "
        "mark evicts.",
    ),
    "use_core_dynamic": (
        "Core dynamic VRAM",
        "Where ComfyUI pages the model itself. follow: set its limits and let it. bypass: load the model static and "
        "manage it here, which costs a reload. auto: follow unless the policy asks for what it cannot do.",
    ),
}
_ADVANCED_FROM = "headroom"


def _widgets() -> tuple[Widget, ...]:
    names = [field.name for field in dataclasses.fields(OffloadPolicy)]
    return tuple(_widget(name, advanced=names.index(name) >= names.index(_ADVANCED_FROM)) for name in names)


def _widget(name: str, advanced: bool) -> Widget:
    label, tooltip = _WORDS[name]
    default = getattr(OffloadPolicy(), name)
    if name == "mode":
        options = tuple(mode.value for mode in OffloadMode)
        return Widget(name, "choice", label, tooltip, default.value, options, advanced)
    if name in CHOICES:
        return Widget(name, "choice", label, tooltip, default, CHOICES[name], advanced)
    if isinstance(default, bool):
        return Widget(name, "switch", label, tooltip, default, (), advanced)
    # Lists and sizes are typed as text, which the policy reads as it is.
    written = ", ".join(default) if isinstance(default, tuple) else str(default)
    return Widget(name, "text", label, tooltip, written, (), advanced)


POLICY_WIDGETS = _widgets()


def read_policy(values: dict[str, Any]) -> OffloadPolicy:
    """The policy that the widgets spell; what is left out takes the policy's default.

    Raises:
        ValueError: names the field, what was given and what is allowed.
    """
    return OffloadPolicy(**values)
