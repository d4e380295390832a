"""Invariant: every operation is counted once, with the arithmetic that it does and the bytes that it reads and writes.

The counts are those of the fused kernels that a GPU runs: attention is one operation that never writes its scores, and
views cost nothing. The same rules as the virtual clock of the simulated accelerator, so that the two can be compared.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..units import aligned

Charge = Callable[[float, int], None]
"""Takes FLOP and bytes of memory traffic of one operation."""

_FREE = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
}


class CountOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports each operation below it to `charge`, and keeps account of the memory that results take.

    `peak` is the most that they took at one time, bytes: the activations of what ran.
    """

    def __init__(self, charge: Charge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._charge = charge
        self._live = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in _FREE and not _is_view(func):
            operands = {id(t): t for t in _tensors((args, kwargs))}
            written = {id(t) for t in _tensors(result) if id(t) in operands}
            traffic = sum(_nbytes(t) * (2 if key in written else 1) for key, t in operands.items())
            traffic += sum(_nbytes(t) for t in _tensors(result) if id(t) not in operands)
            self._charge(_flops(name, args, result), traffic)
        if not _is_view(func):
            given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
            for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(result)}.values():
                if storage._cdata not in given:
                    self._hold(storage)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        nbytes = aligned(int(storage.nbytes()))
        self._live += nbytes
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, nbytes)

    def _release(self, nbytes: int) -> None:
        self._live -= nbytes


class FuseAttention(TorchFunctionMode):
    """Scaled dot product attention as one operation: on the meta device torch would take it apart."""

    def __init__(self, charge: Charge) -> None:
        super().__init__()
        self._charge = charge

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
        flops = (
            2.0 * query.numel() * key.shape[-2]
            + 2.0 * query.numel() / query.shape[-1] * key.shape[-2] * value.shape[-1]
        )
        # Fused kernels lay their result out by position, so that the heads are joined without a copy.
        *batch, heads, length, _ = query.shape
        out = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-2, -3)
        seen = {id(t): t for t in (query, key, value, mask) if isinstance(t, torch.Tensor)}
        sums = 4 * math.prod(query.shape[:-1])
        self._charge(flops, sum(map(_nbytes, seen.values())) + _nbytes(out) + sums)
        return out


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _flops(name: str, args: tuple[Any, ...], result: Any) -> float:
    if name in ("mm", "bmm"):
        return 2.0 * int(args[0].numel()) * int(args[1].shape[-1])
    if name in ("addmm", "baddbmm", "_addmm_activation"):
        return 2.0 * int(args[1].numel()) * int(args[2].shape[-1])
    if name in ("convolution", "_convolution", "convolution_overrideable"):
        return 2.0 * int(result.numel()) * float(math.prod(args[1].shape[1:]))
    return 0.0


def _nbytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel()) * int(tensor.element_size())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
