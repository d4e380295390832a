"""Invariant: tiles are used when the policy or a lack of memory asks for them, are told, and are taken back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from balanced_offload.offload import OffloadPolicy
from balanced_offload.offload.adapters.diffusers import offload

from .conftest import EXAMPLES, device_bytes

CASE = EXAMPLES["sd"]


def tiled(pipe: Any) -> Any:
    """Tiles small enough to show: 16 pixels of the 32."""
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    return pipe


def expected() -> torch.Tensor:
    """What the plain pipeline draws in tiles."""
    pipe = tiled(CASE.build())
    pipe.vae.enable_tiling()
    drawn = CASE.draw(pipe)
    assert not torch.equal(drawn, CASE.expected)
    return drawn


@pytest.mark.parametrize("mode", ["none", "sequential"])
def test_on(sim: ModuleType, mode: str) -> None:
    pipe = tiled(CASE.build())
    with offload(pipe, OffloadPolicy(mode=mode, vae_tiling="on"), device="vram") as handle:
        assert pipe.vae.use_tiling
        assert torch.equal(CASE.draw(handle), expected())
        assert handle.report()["output_neutral"] is False
        handle.policy = OffloadPolicy(mode=mode)
        assert not pipe.vae.use_tiling
        assert torch.equal(CASE.draw(handle), CASE.expected)
        assert handle.report()["output_neutral"] is True
        handle.policy = OffloadPolicy(mode=mode, vae_tiling="on")
        assert pipe.vae.use_tiling
    assert not pipe.vae.use_tiling


def test_a_vae_that_the_user_tiled_stays_so(sim: ModuleType) -> None:
    pipe = tiled(CASE.build())
    pipe.vae.enable_tiling()
    with offload(pipe, OffloadPolicy(mode="sequential", vae_tiling="on"), device="vram") as handle:
        assert torch.equal(CASE.draw(handle), expected())
        assert handle.report()["output_neutral"] is True, "mode none would be tiled likewise"
        handle.policy = OffloadPolicy(mode="sequential", vae_tiling="off")
        assert pipe.vae.use_tiling
    assert pipe.vae.use_tiling


@pytest.mark.parametrize("tiling", ["auto", "off"])
def test_a_decode_that_runs_out_of_memory(sim: ModuleType, monkeypatch: pytest.MonkeyPatch, tiling: str) -> None:
    pipe = tiled(CASE.build())
    decoder = type(pipe.vae.decoder)
    forward = decoder.forward

    def greedy(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[-1] > 8:  # whole, not a tile
            raise torch.OutOfMemoryError("no room for the whole picture")
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(decoder, "forward", greedy)
    policy = OffloadPolicy(mode="balanced", high="100KiB", vae_tiling=tiling)
    with offload(pipe, policy, device="vram") as handle:
        if tiling == "off":
            with pytest.raises(torch.OutOfMemoryError, match="ran out of memory"):
                CASE.draw(handle)
            assert handle.report()["verdict"] == "oom" and not pipe.vae.use_tiling
        else:
            assert torch.equal(CASE.draw(handle), expected())
            report = handle.report()
            assert report["verdict"] == "oom_recovered" and report["output_neutral"] is False
            assert "tile" in [event["data"].get("step") for event in report["events"]]
            assert torch.equal(CASE.draw(handle), expected())
            assert handle.report()["verdict"] == "partial"
    assert not pipe.vae.use_tiling
    assert device_bytes(sim) == 0


def test_a_vae_that_cannot_tile(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = CASE.build()

    def refuse(self: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(pipe.vae), "enable_tiling", refuse)
    with offload(pipe, OffloadPolicy(mode="none", vae_tiling="on"), device="vram") as handle:
        assert torch.equal(CASE.draw(handle), CASE.expected)
        assert handle.report()["output_neutral"] is True
