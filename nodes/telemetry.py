"""Invariant: nobody is sent anything that it did not ask for, and nobody is sent more than ten messages a second.

A client asks by `GET /offload/status?telemetry=CLIENT_ID`, its own id on the host's websocket, and is sent
`offload.telemetry` for `LASTS` seconds; asking again goes on. The state that this leaves behind is a name in a list
that empties itself: nothing of the host, of a run or of a file is changed by a request.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from ..offload.adapters import comfyui_host
from ..offload.adapters.comfyui_runs_report import text_of

LASTS = 30.0  # seconds
MOST = 16  # clients at once
PERIOD = 0.1  # seconds between two messages
_ID = re.compile(r"[0-9A-Za-z_.-]{1,128}")


class Telemetry:
    """Who asked, and what they are sent. `clock` in seconds; `server` gives the host's PromptServer or None."""

    def __init__(self, clock: Callable[[], float] = monotonic, server: Callable[[], Any] = comfyui_host.server) -> None:
        self._clock = clock
        self._server = server
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}
        self._sent = float("-inf")

    def ask(self, client_id: str) -> str | None:
        """A client asks for `LASTS` seconds of telemetry. None, or why it gets none, in words."""
        if not _ID.fullmatch(client_id):
            return "telemetry: got no client id; allowed is 1 to 128 letters, digits, '-', '_' or '.'"
        sockets = getattr(self._server(), "sockets", None)
        if not isinstance(sockets, dict) or client_id not in sockets:
            return "telemetry: no websocket is open under this client id; open /ws?clientId=... first"
        now = self._clock()
        with self._lock:
            self._expire(now)
            if client_id not in self._until and len(self._until) >= MOST:
                return f"telemetry: {MOST} clients are served already; one of them has to stop asking"
            self._until[client_id] = now + LASTS
        return None

    def clients(self) -> dict[str, float]:
        """Client id -> seconds for which it is still sent telemetry."""
        now = self._clock()
        with self._lock:
            self._expire(now)
            return {name: round(until - now, 3) for name, until in self._until.items()}

    def _expire(self, now: float) -> None:
        for name in [name for name, until in self._until.items() if until <= now]:
            del self._until[name]

    def wanted(self) -> bool:
        """Whether anybody is sent telemetry now."""
        return bool(self._until) and bool(self.clients())

    def sample(self, figures: dict[str, Any]) -> None:
        """Send `offload.telemetry` to those that asked."""
        if not self._until:
            return
        now = self._clock()
        if now - self._sent < PERIOD * 0.9:  # the caller's timer jitters
            return
        self._sent = now
        for name in self.clients():
            self._send("offload.telemetry", figures, name)

    def closed(self, report: dict[str, Any]) -> None:
        """Send `offload.report` to the client that queued the prompt and to those that asked for telemetry."""
        told = {str(name) for name in (report.get("client_id"), *self.clients()) if name is not None}
        message = {"prompt_id": report["prompt_id"], "verdict": report["verdict"], "text": text_of(report)}
        for name in sorted(told):
            self._send("offload.report", message, name)

    def _send(self, event: str, data: dict[str, Any], client_id: str) -> None:
        send = getattr(self._server(), "send_sync", None)
        if send is not None:
            send(event, data, client_id)
