"""Invariant: every pipeline here is small, its weights come from a seed, what it should draw comes from plain torch.

`Example.draw` runs a pipeline with its own call and brings the picture to the host; `state_of` is everything that
attaching could change, to be compared before and after.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload.models import call_arguments, tiny
from balanced_offload.offload.models.tokens import toy_tokenizer

MODES = ("none", "balanced", "model", "sequential", "auto")


def policy_fields(mode: str) -> dict[str, Any]:
    """Balanced with a mark far below every denoiser here, so that it streams; the other modes as they are."""
    return {"mode": mode, "high": "100KiB"} if mode == "balanced" else {"mode": mode}


class Example:
    """A pipeline's builder, the arguments of its call (or how to make one on a device), and what it draws alone."""

    def __init__(self, build: Callable[[], Any], **call: Any) -> None:
        self.build = build
        self.call = call

    def draw(self, pipe: Any, **more: Any) -> torch.Tensor:
        """One result on the host, from noise of a fixed seed."""
        arguments = {**self.call, **more}
        device = getattr(pipe, "pipe", pipe)._execution_device
        arguments = {k: v(device) if callable(v) else v for k, v in arguments.items()}
        arguments.setdefault("generator", torch.Generator().manual_seed(7))
        arguments.setdefault("output_type", "pt")
        scheduler = getattr(pipe, "pipe", pipe).scheduler
        before = copy.deepcopy(scheduler.__dict__)
        try:
            output = pipe(**arguments)
        finally:  # a scheduler keeps the last run's steps where the run was, which would count as device memory
            scheduler.__dict__.clear()
            scheduler.__dict__.update(before)
        return (output.frames if hasattr(output, "frames") else output.images).cpu()

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """What a plain run on the CPU draws."""
        drawn = self.draw(self.build())
        assert torch.isfinite(drawn).all() and drawn.std() > 0.01
        return drawn


def quiet(pipe: Any) -> Any:
    """The pipeline in evaluation mode, without a progress bar."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(build: Callable[..., Any]) -> Callable[..., Any]:
    """Weights from a fixed seed; torch's global generator is left alone."""

    @functools.wraps(build)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return quiet(build(*args, **kwargs))

    return run


def sd_parts(width: int = 32) -> dict[str, Any]:
    """The models of a small Stable Diffusion 1 pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=100,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    blocks = {"block_out_channels": (width, 2 * width), "norm_num_groups": 8}
    return {
        "text_encoder": CLIPTextModel(text),
        "tokenizer": toy_tokenizer(text, 77),
        "unet": UNet2DConditionModel(
            **blocks,
            sample_size=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        ),
        "vae": AutoencoderKL(
            **blocks,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@seeded
def build_sd() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**sd_parts())


SD_CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "height": 32, "width": 32}


def controlnet() -> Any:
    """A control net for `sd_parts`, whose last layers are not zero as a fresh one's are."""
    from diffusers import ControlNetModel

    net = ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(16, 32),
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return net


@seeded
def build_controlled(nets: int = 1) -> Any:
    from diffusers import StableDiffusionControlNetPipeline

    given = [controlnet() for _ in range(nets)]
    return StableDiffusionControlNetPipeline(**sd_parts(), controlnet=given[0] if nets == 1 else given)


def stripes(size: int = 32) -> torch.Tensor:
    """A picture [1, 3, size, size] of 0 and 1."""
    line = (torch.arange(size) % 8 < 4).float()
    return line.expand(1, 3, size, size).contiguous()


