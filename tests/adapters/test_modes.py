"""Invariant: every pipeline draws the same bits in every mode, first run and third, and leaves the device as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload import OffloadPolicy
from balanced_offload.offload.adapters.diffusers import offload
from balanced_offload.offload.models import call_arguments, tiny

from .conftest import EXAMPLES, MODES, Example, device_bytes, policy_fields, same_state, state_of, warm


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "sd"])  # that one is in most other tests
def test_bit_equal_to_a_plain_run(sim: ModuleType, example: Callable[[str], Example], name: str, mode: str) -> None:
    case = example(name)
    pipe = warm(case)
    before, bytes_before = state_of(pipe), device_bytes(sim)
    handle = offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram")
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    for run in range(3):
        drawn = case.draw(pipe if run == 1 else handle)
        assert torch.equal(drawn, case.expected), f"run {run}"
        if mode in ("balanced", "sequential"):
            assert handle.session.device_bytes[denoiser] < handle.session.components[denoiser].component.device_bytes
        assert handle.report()["totals"]["bytes_d2h"] == 0
    handle.detach()
    assert device_bytes(sim) == bytes_before
    after = state_of(pipe)
    same_state(before, after)
    assert torch.equal(case.draw(pipe), case.expected)


@pytest.mark.parametrize("start", MODES)
def test_switching_modes_needs_no_reload(sim: ModuleType, example: Callable[[str], Example], start: str) -> None:
    case = example("sd")
    pipe = case.build()
    parameters = [id(p) for part in pipe.components.values() if isinstance(part, nn.Module) for p in part.parameters()]
    with offload(pipe, OffloadPolicy(**policy_fields(start)), device="vram") as handle:
        for mode in MODES:
            for there in (mode, start):
                handle.policy = OffloadPolicy(**policy_fields(there))
                assert handle.policy is handle.session.policy
                assert torch.equal(case.draw(handle), case.expected), f"{start} to {there}"
        now = [id(p) for part in pipe.components.values() if isinstance(part, nn.Module) for p in part.parameters()]
        assert now == parameters
    assert device_bytes(sim) == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_pipeline_says_where_it_runs(sim: ModuleType, example: Callable[[str], Example], mode: str) -> None:
    pipe = example("sd").build()
    with offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram") as handle:
        assert pipe._execution_device == torch.device("vram", 0)
        for other in MODES:
            handle.policy = OffloadPolicy(**policy_fields(other))
            assert pipe._execution_device == torch.device("vram", 0)
            hooked = [n for n, part in pipe.components.items() if hasattr(part, "_hf_hook")]
            assert bool(hooked) == (other != "none")
    assert pipe._execution_device == torch.device("cpu")
    assert not any(hasattr(part, "_hf_hook") for part in pipe.components.values())


def test_mode_none_leaves_no_hook_on_any_module(sim: ModuleType, example: Callable[[str], Example]) -> None:
    pipe = example("sd").build()
    plain = [
        (path, sorted(child.__dict__), len(child._forward_hooks), len(child._forward_pre_hooks))
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for path, child in part.named_modules()
    ]
    with offload(pipe, OffloadPolicy(mode="none"), device="vram"):
        attached = [
            (path, sorted(child.__dict__), len(child._forward_hooks), len(child._forward_pre_hooks))
            for part in pipe.components.values()
            if isinstance(part, nn.Module)
            for path, child in part.named_modules()
        ]
    assert attached == plain


@pytest.mark.parametrize(
    ("mode", "runs"),
    [*((mode, "handle, pipe, handle") for mode in MODES), ("none", "pipe, handle, pipe")],
)
def test_an_sdxl_vae_is_upcast_and_cast_back(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str, runs: str
) -> None:
    def build() -> Any:
        pipe = tiny("sdxl", torch.float16)
        pipe.vae.register_to_config(force_upcast=True)
        return pipe

    case = Example(build, **call_arguments("sdxl", tiny_sizes=True))
    pipe = warm(case)
    before = state_of(pipe)
    seen: list[torch.dtype] = []
    decode = type(pipe.vae).decode

    def spy(self: Any, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(z.dtype)
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(type(pipe.vae), "decode", spy)
    with offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram") as handle:
        for run in runs.split(", "):
            drawn = case.draw(handle if run == "handle" else pipe)
            assert torch.equal(drawn, case.expected), run
            assert pipe.vae.dtype is torch.float16
            if mode == "none":
                assert not [m for m in pipe.vae.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert set(seen) == {torch.float32}
    assert device_bytes(sim) == 0
    same_state(before, state_of(pipe))


@pytest.mark.parametrize("directly", [False, True], ids=["handle", "pipe"])
@pytest.mark.parametrize("mode", MODES)
def test_a_vae_that_fails_while_it_is_upcast_is_cast_back(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str, directly: bool
) -> None:
    """diffusers casts the VAE back after decoding only; after an error the next run would meet another dtype."""

    def build() -> Any:
        pipe = tiny("sdxl", torch.float16)
        pipe.vae.register_to_config(force_upcast=True)
        return pipe

    case = Example(build, **call_arguments("sdxl", tiny_sizes=True))
    pipe = warm(case)
    decode = type(pipe.vae).decode
    fail = [True]

    def interrupted(self: Any, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if fail:
            fail.clear()
            raise KeyboardInterrupt
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(type(pipe.vae), "decode", interrupted)
    with offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram") as handle:
        with pytest.raises(KeyboardInterrupt):
            case.draw(pipe if directly else handle)
        for _ in range(2):
            assert torch.equal(case.draw(pipe if directly else handle), case.expected)
        assert pipe.vae.dtype is torch.float16
    assert device_bytes(sim) == 0


@pytest.mark.parametrize("mode", MODES)
def test_models_that_are_on_the_device_already_go_back_there(
    sim: ModuleType, example: Callable[[str], Example], mode: str
) -> None:
    case = example("sd")
    pipe = warm(case)
    pipe.unet.to("vram")
    pipe.vae.to("vram")
    before = state_of(pipe)
    bytes_before = device_bytes(sim)
    with offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram") as handle:
        assert torch.equal(case.draw(handle), case.expected)
    same_state(before, state_of(pipe))
    assert {p.device.type for p in pipe.unet.parameters()} == {"vram"}
    assert device_bytes(sim) == bytes_before


def test_the_cpu_runs_everything_from_system_memory(example: Callable[[str], Example]) -> None:
    case = example("sd")
    pipe = warm(case)
    before = state_of(pipe)
    with offload(pipe, OffloadPolicy(mode="balanced"), device="cpu") as handle:
        assert torch.equal(case.draw(handle), case.expected)
        report = handle.report()
        assert report["resolved"]["mode"] == "none" and report["resolved"]["sources"]["mode"] == "device"
        assert report["totals"]["bytes_h2d"] == 0
        assert not hasattr(pipe.unet, "_hf_hook")
    same_state(before, state_of(pipe))
