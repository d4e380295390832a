"""Invariant: under any policy, on either device, with or without LoRA, the host's models give the stock host's bits.

In this process, by the host's own sampler; the same through nodes and the API is in `test_prompts.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .inprocess import latent, load_clip, load_model, load_vae, sample, under, with_lora

MIB = 1 << 20
# Policies that lead to different placements of models of 5 to 8 MiB: all resident, half, one at a time, none.
POLICIES: dict[str, dict[str, Any]] = {
    "auto": {"mode": "auto"},
    "none": {"mode": "none"},
    "balanced": {"mode": "balanced", "high": "3MiB", "low": 0},
    "balanced_high": {"mode": "balanced", "high": "60%"},
    "model": {"mode": "model"},
    "sequential": {"mode": "sequential"},
}
KINDS = ("wan", "sd3")


class Bits:
    """What the stock host gives on the CPU, made once for each case."""

    def __init__(self, models: Path) -> None:
        self.models = models
        self.made: dict[str, torch.Tensor] = {}

    def get(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def of(self, kind: str, case: str) -> torch.Tensor:
        return self.get(f"{kind} {case}", lambda: run(load_model(self.models, kind), kind, case, self.models))


def run(model: Any, kind: str, case: str, models: Path) -> torch.Tensor:
    """One sampling of the case: `txt2img`, `img2img`, or either with a LoRA (`_a`, `_b`) -> latent."""
    if case.endswith(("_a", "_b")):
        model = with_lora(model, models, case[-1])
    if case.startswith("img2img"):
        return sample(model, kind, start=latent(kind, seed=77), denoise=0.6)
    return sample(model, kind)


@pytest.fixture(scope="session")
def bits(management: ModuleType, models: Path) -> Bits:
    found = Bits(models)
    for kind in KINDS:
        for case in ("txt2img", "img2img", *(("txt2img_a", "img2img_b", "txt2img_b") if kind == "sd3" else ())):
            found.of(kind, case)
    return found


CASES = [
    *((kind, case) for kind in KINDS for case in ("txt2img", "img2img")),
    *(("sd3", case) for case in ("txt2img_a", "img2img_b")),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_cpu_host_gives_stock_bits(policy: str, bits: Bits, in_process: ModuleType, models: Path) -> None:
    for kind, case in CASES:
        model = under(POLICIES[policy], load_model(models, kind))
        for _ in range(2):
            assert torch.equal(run(model, kind, case, models), bits.of(kind, case)), (kind, case)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("kind", "case"), CASES)
def test_the_simulated_device_gives_stock_bits(
    kind: str, case: str, policy: str, bits: Bits, sim_host: Any, models: Path
) -> None:
    """The first run learns sizes and times, later ones use them: the first, the second and the fourth count."""
    model = under(POLICIES[policy], load_model(models, kind))
    for turn in range(4):
        assert torch.equal(run(model, kind, case, models), bits.of(kind, case)), f"run {turn + 1}"


@pytest.mark.parametrize("policy", POLICIES)
def test_ours_and_stock_alternate_on_one_module(policy: str, bits: Bits, sim_host: Any, models: Path) -> None:
    stock = load_model(models, "sd3")
    ours = under(POLICIES[policy], stock)
    for case in ("txt2img", "txt2img_a", "txt2img_b"):
        for model in (ours, stock, ours, ours, stock):
            assert torch.equal(run(model, "sd3", case, models), bits.of("sd3", case)), case
    for case in ("txt2img", "txt2img_b", "txt2img_a", "txt2img"):
        for model in (stock, ours):
            assert torch.equal(run(model, "sd3", case, models), bits.of("sd3", case)), case


@pytest.mark.parametrize("first", POLICIES)
@pytest.mark.parametrize("second", POLICIES)
def test_a_policy_can_change_between_runs(first: str, second: str, bits: Bits, sim_host: Any, models: Path) -> None:
    stock = load_model(models, "wan")
    one = under(POLICIES[first], stock)
    assert torch.equal(sample(one, "wan"), bits.of("wan", "txt2img"))
    two = under(POLICIES[second], one)
    assert torch.equal(sample(two, "wan"), bits.of("wan", "txt2img"))
    assert torch.equal(sample(one, "wan"), bits.of("wan", "txt2img"))


@pytest.mark.parametrize("policy", POLICIES)
def test_masters_are_as_the_file_has_them(policy: str, sim_host: Any, models: Path) -> None:
    """After runs with and without LoRA and a full unload, the weights in RAM are bit for bit the loaded ones."""
    stock = load_model(models, "sd3")
    before = {name: value.clone() for name, value in stock.model.state_dict().items()}
    ours = under(POLICIES[policy], stock)
    for case in ("txt2img_a", "txt2img", "txt2img_b"):
        run(ours, "sd3", case, models)
    sim_host.management.unload_all_models()
    after = stock.model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].device.type == "cpu" and torch.equal(after[name], value), name
    gc.collect()
    sim_host.vram.synchronize()
    sim_host.vram.empty_cache()
    assert sim_host.vram.memory_allocated() == 0


@torch.inference_mode()
def encoded(clip: Any, text: str = "a cat") -> list[torch.Tensor]:
    condition, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return [condition.cpu().clone(), pooled.cpu().clone()]


@torch.inference_mode()
def decoded(vae: Any) -> list[torch.Tensor]:
    picture = vae.decode(latent("sd3"))
    return [picture.cpu().clone(), vae.encode(picture[:, :, :, :3]).cpu().clone()]


@pytest.fixture(scope="session")
def text_and_picture(management: ModuleType, models: Path) -> dict[str, list[torch.Tensor]]:
    return {"clip": encoded(load_clip(models)), "vae": decoded(load_vae(models))}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("part", ["clip", "vae"])
def test_text_encoder_and_vae_give_stock_bits(
    part: str, policy: str, text_and_picture: Any, sim_host: Any, models: Path
) -> None:
    stock = load_clip(models) if part == "clip" else load_vae(models)
    call = encoded if part == "clip" else decoded
    ours = under(POLICIES[policy], stock)
    assert type(ours) is type(stock)
    for obj in (ours, stock, ours):
        for got, want in zip(call(obj), text_and_picture[part], strict=True):
            assert torch.equal(got, want)
