"""Invariant: one offloader per pipeline, in both directions, and whatever goes wrong on the way in leaves no trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload import OffloadPolicy, Session
from balanced_offload.offload.adapters.diffusers import offload
from balanced_offload.offload.backend import NoAcceleratorError
from balanced_offload.offload.units import ComponentError

from .conftest import EXAMPLES, MODES, Example, device_bytes, policy_fields, same_state, state_of, warm
from .toy import build_toy

TOY = Example(build_toy)


# ---------------------------------------------------------------------- we refuse
def test_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = warm(TOY)
    before = state_of(pipe)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(NoAcceleratorError, match=r"requires an accelerator.*device='cpu'") as caught:
        offload(pipe)
    assert isinstance(caught.value, RuntimeError)
    same_state(before, state_of(pipe))


def test_something_that_is_no_pipeline(sim: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"pipe: got Linear, .*Session\.add"):
        offload(nn.Linear(2, 2), device="vram")


def test_a_device_mapped_pipeline(sim: ModuleType) -> None:
    pipe = warm(TOY)
    pipe.hf_device_map = {"transformer": 0, "text_encoder": "cpu"}
    before = state_of(pipe)
    with pytest.raises(ValueError, match=r"reset_device_map\(\)"):
        offload(pipe, device="vram")
    same_state(before, state_of(pipe))
    pipe.reset_device_map()
    with offload(pipe, device="vram") as handle:
        assert torch.equal(TOY.draw(handle), TOY.expected)


@pytest.mark.parametrize("switch", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_a_pipeline_that_accelerate_offloads(sim: ModuleType, switch: str) -> None:
    case = EXAMPLES["sd"]
    pipe = case.build()
    getattr(pipe, switch)(device="vram")
    before = state_of_hooks(pipe)
    with pytest.raises(ValueError, match=r"offloaded by accelerate already.*remove_all_hooks\(\)"):
        offload(pipe, device="vram")
    assert state_of_hooks(pipe) == before
    pipe.remove_all_hooks()
    with offload(pipe, OffloadPolicy(mode="sequential"), device="vram") as handle:
        assert torch.equal(case.draw(handle), case.expected)


def state_of_hooks(pipe: Any) -> list[Any]:
    """Accelerate's hooks by module, and what is on the pipeline."""
    modules = [m for part in pipe.components.values() if isinstance(part, nn.Module) for m in part.modules()]
    return [[(id(m), id(m.__dict__.get("_hf_hook")), sorted(m.__dict__)) for m in modules], sorted(pipe.__dict__)]


def test_a_pipeline_with_group_offloading(sim: ModuleType) -> None:
    pipe = EXAMPLES["sd"].build()
    pipe.unet.enable_group_offload(torch.device("vram"), offload_type="leaf_level")
    with pytest.raises(ValueError, match=r"'unet' has group offloading on.*without enable_group_offload\(\)"):
        offload(pipe, device="vram")
    assert "_balanced_offload" not in pipe.__dict__


def test_a_model_with_layerwise_casting(sim: ModuleType) -> None:
    pipe = EXAMPLES["sd"].build()
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ComponentError, match=r"'unet' has layerwise casting on.*enable_layerwise_casting"):
        offload(pipe, device="vram")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: setattr(m, "is_loaded_in_8bit", True), r"'transformer_2' is quantized by bitsandbytes"),
        (lambda m: setattr(m, "is_loaded_in_4bit", True), r"'transformer_2' is quantized by bitsandbytes"),
        (lambda m: m.last.to("meta"), r"'transformer_2': 'last\.weight' is on the meta device"),
        (
            lambda m: m.register_buffer("odd", torch.ones(3, 3).to_sparse()),
            r"'transformer_2': 'odd' is a Tensor \(torch.sparse_coo\)",
        ),
    ],
    ids=["8bit", "4bit", "meta", "sparse"],
)
def test_weights_that_cannot_be_placed(sim: ModuleType, spoil: Callable[[nn.Module], Any], match: str) -> None:
    pipe = build_toy()
    spoil(pipe.transformer_2)
    hooks = state_of_hooks(pipe)
    with pytest.raises(ComponentError, match=match):
        offload(pipe, OffloadPolicy(mode="sequential"), device="vram")
    assert state_of_hooks(pipe) == hooks
    assert sim.copy_totals()["h2d"] == 0 and device_bytes(sim) == 0


