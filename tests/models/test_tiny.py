"""Invariant: the tiny twin is the real pipeline in everything but its widths, and draws the same picture twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from balanced_offload.offload.models import NAMES, build_pipeline, call_arguments, load_spec, tiny


def draw(pipe: object, name: str, prompt: str = "a photo of a cat") -> torch.Tensor:
    """One picture [1, 3, 64, 64], of a video the frames [5, 3, 64, 64], from noise of a fixed seed."""
    arguments = {**call_arguments(name, tiny_sizes=True), "prompt": prompt}
    drawn = pipe(**arguments, output_type="pt", generator=torch.Generator().manual_seed(7))
    return drawn.frames[0] if hasattr(drawn, "frames") else drawn.images


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_and_draws_the_same_again(name: str) -> None:
    picture = draw(tiny(name), name)
    frames = call_arguments(name, tiny_sizes=True).get("num_frames", 1)
    assert picture.shape == (frames, 3, 64, 64)
    assert torch.isfinite(picture).all()
    assert picture.std() > 0.01
    assert torch.equal(picture, draw(tiny(name), name))


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_and_the_seed_matter(name: str) -> None:
    pipe = tiny(name)
    picture = draw(pipe, name)
    assert not torch.equal(picture, draw(pipe, name, "seven dogs"))
    assert not torch.equal(picture, draw(tiny(name, seed=1), name))


@pytest.mark.parametrize("name", NAMES)
def test_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    tiny(name)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_dtype(name: str) -> None:
    modules = [part for part in tiny(name, torch.bfloat16).components.values() if isinstance(part, nn.Module)]
    assert len(modules) == len(load_spec(name)["components"])
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_twin_and_real_pipeline_have_the_same_parts(name: str) -> None:
    real, twin = build_pipeline(name), tiny(name)
    assert type(real) is type(twin)
    assert {key: type(part) for key, part in real.components.items()} == {
        key: type(part) for key, part in twin.components.items()
    }
    assert type(real).__name__ == load_spec(name)["pipeline"]
    assert type(real).model_cpu_offload_seq == type(twin).model_cpu_offload_seq


@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers_stay_within_the_vocabulary(name: str) -> None:
    pipe = build_pipeline(name)
    for part, longest in load_spec(name)["tokenizers"].items():
        tokenizer, config = getattr(pipe, part), getattr(pipe, part.replace("tokenizer", "text_encoder")).config
        config = getattr(config, "text_config", config)
        ids = tokenizer("A cat, é 🐈!", padding="max_length", truncation=True).input_ids
        assert len(ids) == longest
        assert max(ids) < config.vocab_size
        assert config.eos_token_id in ids


def test_any_text_can_be_a_prompt() -> None:
    pipe = tiny("sdxl")
    for prompt in ("", "\n", "é🐈", "x" * 1000):
        assert draw(pipe, "sdxl", prompt).shape == (1, 3, 64, 64)
