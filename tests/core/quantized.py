"""Tensor subclasses as quantization libraries have them, and small models that use them. Sizes are bytes.

`Int8` is what torchao and optimum-quanto do: a wrapper with no memory of its own around an integer tensor and a scale.
`Shifted` wraps an `Int8` once more, `Stamped` notes where it is, and `Logged` has memory of its own and a
`__torch_function__`, as diffusers' GGUFParameter has. They refuse a mix of devices, as those do.
Below are the models, and the means to look at them from outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from balanced_offload.offload import Session

from .toys import DEVICE, Chain, policy

aten = torch.ops.aten


class Int8(torch.Tensor):
    """Weight-only int8, [out, in] with one scale per row."""

    @staticmethod
    def __new__(cls, int_data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, **more: Any) -> Int8:
        return torch.Tensor._make_wrapper_subclass(
            cls, int_data.shape, strides=int_data.stride(), dtype=dtype, device=int_data.device
        )

    def __init__(self, int_data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        assert int_data.device == scale.device, "inner tensors on different devices"
        self.int_data = int_data
        self.scale = scale

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8:
        weight = weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale.clone(), weight.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["int_data", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], dtype: Any, size: Any, stride: Any) -> Int8:
        return cls(inner["int_data"], inner["scale"], dtype)

    def dequantize(self) -> torch.Tensor:
        return self.int_data.to(self.dtype) * self.scale.to(self.dtype)

    def each(self, change: Any, dtype: torch.dtype | None = None) -> Int8:
        return type(self)(change(self.int_data), change(self.scale), dtype or self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            target.int_data.copy_(source.int_data)
            target.scale.copy_(source.scale)
            return target
        if func is aten._to_copy.default:
            dtype = kwargs.pop("dtype", None)
            return args[0].each(lambda inner: func(inner, **kwargs), dtype)
        if func in (aten.detach.default, aten.clone.default, aten.alias.default, aten.t.default):
            return args[0].each(lambda inner: func(inner, **kwargs) if inner.dim() == 2 else inner)
        if func in (aten.linear.default, aten.mm.default, aten.addmm.default):
            return func(*[a.dequantize() if isinstance(a, Int8) else a for a in args], **kwargs)
        return _other(cls, func, args, kwargs)


def _other(kind: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """What is made of other functions in inference mode, and whether `.data =` may do."""
    if func is aten._has_compatible_shallow_copy_type.default:
        return type(args[0]) is type(args[1])
    if func.overloadpacket in (aten.to, aten.t):
        return func.decompose(*args, **kwargs)
    raise NotImplementedError(f"{kind.__name__} has no {func}")


class Shifted(torch.Tensor):
    """A wrapper around a wrapper and a tensor that is added to it."""

    @staticmethod
    def __new__(cls, inside: Int8, shift: torch.Tensor) -> Shifted:
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), dtype=inside.dtype, device=inside.device
        )

    def __init__(self, inside: Int8, shift: torch.Tensor) -> None:
        assert inside.device == shift.device, "inner tensors on different devices"
        self.inside = inside
        self.shift = shift

    @classmethod
    def of(cls, weight: torch.Tensor) -> Shifted:
        shift = weight.detach().mean(1, keepdim=True)
        return cls(Int8.of(weight - shift), shift)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inside", "shift"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], context: Any, size: Any, stride: Any) -> Shifted:
        return cls(inner["inside"], inner["shift"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (aten.detach.default, aten.clone.default, aten.alias.default, aten.t.default, aten._to_copy.default):
            return cls(func(args[0].inside, **kwargs), func(args[0].shift, **kwargs))
        if func in (aten.linear.default, aten.mm.default, aten.addmm.default):
            plain = [a.inside.dequantize() + a.shift if isinstance(a, Shifted) else a for a in args]
            return func(*plain, **kwargs)
        return _other(cls, func, args, kwargs)


class Stamped(Int8):
    """Notes its device, and goes by the note when it is put together again."""

    @staticmethod
    def __new__(
        cls, int_data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, place: torch.device | None = None
    ) -> Stamped:
        return torch.Tensor._make_wrapper_subclass(
            cls, int_data.shape, strides=int_data.stride(), dtype=dtype, device=place or int_data.device
        )

    def __init__(
        self, int_data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, place: torch.device | None = None
    ) -> None:
        super().__init__(int_data, scale, dtype)
        self.place = place or int_data.device

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["int_data", "scale"], (self.dtype, torch.device("cpu"))

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Stamped:
        return cls(inner["int_data"], inner["scale"], *context)


class Functional(Int8):
    """Takes `F.linear` above the dispatcher, and computes with its inner tensors, as optimum-quanto does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *rest = args
            bias = rest[0] if rest else (kwargs or {}).get("bias")
            with torch._C.DisableTorchFunctionSubclass():
                y = F.linear(x, weight.int_data.to(x.dtype)) * weight.scale.flatten().to(x.dtype)
            return y if bias is None else y + bias
        return super().__torch_function__(func, types, args, kwargs or {})


