"""Invariant: what comes in goes out under the policy, or unchanged with the reason; what was given stays as it was.

Imported only when a ComfyUI host asks for the nodes (see extension.py), since it needs `comfy_api`.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..offload.policy import OffloadPolicy
from . import stock, words
from .missing import message_of
from .policy import PolicySocket, known_to_host


class ApplyOffloadPolicy(io.ComfyNode):
    """Puts models from anybody's loaders under a policy."""

    @classmethod
    def define_schema(cls) -> Any:
        return known_to_host(
            io.Schema,
            node_id="ApplyOffloadPolicy",
            display_name="Apply Offload Policy",
            category=words.CATEGORY,
            description=(
                "Puts a MODEL, CLIP or VAE under an offload policy, so that you keep your own loaders. Nothing is "
                "loaded again, except where the policy says to bypass ComfyUI's dynamic VRAM. Models with a loader of "
                "their own kind (GGUF, nunchaku) pass through with a notice."
            ),
            search_aliases=words.aliases("policy", "gguf"),
            inputs=[
                PolicySocket.Input("policy", display_name="policy", tooltip=words.POLICY.split(" Not ")[0]),
                io.Model.Input(
                    "model", optional=True, tooltip="A diffusion model from any loader, or behind LoRA nodes."
                ),
                io.Clip.Input("clip", optional=True, tooltip="A text encoder from any loader."),
                io.Vae.Input("vae", optional=True, tooltip="A VAE from any loader."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model", tooltip=words.MODEL_OUT),
                io.Clip.Output("clip_out", display_name="clip", tooltip=words.CLIP_OUT),
                io.Vae.Output("vae_out", display_name="vae", tooltip=words.VAE_OUT),
            ],
        )

    @classmethod
    def execute(cls, policy: OffloadPolicy, model: Any = None, clip: Any = None, vae: Any = None) -> Any:
        from ..offload.adapters.comfyui import apply_policy

        given = {"model": model, "clip": clip, "vae": vae}
        there = {name: obj for name, obj in given.items() if obj is not None and message_of(obj) is None}
        applied = {name: apply_policy(policy, obj) for name, obj in there.items()}
        stock.hold(*(done.obj for done in applied.values()))
        lines = words.record(policy, applied.items())
        lines += [message for obj in given.values() if (message := message_of(obj)) is not None]
        if not lines:
            lines = ["Nothing is connected: connect a model, a clip or a vae."]
        results = [applied[name].obj if name in applied else obj for name, obj in given.items()]
        return io.NodeOutput(*results, ui=words.say(lines))
