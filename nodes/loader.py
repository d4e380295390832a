"""Invariant: the node gives what the stock loaders give, under a policy; another policy never reads the files again.

Imported only when a ComfyUI host asks for the nodes (see extension.py), since it needs `comfy_api`.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..offload.policy import OffloadPolicy
from . import files, stock, words
from .files import NONE
from .missing import Missing
from .policy import PolicySocket, known_to_host
from .sources import Chosen, named_in, problem

_FILES = "Only .safetensors files are listed: a pickled one can run code when it is read."


class ModelLoaderWithOffload(io.ComfyNode):
    """A checkpoint, or a diffusion model with its text encoders and VAE, under a policy."""

    @classmethod
    def define_schema(cls) -> Any:
        return known_to_host(
            io.Schema,
            node_id="ModelLoaderWithOffload",
            display_name="Load Model (Offload)",
            category=words.CATEGORY,
            description=(
                "Loads a checkpoint, or a diffusion model with separate text encoders and VAE, as ComfyUI's own "
                "loaders do, and puts all of it under an offload policy. Changing the policy never reads the files "
                "again. With your own loaders use Apply Offload Policy behind them."
            ),
            search_aliases=words.aliases("load checkpoint", "load diffusion model", "load clip", "load vae"),
            inputs=_inputs(),
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip=words.MODEL_OUT),
                io.Clip.Output("CLIP", display_name="clip", tooltip=words.CLIP_OUT),
                io.Vae.Output("VAE", display_name="vae", tooltip=words.VAE_OUT),
            ],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(
        cls,
        checkpoint: str | None = NONE,
        diffusion_model: str | None = NONE,
        text_encoder: str | None = NONE,
        text_encoder_2: str | None = NONE,
        text_encoder_3: str | None = NONE,
        clip_type: str | None = None,
        vae: str | None = stock.EMBEDDED,
        weight_dtype: str | None = None,
    ) -> bool | str:
        """Before the run, for what is no link (a link arrives as None): files, their kind, and what goes together."""
        encoders = (text_encoder, text_encoder_2, text_encoder_3)
        return problem(Chosen(checkpoint, diffusion_model, encoders, clip_type, vae, weight_dtype)) or True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """Files that changed since are read again; what the policy says is not among what counts."""
        try:
            return [list(stamp) for stamp in Chosen.of(inputs).stamps()]
        except (ValueError, OSError):
            return None  # executing says what is wrong

    @classmethod
    def execute(cls, policy: OffloadPolicy | None = None, **inputs: Any) -> Any:
        from ..offload.adapters.comfyui import apply_policy
        from ..offload.adapters.comfyui_host import dynamic_vram
        from ..offload.adapters.comfyui_pager import wants_static

        policy = policy or OffloadPolicy()
        chosen = Chosen.of(inputs)
        if (message := problem(chosen)) is not None:
            raise ValueError(message)
        # Only where the host has a pager of its own is there anything to stay beside of.
        wanted = chosen.wanted(static=dynamic_vram() and bool(wants_static(policy)))
        found = stock.fetch(wanted, chosen.load, named_in(getattr(cls.hidden, "prompt", None)))
        given = {"model": found.model, "clip": found.clip, "vae": found.vae}
        applied = {name: apply_policy(policy, stock.fresh(obj)) for name, obj in given.items() if obj is not None}
        found.hand_out(*(done.obj for done in applied.values()))
        stock.hold(*(done.obj for done in applied.values()))
        lines = words.record(policy, applied.items())
        results = [applied[name].obj if name in applied else _missing(name, chosen) for name in given]
        return io.NodeOutput(*results, ui=words.say(lines))


def _inputs() -> list[Any]:
    def choice(id: str, label: str, options: list[str], tooltip: str, **more: Any) -> Any:
        return known_to_host(
            io.Combo.Input,
            id=id,
            display_name=label,
            options=options,
            default=options[0],
            tooltip=tooltip,
            # A script may leave out what it does not use, and the order here is the order on the node.
            optional=True,
            **more,
        )

    encoders = files.choices("text_encoders")
    return [
        PolicySocket.Input("policy", display_name="policy", optional=True, tooltip=words.POLICY),
        choice(
            "checkpoint",
            "checkpoint",
            files.choices("checkpoints"),
            f"A file with the diffusion model and mostly its text encoder and VAE, or none. {_FILES}",
        ),
        choice(
            "diffusion_model",
            "diffusion model",
            files.choices("diffusion_models"),
            f"A file with the diffusion model alone, in place of a checkpoint, or none. {_FILES}",
        ),
        choice(
            "text_encoder",
            "text encoder",
            encoders,
            "The text encoder. none: the one in the checkpoint; a diffusion model alone has none.",
        ),
        choice(
            "text_encoder_2", "text encoder 2", encoders, "A second one, for SDXL, SD3, Flux and others that use two."
        ),
        choice("text_encoder_3", "text encoder 3", encoders, "A third one, for SD3 with clip-l, clip-g and t5."),
        choice(
            "clip_type",
            "text encoder type",
            stock.clip_types(),
            "The family of the text encoder files, as in ComfyUI's own loaders; not used with the checkpoint's own.",
        ),
        choice(
            "vae",
            "VAE",
            [stock.EMBEDDED, *stock.vae_names()],
            f"The VAE: the checkpoint's own, a file, or a small approximate one (taesd). {_FILES}",
        ),
        choice(
            "weight_dtype",
            "weight dtype",
            stock.weight_dtypes(),
            "Number format of a diffusion model's weights, as in ComfyUI's own loader; not used with a checkpoint.",
            advanced=True,
        ),
    ]


def _missing(name: str, chosen: Chosen) -> Missing:
    """What stands at an output that the files hold nothing for."""
    source = "checkpoint" if chosen.checkpoint != NONE else "diffusion_model"
    file = chosen.checkpoint if source == "checkpoint" else chosen.diffusion_model
    remedy = {
        "clip": "choose its text encoder at 'text_encoder'",
        "vae": "choose its VAE at 'vae'",
    }[name]
    return Missing(f"Load Model (Offload) has no {name} to give: {file!r} at '{source}' holds none; {remedy}")
