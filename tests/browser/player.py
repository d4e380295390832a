"""Invariant: the events of a played prompt come in a host's order, and go to whom a host would send them.

What a prompt does is a list of messages with pauses, made here; the stub sends them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

if __package__:
    from . import canned
else:  # beside a script
    import canned

SHOWN = ("SaveImage", "PreviewAny", "VRAMReport")
"""Output nodes: they end in an `executed`."""


def usual_report(prompt_id: str, prompt: dict[str, Any], steps: int) -> dict[str, Any]:
    """The canned report on the ids of this graph's own nodes."""

    def first(kind: str, usual: str) -> str:
        return next((key for key, node in prompt.items() if node.get("class_type") == kind), usual)

    nodes = (first("CLIPTextEncode", "6"), first("KSampler", "3"), first("VAEDecode", "8"))
    return canned.report(prompt_id, nodes=nodes, steps=steps)


class Player:
    """One prompt. send(event, data): to the client that queued it; telemetry(data): to those that asked."""

    def __init__(
        self,
        prompt_id: str,
        prompt: dict[str, Any],
        send: Callable[[str, Any], Awaitable[None]],
        telemetry: Callable[[Any], Awaitable[None]],
    ) -> None:
        self.prompt_id, self.prompt = prompt_id, prompt
        self.node: str | None = None
        """The node that runs."""
        self._send, self._telemetry = send, telemetry

    async def play(
        self, steps: int, delay: float, stop: asyncio.Event, report: Callable[[str, dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Every node in turn, a sampler in so many steps -> the report. stop: ends it as an interrupt does."""
        base = {"prompt_id": self.prompt_id}
        await self._send("execution_start", {**base, "timestamp": int(time.time() * 1e3)})
        await self._send("execution_cached", {"nodes": [], **base})
        for node, described in self.prompt.items():
            self.node = node
            kind = described.get("class_type")
            await self._send("executing", {"node": node, "display_node": node, **base})
            if kind == "KSampler":
                await self._sample(node, steps, delay, stop)
            if stop.is_set():
                break
            if kind in SHOWN:
                output: dict[str, Any] = {"text": ["So far: 1.5 s"]}
                if kind == "VRAMReport":
                    output["vram_report"] = [report(self.prompt_id, self.prompt)]
                await self._send("executed", {"node": node, "display_node": node, "output": output, **base})
            await asyncio.sleep(delay)
        self.node = None
        made = report(self.prompt_id, self.prompt)
        if stop.is_set():
            made = {
                **made,
                "complete": False,
                "verdict": "error",
                "error": {"type": "Interrupted", "message": "stopped"},
            }
        await self._send("execution_interrupted" if stop.is_set() else "execution_success", base)
        await self._send("executing", {"node": None, **base})
        return made

    async def _sample(self, node: str, steps: int, delay: float, stop: asyncio.Event) -> None:
        for step in range(1, steps + 1):
            await self._send("progress", {"value": step, "max": steps, "node": node, "prompt_id": self.prompt_id})
            await self._telemetry(canned.telemetry(self.prompt_id, node, step, steps, 1.5 + 0.22 * step))
            await asyncio.sleep(delay)
            if stop.is_set():
                return
