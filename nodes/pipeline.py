"""Invariant: a workflow names a pipeline and says what to draw; where files lie and how models move is decided below.

Imported only when a ComfyUI host asks for the nodes (see extension.py), since it needs `comfy_api`.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..offload.policy import OffloadPolicy
from .pipeline_files import PipelineNameError, find_pipeline, host_roots, pipeline_names, stamp
from .policy import PolicySocket, known_to_host
from .words import CATEGORY, aliases, say

PipelineSocket = io.Custom("OFFLOAD_PIPELINE")
DTYPES = ("auto", "bf16", "fp16", "fp32")
_LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


class PipelineLoaderWithOffload(io.ComfyNode):
    """A diffusers pipeline from the host's own folders, its models under a policy."""

    @classmethod
    def define_schema(cls) -> Any:
        return known_to_host(
            io.Schema,
            node_id="PipelineLoaderWithOffload",
            display_name="Load Diffusers Pipeline (Offload)",
            category=CATEGORY,
            description=(
                "Loads a diffusers pipeline (a folder with a model_index.json below models/diffusers, safetensors "
                "only) under an offload policy. Changing the policy never reads the files again. ComfyUI counts the "
                "pipeline's models and can have their VRAM back. Needs diffusers and transformers in ComfyUI's Python."
            ),
            search_aliases=aliases("diffusers", "pipeline"),
            inputs=[
                PolicySocket.Input(
                    "policy",
                    display_name="policy",
                    optional=True,
                    tooltip="How the pipeline's models share the VRAM, from Offload Policy. Not connected: auto.",
                ),
                known_to_host(
                    io.Combo.Input,
                    id="pipeline_name",
                    display_name="pipeline",
                    options=pipeline_names(host_roots()),
                    tooltip="A folder with a model_index.json below models/diffusers, or below a `diffusers` folder of "
                    "extra_model_paths.yaml. Only safetensors weights are read.",
                ),
                known_to_host(
                    io.Combo.Input,
                    id="dtype",
                    display_name="dtype",
                    options=list(DTYPES),
                    default=DTYPES[0],
                    optional=True,
                    advanced=True,
                    tooltip="Number format of the weights. auto: as the files hold them where your card computes in "
                    "it, else fp32. Changing it reads the files again.",
                ),
            ],
            outputs=[PipelineSocket.Output("pipeline", display_name="pipeline", tooltip="For Generate (Diffusers).")],
        )

    @classmethod
    def validate_inputs(cls, pipeline_name: str | None = None) -> bool | str:
        """The host checks no list where this names the input, so a folder that came later is found as well."""
        if pipeline_name is None:  # connected to another node: known when that one ran
            return True
        try:
            find_pipeline(pipeline_name, host_roots())
        except PipelineNameError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, pipeline_name: str, **others: Any) -> Any:
        """Files that changed since are read again; the policy is not among what counts."""
        try:
            return stamp(find_pipeline(pipeline_name, host_roots()))
        except (PipelineNameError, OSError):
            return None  # executing says what is wrong

    @classmethod
    def execute(cls, pipeline_name: str, policy: OffloadPolicy | None = None, dtype: str = "auto") -> Any:
        from ..offload.adapters.comfyui_pipeline import pipelines

        folder = find_pipeline(pipeline_name, host_roots())
        found = pipelines().open(folder, pipeline_name, policy or OffloadPolicy(), stamp=stamp(folder), dtype=dtype)
        return io.NodeOutput(found, ui=say([found.notice]))


class PipelineGenerate(io.ComfyNode):
    """Draws with a diffusers pipeline: text to image, or image to image where a picture is connected."""

    @classmethod
    def define_schema(cls) -> Any:
        return known_to_host(
            io.Schema,
            node_id="PipelineGenerate",
            display_name="Generate (Diffusers)",
            category=CATEGORY,
            description=(
                "Draws with a diffusers pipeline. With an image connected it runs the pipeline's image-to-image kind "
                "on the same models, nothing is loaded again. Shows progress, and stops between two steps when "
                "interrupted."
            ),
            search_aliases=aliases("diffusers", "txt2img", "img2img", "pipeline"),
            inputs=_generate_inputs(),
            outputs=[io.Image.Output("image_out", display_name="image", tooltip="The picture that was drawn.")],
        )

    @classmethod
    def execute(
        cls,
        pipeline: Any,
        prompt: str,
        negative: str,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        image: Any = None,
        strength: float = 0.75,
    ) -> Any:
        from ..offload.adapters.comfyui_generate import Request
        from ..offload.adapters.comfyui_pipeline import OffloadPipeline

        if not isinstance(pipeline, OffloadPipeline):
            raise TypeError(
                f"pipeline: got {type(pipeline).__name__}, allowed is what Load Diffusers Pipeline (Offload) gives. "
                "For MODEL, CLIP and VAE use Apply Offload Policy and the host's own sampler."
            )
        request = Request(prompt, negative, width, height, steps, guidance, seed, image, strength)
        return io.NodeOutput(pipeline.generate(request))


def _generate_inputs() -> list[Any]:
    size = {"default": 1024, "min": 16, "max": 16384, "step": 8}
    return [
        PipelineSocket.Input("pipeline", display_name="pipeline", tooltip="From Load Diffusers Pipeline (Offload)."),
        known_to_host(
            io.String.Input,
            id="prompt",
            display_name="prompt",
            default="",
            multiline=True,
            tooltip="What to draw.",
        ),
        known_to_host(
            io.String.Input,
            id="negative",
            display_name="negative",
            default="",
            multiline=True,
            tooltip="What to avoid. Pipelines that have no negative prompt leave it out; empty is the pipeline's own.",
        ),
        known_to_host(
            io.Int.Input,
            id="width",
            display_name="width",
            **size,
            tooltip="Width of the picture in pixels. With an image connected, the image's own size counts.",
        ),
        known_to_host(
            io.Int.Input,
            id="height",
            display_name="height",
            **size,
            tooltip="Height of the picture in pixels. With an image connected, the image's own size counts.",
        ),
        known_to_host(
            io.Int.Input,
            id="steps",
            display_name="steps",
            default=20,
            min=1,
            max=1000,
            tooltip="Denoising steps. With an image, about steps x strength of them are done.",
        ),
        known_to_host(
            io.Float.Input,
            id="guidance",
            display_name="guidance",
            default=5.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="How strictly the picture follows the prompt: the pipeline's guidance_scale.",
        ),
        known_to_host(
            io.Int.Input,
            id="seed",
            display_name="seed",
            default=0,
            min=0,
            max=_LARGEST_SEED,
            control_after_generate=True,
            tooltip="Of the noise, which is drawn on the CPU so that it is the same on every device.",
        ),
        known_to_host(
            io.Image.Input,
            id="image",
            display_name="image",
            optional=True,
            tooltip="Start from this picture instead of noise (image to image). Pipelines that edit pictures need it.",
        ),
        known_to_host(
            io.Float.Input,
            id="strength",
            display_name="strength",
            default=0.75,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="How far to go from the image: 0 keeps it, 1 redraws it. Without an image it does nothing.",
        ),
    ]
