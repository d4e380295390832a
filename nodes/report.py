"""Invariant: the node reports and changes nothing: it passes on what comes in, and no failure to write ends a prompt.

What it returns is what is known when it runs. The record in /history and the file are completed when the prompt ends,
after errors too; a prompt that never reaches the node has its file and its record at /offload/report/{prompt_id}.
"""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..offload.adapters.comfyui_runs import runs
from ..offload.adapters.comfyui_runs_report import move_seconds, peak_bytes, text_of
from .policy import known_to_host

GIB = 1 << 30


class VRAMReportNode(io.ComfyNode):
    """Says where the time and the VRAM of a prompt went."""

    @classmethod
    def define_schema(cls) -> Any:
        return known_to_host(
            io.Schema,
            node_id="VRAMReport",
            display_name="VRAM Report",
            category="Offload",
            description="Where the time and the VRAM of this prompt went, as text, as JSON in /history and as a file "
            "beside the images. Completed when the prompt ends, after an error or an OOM too.",
            search_aliases=["lowvram", "block swap", "unload", "oom", "vram", "offload", "report", "memory"],
            inputs=[
                known_to_host(
                    io.AnyType.Input,
                    id="anything",
                    display_name="anything",
                    optional=True,
                    tooltip="Passed on unchanged. Connect the last thing that is made, so that the node runs late.",
                )
            ],
            outputs=[
                io.AnyType.Output("any", display_name="any", tooltip="What came in, unchanged."),
                io.String.Output(
                    "report_json",
                    display_name="report_json",
                    tooltip="The record so far as JSON (offload-report/1); the one in /history and the file are whole.",
                ),
                io.Float.Output(
                    "peak_vram_gib",
                    display_name="peak_vram_gib",
                    tooltip="The highest VRAM use of this prompt so far, GiB; NaN where nobody can tell.",
                ),
                io.Float.Output(
                    "move_seconds",
                    display_name="move_seconds",
                    tooltip="Seconds that this prompt waited for weights so far; NaN where the host moves them.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        """NaN, which equals nothing: a report is never taken from the cache. The host asks at the prompt's start, on
        the thread that will run it: so the record begins there, and its file comes whatever happens on the way."""
        runs().ask_file()
        return float("nan")

    @classmethod
    def execute(cls, anything: Any = None) -> Any:
        record = runs().show(getattr(cls.hidden, "unique_id", None))
        peak = peak_bytes(record)
        return io.NodeOutput(
            anything,
            json.dumps(record, ensure_ascii=False, allow_nan=False),
            float("nan") if peak is None else peak / GIB,
            move_seconds(record),
            ui={"vram_report": [record], "text": [text_of(record)]},
        )
