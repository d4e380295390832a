"""Invariant: the list of nodes that the host gets; the one place to add another. Needs `comfy_api`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .policy import OffloadPolicyNode


class BalancedOffloadExtension(ComfyExtension):
    """What `comfy_entrypoint` returns."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [OffloadPolicyNode]
