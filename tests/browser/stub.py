"""Invariant: the stub plays a host's routes and events as the pack's own server would, and no line of it is a host's.

By hand:

    python tests/browser/stub.py --frontend FOLDER --port 8199 [--vue] [--light] [--steps 20] [--delay 0.05]

FOLDER is the `static` folder of a comfyui-frontend-package; open http://127.0.0.1:8199/ and press Run. A prompt is
played node by node; its first KSampler takes `--steps` steps, with telemetry and a report at the end.

In tests (fixture `stub`, see conftest.py), all from the test's own thread:

    stub.send("offload.telemetry", {...})        an event to every page; client="..." to one of them
    stub.settings["BalancedOffload.Overlay"]     settings, kept in memory, given to the page at its start
    stub.reports["prompt-1"] = canned.report()   what /offload/runs, /report, /trace answer: newest last in this dict
    stub.add_run(canned.report("prompt-1"))      the same, and hands the report back
    stub.answers["/offload/runs"] = (500, "oops")    status and body (text, or JSON of anything else) instead
    stub.answers["/offload/runs"] = None         the request hangs until the stub ends
    stub.make_report = lambda prompt_id, prompt: canned.report(prompt_id, hints=[...])    what a played prompt ends in
    stub.steps, stub.delay                       of a played prompt: steps of the sampler, seconds between two
    stub.prompts                                 what was queued: the bodies of POST /prompt, in order
    stub.asked                                   [(method, path with query)] so far, in order
    stub.clients(), stub.subscribed(), stub.pages()    ids of open sockets; of those that asked for telemetry; ?page=

Events of a prompt go to the page that queued it, telemetry to those that asked within 30 s, as in a real host.
`tests/browser/canned.py` makes reports, rows, telemetry, marks and hints whose figures agree with each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

if __package__:
    from . import canned, fixed, nodes_info, player
else:  # run as a script
    import canned
    import fixed
    import nodes_info
    import player

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "/extensions/balanced_offload"
ASKED_S = 30.0
KEPT = 64


class Stub:
    """One stub host on its own thread. frontend: the `static` folder that it serves."""

    def __init__(self, frontend: Path, port: int = 0) -> None:
        self.frontend, self.port = frontend, port
        self.settings: dict[str, Any] = dict(fixed.SETTINGS)
        self.reports: dict[str, Any] = {}
        self.answers: dict[str, Any] = {}
        self.status: dict[str, Any] = {"pack": "0.1.0", "live": [], "off": {}}
        self.make_report: Callable[[str, dict[str, Any]], Any] = self._usual_report
        self.steps, self.delay = 20, 0.02
        self.prompts: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._until: dict[str, float] = {}
        self._pages: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._players: list[player.Player] = []
        self._interrupt = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),), daemon=True)

    # ------------------------------------------------------------------ from the test's thread
    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Stub:
        self._thread.start()
        if not self._ready.wait(20):
            raise RuntimeError("the stub did not start")
        return self

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    def send(self, event: str, data: Any, client: str | None = None) -> None:
        """An event to one client, or to all. data: anything that JSON or Python's NaN can say."""
        self._wait(self._send(event, data, client))

    def send_text(self, text: str) -> None:
        """A whole frame as it is, be it JSON or not."""
        self._wait(self._frame(text, None))

    def play(self, prompt: dict[str, Any], prompt_id: str | None = None, client: str | None = None) -> str:
        """Play an API-format graph as if this client (None: nobody) had queued it -> its prompt id, at its end."""
        prompt_id = prompt_id or uuid.uuid4().hex
        self._wait(self._play(prompt_id, prompt, client))
        return prompt_id

    def add_run(self, report: dict[str, Any]) -> dict[str, Any]:
        self.reports[report["prompt_id"]] = report
        return report

    def clients(self) -> list[str]:
        return list(self._sockets)

    def subscribed(self) -> list[str]:
        now = time.monotonic()
        return [name for name, until in list(self._until.items()) if until > now]

    def pages(self) -> list[str]:
        return sorted(self._pages)

    def running(self) -> bool:
        """Whether a prompt is being played."""
        return bool(self._players)

    def reset(self) -> None:
        """As a new stub, but for its settings and the pages that are open."""
        for kept in (self.reports, self.answers, self.prompts, self.asked):
            kept.clear()
        self.make_report = self._usual_report
        self.steps, self.delay = 20, 0.02
        self._loop.call_soon_threadsafe(self._interrupt.set)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    # ------------------------------------------------------------------ the server
    async def _main(self) -> None:
        runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self._ready.set()
        await self._stopped.wait()
        for task in list(self._tasks):
            task.cancel()
        for socket in list(self._sockets.values()):
            await socket.close()
        await runner.cleanup()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26, middlewares=[self._middleware])
        get: dict[str, Any] = {
            **{path: self._fixed(body) for path, body in fixed.FIXED.items()},
            "/object_info": self._fixed(nodes_info.object_info()),
            "/i18n": self._fixed(nodes_info.translations()),
            "/extensions": self._extensions,
            "/settings": lambda request: self._json(self.settings),
            "/offload/status": self._status,
            "/offload/runs": self._runs,
            "/offload/report/{prompt_id}": self._report,
            "/offload/trace/{prompt_id}": self._trace,
            "/offload/marks": self._marks,
        }
        post: dict[str, Any] = {
            "/settings": self._set_settings,
            "/settings/{key}": self._set_setting,
            "/prompt": self._prompt,
            "/interrupt": self._interrupted,
            "/userdata/{file:.*}": lambda request: self._json(request.match_info["file"]),
            **dict.fromkeys(("/queue", "/history", "/free"), lambda request: self._json({})),
        }
        for prefix in ("", "/api"):
            app.router.add_get(f"{prefix}/ws", self._ws)
            for path, handler in get.items():
                app.router.add_get(prefix + path, _as_handler(handler))
            for path, handler in post.items():
                app.router.add_post(prefix + path, _as_handler(handler))
            app.router.add_static(prefix + EXTENSION, ROOT / "web")
        app.router.add_get("/plain", _as_handler(self._plain))
        app.router.add_get("/{file:.*}", _as_handler(self._static))
        return app

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append((request.method, request.path_qs))
        path = request.path.removeprefix("/api")
        if path in self.answers:
            answer = self.answers[path]
            if answer is None:
                await self._stopped.wait()
                raise web.HTTPGone
            code, body = answer
            text = body if isinstance(body, str) else json.dumps(body)
            return web.Response(status=code, text=text, content_type="application/json")
        found: web.StreamResponse = await handler(request)
        if path.startswith("/extensions"):
            found.headers["Cache-Control"] = "no-store"
        return found

    @staticmethod
    def _json(body: Any, status: int = 200) -> web.Response:
        return web.json_response(body, status=status)

    def _fixed(self, body: Any) -> Callable[[web.Request], web.Response]:
        return lambda request: self._json(body)

    def _extensions(self, request: web.Request) -> web.Response:
        files = sorted((ROOT / "web").rglob("*.js"))
        return self._json([f"{EXTENSION}/{file.relative_to(ROOT / 'web').as_posix()}" for file in files])

    def _plain(self, request: web.Request) -> web.Response:
        theme = "light" if request.query.get("theme") == "light" else "dark"
        return web.Response(text=fixed.plain(theme), content_type="text/html")

    def _static(self, request: web.Request) -> web.StreamResponse:
        """A file of the front end that is set now; nothing outside its folder."""
        path = (self.frontend / (request.match_info["file"] or "index.html")).resolve()
        if not path.is_relative_to(self.frontend.resolve()) or not path.is_file():
            return web.Response(status=404)
        return web.FileResponse(
            path, headers={"Cache-Control": "max-age=3600" if path.suffix != ".html" else "no-store"}
        )

    async def _set_settings(self, request: web.Request) -> web.Response:
        self.settings.update(await request.json())
        return self._json({})

    async def _set_setting(self, request: web.Request) -> web.Response:
        self.settings[request.match_info["key"]] = await request.json()
        return self._json({})

    # ------------------------------------------------------------------ the pack's routes
    def _status(self, request: web.Request) -> web.Response:
        for name in ("telemetry", "page"):
            asked = request.query.get(name)
            if asked is None:
                continue
            if asked not in self._sockets:
                return self._json({"error": f"{name}: no websocket is open under this client id"}, 400)
            if name == "page":
                self._pages.add(asked)
            else:
                self._until[asked] = time.monotonic() + ASKED_S
        return self._json(self.status)

    def _runs(self, request: web.Request) -> web.Response:
        given = request.query.get("limit", "20")
        if not given.isdigit() or not 1 <= int(given) <= KEPT:
            return self._json({"error": f"limit: got {given!r}"}, 400)
        newest = list(reversed(self.reports.values()))[: int(given)]
        return self._json({"runs": [canned.row(report) for report in newest], "kept": KEPT})

    def _report(self, request: web.Request) -> web.Response:
        found = self.reports.get(request.match_info["prompt_id"])
        return self._json({"error": "no report of this prompt"}, 404) if found is None else self._json(found)

    def _trace(self, request: web.Request) -> web.Response:
        found = self.reports.get(request.match_info["prompt_id"])
        if found is None:
            return self._json({"error": "no report of this prompt"}, 404)
        rows = [
            {"name": row["name"], "ph": "X", "ts": row["t0"] * 1e6, "dur": (row["t1"] - row["t0"]) * 1e6, "pid": 1}
            for row in found["stages"]
        ]
        return self._json({"traceEvents": rows})

    def _marks(self, request: web.Request) -> web.Response:
        return self._json(canned.marks(**dict(request.query)))

    # ------------------------------------------------------------------ events
    async def _ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        client = request.query.get("clientId") or uuid.uuid4().hex
        self._sockets[client] = socket
        await self._send("status", {"status": {"exec_info": {"queue_remaining": 0}}, "sid": client}, client)
        for playing in self._players:  # a page that comes back finds its run
            node = playing.node
            await self._send("executing", {"node": node, "display_node": node, "prompt_id": playing.prompt_id}, client)
        async for message in socket:
            if message.type == WSMsgType.TEXT and '"feature_flags"' in message.data:
                await self._send("feature_flags", {"supports_preview_metadata": True}, client)
        if self._sockets.get(client) is socket:
            del self._sockets[client]
            self._pages.discard(client)
            self._until.pop(client, None)
        return socket

    async def _send(self, event: str, data: Any, client: str | None) -> None:
        await self._frame(json.dumps({"type": event, "data": data}), client)

    async def _frame(self, text: str, client: str | None) -> None:
        for name, socket in list(self._sockets.items()):
            if client in (None, name) and not socket.closed:
                await socket.send_str(text)

    # ------------------------------------------------------------------ a prompt
    async def _prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.prompts.append(body)
        prompt_id = uuid.uuid4().hex
        task = asyncio.get_running_loop().create_task(self._play(prompt_id, body["prompt"], body.get("client_id")))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self._json({"prompt_id": prompt_id, "number": len(self.prompts), "node_errors": {}})

    def _interrupted(self, request: web.Request) -> web.Response:
        self._interrupt.set()
        return self._json({})

    async def _play(self, prompt_id: str, prompt: dict[str, Any], client: str | None) -> None:
        """`client` None: as of a page that is gone."""
        to = client or ""

        async def send(event: str, data: Any) -> None:
            await self._send(event, data, to)

        async def telemetry(data: Any) -> None:
            for name in self.subscribed():
                await self._send("offload.telemetry", data, name)

        self._interrupt.clear()
        playing = player.Player(prompt_id, prompt, send, telemetry)
        self._players.append(playing)
        await self._send("status", {"status": {"exec_info": {"queue_remaining": 1}}}, None)
        try:
            report = await playing.play(self.steps, self.delay, self._interrupt, self.make_report)
        finally:
            self._players.remove(playing)
        row = canned.row(self.add_run(report))
        for name in {to, *self.subscribed()}:
            await self._send("offload.report", row, name)
        await self._send("status", {"status": {"exec_info": {"queue_remaining": 0}}}, None)

    def _usual_report(self, prompt_id: str, prompt: dict[str, Any]) -> dict[str, Any]:
        return player.usual_report(prompt_id, prompt, self.steps)


