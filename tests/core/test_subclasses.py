"""Invariant: a quantized tensor is placed by the memory inside it, and is what it was: object, class and attributes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload.subclasses import addresses
from balanced_offload.offload.units import build_component

from .quantized import (
    NETS,
    Asks,
    Dynamic,
    Int8,
    Kept,
    Logged,
    Mixed,
    OneScale,
    OneWeight,
    Shifted,
    Stamped,
    bytes_of,
    inside,
    objects,
    quantize,
    session_for,
    state_of,
)
from .toys import DEVICE, MODES, Chain, build, clone, copied, device_bytes, hooks, results, tokens, weights_up

STREAMING = ("balanced", "sequential")


# ---------------------------------------------------------------------- equality
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", NETS)
def test_ten_runs_equal_the_plain_cpu(sim: ModuleType, name: str, grad: Callable[[], Any]) -> None:
    with grad():
        expected = results(build(NETS[name]), tokens, 10, "cpu")
    assert not torch.equal(expected[0], expected[1])
    Logged.rebound = 0
    for mode in MODES:
        net = build(NETS[name])
        before = state_of(net)
        session = session_for(net, mode)
        with grad():
            for run, (drawn, plain) in enumerate(zip(results(net, tokens, 10, DEVICE), expected, strict=True)):
                assert torch.equal(drawn, plain), f"{mode}, run {run}"
        if mode in STREAMING:
            assert hooks(net)
        if mode == "balanced":
            assert session.device_bytes["net"] < session.components["net"].component.device_bytes
        session.detach()
        after = state_of(net)
        if name == "kept":  # it writes to it
            assert before.pop("leaf.table[2]") != after.pop("leaf.table[2]")
        assert after == before, mode
        assert not hooks(net)
    assert Logged.rebound == 0, "what rebinds a tensor goes past what its class makes of it"
    assert device_bytes(sim) == 0


# ---------------------------------------------------------------------- sizes
def test_units_count_the_bytes_that_are_stored() -> None:
    component = build_component("c", build(Mixed))
    layer = 64 * 64 + 64 * 4 + 64 * 4  # int8, a scale per row, a plain bias
    assert component.weight_bytes == 5 * layer + 64 * 64 * 4 + 64 * 4
    first = component.units[0]
    assert [ref.name for s in first.storages for ref in s.refs] == [
        "layers.0.weight.int_data",
        "layers.0.weight.scale",
        "layers.0.bias",
    ]
    assert first.nbytes == layer and first.slot_bytes == 4096 + 512 + 512
    assert {id(ref.tensor) for s in component.storages for ref in s.refs} == {
        id(p) for p in component.module.parameters()
    }
    assert component.dtype is torch.float32


@pytest.mark.parametrize("name", NETS)
def test_every_plain_storage_belongs_to_one_unit(name: str) -> None:
    net = build(NETS[name])
    component = build_component("c", net)
    assert component.weight_bytes == bytes_of(net)
    owned = [storage.index for unit in component.units for storage in unit.storages]
    assert sorted(owned) == list(range(len(component.storages)))


def test_names_of_what_lies_deeper() -> None:
    component = build_component("c", build(NETS["nested"]))
    names = [ref.name for s in component.units[0].storages for ref in s.refs]
    assert names[:3] == [f"layers.0.weight.{n}" for n in ("inside.int_data", "inside.scale", "shift")]
    assert addresses(component.module.layers[0].weight) == {
        t.untyped_storage().data_ptr() for t in inside(component.module.layers[0].weight)
    }


def test_ties_between_wrappers_and_inside_them() -> None:
    by_name = {unit.name: unit for unit in build_component("c", build(OneWeight)).units}
    assert len(by_name["layers.4"].borrowed) == 2 and by_name["layers.1"].tied
    net = build(OneScale)
    by_name = {unit.name: unit for unit in build_component("c", net).units}
    assert by_name["layers.1"].borrowed == by_name["layers.0"].storages[1:2]
    assert by_name["layers.3"].borrowed == by_name["layers.2"].storages[:2]
    assert by_name["layers.3"].nbytes == 64 * 4  # its bias


def test_plain_tensors_are_bound_without_anything_in_between(sim: ModuleType) -> None:
    """What a step of a plain model does per tensor is one assignment to the tensor itself."""
    net = build(Mixed)
    session = session_for(net, "sequential")
    with torch.no_grad():
        results(net, tokens, 3, DEVICE)
    slots = {slot.unit.name: slot for slot in session.components["net"].engine.stream.walk.slots}
    plain, quantized = slots["layers.1"].binding, slots["layers.2"].binding
    assert [id(target) for target, _ in plain.ups] == [id(net.layers[1].weight), id(net.layers[1].bias)]
    assert [id(t) for t in plain.counted] == [id(net.layers[1].weight), id(net.layers[1].bias)]
    weight = net.layers[2].weight
    assert [id(target) for target, _ in quantized.ups[:2]] == [id(weight.int_data), id(weight.scale)]
    assert len(quantized.ups) == 4 and len(quantized.counted) == 3
    session.detach()


# ---------------------------------------------------------------------- bytes
@pytest.mark.parametrize("name", ["wrapper", "nested", "own memory"])
def test_a_step_copies_what_streams_and_nothing_else(sim: ModuleType, name: str) -> None:
    net = build(NETS[name])
    x = tokens().to(DEVICE)
    with session_for(net, "balanced") as session, torch.no_grad():
        for _ in range(5):
            net(x)
        managed = session.components["net"]
        flowing = [u for u in managed.component.units if u.index not in managed.engine.loaded]
        assert len(flowing) > 2
        moved = copied(sim, lambda: net(x))
        assert moved["d2h_bytes"] == 0
        ours = list(weights_up(sim, session))
        padded = sum(u.slot_bytes for u in flowing)
        assert sum(u.nbytes for u in flowing) <= sum(entry.nbytes for entry in ours) <= padded
        assert len(ours) == len(flowing)  # one copy a unit
        assert moved["h2d_bytes"] == sum(entry.nbytes for entry in ours)
        assert all(managed.weights.is_pinned(s) for u in flowing for s in u.storages)


def test_what_fits_moves_once_and_carries_no_hook(sim: ModuleType) -> None:
    net = build(Mixed)
    x = tokens().to(DEVICE)
    with session_for(net, "auto") as session, torch.no_grad():
        net(x)
        assert session.device_bytes["net"] == session.components["net"].component.device_bytes
        assert copied(sim, lambda: [net(x) for _ in range(3)])["h2d_bytes"] == 0
        assert not hooks(net)


# ---------------------------------------------------------------------- where they say that they are
class Probe(Asks):
    """Notes what its weight says while it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        down = weight.to("cpu")
        self.notes = {
            "all": {t.device.type for t in objects(weight)},
            "keys": "PrivateUse1" in str(torch._C._dispatch_keys(weight)),
            "down": {t.device.type for t in objects(down)},
            "equal": torch.equal(inside(down)[0], self.bytes),
            "like": torch.empty_like(inside(weight)[0]).device.type,
            "place": getattr(weight, "place", torch.device(DEVICE)).type,
            "type": type(weight),
        }
        if not torch.is_inference_mode_enabled():  # torch refuses there, as the class makes a tensor of another kind
            self.notes["state"] = {t.device.type for t in objects(self.state_dict()["weight"])}
        return super().forward(x)


