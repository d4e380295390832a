"""Ours in each mode, through the door that users take. Invariant: only the policy's mode differs between them."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..policy import OffloadMode, OffloadPolicy
from ..session import Session
from .strategies import Applied, Room, Strategy

COMPONENT = "transformer"


def managed(module: nn.Module, room: Room, mode: str) -> Applied:
    """A session over one component. `reserve` says what an artificial cap takes, where the driver does not show it."""
    session = Session(OffloadPolicy(mode=OffloadMode(mode), reserve=room.reserve), device=room.device)
    try:
        session.add(COMPONENT, module)
    except BaseException:
        session.detach()
        raise
    return Applied(module, functools.partial(_facts, session), session.detach)


def _facts(session: Session) -> dict[str, Any]:
    """What it resolved to, what it planned, and what it thought that a step would take."""
    component = session.components[COMPONENT]
    plan = component.plan
    predicted = getattr(plan, "predicted", None)  # StepTime of the schedule, where the plan was scored by it
    return {
        "resolved": session.resolved.mode.value,
        "sentence": getattr(plan, "sentence", None) or session.resolved.sentence,
        "predicted_s": getattr(predicted, "step_s", None),
        "streamed_bytes": getattr(plan, "streamed_bytes", None),
        "resident_bytes": getattr(plan, "resident_bytes", None),
        "ring_bytes": getattr(plan, "ring_bytes", None),
    }


STRATEGIES: tuple[Strategy, ...] = tuple(
    Strategy(f"ours.{mode}", True, functools.partial(managed, mode=mode), f"OffloadPolicy(mode={mode!r})")
    for mode in ("none", "balanced", "model", "sequential", "auto")
)
