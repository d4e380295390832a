"""Entry points of a component. Invariant: what we put on an instance is taken off again, to the attribute.

An entry point is a method through which a host calls a component: `forward`, a VAE's `encode` and `decode`. We shadow
it by an instance attribute, which leaves the class alone and can retry a call after running out of memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Call = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_ABSENT = object()


class EntryPoints:
    """The shadowed methods of one module."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        self._module = module
        self._names = tuple(name for name in names if callable(getattr(module, name, None)))
        self._before: dict[str, Any] = {}

    @property
    def attached(self) -> bool:
        """Whether the methods are shadowed now."""
        return bool(self._before)

    def attach(self, call: Call) -> None:
        """Send every call of an entry point through `call(name, method, args, kwargs)`."""
        if self._before:
            return
        for name in self._names:
            self.shadow(name, call)

    def shadow(self, name: str, call: Call) -> None:
        """Send calls of the method `name` through `call`."""
        self._before[name] = self._module.__dict__.get(name, _ABSENT)
        method = getattr(self._module, name)

        @functools.wraps(method)
        def entry(*args: Any, **kwargs: Any) -> Any:
            return call(name, method, args, kwargs)

        self._module.__dict__[name] = entry

    def detach(self) -> None:
        """Put every attribute back as it was."""
        for name, value in self._before.items():
            if value is _ABSENT:
                self._module.__dict__.pop(name, None)
            else:
                self._module.__dict__[name] = value
        self._before = {}
