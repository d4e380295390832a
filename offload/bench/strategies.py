"""What a bench compares. Invariant: a strategy is only applied to a module; it is built, fed and timed elsewhere.

A strategy gets a fresh module on the CPU and what a user would know (the device, its cap, the activations of a
forward), and makes the module run on the device. The names are those of `offload-bench/1`, in the table's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Room:
    """What a strategy may know of where it runs. Bytes; `cap` None is no cap."""

    device: torch.device
    cap: int | None
    weights: int
    activations: int
    reserve: int = 0  # what the driver shows as free but is not ours to use
    ram: int | None = None  # of the machine that a simulated card sits in; None is the machine at hand


def nothing() -> dict[str, Any]:
    """No facts."""
    return {}


def no_close() -> None:
    """Nothing to give back."""


@dataclass
class Applied:
    """A module that is ready to be called. `close` gives back what dropping the module would not."""

    module: nn.Module
    facts: Callable[[], dict[str, Any]] = field(default=nothing)  # more fields of the result, once it has run
    close: Callable[[], None] = field(default=no_close)


Apply = Callable[[nn.Module, Room], Applied]


@dataclass(frozen=True)
class Strategy:
    """One row of the table. `fallbacks` are tried in turn where memory runs out, as a user would lower a number."""

    name: str
    ours: bool
    apply: Apply
    note: str = ""
    fallbacks: tuple[Apply, ...] = ()


def all_strategies() -> tuple[Strategy, ...]:
    """Ours in each mode, then every peer."""
    from .ours import STRATEGIES as OURS
    from .peers import STRATEGIES as PEERS

    return (*OURS, *PEERS)


def chosen(only: Iterable[str] | None) -> tuple[Strategy, ...]:
    """The strategies of `--only`, in the table's order; a name without a dot takes all of its family ("ours").

    Raises:
        ValueError: a name that is none.
    """
    every = all_strategies()
    if only is None:
        return every
    wanted: set[str] = set()
    for name in only:
        found = {one.name for one in every if one.name == name or one.name.split(".")[0] == name}
        if not found:
            raise ValueError(
                f"--only: got {name!r}; allowed: {', '.join(one.name for one in every)}, or a family (ours)"
            )
        wanted |= found
    return tuple(one for one in every if one.name in wanted)
