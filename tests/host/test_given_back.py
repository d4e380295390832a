"""Invariant: when we let go of a model, in whatever way, the stock host goes on with it as if we had never been there;
and what the host patches is patched as the host does it, wherever the weights are.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from .inprocess import load_clip, load_model, sample
from .test_modes import encoded
from .test_static import MODES, Ours, ours, policy_of, with_lora

__all__ = ["ours"]  # the fixture


def moved_by(obj: Any, keys: list[str], scale: float = 0.5) -> Any:
    """A clone of a MODEL or CLIP with a random difference on these weights."""
    clone = obj.clone()
    weights = getattr(obj, "patcher", obj).model.state_dict()
    generator = torch.Generator().manual_seed(3)
    clone.add_patches(
        {key: ("diff", (torch.randn(weights[key].shape, generator=generator) * scale,)) for key in keys}, 0.9
    )
    return clone


@pytest.mark.parametrize("mode", MODES)
def test_a_bypassed_policy_is_the_stock_graph(mode: str, ours: Ours, sim_host: Any, models: Path) -> None:
    """Nothing is unloaded in between: the host still takes the model for loaded when our last patcher dies."""
    stock = load_model(models, "sd3")
    wanted = sample(stock, "sd3")
    sim_host.management.unload_all_models()
    model = ours.apply(stock, **policy_of(mode, stock.model_size()))
    assert torch.equal(sample(with_lora(model, models, "a"), "sd3"), sample(with_lora(model, models, "a"), "sd3"))
    assert torch.equal(sample(model, "sd3"), wanted)
    del model
    gc.collect()
    ours.device.sweep()
    assert not ours.device.device_session().components
    for _ in range(2):
        assert torch.equal(sample(stock, "sd3"), wanted)
    assert sim_host.vram.memory_allocated() >= stock.model_size()


@pytest.mark.parametrize("mode", MODES)
def test_restored_stock_behaviour_runs_and_can_be_taken_back(
    mode: str, ours: Ours, sim_host: Any, models: Path
) -> None:
    stock = load_model(models, "sd3")
    wanted, patched = sample(stock, "sd3"), sample(with_lora(stock, models, "a"), "sd3")
    sim_host.management.unload_all_models()
    model = ours.apply(stock, **policy_of(mode, stock.model_size()))
    lora = with_lora(model, models, "a")
    assert torch.equal(sample(lora, "sd3"), patched)
    for on in (True, False, True, False):
        ours.device.restore_stock(on)
        if on:
            assert not ours.device.device_session().components
            assert not any(m._forward_pre_hooks for m in model.model.modules())
            assert sim_host.vram.memory_allocated() < 1 << 16
        for obj, bits in ((model, wanted), (lora, patched), (model, wanted)):
            assert torch.equal(sample(obj, "sd3"), bits)
    sim_host.management.unload_all_models()
    assert sim_host.vram.memory_allocated() < 1 << 16


def test_none_loads_one_at_a_time_and_the_host_can_evict_each(
    ours: Ours, sim_host: Any, models: Path, cap: Any
) -> None:
    stock = {kind: load_model(models, kind) for kind in ("sd3", "wan")}
    wanted = {kind: sample(model, kind) for kind, model in stock.items()}
    sim_host.management.unload_all_models()
    cap(max(model.model_size() for model in stock.values()) + (4 << 20))  # not both
    placed = {kind: ours.apply(model, mode="none") for kind, model in stock.items()}
    for kind in ("sd3", "wan", "sd3", "wan"):
        got = sample(placed[kind], kind)  # so little is free that the host may not batch the guided pair: it rounds
        assert torch.allclose(got, wanted[kind], rtol=1e-3, atol=1e-3)
    for mode in ("auto", "none"):
        placed["sd3"] = ours.apply(placed["sd3"], mode=mode)
        assert torch.allclose(sample(placed["sd3"], "sd3"), wanted["sd3"], rtol=1e-3, atol=1e-3)
    for _ in range(2):
        sim_host.management.unload_all_models()
        assert sim_host.vram.memory_allocated() < 1 << 16


@pytest.mark.parametrize("mode", ["auto", "none", "balanced"])
def test_a_device_that_shares_the_hosts_memory_keeps_pristine_weights(
    mode: str, ours: Ours, sim_host: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Macs and integrated cards: there the device's copy is the only one."""
    stock = load_model(models, "sd3")
    before = {key: value.clone() for key, value in stock.model.state_dict().items()}
    wanted = {name: sample(with_lora(stock, models, name), "sd3") for name in ("a", "b")}
    wanted["base"] = sample(stock, "sd3")
    sim_host.management.unload_all_models()
    from balanced_offload.offload.backend.generic import AcceleratorBackend

    monkeypatch.setattr(AcceleratorBackend, "_is_integrated", lambda self: True)
    model = ours.apply(stock, **policy_of(mode, stock.model_size()))
    assert ours.device.open_device_session().backend.shared_memory
    for name in ("a", "base", "b", "base"):
        obj = model if name == "base" else with_lora(model, models, name)
        assert torch.equal(sample(obj, "sd3"), wanted[name]), name
    sim_host.management.unload_all_models()
    ours.device.close_device_session()
    for key, value in stock.model.state_dict().items():
        assert torch.equal(value.cpu(), before[key]), key