@pytest.mark.parametrize("kind", [Int8, Shifted, Stamped, Dynamic])
def test_a_wrapper_says_where_its_bytes_are(sim: ModuleType, kind: Any) -> None:
    for mode in MODES:
        net = build(lambda: Chain(6))
        net.layers[2] = probe = Probe(64, 64).requires_grad_(False)
        quantize(probe, kind)
        probe.bytes = inside(probe.weight)[0].clone()
        weight, home = probe.weight, torch.device("cpu")
        with session_for(net, mode) as session:
            for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
                with grad():
                    net(tokens().to(DEVICE))
                assert probe.notes.pop("state", {DEVICE}) == {DEVICE}
                assert probe.notes == {
                    "all": {DEVICE},
                    "keys": True,
                    "down": {"cpu"},
                    "equal": True,
                    "like": DEVICE,
                    "place": DEVICE,
                    "type": kind,
                }
                assert probe.weight is weight
                session.free()
                assert {t.device for t in objects(weight)} == {home}
                assert "PrivateUse1" not in str(torch._C._dispatch_keys(weight))
                assert getattr(weight, "place", home) == home


def test_what_was_found_on_the_device_goes_back_there(sim: ModuleType) -> None:
    net = build(Mixed).to(DEVICE)
    expected = results(build(Mixed), tokens, 3, "cpu")
    before = state_of(net)
    session = session_for(net, "sequential")
    assert {t.device.type for p in net.parameters() for t in objects(p)} == {"cpu"}
    with torch.no_grad():
        drawn = results(net, tokens, 3, DEVICE)
    session.detach()
    assert all(map(torch.equal, drawn, expected))
    assert state_of(net) == before
    del net, session


# ---------------------------------------------------------------------- writes
def test_a_write_on_the_device_comes_down(sim: ModuleType) -> None:
    for mode in MODES:
        net = build(Kept)
        twin = clone(net)
        session = session_for(net, mode)
        for grad in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with grad():
                for seed in range(3):
                    assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed)))
            session.free()
        session.detach()
        assert torch.equal(net.leaf.table.scale, twin.leaf.table.scale)


