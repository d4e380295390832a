"""Invariant: every weight storage belongs to exactly one unit, and what cannot be cut says which tensor and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from balanced_offload.offload.units import Component, ComponentError, build_component, storages_by_unit

from .toys import NETS, Chain, Convs, Functional, Low, OwnTensors, Tied, TiedViews, build, weight_bytes


def names(component: Component) -> list[str]:
    return [unit.name for unit in component.units]


@pytest.mark.parametrize("name", NETS)
def test_every_storage_belongs_to_one_unit(name: str) -> None:
    net = build(NETS[name][0])
    component = build_component("c", net)
    owned = [storage.index for unit in component.units for storage in unit.storages]
    assert sorted(owned) == list(range(len(component.storages)))
    assert [unit.index for unit in component.units] == list(range(len(component.units)))
    for storage in component.storages:
        assert storage in component.units[storage.unit].storages
    assert component.weight_bytes == weight_bytes(net)
    refs = {id(ref.tensor) for storage in component.storages for ref in storage.refs}
    assert refs == {id(t) for t in (*net.parameters(), *net.buffers()) if t.numel()}


def test_a_tie_is_counted_once_and_lent() -> None:
    component = build_component("c", build(Tied))
    body = 3 * (64 * 64 + 64) * 4
    assert component.weight_bytes == 50 * 64 * 4 + body
    by_name = {unit.name: unit for unit in component.units}
    assert by_name["head"].nbytes == 0 and by_name["head"].borrowed == by_name["embed"].storages
    assert by_name["head"].tied and by_name["embed"].tied and not by_name["body.layers.0"].tied
    needs = storages_by_unit(component)
    assert needs[by_name["head"].index] == needs[by_name["embed"].index]


def test_views_of_one_storage_are_one_storage() -> None:
    component = build_component("c", build(TiedViews))
    (storage,) = component.storages
    assert storage.nbytes == component.weight_bytes == 2 * 64 * 64 * 4
    assert [(ref.offset, ref.stride) for ref in storage.refs] == [(0, (64, 1)), (64 * 64, (1, 64))]
    assert storage.users == {0, 1}


def test_modules_with_children_are_units_of_their_own_tensors() -> None:
    component = build_component("root", build(OwnTensors))
    assert names(component) == ["root", *(f"blocks.{i}{tail}" for i in range(3) for tail in ("", ".inner"))]
    by_name = {unit.name: unit for unit in component.units}
    assert by_name["root"].nbytes == 8 * 64 * 4 and not by_name["root"].is_leaf and not by_name["root"].hookable
    assert by_name["blocks.1"].nbytes == 64 * 4 and not by_name["blocks.1"].is_leaf and by_name["blocks.1"].hookable
    assert by_name["blocks.1.inner"].is_leaf


def test_buffers_count_as_weights() -> None:
    net = build(Functional)
    component = build_component("c", net)
    norm = next(unit for unit in component.units if unit.name == "norm")
    assert {ref.name: ref.is_buffer for storage in norm.storages for ref in storage.refs} == {
        "norm.weight": False,
        "norm.bias": False,
        "norm.running_mean": True,
        "norm.running_var": True,
        "norm.num_batches_tracked": True,
    }
    assert norm.nbytes == 4 * 64 * 4 + 8


def test_slots_are_aligned_per_storage() -> None:
    component = build_component("c", build(Low))
    for unit in component.units:
        assert unit.slot_bytes == sum(-(-s.nbytes // 512) * 512 for s in unit.storages)
    root = component.units[0]
    assert (root.nbytes, root.slot_bytes) == (13 + 64, 1024)
    assert component.device_bytes == sum(unit.slot_bytes for unit in component.units)
    assert component.dtype is torch.bfloat16


def test_strides_of_channels_last_weights_are_kept() -> None:
    component = build_component("c", build(Convs))
    (ref,) = [r for s in component.storages for r in s.refs if r.name == "convs.0.weight"]
    assert ref.stride == (16 * 9, 1, 48, 16)


def test_layers_with_a_fused_path_carry_no_hooks_below() -> None:
    component = build_component("c", build(NETS["encoder layer"][0]))
    hookable = {unit.name for unit in component.units if unit.hookable}
    assert hookable == {"inward"}


def test_a_module_that_occurs_twice_is_one_unit() -> None:
    shared = nn.Linear(8, 8)
    component = build_component("c", nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8))}))
    assert names(component) == ["a", "b.1"]


@pytest.mark.parametrize("net", [nn.Sequential(nn.ReLU(), nn.Identity()), nn.Linear(0, 0)])
def test_no_weights_is_an_error(net: nn.Module) -> None:
    with pytest.raises(ComponentError, match=r"'painter' \((Sequential|Linear)\) has no weights"):
        build_component("painter", net)


def test_meta_is_an_error_that_names_the_tensor() -> None:
    net = Chain(2)
    net.layers[1].to("meta")
    with pytest.raises(ComponentError, match=r"'painter': 'layers\.1\.weight' is on the meta device"):
        build_component("painter", net)


def test_sparse_weights_are_an_error_that_names_the_tensor() -> None:
    net = Chain(2)
    net.register_buffer("mask", torch.eye(4).to_sparse())
    with pytest.raises(ComponentError, match=r"'painter': 'mask' is a Tensor \(torch\.sparse_coo\).*cannot be rebound"):
        build_component("painter", net)


def test_lazy_weights_are_an_error_that_names_the_tensor() -> None:
    with pytest.raises(ComponentError, match=r"'painter': '1\.weight'"):
        build_component("painter", nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)))


def test_component_errors_are_value_errors() -> None:
    assert issubclass(ComponentError, ValueError)


def test_an_empty_tensor_next_to_a_full_one_owns_nothing() -> None:
    """An empty view keeps a storage alive, which belongs to the module that uses it."""
    net = nn.Module()
    net.empty, net.full, net.other = nn.Module(), nn.Module(), nn.Linear(4, 4)
    whole = torch.randn(16)
    net.empty.register_buffer("view", whole[:0])
    net.full.register_buffer("view", whole)
    component = build_component("c", net)
    assert names(component) == ["full", "other"]
    assert component.units[0].storages == [component.storages[0]]
    assert component.device_bytes == sum(-(-s.nbytes // 512) * 512 for s in component.storages)


def test_a_parameter_that_is_none_is_left_out() -> None:
    assert build_component("c", nn.Linear(8, 8, bias=False)).weight_bytes == 256
