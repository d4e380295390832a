"""Invariant: a model of the host under any policy gives what the stock host gives, to the bit.

On the simulated accelerator as the host's load device: real placement errors, exact byte counts, a memory cap.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from . import tiny
from .inprocess import load_model, sample

MIB = 1 << 20
MODES = ("none", "auto", "balanced", "model", "sequential")


class Ours(NamedTuple):
    """What the tests of this file ask of the pack."""

    apply: Callable[..., Any]  # (model, **policy fields) -> the model under that policy
    device: ModuleType  # adapters.comfyui_device


@pytest.fixture
def ours(sim_host: Any, pack: Callable[[str], ModuleType]) -> Iterator[Ours]:
    comfyui, device = pack("offload.adapters.comfyui"), pack("offload.adapters.comfyui_device")
    policy = pack("offload.policy").OffloadPolicy

    def apply(obj: Any, **fields: Any) -> Any:
        applied = comfyui.apply_policy(policy(**fields), obj)
        assert applied.world == "static"
        return applied.obj

    yield Ours(apply, device)
    sim_host.management.unload_all_models()
    gc.collect()
    device.close_device_session()


def policy_of(mode: str, whole: int) -> dict[str, Any]:
    """A policy under which something of this mode happens: balanced streams half."""
    return {"mode": mode, "high": f"{whole // 2}B"} if mode == "balanced" else {"mode": mode}


def with_lora(model: Any, models: Path, name: str, strength: float = 0.8) -> Any:
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(models / "loras" / f"tiny_sd3_{name}.safetensors"), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
    return patched


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["wan", "sd3"])
def test_every_mode_is_equal_to_stock(kind: str, mode: str, ours: Ours, sim_host: Any, models: Path) -> None:
    stock = load_model(models, kind)
    sim_host.moved()
    wanted = sample(stock, kind)
    for _ in range(2):
        sample(stock, kind)
    by_stock = sim_host.moved()
    sim_host.management.unload_all_models()
    model = ours.apply(load_model(models, kind), **policy_of(mode, stock.model_size()))
    sim_host.moved()
    for _ in range(3):
        assert torch.equal(sample(model, kind), wanted)
    moved = sim_host.moved()
    assert moved["d2h_bytes"] == by_stock["d2h_bytes"], "only latents come down"
    if mode in ("none", "auto", "model"):
        assert moved["h2d_bytes"] < 1.02 * by_stock["h2d_bytes"], "weights once"
    else:
        assert moved["h2d_bytes"] > by_stock["h2d_bytes"] + 2 * stock.model_size(), "streamed in every forward"
    assert sim_host.management.current_loaded_models[0].model.loaded_size() > 0
    sim_host.management.unload_all_models()
    assert sim_host.vram.memory_allocated() < MIB


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_lora_and_base_alternated_with_stock(mode: str, dtype: Any, ours: Ours, sim_host: Any, models: Path) -> None:
    import comfy.sd

    path = str(models / "diffusion_models" / "tiny_sd3.safetensors")
    options = {} if dtype is None else {"dtype": dtype}
    stock = comfy.sd.load_diffusion_model(path, model_options=options)
    wanted = {name: sample(with_lora(stock, models, name), "sd3") for name in ("a", "b")}
    wanted["base"] = sample(stock, "sd3")
    assert not torch.equal(wanted["a"], wanted["base"]) and not torch.equal(wanted["a"], wanted["b"])
    sim_host.management.unload_all_models()
    model = ours.apply(stock, **policy_of(mode, stock.model_size()))
    loras = {name: with_lora(model, models, name) for name in ("a", "b")}
    stock_loras = {name: with_lora(stock, models, name) for name in ("a", "b")}
    for name in ("base", "a", "a", "b", "base", "a"):
        assert torch.equal(sample(loras.get(name, model), "sd3"), wanted[name]), name
    for name in ("a", "base", "b"):  # the same module, by the stock patcher in between
        assert torch.equal(sample(stock_loras.get(name, stock), "sd3"), wanted[name]), f"stock {name}"
        assert torch.equal(sample(loras.get(name, model), "sd3"), wanted[name]), f"ours {name} after stock"
    sim_host.management.unload_all_models()
    assert torch.equal(sample(stock, "sd3"), wanted["base"])


def test_a_fitting_set_moves_nothing_again(ours: Ours, sim_host: Any, models: Path) -> None:
    stock = load_model(models, "sd3")
    sample(stock, "sd3")
    sim_host.moved()
    sample(stock, "sd3")
    beside = sim_host.moved()["h2d_bytes"]  # noise and conditioning
    model = ours.apply(load_model(models, "sd3"), mode="auto")
    sample(model, "sd3")
    sim_host.moved()
    sample(model, "sd3", seed=7)
    assert sim_host.moved()["h2d_bytes"] == beside, "another seed"
    for mode in ("balanced", "none", "model", "auto"):
        again = ours.apply(model, mode=mode)
        sample(again, "sd3", prompt=4)
        assert sim_host.moved()["h2d_bytes"] == beside, mode


def test_a_lora_switch_moves_each_touched_layer_once(ours: Ours, sim_host: Any, models: Path) -> None:
    model = ours.apply(load_model(models, "sd3"), mode="auto")
    lora = with_lora(model, models, "a")
    sample(model, "sd3")
    sim_host.moved()
    sample(model, "sd3")
    beside = sim_host.moved()["h2d_bytes"]  # noise, conditioning
    leaves = {key.rpartition(".")[0] for key in lora.patches}
    touched = sum(p.numel() * p.element_size() for leaf in leaves for p in model.model.get_submodule(leaf).parameters())
    factors = sum(  # of the LoRA
        t.numel() * t.element_size()
        for patches in lora.patches.values()
        for t in patches[0][1].weights
        if t is not None and hasattr(t, "numel")
    )
    sample(lora, "sd3")
    moved = sim_host.moved()["h2d_bytes"]
    gaps = 512 * 2 * len(leaves)
    assert touched <= moved - beside <= touched + factors + gaps
    sample(lora, "sd3")
    assert sim_host.moved()["h2d_bytes"] <= beside, "patched in place: no factor comes again"


@pytest.mark.parametrize("mode", ["auto", "balanced", "sequential"])
def test_half_the_weights(mode: str, ours: Ours, sim_host: Any, models: Path, cap: Any) -> None:
    tiny.make(models, "diffusion_models/tiny_sd15")
    stock = load_model(models, "sd15")
    wanted = sample(stock, "sd15")
    whole = stock.model_size()
    sim_host.management.unload_all_models()
    model = ours.apply(stock, mode=mode)
    cap(whole // 2)
    sim_host.peak()
    for _ in range(2):
        assert torch.equal(sample(model, "sd15"), wanted)
    assert sim_host.peak() <= whole // 2


def test_the_host_evicts_us_and_we_come_back(ours: Ours, sim_host: Any, models: Path) -> None:
    stock = load_model(models, "sd3")
    wanted = sample(stock, "sd3")
    sim_host.management.unload_all_models()
    model = ours.apply(stock, mode="auto")
    sample(model, "sd3")
    management = sim_host.management
    sim_host.moved()
    management.free_memory(management.get_free_memory(sim_host.device) + MIB, sim_host.device)
    assert 0 < model.loaded_size() < stock.model_size() or model.loaded_size() == 0
    assert sim_host.moved().get("d2h_bytes", 0) == 0, "evicting copies nothing"
    assert torch.equal(sample(model, "sd3"), wanted)
    management.unload_all_models()
    assert model.loaded_size() == 0 and not management.current_loaded_models
    assert torch.equal(sample(model, "sd3"), wanted)


@pytest.mark.parametrize("mode", ["auto", "balanced", "sequential"])
def test_an_interrupt_leaves_nothing_stale(mode: str, ours: Ours, sim_host: Any, models: Path) -> None:
    stock = load_model(models, "sd3")
    wanted = sample(stock, "sd3")
    sim_host.management.unload_all_models()
    model = ours.apply(stock, **policy_of(mode, stock.model_size()))
    assert torch.equal(sample(model, "sd3"), wanted)
    interrupt = sim_host.management.InterruptProcessingException
    layer = model.model.diffusion_model.joint_blocks[1].x_block.attn.qkv
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise interrupt

    handle = layer.register_forward_pre_hook(stop)
    with pytest.raises(interrupt):
        sample(model, "sd3")
    handle.remove()
    assert torch.equal(sample(model, "sd3"), wanted)
    sim_host.management.unload_all_models()
    assert sim_host.vram.memory_allocated() < MIB


def test_a_model_dies_with_its_last_patcher(ours: Ours, sim_host: Any, models: Path) -> None:
    import weakref

    model = ours.apply(load_model(models, "sd3"), mode="balanced", high="1MiB")
    sample(model, "sd3")
    module = weakref.ref(model.model.diffusion_model)
    clone = model.clone()
    del model
    gc.collect()
    assert module() is not None and ours.device.device_session().components
    del clone
    sim_host.management.unload_all_models()
    gc.collect()
    ours.device.sweep()
    sim_host.management.cleanup_models_gc()
    gc.collect()
    assert not ours.device.device_session().components
    assert module() is None
    assert sim_host.vram.memory_allocated() < MIB


def test_a_merge_reads_pristine_weights(ours: Ours, sim_host: Any, models: Path) -> None:
    import comfy.model_patcher  # noqa: F401 - the host's merge node is three lines of these calls

    def merged(base: Any, other: Any) -> Any:
        clone = base.clone()
        for key, patches in other.get_key_patches("diffusion_model.").items():
            clone.add_patches({key: patches}, 0.5, 0.5)
        return clone

    stock = load_model(models, "sd3")
    wanted = sample(merged(stock, with_lora(stock, models, "a")), "sd3")
    sim_host.management.unload_all_models()
    model = ours.apply(stock, mode="auto")
    lora = with_lora(model, models, "a")
    sample(lora, "sd3")
    assert model.loaded_size() > 0
    assert torch.equal(sample(merged(model, lora), "sd3"), wanted)


def test_clones_know_the_whole_size(ours: Ours, sim_host: Any, models: Path) -> None:
    stock = load_model(models, "sd3")
    whole = stock.model_size()
    model = ours.apply(stock, mode="balanced", high=f"{whole // 2}B")
    sample(model, "sd3")
    assert model.model_size() == model.loaded_size() <= whole // 2
    clone = model.clone().clone()
    sim_host.management.unload_all_models()
    assert clone.model_size() == whole // 2
    assert super(type(clone), clone).model_size() == whole


def test_a_model_loaded_in_inference_mode_sends_nothing_down(ours: Ours, sim_host: Any, models: Path) -> None:
    """As the host loads them. Their buffers would have to come down to see whether they were written."""
    with torch.inference_mode():
        stock = load_model(models, "sd3")
    sample(stock, "sd3")
    sim_host.moved()
    wanted = sample(stock, "sd3")
    results = sim_host.moved()["d2h_bytes"]
    sim_host.management.unload_all_models()  # between two prompts: outside of inference mode
    for fields in (policy_of("balanced", stock.model_size()), {"mode": "sequential"}, {"mode": "sequential"}):
        sim_host.moved()
        assert torch.equal(sample(ours.apply(stock, **fields), "sd3"), wanted)
        assert sim_host.moved()["d2h_bytes"] <= results


def test_the_host_moves_what_our_last_patcher_left(ours: Ours, sim_host: Any, models: Path) -> None:
    stock = load_model(models, "sd3")
    wanted = sample(stock, "sd3")
    sim_host.management.unload_all_models()
    model = ours.apply(stock, mode="balanced", high="1MiB")
    sample(model, "sd3")
    del model
    gc.collect()  # nobody has swept yet
    sim_host.management.unload_all_models()
    assert not ours.device.device_session().components
    assert torch.equal(sample(stock, "sd3"), wanted)
