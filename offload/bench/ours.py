"""Ours in each mode, through the door that users take. Invariant: only the policy's mode differs between them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import nn

from ..policy import OffloadMode, OffloadPolicy
from ..session import Session
from .strategies import Applied, Room, Strategy

COMPONENT = "transformer"


HIGH = "100%"
"""What the weights may take of the card: all that is there, as accelerate.dispatch is given all that is there. A
profile's high (0.6 on a card of 12 GiB) is kinder to other programs, of which there are none in a bench."""

PINNED = "90%"
"""Of system memory: peers lock all they have without asking, so ours may lock what it needs."""


def managed(module: nn.Module, room: Room, mode: str) -> Applied:
    """A session over one component. `reserve` says what an artificial cap takes, where the driver does not show it."""
    policy = OffloadPolicy(mode=OffloadMode(mode), high=HIGH, reserve=room.reserve, pinned_ram=PINNED)
    session = Session(policy, device=room.device)
    try:
        if room.ram is not None:
            session.machine = dataclasses.replace(session.machine, ram_total=room.ram, ram_limit=None, memlock=None)
            session.policy = policy  # resolved anew, for that machine
        session.add(COMPONENT, module)
    except BaseException:
        session.detach()
        raise
    return Applied(module, functools.partial(_facts, session), session.detach)


def _facts(session: Session) -> dict[str, Any]:
    """What it resolved to, what it planned, and what it thought that a step would take."""
    component = session.components[COMPONENT]
    plan = component.plan
    streamed = None
    if plan is not None:  # without the padding between storages, which a copy may leave out or take along
        streamed = sum(unit.nbytes for unit in component.component.units if unit.index not in plan.resident)
    return {
        "registered": component.weights.pinned if session.backend.can_register else 0,
        "resolved": session.resolved.mode.value,
        "sentence": plan.sentence if plan is not None else session.resolved.sentence,
        "predicted_s": plan.step_s if plan is not None else None,
        "placement": plan.placement if plan is not None else None,
        "streamed_bytes": plan.streamed_bytes if plan is not None else None,
        "streamed_raw_bytes": streamed,
        "resident_bytes": plan.resident_bytes if plan is not None else None,
        "ring_bytes": plan.ring_bytes if plan is not None else None,
    }


STRATEGIES: tuple[Strategy, ...] = tuple(
    Strategy(
        f"ours.{mode}",
        True,
        functools.partial(managed, mode=mode),
        f"OffloadPolicy(mode={mode!r}, high={HIGH!r}, pinned_ram={PINNED!r})",
    )
    for mode in ("none", "balanced", "model", "sequential", "auto")
)
