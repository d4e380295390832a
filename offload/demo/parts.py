"""Guards: the component set is SDXL's, class by class and in how the pieces join; only the sizes are small.

The UNet holds most of the weights (about 63 %), as in the real model, and its activations are small beside them, so
that a VRAM cap below the weights means something: 17.7 MiB of weights in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .pictures import SIZE
from .words import END, START, vocabulary

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 32
"""Longest prompt, tokens, start and end included."""
WIDTH = 96
"""Hidden size of either text encoder; the UNet attends to both, side by side (192)."""
LATENT = (4, SIZE // 4, SIZE // 4)
"""Latent of one picture: channels, height, width."""


def make_tokenizer() -> CLIPTokenizer:
    """The toy CLIP tokenizer; every digit word and numeral is one token, unknown words fall apart into bytes."""
    from transformers import CLIPTokenizer

    vocab, merges = vocabulary()
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two text encoders of 0.5 M parameters each, freshly initialised from torch's generator."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return CLIPTextModel(_text_config(tokenizer)), CLIPTextModelWithProjection(_text_config(tokenizer))


def make_vae() -> AutoencoderKL:
    """AutoencoderKL, 0.7 M parameters: RGB [N, 3, 64, 64] in -1..1 <-> latent [N, 4, 16, 16]."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT[0],
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def make_unet() -> UNet2DConditionModel:
    """UNet2DConditionModel with the text_time embedding, 2.9 M parameters in 186 leaves that hold weights."""
    from diffusers import UNet2DConditionModel

    time_channels = 8
    return UNet2DConditionModel(
        sample_size=LATENT[1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_channels,
        projection_class_embeddings_input_dim=6 * time_channels + WIDTH,
    )


def make_scheduler() -> DDIMScheduler:
    """Deterministic DDIM on v-prediction with zero terminal SNR: ten steps from pure noise suffice."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )


def assemble(
    tokenizer: CLIPTokenizer,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    """The whole pipeline in evaluation mode, without watermark and progress bar."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=encoders[0].eval(),
        text_encoder_2=encoders[1].eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def time_ids(count: int) -> torch.Tensor:
    """SDXL's size conditioning [count, 6] as the pipeline sends it for a full 64x64 picture: size, crop, target."""
    return torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32).repeat(count, 1)
