"""Invariant: what the pack did to a model is said on the node and in the report, in the same words.

Tooltips that several nodes share, and the one way to say something: a host that lacks a channel loses that one only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from ..offload.adapters import comfyui_host
from ..offload.policy import OffloadPolicy
from . import stock

ALIASES = ("lowvram", "block swap", "unload", "oom", "vram", "offload")
CATEGORY = "Offload"

POLICY = (
    "How much VRAM the model may use, from Offload Policy. Not connected: auto, which moves nothing while it all fits."
)
MODEL_OUT = "The diffusion model under the policy, for samplers, LoRA loaders and everything that takes a MODEL."
CLIP_OUT = "The text encoder under the policy."
VAE_OUT = "The VAE under the policy."


def aliases(*more: str) -> list[str]:
    """Search words of a node, the pack's first."""
    return [*ALIASES, *more]


def say(lines: Sequence[str]) -> dict[str, list[str]]:
    """The node's `ui` with these lines; they also appear below the node while the prompt runs."""
    lines = list(dict.fromkeys(line for line in lines if line))
    server, node = comfyui_host.server(), comfyui_host.executing().node_id
    send = getattr(server, "send_progress_text", None)
    if lines and node is not None and send is not None:
        with contextlib.suppress(Exception):  # a browser that went away is no reason to lose the picture
            send("\n".join(lines), node)
    return {"text": lines}


def record(policy: OffloadPolicy, applied: Iterable[tuple[str, Any]]) -> list[str]:
    """Note in the prompt's report what was done under `policy` to each named thing; the notices, for the node."""
    from ..offload.adapters.comfyui_runs import runs

    runs().on_idle(stock.drop_idle)
    lines = []
    for name, done in applied:
        runs().touch("observe" if done.world == "foreign" else done.world, policy)
        runs().note("foreign" if done.world == "foreign" else "policy", f"{name}: {done.notice}")
        lines.append(f"{name}: {done.notice}")
    return lines
