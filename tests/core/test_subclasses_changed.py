"""Invariant: who converts, replaces or edits a quantized weight is heard, and what cannot be placed is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload import Session
from balanced_offload.offload.units import ComponentError, build_component

from .quantized import NETS, Int8, Mixed, Shifted, objects, quantize, session_for
from .toys import DEVICE, MODES, Chain, build, clone, device_bytes, hooks, policy, results, tokens


# ---------------------------------------------------------------------- others at the same weights
def test_the_whole_module_is_converted(sim: ModuleType) -> None:
    for mode in MODES:
        net, twin = build(Mixed), build(Mixed)
        weight = net.layers[2].weight
        session = session_for(net, mode)
        with torch.no_grad():
            net(tokens().to(DEVICE))
            net.to(torch.bfloat16)
            twin.to(torch.bfloat16)
            x = tokens().to(torch.bfloat16)
            expected = twin(x)
            for _ in range(4):
                assert torch.equal(net(x.to(DEVICE)).cpu(), expected)
            session.policy = policy("balanced", high="12KiB")
            for _ in range(4):
                assert torch.equal(net(x.to(DEVICE)).cpu(), expected)
        session.detach()
        assert net.layers[2].weight is weight and type(weight) is Int8 and weight.dtype is torch.bfloat16
        assert {t.device.type for p in net.parameters() for t in objects(p)} == {"cpu"}
        assert torch.equal(net(x), expected)


@pytest.mark.parametrize("when", ["same stage", "after free", "mode changes"])
def test_weights_are_quantized_while_they_are_managed(sim: ModuleType, when: str) -> None:
    for mode in ["balanced", "model", "sequential", "auto"]:
        net, twin = build(Chain), build(Chain)
        session = session_for(net, mode)
        with torch.no_grad():
            for i in range(4):
                assert torch.equal(net(tokens(i).to(DEVICE)).cpu(), twin(tokens(i)))
            if when == "after free":
                session.free()
            for i in (0, 2, 3):
                quantize(net.layers[i], Shifted if i else Int8)
                quantize(twin.layers[i], Shifted if i else Int8)
            if when == "mode changes":
                session.policy = policy("sequential" if mode == "balanced" else "balanced", high="12KiB")
            for i in range(4):
                assert torch.equal(net(tokens(i).to(DEVICE)).cpu(), twin(tokens(i))), i
        session.detach()
        assert {t.device.type for p in net.parameters() for t in objects(p)} == {"cpu"}
        assert torch.equal(net(tokens()), twin(tokens()))
        assert device_bytes(sim) == 0


def test_an_inner_tensor_is_replaced(sim: ModuleType) -> None:
    """What something else put in is left to it; our buffers do not stay under it."""
    for mode in MODES:
        net, twin = build(Mixed), build(Mixed)
        session = session_for(net, mode)
        with torch.no_grad():
            net(tokens().to(DEVICE))
            session.free()
            for model in (net, twin):
                model.layers[2].weight.scale = model.layers[2].weight.scale * 3
            session.free()
            for i in range(3):
                assert torch.equal(net(tokens(i).to(DEVICE)).cpu(), twin(tokens(i)))
        session.detach()
        assert torch.equal(net(tokens()), twin(tokens()))
        assert {t.device.type for p in net.parameters() for t in objects(p)} == {"cpu"}


@pytest.mark.parametrize("name", ["wrapper", "nested", "own memory"])
def test_a_module_given_back_is_as_good_as_new(sim: ModuleType, name: str) -> None:
    net = build(NETS[name])
    with session_for(net, "balanced"), torch.no_grad():
        results(net, tokens, 3, DEVICE)
    expected = build(NETS[name])(tokens())
    if name != "own memory":  # a class of its own making, which torch cannot copy by itself
        twin = clone(net)
        assert torch.equal(twin(tokens()), expected)
        state = net.state_dict()
        assert {t.device.type for value in state.values() for t in objects(value)} == {"cpu"}
    if name == "wrapper":
        other = build(NETS[name], seed=3)
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(tokens()), expected)
        net.to(torch.float64).to(torch.float32)  # torch swaps wrappers, which it refuses where somebody refers to one
    net.to(DEVICE)
    assert torch.equal(net(tokens().to(DEVICE)).cpu(), expected)


def test_weights_from_a_file_reach_the_masters(sim: ModuleType) -> None:
    net, other = build(Mixed, seed=1), build(Mixed, seed=2)
    with session_for(net, "balanced") as session, torch.no_grad():
        for i in range(3):
            net(tokens(i).to(DEVICE))
        net.load_state_dict(other.state_dict())
        for _ in range(2):
            assert torch.equal(net(tokens().to(DEVICE)).cpu(), other(tokens()))
            session.free()


@pytest.mark.parametrize("mode", ["balanced", "model", "sequential", "auto"])
def test_two_components_that_share_a_quantized_weight(sim: ModuleType, mode: str) -> None:
    first, second = build(Mixed, seed=1), build(Mixed, seed=2)
    second.layers[3].weight = first.layers[0].weight  # in a layer that asks it where it is
    twins = clone(nn.ModuleList([first, second]))
    session = session_for(first, mode)
    session.add("second", second)
    with torch.no_grad():
        for run in range(5):
            for part, twin in zip((first, second), twins, strict=True):
                for _ in range(2):
                    assert torch.equal(part(tokens(run).to(DEVICE)).cpu(), twin(tokens(run))), run
    session.detach()
    assert second.layers[3].weight is first.layers[0].weight
    assert {t.device.type for part in (first, second) for p in part.parameters() for t in objects(p)} == {"cpu"}
    for part, twin in zip((first, second), twins, strict=True):
        assert torch.equal(part(tokens()), twin(tokens()))
    assert device_bytes(sim) == 0


# ---------------------------------------------------------------------- what is refused
class Silent(torch.Tensor):
    """A wrapper that does not say what is in it."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> Silent:
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.ops.aten.detach.default else NotImplemented


