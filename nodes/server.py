"""Invariant: a route only reads, and only memory: no path comes from a request, no handler asks a device or waits for
one.

`/offload/status`, `/offload/runs?limit=`, `/offload/report/{prompt_id}`, `/offload/trace/{prompt_id}` and
`/offload/marks?mode=..`, each below `/api` too, as the host does with all its routes. `prompt_id` is looked up in the
store of reports and goes nowhere else. Imports without a host.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

from ..offload.adapters import comfyui_host
from ..offload.adapters.comfyui_runs import PromptRuns, device_session, runs
from ..offload.adapters.comfyui_runs_host import RESTORE, stock_wanted
from ..offload.adapters.comfyui_runs_report import NOTICES, components
from ..offload.adapters.comfyui_store import KEEP
from ..offload.trace import build_trace
from ..offload.version import version
from .marks import LONGEST, marks
from .progress import ProgressText
from .rows import Rows, row_of
from .telemetry import LASTS, MOST, Telemetry

PREFIX = "/offload"
STATUS, RUNS, REPORT = f"{PREFIX}/status", f"{PREFIX}/runs", f"{PREFIX}/report/{{prompt_id}}"
TRACE, MARKS = f"{PREFIX}/trace/{{prompt_id}}", f"{PREFIX}/marks"
LIMIT = 20
"""Runs that are listed where no limit is given."""
WAIT_S, LOOK_S = 1.0, 0.02
"""For how long a report waits for its run, and how often it looks."""

_log = logging.getLogger(__name__)
_registered: list[Any] = []  # servers, so that a second call of the host's registers nothing twice
_off: dict[str, str] = {}  # route -> why it is off


def register_routes() -> dict[str, str]:
    """Add the routes to the host's server, once. What could not be added, and why; everything else works all the same.

    Call it while the host loads its packs: later ones are not served any more.
    """
    server = comfyui_host.server()
    if server is None or any(known is server for known in _registered):
        return dict(_off)
    _off.clear()
    try:
        from aiohttp import web

        table = server.routes
    except (ImportError, AttributeError) as error:
        return _say_off({PREFIX: f"this host's server takes no routes ({error})"})
    _registered.append(server)
    telemetry, rows = Telemetry(), Rows()
    handlers = Handlers(web, runs(), telemetry, rows)
    taken = _paths(server)
    for path, handler in handlers.table().items():
        if _shape(path) in taken:
            _off[path] = "another pack has this route"
            continue
        try:
            table.get(path)(handler)
        except (RuntimeError, ValueError, TypeError) as error:
            _off[path] = f"the host refused it ({error})"
    text = ProgressText(telemetry.knows)
    runs().on_sample(telemetry.sample, telemetry.wanted)
    runs().on_sample(text.sample, text.wanted)
    runs().on_close(lambda report: telemetry.closed(rows.keep(report), report.get("client_id")))
    runs().on_close(text.closed)
    _observe(server)
    return _say_off(_off)


def _observe(server: Any) -> None:
    """Have the host tell when a prompt is queued, so that one without our nodes is observed too."""
    add = getattr(server, "add_on_prompt_handler", None)
    if add is None:
        _off["observe"] = "this host does not tell when a prompt is queued: prompts without our nodes have no report"
        return

    def queued(document: Any) -> Any:
        runs().expect()
        return document

    add(queued)


def _say_off(off: dict[str, str]) -> dict[str, str]:
    for what, why in off.items():
        _log.warning("Balanced Offload: %s is off: %s. Everything else works.", what, why)
    return dict(off)


def _shape(path: str) -> str:
    """The path with its variables' names taken out: what it matches."""
    return re.sub(r"\{[^}]*\}", "{}", path)


def _paths(server: Any) -> set[str]:
    """What is served already, by packs that were loaded before this one and by the host."""
    found = {_shape(str(path)) for route in server.routes if (path := getattr(route, "path", None)) is not None}
    router = getattr(getattr(server, "app", None), "router", None)
    if router is not None:
        found |= {_shape(str(resource.canonical)) for resource in router.resources()}
    return found