@seeded
def build_wan() -> Any:
    """Two denoisers that share the steps between them, and a causal video VAE that keeps features between frames."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    def transformer() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=64,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer(),
        transformer_2=transformer(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        boundary_ratio=0.875,
    )


def embeddings(seed: int) -> torch.Tensor:
    """Prompt embeddings [1, 8, 32]."""
    return torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(seed))


EXAMPLES: dict[str, Example] = {
    "sdxl": Example(lambda: tiny("sdxl"), **call_arguments("sdxl", tiny_sizes=True)),
    "flux": Example(lambda: tiny("flux1-dev"), **call_arguments("flux1-dev", tiny_sizes=True)),
    "sd": Example(build_sd, **SD_CALL),
    "controlnet": Example(build_controlled, **SD_CALL, image=lambda device: stripes()),
    "two_controlnets": Example(
        lambda: build_controlled(2),
        **SD_CALL,
        image=lambda device: [stripes(), 1 - stripes()],
        controlnet_conditioning_scale=lambda device: [1.0, 0.5],
    ),
    "wan": Example(
        build_wan,
        prompt_embeds=lambda device: embeddings(1).to(device),
        negative_prompt_embeds=lambda device: embeddings(2).to(device),
        height=16,
        width=16,
        num_frames=5,
        num_inference_steps=4,
    ),
}


@pytest.fixture(scope="session", autouse=True)
def imported() -> Iterator[None]:
    """Import what the pipelines need, and leave it out of every later garbage collection: it costs 0.2 s each."""
    for case in EXAMPLES.values():
        case.build()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def warm(case: Example) -> Any:
    """A pipeline that ran once without us, as libraries put attributes and hooks of their own in place then."""
    pipe = case.build()
    assert torch.equal(case.draw(pipe), case.expected)
    return pipe


@pytest.fixture
def example() -> Callable[[str], Example]:
    """A pipeline by name."""
    return EXAMPLES.__getitem__


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"{path}.{key}", tensor)
        for path, child in module.named_modules()
        for table in (child._parameters, child._buffers)
        for key, tensor in table.items()
        if tensor is not None
    ]


def _values(attributes: dict[str, Any]) -> dict[str, Any]:
    """Plain values and lists of them as they are, other objects by their identity."""
    return {k: v if _is_plain(v) else id(v) for k, v in attributes.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return (type(value) is dict and not value) or (type(value) is list and all(map(_is_plain, value)))
    return value is None or isinstance(value, (bool, int, float, str))


def device_bytes(sim: ModuleType) -> int:
    """Bytes on the simulated device once cycles of dead objects are gone."""
    gc.collect()
    return int(sim.memory_allocated())


def state_of(pipe: Any) -> dict[str, Any]:
    """All that attaching may touch: attributes, classes, hooks, tensor objects, devices, types, values, ties.

    Holds the tensors' values as copies on the host, and the objects themselves, so that no id is given out again.
    """
    found: dict[str, Any] = {"pipe": _values(pipe.__dict__), "keep": dict(pipe.__dict__)}
    for name, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            continue
        children = list(module.named_modules())
        tensors = _tensors(module)
        places: dict[int, list[str]] = {}
        for key, tensor in tensors:
            if tensor.untyped_storage().nbytes():
                places.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)
        found[name] = {
            "classes": [(path, type(child)) for path, child in children],
            "attributes": [(path, _values(child.__dict__)) for path, child in children],
            "hooks": [
                (path, key, sorted(value))
                for path, child in children
                for key, value in child.__dict__.items()
                if "hooks" in key and isinstance(value, dict)
            ],
            "tensors": [
                (key, id(t), str(t.device), t.dtype, tuple(t.shape), t.stride(), t.requires_grad) for key, t in tensors
            ],
            "ties": sorted(sorted(keys) for keys in places.values()),
        }
        found["keep"][name] = [child.__dict__.copy() for _, child in children]
        found[f"{name} values"] = [tensor.detach().cpu().clone() for _, tensor in tensors]
    return found


def same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Every entry is equal, the values bit for bit."""
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name == "keep":
            continue
        if name.endswith(" values"):
            assert len(value) == len(after[name])
            for one, other in zip(value, after[name], strict=True):
                assert torch.equal(one, other)
        else:
            assert value == after[name], name
