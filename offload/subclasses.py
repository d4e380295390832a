"""Tensors that are no plain ones, as the plain memory behind them. Invariant: the model's own objects stay, of the same
class and with the same attributes, and what torch and their class say of their device is true wherever the bytes are.

Two kinds can be rebound. A subclass *with memory of its own* (diffusers' GGUFParameter) is rebound as a plain tensor
is, past whatever its class makes of torch's functions. A *wrapper* (torchao's and optimum-quanto's weights) has no
memory: its inner tensors have, which `__tensor_flatten__` names, and each of those is rebound by itself.

A wrapper also has a header, which torch made when the wrapper was made: device, sizes, dispatch keys. It is not looked
up in the inner tensors, so it would go on to say "cpu" (`weight.device`, autocast, autograd, `.to("cpu")`, which would
hand out the device's bytes as the host's). So it changes hands too: `.data =` between two wrappers exchanges the
header and nothing else, as the inner tensors are attributes of the Python object. The header for another device comes
from a second wrapper, made once by the class's own `__tensor_unflatten__` around inner tensors that are there. To put
that second wrapper into the module instead would break ties, leave everybody who holds the first one with an outdated
object, and lose what a forward writes to its attributes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (torch.Tensor, nn.Parameter)
_RAW: Any = torch._C.TensorBase  # its methods as they are, whatever a subclass makes of their names
_OWN_STATE = ("bitsandbytes",)  # packages whose parameters convert themselves when they are moved
_DEEPEST = 3  # attributes of attributes of attributes are looked through for tensors


class Unsupported(ValueError):
    """A tensor that cannot be rebound; the text says why, as the end of a sentence."""


@contextlib.contextmanager
def _as_plain(inference: bool = False) -> Iterator[None]:
    """In this block torch treats every tensor as a plain one. New ones count their writes, but for `inference`."""
    with (
        torch._C._DisableTorchDispatch(),
        torch._C.DisableTorchFunctionSubclass(),
        torch.inference_mode(inference),
        torch.no_grad(),
    ):
        yield


class OwnMemory:
    """A subclass with memory of its own, with as much of a tensor's interface as rebinding takes.

    `writes` is a plain, empty tensor that counts the writes to it: torch lets a tensor and its `detach()` share that.
    """

    __slots__ = ("_tensor", "writes")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        with _as_plain():
            writes: torch.Tensor = _RAW.detach(tensor)
        with _as_plain(writes.is_inference()):
            writes.data = torch.empty(0, dtype=writes.dtype, device=writes.device)  # else it would hold on to memory
        self.writes = writes

    def _set_data(self, data: torch.Tensor) -> None:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():
            self._tensor.data = data

    data = property(None, _set_data)

    def plain(self) -> torch.Tensor:
        """The same bytes as a plain tensor."""
        with _as_plain():
            view: torch.Tensor = _RAW.detach(self._tensor)
            return view

    def data_ptr(self) -> int:
        """Address of its first element."""
        return int(self._ask(_RAW.data_ptr))

    def numel(self) -> int:
        """Number of elements that it stores, which is not what its class may say."""
        return int(self._ask(_RAW.numel))

    def untyped_storage(self) -> torch.UntypedStorage:
        """Its memory."""
        return self.plain().untyped_storage()

    @property
    def dtype(self) -> torch.dtype:
        """What it stores."""
        found: torch.dtype = self._ask(_RAW.dtype.__get__)
        return found

    @property
    def device(self) -> torch.device:
        """Where its bytes are."""
        found: torch.device = self._ask(_RAW.device.__get__)
        return found

    def _ask(self, question: Callable[[torch.Tensor], Any]) -> Any:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():
            return question(self._tensor)


Target = torch.Tensor | OwnMemory  # what has bytes, and whose `.data` changes hands


class _Header(torch.Tensor):
    """Holds the header of a wrapper and nothing else."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func}: a header has no values")

    @classmethod
    def of(cls, tensor: torch.Tensor) -> torch.Tensor:
        """What torch keeps of the wrapper `tensor`, without its inner tensors."""
        with _as_plain(_is_inference(tensor)):
            made: torch.Tensor = torch.Tensor._make_wrapper_subclass(cls, (0,), device=_RAW.device.__get__(tensor))
            made.data = tensor
        return made


