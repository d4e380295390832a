"""Out of memory, one step down. Invariant: each step is taken once per stage, and each is reported.

The order: evict what the stage does not need, shrink the resident set of the running component, tile the VAE,
sequential; then the error, with the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .backend import Backend
from .ledger import Ledger
from .managed import Managed
from .plan import sequential_plan, stream_plan
from .policy import ResolvedPolicy, always_resident
from .sizes import format_size

STEPS = ("evict", "shrink", "tile", "sequential")


class StepDown:
    """The ladder of one session."""

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger,
        components: Mapping[str, Managed],
        policy: Callable[[], ResolvedPolicy],
    ) -> None:
        self._backend = backend
        self._ledger = ledger
        self._components = components
        self._policy = policy
        self.tile: Callable[[str], bool] | None = None  # set by an adapter: switch a VAE to tiles, True if it did
        self.ask_host: Callable[[int], int] | None = None  # what else is on the device: free at least so many bytes

    def take(self, managed: Managed) -> bool:
        """Take the next step for the stage of `managed`; False when there is none left, or the policy says stop."""
        policy = self._policy()
        if policy.on_oom == "stop" or always_resident(policy):
            return False
        for step in STEPS:
            if step in managed.rungs:
                continue
            managed.rungs.add(step)
            try:
                done = getattr(self, f"_{step}")(managed)
            except torch.OutOfMemoryError:  # not even what this step wanted fits: the next one wants less
                continue
            if done:
                self._ledger.event("oom", f"out of memory in {managed.name}: {done}", step=step)
                self._backend.empty_cache()
                return True
        return False

    def _evict(self, managed: Managed) -> str | None:
        others = [m for m in self._components.values() if not m.running and m.engine.device_bytes]
        freed = 0
        for other in others:
            if other.name not in self._policy().never:
                freed += other.engine.evict(None, "oom")
                other.unplace()
        if self.ask_host is not None:
            freed += self.ask_host(managed.component.device_bytes + managed.reserved)
        return f"evicted {format_size(freed)} of other components" if freed else None

    def _shrink(self, managed: Managed) -> str | None:
        if managed.name in self._policy().never:
            return None
        # half of what it held; where not even the loading went through, half of what there is
        held = managed.engine.device_bytes if managed.engine.loaded else self._room(managed)
        return self._limit(managed, held // 2)

    def _room(self, managed: Managed) -> int:
        now = self._backend.memory()
        return now.free + now.reclaimable + managed.engine.device_bytes

    def _limit(self, managed: Managed, nbytes: int) -> str:
        held, prefetch = managed.engine.held_units, self._policy().prefetch
        if "sequential" in managed.rungs:
            plan = sequential_plan(managed.component, held, prefetch, nbytes)
        else:
            plan = stream_plan(managed.component, nbytes, held, prefetch)
        managed.limit = nbytes
        managed.engine.apply(plan, "oom")
        return plan.sentence

    def _tile(self, managed: Managed) -> str | None:
        if managed.role != "vae" or self._policy().vae_tiling == "off" or self.tile is None:
            return None
        return "its VAE works in tiles from here on" if self.tile(managed.name) else None

    def _sequential(self, managed: Managed) -> str | None:
        if managed.name in self._policy().never:
            return None
        # a ring that leaves half of the room to the activations, or none at all
        return self._limit(managed, self._room(managed) // 2)

    def figures(self, managed: Managed, failure: str) -> str:
        """The error's text: what was tried, what is there, what to change."""
        if always_resident(self._policy()) and "Mode none" not in failure:
            failure = f"Mode none keeps everything resident. {failure}"
        now = self._backend.memory()
        sizes = {name: m.engine.device_bytes for name, m in self._components.items()}
        weights = ", ".join(f"{name} {format_size(size)}" for name, size in sizes.items() if size) or "none"
        tried = ", ".join(step for step in STEPS if step in managed.rungs) or "nothing"
        return (
            f"{managed.name} ({format_size(managed.component.weight_bytes)} of weights) ran out of memory on "
            f"{self._backend.name}: {format_size(now.free)} free of {format_size(now.total)}; weights on the device: "
            f"{weights}; steps taken: {tried}. {failure} Lower `high`, choose mode sequential, "
            "make the picture smaller, or close other programs that use the card."
        )
