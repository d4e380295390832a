"""Invariant: nobody is sent anything that it did not ask for, and nobody is sent more than four messages a second.

A client asks by `GET /offload/status?telemetry=CLIENT_ID`, its own id on the host's websocket, and is sent
`offload.telemetry` for `LASTS` seconds; asking again goes on. `?page=CLIENT_ID` says that the pack's own script runs in
that page, for as long as its socket is open (progress.py). The state that this leaves behind are names in lists that
empty themselves: nothing of the host, of a run or of a file is changed by a request.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from ..offload.adapters import comfyui_host
from ..offload.adapters.comfyui_runs_live import ONCE

LASTS = 30.0  # seconds
MOST = 16  # clients at once
PAGES = 256  # likewise; each takes a few bytes
PERIOD = 0.25  # seconds between two messages, on average
JITTER_S = 0.05  # by which one may come early, so that a timer that is late once does not halve the rate
POINTS = 512  # that wait for a message to take them along
_ID = re.compile(r"[0-9A-Za-z_.-]{1,128}")


class Telemetry:
    """Who asked, and what they are sent. `clock` in seconds; `server` gives the host's PromptServer or None."""

    def __init__(self, clock: Callable[[], float] = monotonic, server: Callable[[], Any] = comfyui_host.server) -> None:
        self._clock = clock
        self._server = server
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}
        self._pages: set[str] = set()
        self._due = float("-inf")
        self._kept: dict[str, list[Any]] = {name: [] for name in ONCE}
        self._of: Any = None  # the prompt to which they belong

    # ------------------------------------------------------------------ who asks
    def ask(self, client_id: str) -> str | None:
        """A client asks for `LASTS` seconds of telemetry. None, or why it gets none, in words."""
        refused = self._refused("telemetry", client_id)
        if refused is not None:
            return refused
        now = self._clock()
        with self._lock:
            self._expire(now)
            if client_id not in self._until and len(self._until) >= MOST:
                self._until = {name: until for name, until in self._until.items() if name in self._sockets()}
            if client_id not in self._until and len(self._until) >= MOST:
                return f"telemetry: {MOST} clients are served already; one of them has to stop asking"
            self._until[client_id] = now + LASTS
        return None

    def meet(self, client_id: str) -> str | None:
        """The pack's own script runs in this client's page. None, or why that is not taken down, in words."""
        refused = self._refused("page", client_id)
        if refused is not None:
            return refused
        with self._lock:
            self._pages = {name for name in self._pages if name in self._sockets()}
            if client_id not in self._pages and len(self._pages) >= PAGES:
                return f"page: {PAGES} pages are open already"
            self._pages.add(client_id)
        return None

    def _refused(self, what: str, client_id: str) -> str | None:
        if not _ID.fullmatch(client_id):
            return f"{what}: got no client id; allowed is 1 to 128 letters, digits, '-', '_' or '.'"
        if client_id not in self._sockets():
            return f"{what}: no websocket is open under this client id; open /ws?clientId=... first"
        return None

    def _sockets(self) -> dict[str, Any]:
        sockets = getattr(self._server(), "sockets", None)
        return sockets if isinstance(sockets, dict) else {}

    def clients(self) -> dict[str, float]:
        """Client id -> seconds for which it is still sent telemetry."""
        now, sockets = self._clock(), self._sockets()
        with self._lock:
            self._expire(now)
            return {name: round(until - now, 3) for name, until in self._until.items() if name in sockets}

    def pages(self) -> int:
        """How many open pages run the pack's own script."""
        sockets = self._sockets()
        with self._lock:
            return sum(name in sockets for name in self._pages)

    def knows(self, client_id: str) -> bool:
        """Whether this client shows our figures by itself."""
        return client_id in self._pages or self._until.get(client_id, float("-inf")) > self._clock()

    def _expire(self, now: float) -> None:
        for name in [name for name, until in self._until.items() if until <= now]:
            del self._until[name]

    # ------------------------------------------------------------------ what they are sent
    def wanted(self) -> bool:
        """Whether anybody is sent telemetry now."""
        return bool(self._until) and bool(self.clients())

    def sample(self, figures: dict[str, Any]) -> None:
        """Send `offload.telemetry` to those that asked."""
        if not self._until:
            return
        self._keep(figures)
        now = self._clock()
        if now < self._due:
            return
        self._due = max(self._due, now - JITTER_S) + PERIOD
        message = figures | self._kept
        self._kept = {name: [] for name in ONCE}
        for name in self.clients():
            self._send("offload.telemetry", message, name)

    def _keep(self, figures: dict[str, Any]) -> None:
        """What is said once waits for the next message, where this is none; those of an older prompt do not."""
        if figures.get("prompt_id") != self._of:
            self._of, self._kept = figures.get("prompt_id"), {name: [] for name in ONCE}
        for name, rows in self._kept.items():
            rows += figures.get(name) or ()
            del rows[:-POINTS]

    def closed(self, row: dict[str, Any], client_id: str | None) -> None:
        """Send `offload.report`, a row of `/offload/runs`, to who queued the prompt and to those that asked."""
        for name in sorted({*self.clients(), *([] if client_id is None else [client_id])}):
            self._send("offload.report", row, name)

    def _send(self, event: str, data: dict[str, Any], client_id: str) -> None:
        send = getattr(self._server(), "send_sync", None)
        if send is not None:
            send(event, data, client_id)
