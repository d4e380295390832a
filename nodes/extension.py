"""Invariant: the list of nodes that the host gets; the one place to add another. Needs `comfy_api`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..offload.adapters.comfyui_runs import runs
from ..offload.adapters.comfyui_runs_host import stock_wanted
from .apply import ApplyOffloadPolicy
from .free import FreeVRAMToFit
from .loader import ModelLoaderWithOffload
from .pipeline import PipelineGenerate, PipelineLoaderWithOffload
from .policy import OffloadPolicyNode
from .report import VRAMReportNode
from .server import register_routes


class BalancedOffloadExtension(ComfyExtension):
    """What `comfy_entrypoint` returns."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # here and not in `on_load`, which older hosts never call
        register_routes()
        runs().on_idle(_sweep)
        return [
            OffloadPolicyNode,
            ModelLoaderWithOffload,
            ApplyOffloadPolicy,
            PipelineLoaderWithOffload,
            PipelineGenerate,
            FreeVRAMToFit,
            VRAMReportNode,
        ]


def _sweep() -> None:
    """No model is in use: let go of those that nobody holds any more, and of all where stock behaviour is wanted."""
    from ..offload.adapters.comfyui_device import restore_stock, sweep

    sweep()
    if stock_wanted():
        restore_stock()