class Wrapper:
    """A tensor whose bytes are those of its inner tensors, which may be wrappers themselves."""

    __slots__ = ("_devices", "_headers", "_home", "_inner", "_leaves", "_nested", "tensor")

    def __init__(self, tensor: torch.Tensor, inner: dict[str, torch.Tensor], nested: list[Wrapper]) -> None:
        self.tensor = tensor
        self._inner = inner
        self._nested = nested
        self._leaves: list[Target] = [leaf for wrapper in nested for leaf in wrapper._leaves]
        with _as_plain():
            self._home: torch.device = _RAW.device.__get__(tensor)
        self._headers = {self._home: _Header.of(tensor)}
        # what the class itself noted of where it is
        self._devices = {name: value for name, value in vars(tensor).items() if isinstance(value, torch.device)}

    def add(self, leaf: Target) -> None:
        """`leaf` has bytes of it."""
        self._leaves.append(leaf)

    @property
    def replaced(self) -> bool:
        """Whether something else gave it another inner tensor."""
        tensor = self.tensor
        return any(getattr(tensor, name, None) is not inner for name, inner in self._inner.items())

    def settle(self, _: object = None) -> None:
        """Have it say where it is: where all of its bytes are, or where it was found while they are apart."""
        devices = {leaf.device for leaf in self._leaves}
        device = devices.pop() if len(devices) == 1 else self._home
        if self.replaced:
            return
        header = self._headers.get(device)
        if header is None:
            header = self._headers[device] = self._header(device)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():
            self.tensor.data = header
        for name, found in self._devices.items():
            vars(self.tensor)[name] = found if device == self._home else device

    data = property(None, settle)  # so that it stands among the tensors that a unit rebinds, behind its inner ones

    def check(self) -> None:
        """Raise `Unsupported` if its class does not make an equal one of what it was flattened to."""
        devices = {leaf.device for leaf in self._leaves}
        if len(devices) == 1:
            self._header(devices.pop())

    def _header(self, device: torch.device) -> torch.Tensor:
        for wrapper in self._nested:
            wrapper.settle()
        twin = self._twin()
        with _as_plain(_is_inference(self.tensor)):
            if _RAW.device.__get__(twin) == device:
                return _Header.of(twin)
            # its class does not ask the inner tensors
            header: torch.Tensor = torch.Tensor._make_wrapper_subclass(
                _Header,
                _RAW.size(self.tensor),
                strides=_RAW.stride(self.tensor),
                storage_offset=_RAW.storage_offset(self.tensor),
                dtype=_RAW.dtype.__get__(self.tensor),
                device=device,
            )
            return header

    def _twin(self) -> torch.Tensor:
        """A second wrapper around the same inner tensors, by the class's own means."""
        tensor: Any = self.tensor
        with torch.inference_mode(_is_inference(tensor)), torch.no_grad():
            try:
                _, context = tensor.__tensor_flatten__()
                size, stride = _geometry(tensor)
                twin: torch.Tensor = type(tensor).__tensor_unflatten__(dict(self._inner), context, size, stride)
            except Exception as error:
                raise Unsupported(f"its `__tensor_unflatten__` fails ({type(error).__name__}: {error})") from error
        with _as_plain():
            same = type(twin) is type(tensor) and _geometry(twin) == _geometry(tensor)
            if not same or _RAW.dtype.__get__(twin) != _RAW.dtype.__get__(tensor):
                raise Unsupported("its `__tensor_unflatten__` does not make an equal one of what it was flattened to")
        return twin


def _is_inference(tensor: torch.Tensor) -> bool:
    """Whether it was made in inference mode: what takes its place has to be, as torch goes by it."""
    with _as_plain():
        return bool(_RAW.is_inference(tensor))


def _geometry(tensor: torch.Tensor) -> tuple[Any, Any]:
    with _as_plain():
        return _RAW.size(tensor), _RAW.stride(tensor)


class Part(NamedTuple):
    """Plain memory in a tensor: the tensor itself, or one inside it."""

    suffix: str  # what its name has behind the tensor's: "" or ".int_data", ".outer.scale"
    target: Target
    plain: torch.Tensor  # the same bytes, as torch sees them
    wrappers: tuple[Wrapper, ...]  # those that it is in, from the innermost on