@pytest.mark.parametrize("name", ["wrapper", "nested", "own memory"])
def test_a_write_between_forwards_is_seen(sim: ModuleType, name: str) -> None:
    for mode in MODES:
        net = build(NETS[name])
        twin = clone(net)
        session = session_for(net, mode)
        for i in range(6):
            with torch.no_grad():
                assert torch.equal(net(tokens(i).to(DEVICE)).cpu(), twin(tokens(i))), i
                for model in (net, twin):
                    for layer in (0, 3, 5):
                        inside(model.layers[layer].weight)[-1].mul_(1 + i % 2)
            if i == 3:
                session.free()
        session.detach()
        assert torch.equal(net(tokens()), twin(tokens()))


def test_evicted_between_calls(sim: ModuleType) -> None:
    for mode in MODES:
        net = build(Mixed)
        expected = results(build(Mixed), tokens, 8, "cpu")
        with session_for(net, mode) as session, torch.no_grad():
            for i in range(8):
                assert torch.equal(net(tokens(i).to(DEVICE)).cpu(), expected[i])
                if i % 2:
                    assert session.free() > 0
                    assert session.device_bytes["net"] == 0
                    assert device_bytes(sim) == 0


# ---------------------------------------------------------------------- gradients and exceptions
def test_a_gradient_with_respect_to_the_input(sim: ModuleType) -> None:
    for mode in ["none", "model", "balanced"]:
        net = build(Mixed)
        for i in (0, 3):
            net.layers[i].__class__ = nn.Linear

        def gradient(x: torch.Tensor, net: nn.Module = net) -> torch.Tensor:
            x = x.requires_grad_()
            return torch.autograd.grad(net(x).square().sum(), x)[0].cpu()

        expected = gradient(tokens())
        with session_for(net, mode):
            for _ in range(3):
                assert torch.allclose(gradient(tokens().to(DEVICE)), expected, rtol=1e-6, atol=0)
                with torch.inference_mode():
                    net(tokens().to(DEVICE))


def test_a_call_that_raises_leaves_it_clean(sim: ModuleType) -> None:
    for mode in MODES:
        net = build(Mixed)
        expected = net(tokens())
        before = state_of(net)
        fail = [False]

        def stop(*_: Any, fail: list[bool] = fail) -> None:
            if fail[0]:
                raise KeyboardInterrupt

        handle = net.layers[3].register_forward_pre_hook(stop)
        session = session_for(net, mode)
        with torch.no_grad():
            for turn in range(6):
                fail[0] = turn % 2 == 1
                if fail[0]:
                    with pytest.raises(KeyboardInterrupt):
                        net(tokens().to(DEVICE))
                else:
                    assert torch.equal(net(tokens().to(DEVICE)).cpu(), expected)
        session.detach()
        handle.remove()
        assert state_of(net) == before


# ---------------------------------------------------------------------- the library itself
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_diffusers_gguf_layers(sim: ModuleType, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="diffusers' GGUF layers need the gguf package")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils", reason="diffusers is not installed")
    quant_type = gguf.GGMLQuantizationType[kind]

    def make() -> nn.Module:
        net = Chain(6, 256)
        for i in (0, 2, 3, 5):
            layer = utils.GGUFLinear(256, 256, bias=True, compute_dtype=torch.float32)
            if kind == "Q4_K":  # its packer is not in Python: any bytes are some weights, if the scales are small
                block, size = gguf.GGML_QUANT_SIZES[quant_type]
                stored = torch.randint(0, 256, (256, 256 // block * size), dtype=torch.uint8)
                stored[:, 1::size] = 1
                stored[:, 3::size] = 1
            else:
                stored = torch.from_numpy(gguf.quants.quantize(net.layers[i].weight.detach().numpy(), quant_type))
            layer.weight = utils.GGUFParameter(stored, quant_type=quant_type)
            net.layers[i] = layer
        return net

    expected = [net_run for net_run in results(build(make), lambda seed: wide(seed), 10, "cpu")]
    assert all(y.isfinite().all() for y in expected) and not torch.equal(expected[0], expected[1])
    for mode in MODES:
        net = build(make)
        before = state_of(net)
        session = session_for(net, mode, high="160KiB") if mode == "balanced" else session_for(net, mode)
        component = session.components["net"].component
        assert (
            component.weight_bytes
            == bytes_of(net)
            < 0.6 * sum(p.numel() for p in build(lambda: Chain(6, 256)).parameters()) * 4
        )
        with torch.inference_mode():
            assert all(map(torch.equal, results(net, wide, 10, DEVICE), expected)), mode
        if mode in STREAMING:
            assert hooks(net)
        session.detach()
        assert state_of(net) == before, mode
        assert net.layers[0].weight.quant_type == quant_type


def wide(seed: int) -> torch.Tensor:
    return torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(seed))
