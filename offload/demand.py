"""Weights on demand. Invariant: a tensor used outside its own module's forward is found on the device all the same.

Some models read a weight without calling the module that owns it: attention that takes `out_proj.weight`, an
embedding used as an output layer, a position table that a parent slices. While a forward is watched, every tensor
operation passes here first; a weight that is not on the device is brought up and held until the forward ends, and
its unit is held from then on. It works at the dispatcher, below torch's Python API: a watcher above it makes
modules choose other code paths, and so other bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DemandPaging(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class has no annotations
    """Active for one watched forward; `demand` is told of every tensor that is about to be used."""

    def __init__(self, demand: Callable[[torch.Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._demand = demand

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for arg in args:
            self._check(arg)
        if kwargs:
            for arg in kwargs.values():
                self._check(arg)
        return func(*args, **(kwargs or {}))

    def _check(self, arg: Any) -> None:
        if isinstance(arg, torch.Tensor):
            self._demand(arg)
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                self._check(item)
