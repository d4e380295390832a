"""Out of memory, one step down. Invariant: each step is taken once per stage, and each is reported.

The order: evict what the stage does not need, shrink the resident set of the running component, tile the VAE,
sequential; then the error, with the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .plan import sequential_plan, stream_plan
from .sizes import format_size
from .stages import always_resident

if TYPE_CHECKING:
    from .managed import Managed
    from .session import Session

STEPS = ("evict", "shrink", "tile", "sequential")


class StepDown:
    """The ladder of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.tile: Callable[[str], bool] | None = None  # set by an adapter: switch a VAE to tiles, True if it did

    def take(self, managed: Managed) -> bool:
        """Take the next step for the stage of `managed`; False when there is none left, or the policy says stop."""
        session = self._session
        if session.resolved.on_oom == "stop" or always_resident(session.resolved):
            return False
        for step in STEPS:
            if step in managed.rungs:
                continue
            managed.rungs.add(step)
            done = getattr(self, f"_{step}")(managed)
            if done:
                session.ledger.event("oom", f"out of memory in {managed.name}: {done}", step=step)
                session.backend.empty_cache()
                return True
        return False

    def _evict(self, managed: Managed) -> str | None:
        others = [m for m in self._session.components.values() if not m.running and m.engine.device_bytes]
        freed = 0
        for other in others:
            if other.name not in self._session.resolved.never:
                freed += other.engine.evict(None, "oom")
                other.unplace()
        return f"evicted {format_size(freed)} of other components" if freed else None

    def _shrink(self, managed: Managed) -> str | None:
        held = managed.engine.device_bytes
        if managed.name in self._session.resolved.never or not managed.engine.loaded:
            return None
        plan = stream_plan(managed.component, held // 2, managed.engine.held_units, self._session.resolved.prefetch)
        if plan.device_bytes >= held:
            return None
        managed.engine.apply(plan, "oom")
        managed.limit = plan.device_bytes
        return plan.sentence

    def _tile(self, managed: Managed) -> str | None:
        if managed.role != "vae" or self._session.resolved.vae_tiling == "off" or self.tile is None:
            return None
        return "its VAE works in tiles from here on" if self.tile(managed.name) else None

    def _sequential(self, managed: Managed) -> str | None:
        if managed.name in self._session.resolved.never:
            return None
        held = managed.engine.device_bytes
        plan = sequential_plan(managed.component, managed.engine.held_units, self._session.resolved.prefetch)
        if plan.device_bytes >= held and not managed.engine.loaded:
            return None
        managed.engine.apply(plan, "oom")
        managed.limit = 0
        return plan.sentence

    def figures(self, managed: Managed, failure: str) -> str:
        """The error's text: what was tried, what is there, what to change."""
        session = self._session
        now = session.backend.memory()
        weights = ", ".join(f"{n} {format_size(b)}" for n, b in session.device_bytes.items() if b) or "none"
        tried = ", ".join(step for step in STEPS if step in managed.rungs) or "nothing"
        return (
            f"{managed.name} ({format_size(managed.component.weight_bytes)} of weights) ran out of memory on "
            f"{session.backend.name}: {format_size(now.free)} free of {format_size(now.total)}; weights on the device: "
            f"{weights}; steps taken: {tried}. {failure} Lower `high`, choose mode sequential, "
            "make the picture smaller, or close other programs that use the card."
        )
