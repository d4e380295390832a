"""Shapes of what is not computed, remembered. Invariant: a remembered shape is what torch's own kernel answered before.

In ghost mode only shapes are worked out, by torch's meta kernels, many of which are Python: a hundred microseconds for
each of the ten thousand operations of a forward. Every step asks the same questions again, so the answers are kept.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The frequent ones of diffusion models; none writes to an argument. Those with an `out` come with it sized already, as
# torch works shapes out before it asks a device that has no kernel of its own.
_OPERATORS = (
    "mul.out",
    "add.out",
    "sub.out",
    "div.out",
    "neg.out",
    "sin.out",
    "cos.out",
    "exp.out",
    "rsqrt.out",
    "pow.Tensor_Scalar_out",
    "mean.out",
    "silu.out",
    "gelu.out",
    "sigmoid.out",
    "tanh.out",
    "mm.out",
    "bmm.out",
    "addmm.out",
    "baddbmm.out",
    "cat.out",
    "_softmax.out",
    "mul.Tensor",
    "add.Tensor",
    "div.Tensor",
    "native_layer_norm",
    "native_group_norm",
    "convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_META = torch._C.DispatchKey.Meta
Kernel = Callable[..., Any]


def _asked(value: Any) -> Any:
    """A value as part of a question; unhashable values make the question unanswerable (TypeError)."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg())
    if isinstance(value, (list, tuple)):
        return tuple(map(_asked, value))
    return (type(value), value)  # 1, 1.0 and True are equal, and promote to different types


def _shape(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def _made(shape: Any) -> Any:
    if isinstance(shape, tuple):
        return torch.empty_strided(shape[0], shape[1], dtype=shape[2], device="meta")
    return shape


def remembering(kernel: Kernel) -> Kernel:
    """`kernel` with its answers kept; what it returns must be `out`, new tensors, or a tuple of them and numbers."""
    answers: dict[Any, Any] = {}

    def answer(*args: Any, **kwargs: Any) -> Any:
        question = (tuple(map(_asked, args)), tuple((key, _asked(value)) for key, value in kwargs.items()))
        known, out = answers.get(question), kwargs.get("out")
        if known is None:
            before = _shape(out)
            found = kernel(*args, **kwargs)
            if out is not None:
                if _shape(found) == before:  # else it has to be resized again the next time
                    answers[question] = (False, before)
                return found
            many = isinstance(found, (tuple, list))
            answers[question] = (many, tuple(map(_shape, found)) if many else _shape(found))
            return found
        if out is not None:
            return out
        many, shape = known
        return tuple(map(_made, shape)) if many else _made(shape)

    return answer


@contextlib.contextmanager
def remembered_shapes() -> Iterator[None]:
    """Torch's meta kernels of the frequent operators remember their answers within the block."""
    library: Any = torch.library.Library("aten", "IMPL", "Meta")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden, which is meant
            for written in _OPERATORS:
                name, _, overload = written.partition(".")
                operator = getattr(getattr(torch.ops.aten, name), overload or "default")
                kernel = operator.py_kernels.get(_META)
                if kernel is not None:
                    library.impl(operator, remembering(kernel))
        yield
    finally:
        library._destroy()