class Dynamic(Int8):
    """Answers by itself when torch asks for its device and sizes."""

    @staticmethod
    def __new__(cls, int_data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Dynamic:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            int_data.shape,
            strides=int_data.stride(),
            dtype=dtype,
            device=int_data.device,
            dispatch_device=True,
            dispatch_sizes_strides_policy="sizes",
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].int_data.device
        if func.overloadpacket in (aten.size, aten.sym_size, aten.dim, aten.stride, aten.sym_stride, aten.numel):
            return func(args[0].int_data, *args[1:])
        if func.overloadpacket in (aten.sym_numel, aten.is_contiguous, aten.storage_offset, aten.sym_storage_offset):
            return func(args[0].int_data, *args[1:])
        return super().__torch_dispatch__(func, types, args, kwargs)


class Logged(torch.Tensor):
    """Bytes of its own; says another shape than it has, and hides from torch's functions what it is."""

    rebound = 0  # times that its class was asked to assign to `data`

    def __new__(cls, data: torch.Tensor, logical: tuple[int, ...]) -> Logged:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.logical = logical
        return made

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.logical)

    def detach(self) -> Logged:  # as one of ComfyUI's quantized tensors has it
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Logged.rebound += func == torch.Tensor.data.__set__
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Logged) and "logical" not in vars(result):
            result.logical = tuple(args[0].logical)
        return result

    def plain(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def __deepcopy__(self, memo: Any) -> Logged:
        twin = Logged(self.plain().clone(), self.logical)
        twin.__dict__.update(self.__dict__)
        return twin


class LoggedLinear(nn.Module):
    """One byte a weight: what is stored, over 127, less 1."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        stored = ((weight.detach().clamp(-1, 1) + 1) * 127).round().to(torch.uint8)
        self.weight = nn.Parameter(Logged(stored.flatten(), tuple(weight.shape)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.Tensor.reshape(self.weight.plain(), self.weight.shape)
        return F.linear(x, weight.to(x.dtype) / 127 - 1)


class Asks(nn.Linear):
    """Takes its input to where its weight says that it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.device))


def quantize(layer: nn.Linear, kind: Any) -> None:
    """Put a quantized weight in the layer's place."""
    layer.weight = nn.Parameter(kind.of(layer.weight), requires_grad=False)


class Mixed(Chain):
    """Quantized leaves between plain ones; every third asks its weight where it is."""

    def __init__(self, kind: Any = Int8) -> None:
        super().__init__()
        for i in (0, 3):
            self.layers[i] = Asks(64, 64)
        for i in (0, 2, 3, 4, 5):
            quantize(self.layers[i], kind)


class MixedLogged(Chain):
    def __init__(self) -> None:
        super().__init__()
        for i in (0, 2, 3, 5):
            self.layers[i] = LoggedLinear(self.layers[i].weight)


class OneWeight(Chain):
    """One quantized weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        quantize(self.layers[1], Int8)
        self.layers[4].weight = self.layers[1].weight


class OneScale(Chain):
    """Two quantized weights with one scale, and two around the very same inner tensors."""

    def __init__(self) -> None:
        super().__init__()
        for i in (0, 1, 2, 3):
            quantize(self.layers[i], Int8)
        first, second, third = (self.layers[i].weight for i in (0, 1, 2))
        self.layers[1].weight = nn.Parameter(Int8(second.int_data, first.scale, second.dtype), requires_grad=False)
        alias = Int8(third.int_data, third.scale, third.dtype)
        alias.__dict__.update(int_data=third.int_data, scale=third.scale)
        parameter = nn.Parameter(alias, requires_grad=False)
        parameter.__dict__.update(int_data=third.int_data, scale=third.scale)
        self.layers[3].weight = parameter


class Stray(Mixed):
    """Uses a quantized weight past its module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(super().forward(x), self.layers[3].weight)


class Kept(nn.Module):
    """A quantized buffer, one that its own forward writes to, and one on a module with children."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Chain(4)
        self.register_buffer("turn", Int8.of(torch.randn(64, 64)))
        self.leaf = nn.Module()
        self.leaf.register_buffer("table", Int8.of(torch.randn(64, 64)))
        self.leaf.forward = self._write  # type: ignore[method-assign]

    def _write(self, x: torch.Tensor) -> torch.Tensor:
        self.leaf.table.scale.mul_(1.25)
        return F.linear(x, self.leaf.table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(self.leaf(self.body(x)), self.turn))


NETS: dict[str, Any] = {
    "wrapper": Mixed,
    "nested": lambda: Mixed(Shifted),
    "stamped": lambda: Mixed(Stamped),
    "dynamic": lambda: Mixed(Dynamic),
    "function": lambda: Mixed(Functional),
    "own memory": MixedLogged,
    "one weight": OneWeight,
    "one scale": OneScale,
    "stray": Stray,
    "kept": Kept,
}


# ---------------------------------------------------------------------- looking from outside
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
    """Parameters and buffers by name, ties as often as they are named."""
    return dict([*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)])


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
