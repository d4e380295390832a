"""Guards: what ships can be made again: one command, one seed, one thread of one CPU gives the files in `digits/`.

    python -m balanced_offload.offload.demo.train --out DIR [--steps N] [--seed 0]

Four stages: the text encoders learn which digit a prompt names (text alone, then frozen), the VAE learns the pictures,
the UNet learns to draw latents under guidance, the classifier learns to read. Each stage rounds its weights to the
fp16 that is stored, so the next stage trains against what ships. Needs scikit-learn for the digits; runs on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import parts, pictures, words
from .classifier import DigitReader, read_digits, view_of
from .pipeline import DEFAULTS, PROMPTS, load_pipeline, quiet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HELD_OUT = 297
"""Pictures that no stage trains on; the classifier is tested on them."""
PROMPT_DROP = 0.1
"""Share of pictures that the UNet sees without a prompt, for classifier-free guidance."""


@dataclass(frozen=True)
class Steps:
    """Optimiser steps of each stage."""

    text: int = 220
    vae: int = 450
    unet: int = 2400
    classifier: int = 900

    @classmethod
    def scaled(cls, unet: int) -> Steps:
        """The other stages shortened in proportion where the UNet gets fewer steps than by default."""
        share = min(1.0, unet / cls.unet)
        text, vae, reader = (max(2, round(share * full)) for full in (cls.text, cls.vae, cls.classifier))
        return cls(text=text, vae=vae, unet=unet, classifier=reader)


def _optimise(
    name: str,
    model: Sequence[nn.Module],
    steps: int,
    rate: float,
    loss_of: Callable[[], Tensor],
    after: Callable[[int], None],
) -> None:
    """AdamW with a short warm-up and a cosine down to a hundredth; prints progress about ten times."""
    parameters = [p for module in model for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    warm = max(1, min(50, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * i / steps)))
    )
    every, mean, start = max(1, steps // 10), 0.0, time.perf_counter()
    for module in model:
        module.train()
    for step in range(steps):
        loss = loss_of()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        after(step)
        mean += (loss.item() - mean) / (step % every + 1)
        if (step + 1) % every == 0:
            print(f"{name:10s} {step + 1:5d}/{steps} loss {mean:.4f} {time.perf_counter() - start:6.0f} s", flush=True)
            mean = 0.0
    for module in model:
        module.eval().requires_grad_(False)


def _round_to_stored(module: nn.Module) -> None:
    """Weights to the nearest fp16 value, kept as fp32: what a later load will give."""
    for parameter in module.parameters():
        parameter.data.copy_(parameter.data.half().float())


def train_text(steps: int, seed: int) -> tuple[CLIPTokenizer, tuple[CLIPTextModel, CLIPTextModelWithProjection]]:
    """Text encoders whose outputs, at the places where the UNet takes them, say which digit the prompt names."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = parts.make_tokenizer()
    encoders = parts.make_text_encoders(tokenizer)
    answers = words.NO_DIGIT + 1
    heads = nn.ModuleList(nn.Linear(parts.WIDTH, answers) for _ in range(3))

    def loss_of() -> Tensor:
        prompts, labels = words.random_prompts(96, generator)
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        rows = torch.arange(len(prompts))
        one = encoders[0](ids, output_hidden_states=True)
        two = encoders[1](ids, output_hidden_states=True)
        # Where SDXL taps them: the last but one layer of both, and the second's projection.
        taps = (one.hidden_states[-2][rows, end], two.hidden_states[-2][rows, end], two.text_embeds)
        losses = [F.cross_entropy(head(tap), labels) for head, tap in zip(heads, taps, strict=True)]
        return torch.stack(losses).mean()

    _optimise("text", [*encoders, heads], steps, 1e-3, loss_of, lambda step: None)
    for encoder in encoders:
        _round_to_stored(encoder)
    return tokenizer, encoders