class Anatomy:
    """Takes tensors apart. A wrapper that occurs twice is one `Wrapper`."""

    def __init__(self) -> None:
        self._wrappers: dict[int, tuple[Wrapper, list[Part]]] = {}

    def parts(self, tensor: torch.Tensor) -> list[Part]:
        """The plain memory in `tensor`, at any depth.

        Raises:
            Unsupported: it cannot be rebound.
        """
        if type(tensor) in _PLAIN:
            return [Part("", tensor, _checked(tensor), ())]
        if type(tensor).__module__.partition(".")[0] in _OWN_STATE:
            raise Unsupported("its library keeps state of its own beside the weight")
        if is_traceable_wrapper_subclass(tensor):
            return self._inside(tensor)[1]
        _refuse_hidden(tensor, ())
        if _is_passive(type(tensor)):
            return [Part("", tensor, _checked(tensor), ())]
        own = OwnMemory(tensor)
        return [Part("", own, _checked(own.plain()), ())]

    def _inside(self, tensor: Any) -> tuple[Wrapper, list[Part]]:
        known = self._wrappers.get(id(tensor))
        if known is not None:
            return known
        with _as_plain():
            if _RAW.layout.__get__(tensor) is not torch.strided:
                raise Unsupported("its layout is not strided")
        inner = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
        for name, value in inner.items():
            if not isinstance(value, torch.Tensor) or getattr(tensor, name) is not value:
                raise Unsupported(f"its `__tensor_flatten__` names `{name}`, which is no tensor that it keeps")
        _refuse_hidden(tensor, inner.values())
        nested: list[Wrapper] = []
        parts: list[Part] = []
        for name, value in inner.items():
            for part in self.parts(value):
                parts.append(part._replace(suffix=f".{name}{part.suffix}"))
            if id(value) in self._wrappers:
                nested.append(self._wrappers[id(value)][0])
        wrapper = Wrapper(tensor, inner, nested)
        for part in parts:
            if not part.wrappers and part.plain.numel():
                wrapper.add(part.target)
        parts = [part._replace(wrappers=(*part.wrappers, wrapper)) for part in parts]
        wrapper.check()
        self._wrappers[id(tensor)] = wrapper, parts
        return wrapper, parts


def addresses(tensor: torch.Tensor) -> set[int]:
    """Where the memory in `tensor` begins: one address each, of whole storages; none where it has none to ask for."""
    try:
        parts = Anatomy().parts(tensor)
    except Unsupported:
        return set()
    return {part.plain.untyped_storage().data_ptr() for part in parts if part.plain.numel() and not part.plain.is_meta}


def _is_passive(kind: Any) -> bool:
    """Whether torch treats the class as a plain tensor: a Parameter by another name."""
    no_function: Any = torch._C._disabled_torch_function_impl
    no_dispatch: Any = torch._C._disabled_torch_dispatch_impl
    passive = kind.__torch_function__ == no_function and kind.__torch_dispatch__ == no_dispatch
    return bool(passive and kind.data is _RAW.data and kind._version is _RAW._version)


def _checked(plain: torch.Tensor) -> torch.Tensor:
    """`plain`, if a view of its bytes by dtype, size and stride is all there is to it."""
    if plain.layout is not torch.strided:
        raise Unsupported("its layout is not strided")
    if plain.is_quantized or plain.is_nested or plain.is_conj() or plain.is_neg():
        raise Unsupported("it has state beside its bytes (a quantizer, a nested shape, or a lazy conjugate)")
    if plain.numel() and not plain.is_meta and not _has_memory(plain):
        raise Unsupported("it has no memory of its own (a wrapper without `__tensor_flatten__`, or taken by another)")
    return plain


def _has_memory(plain: torch.Tensor) -> bool:
    try:
        return plain.untyped_storage().data_ptr() != 0
    except RuntimeError:  # torch's word for the storage of a wrapper
        return False


def _refuse_hidden(tensor: torch.Tensor, known: Iterable[torch.Tensor]) -> None:
    """Tensors that an object carries beside those it names would stay where they are."""
    path = _hidden(vars(tensor), {id(item) for item in known}, _DEEPEST)
    if path is not None:
        raise Unsupported(f"it carries a tensor beside its bytes (`{path.strip('.')}`), which would stay behind")


def _hidden(values: Any, known: set[int], depth: int) -> str | None:
    """The path to a tensor among `values`, if there is one; those with a single value may be anywhere."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in items:
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.dim():
                return f".{name}"
        elif depth > 1 and not isinstance(value, (nn.Module, ModuleType, type)):
            inside = value if isinstance(value, (dict, list, tuple)) else getattr(value, "__dict__", {})
            path = _hidden(inside, known, depth - 1)
            if path is not None:
                return f".{name}{path}"
    return None
