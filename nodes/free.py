"""Invariant: only what is missing is freed, and what stays is named with its size and the reason.

Imported only when a ComfyUI host asks for the nodes (see extension.py), since it needs `comfy_api`.
"""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..offload.sizes import GIB, bad_value
from . import words
from .policy import known_to_host

MOST_GIB = 1024.0


class FreeVRAMToFit(io.ComfyNode):
    """Makes room for what comes next, and keeps what fits beside it."""

    @classmethod
    def define_schema(cls) -> Any:
        return known_to_host(
            io.Schema,
            node_id="FreeVRAMToFit",
            display_name="Free VRAM (keep what fits)",
            category=words.CATEGORY,
            description=(
                "Frees VRAM until so much is free, and keeps every model that fits beside it. Put it on a link between "
                "two nodes: it runs there, and passes on what it got. It says what went, what stayed and why."
            ),
            search_aliases=words.aliases("purge", "clean vram", "free memory", "clear cache"),
            inputs=[
                io.AnyType.Input(
                    "anything", optional=True, tooltip="Passed on unchanged; it decides when this node runs."
                ),
                known_to_host(
                    io.Float.Input,
                    id="need_gib",
                    display_name="need (GiB)",
                    default=0.0,
                    min=0.0,
                    max=MOST_GIB,
                    step=0.25,
                    optional=True,
                    tooltip="How much VRAM must be free, in GiB. 0: as much as the next stage needs (its weights that "
                    "are not there yet and its activations, as far as learned).",
                ),
            ],
            outputs=[
                io.AnyType.Output("out", display_name="anything", tooltip="What came in."),
                io.String.Output("kept", display_name="kept", tooltip="What was freed, what was kept, and why."),
            ],
        )

    @classmethod
    def validate_inputs(cls, need_gib: float | None = 0.0) -> bool | str:
        """A link arrives as None, and is judged when it runs."""
        try:
            _bytes(need_gib or 0.0)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, anything: Any = None, need_gib: float = 0.0) -> Any:
        from ..offload.adapters.comfyui_device import free_to_fit
        from ..offload.adapters.comfyui_runs import runs

        need = _bytes(need_gib)
        runs().touch("observe")
        done = free_to_fit(need or None)
        runs().note("free", done.sentence)
        return io.NodeOutput(anything, done.sentence, ui=words.say([done.sentence]))


def _bytes(gib: float) -> int:
    if not math.isfinite(gib) or not 0.0 <= gib <= MOST_GIB:
        raise bad_value("need_gib", gib, f"0 to {MOST_GIB:g} GiB", "0 asks the next stage")
    return int(gib * GIB)