def train_vae(images: Tensor, steps: int, seed: int) -> AutoencoderKL:
    """The autoencoder of `images` [N, 3, 64, 64] in -1..1, with the latents' mean and spread in its configuration."""
    torch.manual_seed(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    vae = parts.make_vae()

    def loss_of() -> Tensor:
        batch = images[torch.randint(len(images), (16,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / math.prod(parts.LATENT)
        loss: Tensor = F.mse_loss(rebuilt, batch) + 0.1 * F.l1_loss(rebuilt, batch) + 3e-4 * kl
        return loss

    _optimise("vae", [vae], steps, 2e-3, loss_of, lambda step: None)
    _round_to_stored(vae)
    latents = encode(vae, images)
    vae.register_to_config(
        latents_mean=[round(float(x), 4) for x in latents.mean(dim=(0, 2, 3))],
        latents_std=[round(float(x), 4) for x in latents.std(dim=(0, 2, 3))],
    )
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean latents [N, 4, 16, 16] of pictures [N, 3, 64, 64] in -1..1, as the VAE gives them (not normalised)."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in torch.split(images, 64)]).clone()


def normalised(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents as the UNet sees them: mean 0 and spread 1 per channel."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    result: Tensor = (latents - mean) / std
    return result


def train_unet(pipe: StableDiffusionXLPipeline, latents: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """`pipe.unet` learns v-prediction on normalised latents [N, 4, 16, 16]; it ends with averaged weights (EMA)."""
    torch.manual_seed(seed + 2)
    generator = torch.Generator().manual_seed(seed + 2)
    prompts, names = words.every_prompt()
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    choices = [torch.nonzero(names == digit).flatten() for digit in range(len(words.DIGITS))]
    schedule = parts.make_scheduler()
    unet: UNet2DConditionModel = pipe.unet
    average = copy.deepcopy(unet).requires_grad_(False)
    size = 32

    def loss_of() -> Tensor:
        pick = torch.randint(len(latents), (size,), generator=generator)
        clean = latents[pick]
        noise = torch.randn(clean.shape, generator=generator)
        when = torch.randint(schedule.config.num_train_timesteps, (size,), generator=generator)
        which = torch.stack(
            [
                options[torch.randint(len(options), (), generator=generator)]
                for options in (choices[int(x)] for x in labels[pick])
            ]
        )
        # Dropped prompts become zeros, as the pipeline's empty negative prompt does (force_zeros_for_empty_prompt).
        kept = (torch.rand(size, generator=generator) >= PROMPT_DROP).float()
        predicted = unet(
            schedule.add_noise(clean, noise, when),
            when,
            encoder_hidden_states=embeds[which] * kept.view(-1, 1, 1),
            added_cond_kwargs={"text_embeds": pooled[which] * kept.view(-1, 1), "time_ids": parts.time_ids(size)},
        ).sample
        return F.mse_loss(predicted, schedule.get_velocity(clean, noise, when))

    def after(step: int) -> None:
        decay = min(0.997, (step + 1) / (step + 10))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), unet.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - decay)

    _optimise("unet", [unet], steps, 2e-3, loss_of, after)
    unet.load_state_dict(average.state_dict())
    _round_to_stored(unet)


def train_classifier(ink: Tensor, labels: Tensor, steps: int, seed: int) -> DigitReader:
    """The reader, trained on real digits [N, 1, 64, 64]: jittered, faded and with noise, never on drawn ones."""
    torch.manual_seed(seed + 3)
    generator = torch.Generator().manual_seed(seed + 3)
    reader = DigitReader()

    def loss_of() -> Tensor:
        pick = torch.randint(len(ink), (64,), generator=generator)
        view = view_of(pictures.colour(pictures.jitter(ink[pick], generator)))
        fade = 0.7 + 0.3 * torch.rand(64, 1, 1, 1, generator=generator)
        view = view * fade + 0.05 * torch.randn(view.shape, generator=generator)
        return F.cross_entropy(reader(view.clamp(0.0, 1.0)), labels[pick])

    _optimise("classifier", [reader], steps, 2e-3, loss_of, lambda step: None)
    _round_to_stored(reader)
    return reader


def accuracy_of_reader(reader: DigitReader, ink: Tensor, labels: Tensor) -> float:
    """Share of real pictures [N, 1, 64, 64] that the reader gets right."""
    with torch.inference_mode():
        return float((reader(view_of(pictures.colour(ink))).argmax(dim=1) == labels).float().mean())


def accuracy_of_pipeline(pipe: StableDiffusionXLPipeline, weights: Path, seeds: Sequence[int]) -> float:
    """Share of pictures, ten prompts by the given seeds, in which the reader finds the digit that was asked for."""
    right = 0
    for seed in seeds:
        generators = [torch.Generator().manual_seed(1000 * seed + digit) for digit in range(len(PROMPTS))]
        drawn = pipe(PROMPTS, generator=generators, output_type="pt", **DEFAULTS).images
        right += sum(read == asked for asked, read in enumerate(read_digits(list(drawn), weights)))
    return right / (len(seeds) * len(PROMPTS))


def save(pipe: StableDiffusionXLPipeline, reader: DigitReader, out: Path) -> None:
    """Everything in fp16 under `out`: the pipeline's folders and classifier.safetensors."""
    from safetensors.torch import save_file

    stored = copy.deepcopy(pipe)
    for component in stored.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, torch.float16)
    with quiet():
        stored.save_pretrained(str(out), safe_serialization=True)
    save_file(
        {name: value.half().contiguous() for name, value in reader.state_dict().items()}, out / "classifier.safetensors"
    )
    vocab, merges = words.vocabulary()
    for folder in ("tokenizer", "tokenizer_2"):
        _write_slow_vocabulary(out / folder, vocab, merges)


def _write_slow_vocabulary(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """vocab.json and merges.txt beside tokenizer.json: transformers 4 wants the former, 5 the latter."""
    import json

    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(out: Path, steps: Steps, seed: int) -> tuple[float, float]:
    """All stages, written to `out`; returns the classifier's accuracy on held-out digits and the pipeline's on 50."""
    grey, labels = pictures.load_digits()
    ink = pictures.enlarge(grey)
    learn, test = pictures.split(len(ink), HELD_OUT, seed)
    images = pictures.colour(ink[learn]) * 2.0 - 1.0

    reader = train_classifier(ink[learn], labels[learn], steps.classifier, seed)
    reading = accuracy_of_reader(reader, ink[test], labels[test])
    print(f"classifier reads {reading:.1%} of {len(test)} held-out digits", flush=True)

    tokenizer, encoders = train_text(steps.text, seed)
    vae = train_vae(images, steps.vae, seed)
    torch.manual_seed(seed)
    with quiet():
        pipe = parts.assemble(tokenizer, encoders, vae, parts.make_unet())
    train_unet(pipe, normalised(vae, encode(vae, images)), labels[learn], steps.unet, seed)

    out.mkdir(parents=True, exist_ok=True)
    save(pipe, reader, out)
    drawing = accuracy_of_pipeline(load_pipeline(folder=out), out / "classifier.safetensors", range(5))
    print(f"pipeline draws the right digit in {drawing:.1%} of 50 pictures", flush=True)
    return reading, drawing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 0 when the files were written, whatever the accuracy."""
    parser = argparse.ArgumentParser(
        description="Train the digits pipeline of the demo (about 20 minutes on one CPU core)."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; one that holds a pipeline is replaced"
    )
    parser.add_argument("--steps", type=int, default=Steps.unet, help="UNet steps; fewer shortens every stage")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    # One thread: the sum order of a reduction, and with it the result, depends on the number of threads.
    torch.set_num_threads(1)
    train(options.out, Steps.scaled(options.steps), options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
