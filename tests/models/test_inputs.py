"""Invariant: one forward gets what the pipeline gives it, and a resolution that cannot be drawn is refused in words."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from balanced_offload.offload.models import (
    NAMES,
    build_denoiser,
    call_arguments,
    denoiser_inputs,
    denoiser_name,
    parse_resolution,
    tiny,
)
from balanced_offload.offload.models.inputs import tokens


def flat(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested arguments, by its path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: tensor for key, inner in items for name, tensor in flat(inner, f"{path}.{key}").items()}


def seen_by_the_denoiser(name: str) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """The arguments of each call of the twin's denoiser in a run of its pipeline."""
    pipe, calls = tiny(name), []
    module = getattr(pipe, denoiser_name(name))
    signature = inspect.signature(type(module).forward)

    def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(list(signature.bind(module, *args, **kwargs).arguments.items())[1:]))

    module.register_forward_pre_hook(record, with_kwargs=True)
    arguments = {**call_arguments(name, tiny_sizes=True), "prompt": "a photo of a cat, " * 9}
    pipe(**arguments, output_type="latent")
    return module, calls


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tensors_as_the_pipelines(name: str) -> None:
    _, calls = seen_by_the_denoiser(name)
    given = flat({k: v for k, v in calls[0].items() if v is not None})
    made = flat(denoiser_inputs(name, dtype=torch.float32, device="cpu", tiny=True))
    assert {key: (t.shape, t.dtype) for key, t in made.items()} == {key: (t.shape, t.dtype) for key, t in given.items()}
    for key in made:
        if "ids" in key:
            assert torch.equal(made[key], given[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_they_run_and_are_the_same_again(name: str) -> None:
    module = build_denoiser(name, torch.float32, tiny=True)
    with torch.inference_mode():
        out = [
            module(**denoiser_inputs(name, dtype=torch.float32, device="cpu", tiny=True, seed=s))[0] for s in (0, 0, 1)
        ]
    assert torch.isfinite(out[0]).all()
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


def test_values_do_not_depend_on_the_device(sim: Any) -> None:
    here = flat(denoiser_inputs("sdxl", dtype=torch.float32, device="cpu", tiny=True))
    there = flat(denoiser_inputs("sdxl", dtype=torch.float32, device="vram", tiny=True))
    assert all(torch.equal(there[key].cpu(), here[key]) for key in here)


@pytest.mark.parametrize(
    ("name", "resolution", "expected"),
    [
        ("sdxl", None, 128 * 128),
        ("sd35-large", None, 4096),
        ("flux1-dev", None, 4096),
        ("flux1-dev", "512x512", 1024),
        ("qwen-image", "1024 x 768", 3072),
        ("wan21-14b", None, 32760),
        ("wan21-14b", "832X480x81", 32760),
        ("wan21-14b", "832x480", 32760),
        ("wan21-14b", "832x480x1", 1560),
    ],
)
def test_tokens(name: str, resolution: str | None, expected: int) -> None:
    assert tokens(name, resolution) == expected


def test_the_usual_resolution() -> None:
    assert str(parse_resolution("flux1-dev")) == "1024x1024"
    assert str(parse_resolution("wan21-14b")) == "832x480x81"
    assert str(parse_resolution("wan21-14b", "832x480")) == "832x480x81"
    assert str(parse_resolution("sdxl", tiny=True)) == "64x64"


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("sdxl", "big", ["'big'", "WIDTHxHEIGHT", '"1024x1024"']),
        ("sdxl", "1024", ["'1024'", "WIDTHxHEIGHT"]),
        ("sdxl", "1001x1024", ["'1001x1024'", "multiples of 8", "1000"]),
        ("flux1-dev", "1000x1000", ["multiples of 16", "1000 could be 992"]),
        ("flux1-dev", "0x1024", ["0 could be 16"]),
        ("flux1-dev", "99999x1024", ["8192"]),
        ("flux1-dev", "1024x1024x81", ["leave the frames out"]),
        ("sd35-large", "4096x4096", ["3072 pixels"]),
        ("wan21-14b", "832x480x80", ["4 k + 1", "80 frames could be 81"]),
        ("wan21-14b", "832x480x0", ["0 frames could be 1"]),
    ],
)
def test_a_resolution_that_cannot_be_drawn(name: str, written: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="resolution: got ") as refused:
        denoiser_inputs(name, written, dtype=torch.bfloat16, device="meta")
    for word in words:
        assert word in str(refused.value)
