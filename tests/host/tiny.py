"""Invariant: every file here is one that the host's own loaders accept, random but the same on every machine and host.

The networks are made with the host's classes, so that tensor names and shapes are its own; the sizes are as small as
what the host infers from a file allows. Needs the host importable (`inprocess.open_host`).

    file (below models/)                         network                        bytes
    diffusion_models/tiny_wan.safetensors        Wan 2.1 t2v, 4 blocks          3 MB, fp16
    diffusion_models/tiny_sd3.safetensors        SD3, 2 blocks of width 128     4 MB, fp16
    diffusion_models/tiny_sd15.safetensors       SD1.5 UNet                     176 MB, fp32, made on first use
    checkpoints/tiny_checkpoint.safetensors      SD3 of 4 blocks, CLIP, TAESD   28 MB, fp16
    text_encoders/tiny_clip.safetensors          CLIP-L of width 64, 3 layers   7 MB, fp16
    vae_approx/taesd{,3}_{en,de}coder            TAESD, 4 and 16 channels       2.5 MB each
    loras/tiny_sd3_{a,b}.safetensors             rank 4 on six layers
    diffusers/tiny_sdxl/                         a whole diffusers pipeline     18 MB, fp32
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

CLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,  # SD3 reads the layer before the last
}
"""What the host must be told beside the file: it takes every text encoder for one of the full size otherwise."""
POOLED = CLIP_CONFIG["hidden_size"] + 1280
TEXT_WIDTH = 4096
LORA_LAYERS = (
    *("joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.mlp.fc1", "joint_blocks.1.x_block.attn.qkv"),
    *("joint_blocks.1.x_block.mlp.fc2", "joint_blocks.0.context_block.attn.proj", "final_layer.linear"),
)
RANK = 4


def seeded(module: nn.Module, seed: int) -> nn.Module:
    """Weights drawn from `seed`: scaled by fan-in, norms 1, biases 0. No global generator is touched."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * (0.7 / max(1, fan_in) ** 0.5))
            elif name.endswith("weight") and ("norm" in name or "ln_" in name or parameter.dim() == 1):
                parameter.fill_(1.0)
            else:
                parameter.zero_()
        for buffer in module.buffers():  # the host leaves tables as memory came: not the same twice, and NaN at times
            if buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.02)
    return module


def tensors(module: nn.Module, dtype: torch.dtype, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: value.detach().to(dtype).contiguous() for name, value in module.state_dict().items()}


def _operations() -> Any:
    import comfy.ops

    return comfy.ops.disable_weight_init


def sd3(depth: int) -> nn.Module:
    """MMDiT; hidden width is 64 x depth."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    context = {"in_features": TEXT_WIDTH, "out_features": 64 * depth}
    return OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        depth=depth,
        adm_in_channels=POOLED,
        context_embedder_config={"target": "torch.nn.Linear", "params": context},
        num_patches=32 * 32,
        pos_embed_max_size=32,
        pos_embed_scaling_factor=None,
        device="cpu",
        dtype=torch.float32,
        operations=_operations(),
    )


def wan() -> nn.Module:
    from comfy.ldm.wan.model import WanModel

    sizes = {"in_dim": 16, "out_dim": 16, "dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 4}
    return WanModel(model_type="t2v", **sizes, device="cpu", dtype=torch.float32, operations=_operations())


def sd15() -> nn.Module:
    """44 M parameters: 168 MiB in fp32. Width 320 and context 768 are fixed for this kind."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1, 1],
        channel_mult=[1, 1],
        num_heads=8,
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        context_dim=768,
        legacy=False,
        device="cpu",
        dtype=torch.float32,
        operations=_operations(),
    )


def clip() -> nn.Module:
    import comfy.clip_model

    config = {
        **CLIP_CONFIG,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    }
    return comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", _operations())


def taesd(channels: int) -> nn.Module:
    from comfy.taesd.taesd import TAESD

    return seeded(TAESD(latent_channels=channels), 10 + channels)


def lora(seed: int) -> dict[str, torch.Tensor]:
    """Rank-4 changes of `LORA_LAYERS` of the two-block SD3, in the host's generic naming."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in sd3(2).state_dict().items()}
    found = {}
    for layer in LORA_LAYERS:
        rows, columns = shapes[f"{layer}.weight"]
        key = f"diffusion_model.{layer}"
        found[f"{key}.lora_up.weight"] = torch.randn(rows, RANK, generator=generator) * 0.3
        found[f"{key}.lora_down.weight"] = torch.randn(RANK, columns, generator=generator) * 0.3
        found[f"{key}.alpha"] = torch.tensor(float(RANK))
    return found


def checkpoint() -> dict[str, torch.Tensor]:
    """An SD3 checkpoint with text encoder and VAE inside."""
    vae = taesd(16)
    half = torch.float16
    return {
        **tensors(seeded(sd3(4), 5), half, "model.diffusion_model."),
        **tensors(seeded(clip(), 6), half, "text_encoders.clip_l.transformer."),
        **tensors(vae.taesd_encoder, half, "first_stage_model.taesd_encoder."),
        **tensors(vae.taesd_decoder, half, "first_stage_model.taesd_decoder."),
    }


def pipeline(folder: Path) -> None:
    """A tiny SDXL in diffusers' folder layout, 64 x 64 pixels; the demo's parts with seeded weights."""
    import importlib

    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    parts = importlib.import_module("balanced_offload.offload.demo.parts")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        tokenizer = parts.make_tokenizer()
        first, second = parts.make_text_encoders(tokenizer)
        pipe = StableDiffusionXLPipeline(
            vae=parts.make_vae(),
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tokenizer,
            tokenizer_2=parts.make_tokenizer(),
            unet=parts.make_unet(),
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
            add_watermarker=False,
        )
    pipe.save_pretrained(folder, safe_serialization=True)


def _files() -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    half, full = torch.float16, torch.float32
    files: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "diffusion_models/tiny_wan": lambda: tensors(seeded(wan(), 1), half),
        "diffusion_models/tiny_sd3": lambda: tensors(seeded(sd3(2), 2), half),
        "diffusion_models/tiny_sd15": lambda: tensors(seeded(sd15(), 3), full),
        "text_encoders/tiny_clip": lambda: tensors(seeded(clip(), 4), half),
        "checkpoints/tiny_checkpoint": checkpoint,
        "loras/tiny_sd3_a": lambda: lora(21),
        "loras/tiny_sd3_b": lambda: lora(22),
    }
    for name, channels in (("taesd", 4), ("taesd3", 16)):
        for half_of in ("encoder", "decoder"):
            files[f"vae_approx/{name}_{half_of}"] = lambda c=channels, h=half_of: tensors(  # type: ignore[misc]
                getattr(taesd(c), f"taesd_{h}"), torch.float16
            )
    return files


FOLDERS = ("checkpoints", "diffusers", "diffusion_models", "loras", "text_encoders", "vae", "vae_approx")
LARGE = ("diffusion_models/tiny_sd15",)
"""Not made by `make_all`: only the tests of a memory cap need it."""


def make(models: Path, name: str) -> Path:
    """The file `name` (without its ending) below `models`, made if it is not there."""
    path = models / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(_files()[name](), partial)
        partial.rename(path)
    return path


def make_all(models: Path) -> None:
    """Every small model, in the host's folder layout; some 4 seconds."""
    for folder in FOLDERS:
        (models / folder).mkdir(parents=True, exist_ok=True)
    for name in _files():
        if name not in LARGE:
            make(models, name)
    folder = models / "diffusers" / "tiny_sdxl"
    if not (folder / "model_index.json").exists():
        pipeline(folder)