def _as_handler(handler: Any) -> Any:
    """aiohttp wants a coroutine function; most answers here need no waiting."""

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = handler(request)
        found: web.StreamResponse = await answer if asyncio.iscoroutine(answer) else answer
        return found

    return handle


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="A stub host for work on web/js by hand.")
    parser.add_argument("--frontend", type=Path, required=True, help="the front end package's static folder")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--vue", action="store_true", help="Nodes 2.0")
    parser.add_argument("--light", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--delay", type=float, default=0.25, help="seconds between two steps")
    parser.add_argument("--runs", type=int, default=3, help="reports that are there at the start")
    given = parser.parse_args(arguments)
    folders = [given.frontend, given.frontend / "static", given.frontend / "comfyui_frontend_package" / "static"]
    frontend = next((folder for folder in folders if (folder / "index.html").is_file()), None)
    if frontend is None:
        parser.error(f"--frontend: no index.html in {given.frontend}, and no front end package")
    stub = Stub(frontend, given.port)
    stub.steps, stub.delay = given.steps, given.delay
    stub.settings["Comfy.VueNodes.Enabled"] = given.vue
    stub.settings["Comfy.ColorPalette"] = "light" if given.light else "dark"
    for number in range(1, given.runs + 1):
        stub.add_run(canned.report(f"prompt-{number}", created=f"2026-01-31T12:{number:02}:00.000Z"))
    stub.start()
    print(f"{stub.url}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        stub.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