@pytest.mark.parametrize("mode", MODES)
def test_patches_on_a_text_encoder_and_its_tables(mode: str, ours: Ours, sim_host: Any, models: Path) -> None:
    """Positions are read beside their layer: a function on the layer would never be called."""
    stock = load_clip(models)
    weights = stock.patcher.model.state_dict()
    keys = [key for key, value in weights.items() if key.endswith("weight") and value.ndim <= 2]
    assert any("position_embedding" in key for key in keys)
    before = {key: value.clone() for key, value in weights.items()}
    plain, patched = encoded(stock), encoded(moved_by(stock, keys, 0.02))
    assert not torch.equal(plain[0], patched[0])
    sim_host.management.unload_all_models()
    clip = ours.apply(stock, **policy_of(mode, stock.patcher.model_size()))
    moved = moved_by(clip, keys, 0.02)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(encoded(moved), patched, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(encoded(clip), plain, strict=True))
    encoded(moved)
    del clip, moved  # while it is patched
    gc.collect()
    ours.device.sweep()
    for key, value in stock.patcher.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(torch.equal(a, b) for a, b in zip(encoded(stock), plain, strict=True))


@pytest.mark.parametrize("mode", ["auto", "sequential"])
@pytest.mark.parametrize("kind", ["wan", "sd3"])
def test_what_the_host_passes_by_is_passed_by(kind: str, mode: str, ours: Ours, sim_host: Any, models: Path) -> None:
    """Parameters of modules that have layers below them: no loader of the host patches these."""
    stock = load_model(models, kind)
    keys = [key for key in stock.model.state_dict() if key.endswith((".modulation", "pos_embed"))]
    keys = [key for key in keys if key.startswith("diffusion_model.")]
    assert keys
    wanted = sample(moved_by(stock, keys), kind)
    sim_host.management.unload_all_models()
    model = ours.apply(stock, mode=mode)
    assert torch.equal(sample(moved_by(model, keys), kind), wanted)


@pytest.mark.parametrize("mode", ["none", "auto", "sequential"])
def test_lora_on_scaled_fp8_goes_the_hosts_way(
    mode: str, ours: Ours, sim_host: Any, models: Path, tmp_path: Path
) -> None:
    import comfy.sd
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(models / "diffusion_models" / "tiny_sd3.safetensors").items():
        tensors[name] = value
        if name.endswith(".weight") and value.ndim == 2 and "joint_blocks" in name:
            scale = value.abs().max().float() / 100.0
            tensors[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + "scale_weight"] = scale
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "scaled.safetensors")
    with torch.inference_mode():  # as in a prompt: the host's quantized tensors may not be moved outside of it
        stock = comfy.sd.load_diffusion_model(str(tmp_path / "scaled.safetensors"))
        wanted, patched = sample(stock, "sd3"), sample(with_lora(stock, models, "a"), "sd3")
        assert not torch.equal(wanted, patched)
        sim_host.management.unload_all_models()
        model = ours.apply(stock, mode=mode)
        lora = with_lora(model, models, "a")
        for obj, bits in ((model, wanted), (lora, patched), (model, wanted), (lora, patched)):
            assert torch.equal(sample(obj, "sd3"), bits)
        sim_host.management.unload_all_models()


def test_a_wrapper_of_one_clone_is_not_the_next_ones(ours: Ours, sim_host: Any, models: Path) -> None:
    """What other packs put around a weight belongs to the clone that carries it."""
    stock = load_model(models, "sd3")
    key = "diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"

    def wrapped(model: Any) -> Any:
        clone = model.clone()
        clone.add_weight_wrapper(key, lambda weight: weight * 0.5)
        return clone

    wanted, halved = sample(stock, "sd3"), sample(wrapped(stock), "sd3")
    assert not torch.equal(wanted, halved)
    sim_host.management.unload_all_models()
    model = ours.apply(stock, mode="auto")
    other = wrapped(model)
    for _ in range(2):
        assert torch.equal(sample(other, "sd3"), halved)
        assert torch.equal(sample(model, "sd3"), wanted)
    sample(other, "sd3")
    ours.device.restore_stock()
    assert not any(getattr(m, "weight_function", []) for m in model.model.modules())
