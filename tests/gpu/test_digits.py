"""Invariant: a real diffusers pipeline draws the same picture in every mode, on whatever device is under test."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from balanced_offload.offload import OffloadPolicy
from balanced_offload.offload.demo.pipeline import DEFAULTS, PROMPTS, load_pipeline

MODES = {
    "auto": {},
    "none": {},
    "balanced": {"high": "2MiB"},  # the denoiser is larger
    "model": {},
    "sequential": {},
}


def draw(call: Any, digit: int, steps: int = 3) -> torch.Tensor:
    settings = {**DEFAULTS, "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(digit)
    return call(PROMPTS[digit], generator=generator, output_type="pt", **settings).images.cpu()


def load(dtype: torch.dtype) -> Any:
    with torch.inference_mode(False):  # the fixture's mode is for calls
        return load_pipeline(dtype)


@pytest.mark.parametrize("mode", list(MODES))
def test_digits_equal_none(accelerator: Any, mode: str) -> None:
    adapter = importlib.import_module("balanced_offload.offload.adapters.diffusers")
    dtype = torch.float32 if accelerator.simulated else torch.float16
    plain = load(dtype).to(accelerator.device)
    expected = [draw(plain, digit) for digit in (7, 3)]
    del plain
    assert not torch.equal(*expected)
    with adapter.offload(load(dtype), OffloadPolicy(mode=mode, **MODES[mode]), device=accelerator.device) as offloaded:
        for digit, picture in zip((7, 3, 7), (*expected, expected[0]), strict=True):
            assert torch.equal(draw(offloaded, digit), picture)
        session = offloaded.session
        assert session.ledger.total_bytes_d2h == 0
        if mode == "balanced":
            assert session.components["unet"].plan.streams