def test_a_second_time(sim: ModuleType) -> None:
    pipe = build_toy()
    with offload(pipe, device="vram") as handle:
        with pytest.raises(RuntimeError, match=r"offloaded already.*detach\(\)"):
            offload(pipe, device="vram")
        assert torch.equal(TOY.draw(handle), TOY.expected)
    with offload(pipe, device="vram") as handle:
        assert torch.equal(TOY.draw(handle), TOY.expected)


def test_another_device_than_the_sessions(sim: ModuleType) -> None:
    session = Session(device="vram")
    with pytest.raises(ValueError, match="device: got cpu, allowed is the session's vram:0"):
        offload(build_toy(), session=session, device="cpu")
    with offload(build_toy(), session=session, device="vram:0"):
        assert set(session.components) == {"text_encoder", "transformer", "transformer_2"}


# ---------------------------------------------------------------------- nothing half attached
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_error_while_attaching_puts_everything_back(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str, at: int
) -> None:
    pipe = warm(TOY)
    before = state_of(pipe)
    add, calls = Session.add, []

    def failing(self: Session, name: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return add(self, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "add", failing)
        with pytest.raises(KeyboardInterrupt):
            offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram")
    assert len(calls) == at
    assert device_bytes(sim) == 0
    same_state(before, state_of(pipe))
    with offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram") as handle:
        assert torch.equal(TOY.draw(handle), TOY.expected)


def test_mode_none_that_does_not_fit_puts_everything_back(sim: ModuleType) -> None:
    case = EXAMPLES["sd"]
    pipe = warm(case)
    before = state_of(pipe)
    sim.set_memory_cap(600 << 10)
    with pytest.raises(torch.OutOfMemoryError, match="Mode none keeps everything resident"):
        offload(pipe, OffloadPolicy(mode="none"), device="vram")
    assert device_bytes(sim) == 0
    same_state(before, state_of(pipe))
    sim.set_memory_cap(8 << 30)
    assert torch.equal(case.draw(pipe), case.expected)


def test_a_pipeline_that_fails_to_join_leaves_the_session_as_it_was(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = build_toy(), build_toy()
    policy = OffloadPolicy(mode="sequential")
    with offload(one, policy, device="vram") as handle:
        before, session = state_of(two), handle.session
        monkeypatch.setattr(type(two), "maybe_free_model_hooks", property(lambda self: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            offload(two, OffloadPolicy(mode="none"), session=session)
        monkeypatch.undo()
        same_state(before, state_of(two))
        assert session.policy is policy and session.auto_runs
        assert set(session.components) == {"text_encoder", "transformer", "transformer_2"}
        assert torch.equal(TOY.draw(handle), TOY.expected)


def test_a_policy_that_does_not_fit_is_set_back(sim: ModuleType) -> None:
    case = EXAMPLES["sd"]
    sim.set_memory_cap(2 << 20)
    policy = OffloadPolicy(mode="sequential")
    with offload(case.build(), policy, device="vram") as handle:
        sim.set_memory_cap(max(600 << 10, sim.memory_reserved()))
        with pytest.raises(torch.OutOfMemoryError):
            handle.policy = OffloadPolicy(mode="none")
        assert handle.policy is policy
        assert handle.pipe._execution_device.type == "vram"
        sim.set_memory_cap(8 << 30)
        assert torch.equal(case.draw(handle), case.expected)


# ---------------------------------------------------------------------- the others are refused
@pytest.mark.parametrize("mode", ["none", "balanced"])
def test_other_offloaders_and_moves_are_refused_while_attached(sim: ModuleType, mode: str) -> None:
    case = EXAMPLES["sd"]
    pipe = case.build()
    with offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram") as handle:
        for call in (
            lambda: pipe.enable_model_cpu_offload(),
            lambda: pipe.enable_sequential_cpu_offload(device="vram"),
            lambda: pipe.enable_group_offload(torch.device("vram")),
            lambda: pipe.to("vram"),
            lambda: pipe.to(device="cpu"),
            lambda: pipe.to("cpu", torch.float32),
            lambda: pipe.to(torch.device("vram")),
        ):
            with pytest.raises(RuntimeError, match=r"detach\(\)"):
                call()
        assert torch.equal(case.draw(handle), case.expected)
    pipe.to("vram")
    assert pipe.unet.device.type == "vram"
    pipe.to("cpu")
    pipe.enable_model_cpu_offload(device="vram")
    pipe.remove_all_hooks()


@pytest.mark.parametrize("mode", MODES)
def test_a_conversion_goes_through(sim: ModuleType, mode: str) -> None:
    pipe = EXAMPLES["sd"].build()
    expected = EXAMPLES["sd"].draw(EXAMPLES["sd"].build().to(torch.bfloat16)).float()
    with offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram") as handle:
        EXAMPLES["sd"].draw(handle)
        assert pipe.to(torch.bfloat16) is pipe
        assert pipe.unet.dtype is torch.bfloat16
        for _ in range(2):
            assert torch.equal(EXAMPLES["sd"].draw(handle).float(), expected)
    assert pipe.unet.dtype is torch.bfloat16
    assert {p.device.type for p in pipe.unet.parameters()} == {"cpu"}
    assert device_bytes(sim) == 0
    assert torch.equal(EXAMPLES["sd"].draw(pipe).float(), expected)


def test_our_hook_is_not_mistaken_for_another_offloader(sim: ModuleType) -> None:
    from diffusers.loaders.lora_base import _func_optionally_disable_offloading

    case = EXAMPLES["sd"]
    pipe = case.build()
    with offload(pipe, OffloadPolicy(**policy_fields("balanced")), device="vram") as handle:
        hook = pipe.unet._hf_hook
        assert type(hook).__mro__ == (type(hook), object)
        assert not hasattr(hook, "hooks") and not hasattr(hook, "pre_forward")
        assert hook.execution_device == torch.device("vram", 0)
        assert inspect.signature(hook.detach_hook).parameters.keys() == {"module"}
        assert _func_optionally_disable_offloading(pipe) == (False, False, False)
        assert not pipe._maybe_raise_error_if_group_offload_active()
        assert not pipe._is_pipeline_device_mapped()
        assert not hasattr(pipe, "_offload_gpu_id")
        assert not getattr(pipe, "_all_hooks", None)
        pipe.to(torch.float32)  # diffusers looks for its own offloaders here
        assert pipe.unet._hf_hook is hook
        pipe.maybe_free_model_hooks()
        assert pipe.unet._hf_hook is hook
        pipe.remove_all_hooks()
        assert pipe._execution_device.type == "vram"
        assert torch.equal(case.draw(handle), case.expected)


def test_a_new_pipeline_around_the_same_models_that_takes_hooks_off(sim: ModuleType) -> None:
    from diffusers import AutoPipelineForImage2Image

    case = EXAMPLES["sd"]
    pipe = case.build()
    with offload(pipe, OffloadPolicy(**policy_fields("balanced")), device="vram"):
        AutoPipelineForImage2Image.from_pipe(pipe).remove_all_hooks()
        assert not hasattr(pipe.unet, "_hf_hook")
        for _ in range(2):
            assert torch.equal(case.draw(pipe, output_type="pt"), case.expected)


# ---------------------------------------------------------------------- the way out
def test_detach_is_idempotent_and_final(sim: ModuleType) -> None:
    pipe = warm(TOY)
    before = state_of(pipe)
    handle = offload(pipe, device="vram")
    TOY.draw(handle)
    for _ in range(3):
        handle.detach()
        same_state(before, state_of(pipe))
    assert handle.report()["complete"]
    with pytest.raises(RuntimeError, match="was detached"):
        handle()
    with pytest.raises(RuntimeError, match="was detached"):
        handle.policy = OffloadPolicy()


def test_detach_in_the_middle_of_a_run_is_refused(sim: ModuleType) -> None:
    pipe = build_toy()
    handle = offload(pipe, OffloadPolicy(mode="sequential"), device="vram")
    refused = []

    def hook(module: nn.Module, args: Any) -> None:
        with pytest.raises(RuntimeError, match="the pipeline is running"):
            handle.detach()
        refused.append(True)

    taken = pipe.transformer.last.register_forward_pre_hook(hook)
    assert torch.equal(TOY.draw(handle), TOY.expected)
    taken.remove()
    assert refused
    handle.detach()
    assert device_bytes(sim) == 0


def test_a_session_that_was_detached_behind_our_back(sim: ModuleType) -> None:
    pipe = warm(TOY)
    before = state_of(pipe)
    handle = offload(pipe, OffloadPolicy(mode="sequential"), device="vram")
    handle.session.detach()
    handle.detach()
    same_state(before, state_of(pipe))