class Params4bit(nn.Parameter):
    """As bitsandbytes has it: bytes, and a state beside them that holds the scales."""

    def __new__(cls, data: torch.Tensor, state: Any = None) -> Params4bit:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.quant_state = state
        return made


class FromBitsandbytes(Params4bit):
    __module__ = "bitsandbytes.nn.modules"


class State:
    def __init__(self, absmax: torch.Tensor) -> None:
        self.blocksize, self.absmax = 64, absmax


class Careless(Int8):
    """Forgets its dtype."""

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, dtype: Any, size: Any, stride: Any) -> Careless:
        return cls(inner["int_data"], inner["scale"], torch.float64)


class Broken(Int8):
    @classmethod
    def __tensor_unflatten__(cls, inner: Any, dtype: Any, size: Any, stride: Any) -> Broken:
        raise KeyError("layout")


class Fresh(Int8):
    """Makes its inner tensor whenever it is asked for."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["copied", "scale"], self.dtype

    @property
    def copied(self) -> torch.Tensor:
        return self.int_data.view(64, 64)


class Caches(Int8):
    """Keeps a tensor that it does not tell of."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept = {"rows": [torch.zeros(4)]}


class SparseInside(Int8):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.int_data = self.int_data.to_sparse()


def weight() -> torch.Tensor:
    return torch.randn(64, 64)


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "silent": (lambda: Silent(weight()), r"is a Silent \(torch.strided\).*has no memory of its own"),
    "state": (lambda: Params4bit(weight(), State(weight()[0])), r"is a Params4bit .*`quant_state.absmax`.*stay behind"),
    "library": (lambda: FromBitsandbytes(weight()), r"is a FromBitsandbytes .*state of its own"),
    "careless": (lambda: Careless.of(weight()), r"is a Careless .*does not make an equal one"),
    "broken": (lambda: Broken.of(weight()), r"is a Broken .*fails \(KeyError: 'layout'\)"),
    "fresh": (lambda: Fresh.of(weight()), r"is a Fresh .*names `copied`, which is no tensor that it keeps"),
    "caches": (lambda: Caches.of(weight()), r"is a Caches .*`kept.rows.0`.*stay behind"),
    "sparse": (lambda: torch.eye(64).to_sparse_csr(), r"is a Tensor \(torch.sparse_csr\).*layout is not strided"),
    "sparse inside": (
        lambda: SparseInside.of(weight()),
        r"is a SparseInside .*layout is not strided",
    ),
    "conjugate": (lambda: torch.randn(8, dtype=torch.cfloat).conj(), r"is a Tensor .*state beside its bytes"),
    "taken": (lambda: taken(weight()), r"is a Tensor .*no memory of its own"),
}


def taken(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_rebound_is_refused(sim: ModuleType, what: str) -> None:
    make, text = REFUSED[what]
    net = build(Chain)
    net.layers[1].register_buffer("odd", None)
    net.layers[1]._buffers["odd"] = make()
    session = Session(policy("balanced"), device=DEVICE)
    with pytest.raises(ComponentError, match=r"component 'net': 'layers\.1\.odd' " + text) as caught:
        session.add("net", net)
    assert "cannot be rebound byte by byte" in str(caught.value)
    assert "Leave the component out" in str(caught.value)
    assert not hooks(net)
    session.detach()


def test_meta_inside_is_named_as_such() -> None:
    net = build(Chain)
    meta = Int8(torch.zeros(64, 64, dtype=torch.int8, device="meta"), torch.zeros(64, 1, device="meta"), torch.float32)
    net.layers[1].weight = nn.Parameter(meta, requires_grad=False)
    with pytest.raises(ComponentError, match=r"'layers\.1\.weight' is on the meta device"):
        build_component("net", net)