class Handlers:
    """The routes' answers. `web` is `aiohttp.web`, handed in so that this file needs no server."""

    def __init__(self, web: Any, known: PromptRuns, telemetry: Telemetry, rows: Rows) -> None:
        self._web = web
        self._runs = known
        self._telemetry = telemetry
        self._rows = rows

    def table(self) -> dict[str, Callable[[Any], Any]]:
        """Route -> who answers it."""
        return {STATUS: self.status, RUNS: self.runs, REPORT: self.report, TRACE: self.trace, MARKS: self.marks}

    async def status(self, request: Any) -> Any:
        """What is in force now. `?telemetry=CLIENT_ID`, `?page=CLIENT_ID`: see telemetry.py."""
        for name, take in (("telemetry", self._telemetry.ask), ("page", self._telemetry.meet)):
            asked = request.query.get(name)
            refused = None if asked is None else take(asked)
            if refused is not None:
                return self._error(400, refused)
        return self._web.json_response(status(self._runs, self._telemetry))

    async def runs(self, request: Any) -> Any:
        """The last prompts, the newest first, without their lists; `?limit=` 1 to 64."""
        given = request.query.get("limit", str(LIMIT))
        if not re.fullmatch(r"[0-9]{1,4}", given) or not 1 <= int(given) <= KEEP:
            return self._error(400, f"limit: got {given[:40]!r}, allowed is a whole number from 1 to {KEEP}")
        rows = [self._row(prompt_id) for prompt_id in self._runs.ids(int(given))]
        return self._web.json_response({"runs": [row for row in rows if row is not None], "kept": KEEP})

    def _row(self, prompt_id: str) -> dict[str, Any] | None:
        row = self._rows.get(prompt_id)
        if row is not None:
            return row
        report = self._runs.report(prompt_id)
        return None if report is None else row_of(report)

    async def report(self, request: Any) -> Any:
        """The whole report of one prompt, its lists capped."""
        return await self._of_prompt(request, lambda report: report)

    async def trace(self, request: Any) -> Any:
        """The same as a Chrome trace, for ui.perfetto.dev."""
        return await self._of_prompt(request, build_trace)

    async def _of_prompt(self, request: Any, make: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        prompt_id = request.match_info["prompt_id"]
        run = self._runs._of(prompt_id)
        if run is not None and not await _taken(run.lock):
            return self._error(503, "the prompt is ending just now, and waits for the device: ask again")
        try:
            report = self._runs.report(prompt_id)
        except RuntimeError:  # a table of the session's changed while it was read; the prompt still runs
            return self._error(503, "the prompt is changing models just now: ask again")
        finally:
            if run is not None:
                run.lock.release()
        if report is None:
            return self._error(404, f"no report of this prompt: the last {KEEP} prompts are kept, see {RUNS}")
        return self._web.json_response(make(report))

    async def marks(self, request: Any) -> Any:
        """What an Offload Policy node with these inputs means on this card; see marks.py."""
        if len(request.query_string) > LONGEST:
            return self._error(400, f"marks: at most {LONGEST} characters of a query are read")
        return self._web.json_response(marks(dict(request.query), device_session()))

    def _error(self, code: int, text: str) -> Any:
        return self._web.json_response({"error": text}, status=code)


async def _taken(lock: Any) -> bool:
    """Take a lock that is held while the device is waited for, at a run's end, without holding up the server."""
    for _ in range(round(WAIT_S / LOOK_S)):
        if lock.acquire(blocking=False):
            return True
        await asyncio.sleep(LOOK_S)
    return False


def status(known: PromptRuns, telemetry: Telemetry) -> dict[str, Any]:
    """`/offload/status`: everything that can be said without asking a device."""
    facts = comfyui_host.facts()
    return {
        "pack": version(),
        "host": {
            "version": facts.version,
            "dynamic_vram": facts.dynamic_vram,
            "flags": list(facts.flags),
            "reserve": facts.reserve,
        },
        "worlds": NOTICES,
        "live": known.live(),
        "components": _components(),
        "policy": _policy(),
        "stock": {"wanted": stock_wanted(), "setting": RESTORE},
        "telemetry": {"clients": len(telemetry.clients()), "pages": telemetry.pages(), "lasts_s": LASTS, "most": MOST},
        "off": dict(_off),
    }


def _components() -> list[dict[str, Any]] | None:
    """Residency by component; None while the worker changes it."""
    session = device_session()
    try:
        return [] if session is None else components(session)
    except RuntimeError:
        return None


def _policy() -> dict[str, Any] | None:
    """The policy of the stage that ran last, as written and as resolved; None where none was."""
    session = device_session()
    if session is None:
        return None
    return {"written": session.policy.to_json(), "resolved": session.resolved.to_json()}
