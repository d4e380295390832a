"""How much memory a stage needs beside weights. Invariant: a learned peak beats an estimate, and each says which it is.

A peak is learned per (component, entry point, shapes, dtype): the most that was allocated during the stage, less what
was there when it began. Before that it is estimated from the shapes that come in and the widths of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .policy import ActivationSource
from .units import Component

Signature = tuple[Any, ...]
GRADIENT = "gradient"  # in a signature: an input of the call requires one

# Live tensors of the widest activation at once, per kind of model. Guesses of the right order, on the safe side:
# they decide one first stage, then the measured peak takes their place.
_LIVE = {"denoiser": 24, "controlnet": 24, "text_encoder": 24, "vae": 10, "other": 16}


def signature(entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature:
    """What decides the activation peak of a call: entry point, shapes and dtypes of the tensors that come in, and
    whether a gradient will be asked for through it (`GRADIENT`)."""
    found: list[Any] = [entry]
    if torch.is_grad_enabled() and _wants_gradient((*args, *kwargs.values())):
        found.append(GRADIENT)
    for value in args:
        _describe(value, found)
    for name, value in kwargs.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            found.append(name)
            _describe(value, found)
    return tuple(found)


def _wants_gradient(values: Any) -> bool:
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)):
            if _wants_gradient(value):
                return True
        elif isinstance(value, Mapping) and _wants_gradient(value.values()):
            return True
    return False


def _describe(value: Any, found: list[Any]) -> None:
    if isinstance(value, torch.Tensor):
        found.append((tuple(value.shape), value.dtype))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _describe(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _describe(item, found)


def estimate(component: Component, entry: str, sig: Signature, width: _Widths | None = None) -> int:
    """Bytes that a call of this signature is guessed to need, before it was ever measured."""
    shapes = list(_shapes(sig))
    if not shapes:
        return 0
    item = component.dtype.itemsize if component.dtype is not None else 4
    width = width or _widths(component.module)
    # positions x channels of the widest activation: a picture's pixels, or a sequence's tokens
    widest = 0
    for shape in shapes:
        if len(shape) >= 4:
            pixels = shape[0] * math.prod(shape[2:])
            if component.role == "vae":
                scale = _upscale(component.module)
                grown = pixels * scale ** (len(shape) - 2) if entry == "decode" else pixels
                widest = max(widest, grown * width.edge)
            else:
                widest = max(widest, pixels * width.edge)
        elif len(shape) >= 2:
            widest = max(widest, math.prod(shape[:2]) * width.hidden)
    return widest * item * _LIVE.get(component.role, _LIVE["other"])


def _shapes(sig: Signature) -> Iterator[tuple[int, ...]]:
    for item in sig:
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], tuple):
            yield item[0]


@dataclass(frozen=True)
class _Widths:
    edge: int  # channels at full resolution: the narrow end of a convolutional net
    hidden: int  # width of the token stream


def _widths(module: nn.Module) -> _Widths:
    convs = [m.out_channels for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    linears = [m.in_features for m in module.modules() if isinstance(m, nn.Linear)]
    embeddings = [m.embedding_dim for m in module.modules() if isinstance(m, nn.Embedding)]
    edge = convs[0] if convs else (linears[0] if linears else 64)
    hidden = max(embeddings or sorted(linears)[len(linears) // 2 : len(linears) // 2 + 1] or [edge])
    return _Widths(max(edge, 8), max(hidden, 8))


def _upscale(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    blocks = getattr(config, "block_out_channels", None)
    return int(2 ** (len(blocks) - 1)) if blocks else 8


MOST_LEARNED = 1024  # signatures that are remembered; the oldest go first


@dataclass
class ActivationPeaks:
    """Learned peaks of one session, bytes, by (component, signature)."""

    learned: dict[tuple[str, Signature], int] = field(default_factory=dict)
    _guessed: dict[tuple[str, Signature], int] = field(default_factory=dict)
    _widths: dict[str, _Widths] = field(default_factory=dict)
    _latest: dict[str, tuple[int, ActivationSource]] = field(default_factory=dict)
    _hints: dict[str, int] = field(default_factory=dict)

    def expect(
        self, component: Component, entry: str, sig: Signature, headroom: int | None
    ) -> tuple[int, ActivationSource]:
        """Bytes to keep free for this call, and where the figure is from: learned, headroom or estimated."""
        key = (component.name, sig)
        if key in self.learned:
            return self.learned[key], "learned"
        if headroom is not None:
            found: tuple[int, ActivationSource] = (headroom, "headroom")
        elif component.name in self._hints:
            found = (self._hints[component.name], "estimated")
        else:
            if key not in self._guessed:
                if component.name not in self._widths:
                    self._widths[component.name] = _widths(component.module)
                self._guessed[key] = estimate(component, entry, sig, self._widths[component.name])
                _trim(self._guessed)
            found = (self._guessed[key], "estimated")
        self._latest[component.name] = found
        return found

    def hint(self, component: str, nbytes: int) -> None:
        """A host says what it expects the next calls to need: it takes the place of our guess, not of a measurement."""
        self._hints[component] = nbytes

    def learn(self, component: str, sig: Signature, nbytes: int, beside_weights: int) -> None:
        """The last run of this shape needed `nbytes` more than there was in use when it began.

        `beside_weights` is all that was in use and no weight, what was there before included: the fit rule's figure.
        """
        self.learned[(component, sig)] = nbytes
        _trim(self.learned)
        self._latest[component] = (beside_weights, "learned")

    def forget(self, component: str) -> None:
        """The component changed (dtype, weights) or went: what was measured on it no longer holds."""
        for table in (self.learned, self._guessed):
            for key in [k for k in table if k[0] == component]:
                del table[key]
        self._latest.pop(component, None)
        self._widths.pop(component, None)
        self._hints.pop(component, None)

    def largest(self) -> tuple[int, ActivationSource]:
        """The largest peak beside weights among the stages seen so far, and where it is from."""
        return max(self._latest.values(), default=(0, "estimated"))


def _trim(table: dict[tuple[str, Signature], int]) -> None:
    while len(table) > MOST_LEARNED:
        del table[next(iter(table))]
