"""Invariant: another pack had the routes first; it answers them, whatever Balanced Offload does. Test only."""

from __future__ import annotations

import sys
from typing import Any

NODE_CLASS_MAPPINGS: dict[str, type] = {}


def claim() -> None:
    from aiohttp import web
    from server import PromptServer

    routes = PromptServer.instance.routes

    @routes.get("/offload/status")
    async def status(request: Any) -> Any:
        return web.json_response({"from": "same_routes"})

    @routes.get("/offload/other")
    async def other(request: Any) -> Any:
        return web.json_response({"from": "same_routes"})


if "server" in sys.modules and getattr(sys.modules["server"].PromptServer, "instance", None):
    claim()
