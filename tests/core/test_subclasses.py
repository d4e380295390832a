"""Invariant: a quantized tensor is placed by the memory inside it, and is what it was: object, class and attributes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload import Session

from .quantized import NETS
from .toys import DEVICE, MODES, build, device_bytes, hooks, policy, results, tokens

STREAMING = ("balanced", "sequential")


def session_for(net: nn.Module, mode: str, **fields: Any) -> Session:
    session = Session(policy(mode, **fields), device=DEVICE)
    session.add("net", net)
    return session


def inside(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors in a tensor."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [plain for name in tensor.__tensor_flatten__()[0] for plain in inside(getattr(tensor, name))]
    return [tensor]


def objects(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor and all those in it, wrappers too."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [tensor, *(t for name in tensor.__tensor_flatten__()[0] for t in objects(getattr(tensor, name)))]
    return [tensor]


def tensors_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(net.named_parameters(remove_duplicate=False)),
        **dict(net.named_buffers(remove_duplicate=False)),
    }


def state_of(net: nn.Module) -> dict[str, Any]:
    """What offloading could leave behind: of every tensor and each inside it all that can be asked, and its bytes."""
    with torch._C.DisableTorchFunctionSubclass():
        return {
            f"{name}[{i}]": (
                id(t),
                type(t),
                t.dtype,
                torch.Tensor.size(t),
                t.stride(),
                t.storage_offset(),
                t.device,
                t.requires_grad,
                torch._C._dispatch_keys(t).__repr__(),
                t.is_inference(),
                sorted((key, id(value)) for key, value in vars(t).items()),
                [] if hasattr(t, "__tensor_flatten__") else t.as_subclass(torch.Tensor).cpu().tolist(),
            )
            for name, tensor in tensors_of(net).items()
            for i, t in enumerate(objects(tensor))
        }


def bytes_of(net: nn.Module) -> int:
    """Bytes of all plain storages, each once."""
    found = {}
    for tensor in tensors_of(net).values():
        for plain in inside(tensor):
            found[plain.untyped_storage().data_ptr()] = plain.untyped_storage().nbytes()
    return sum(found.values())


# ---------------------------------------------------------------------- equality
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", NETS)
def test_ten_runs_equal_the_plain_cpu(sim: ModuleType, name: str, grad: Callable[[], Any]) -> None:
    with grad():
        expected = results(build(NETS[name]), tokens, 10, "cpu")
    assert not torch.equal(expected[0], expected[1])
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
    assert device_bytes(sim) == 0
