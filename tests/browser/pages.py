"""Invariant: a page that complained, or asked another host for anything, fails the test that opened it.

What a front end says by itself, with no extension at all, is in `USUAL`, each line with its reason; nothing else is
let through unless the test says so by `allow`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page

from . import places
from .stub import Stub

ROOT = Path(__file__).resolve().parents[2]
READY = "() => window.app?.graph && window.app.canvas && window.app.extensionManager?.setting"
SIZE = {"width": 1280, "height": 800}
USUAL = (
    # Files that a user may have and this one does not.
    r"status of 404 .*/user\.css",
    r"status of 404 .*/userdata/",
    # 1.49.6 says so of itself, with no extension loaded.
    r"ComfyApp graph accessed before initialization",
    # Routes of newer or of cloud hosts, feature-detected by the front end.
    r"status of 40[45] .*/api/(?!offload)",
    r"\[Jobs API\] Failed to fetch jobs: 404",
)
OURS = "Balanced Offload"


class Watch:
    """What pages complained about and whom they asked."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.warnings: list[str] = []
        self.allowed: list[str] = []

    def allow(self, pattern: str) -> None:
        """Complaints with this regular expression in them are expected by the test."""
        self.allowed.append(pattern)

    def follow(self, page: Page) -> None:
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error.stack or error}"))
        page.on("crash", lambda _: self.complaints.append("the page crashed"))
        page.on("request", lambda request: self._asked(request.url))
        page.on("websocket", lambda socket: self._asked(socket.url))

    def _said(self, message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" or (message.type == "warning" and message.text.startswith(OURS)):
            self.complaints.append(text)
        elif message.type == "warning":
            self.warnings.append(text)

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("data", "blob", "about"):
            return
        if (parts.hostname, parts.port) != ("127.0.0.1", self.port):
            self.foreign.append(url)

    def check(self) -> None:
        """Fails with every complaint that nobody expected; what was told is told once."""
        known = [re.compile(pattern) for pattern in (*USUAL, *self.allowed)]
        bad = [text for text in self.complaints if not any(pattern.search(text) for pattern in known)]
        foreign, self.complaints, self.foreign = self.foreign, [], []
        assert not bad, "the console has:\n" + "\n".join(bad[:20])
        assert not foreign, "requests to another host:\n" + "\n".join(foreign[:20])


class Pages:
    """Opens pages of one stub. Each has a context of its own: no cookie, no storage, no cache of another's."""

    def __init__(self, browser: Browser, stub: Stub) -> None:
        self.browser, self.stub = browser, stub
        self.watch = Watch(stub.port)
        self.allow = self.watch.allow
        self._contexts: list[Any] = []

    def __call__(
        self,
        frontend: str = places.NEWEST,
        vue: bool = False,
        theme: str = "dark",
        settings: dict[str, Any] | None = None,
        size: dict[str, int] | None = None,
        **context: Any,
    ) -> Page:
        """A page with this front end, ready. theme: dark or light. context: more for Playwright's new_context."""
        assert theme in ("dark", "light")
        self.stub.frontend = places.frontend(frontend)
        self.stub.settings["Comfy.VueNodes.Enabled"] = vue
        self.stub.settings["Comfy.ColorPalette"] = theme
        self.stub.settings |= settings or {}
        page = self.blank(size=size, **context)
        self.load(page)
        return page

    def another(self, page: Page) -> Page:
        """A second tab of the same browser user, on the same host."""
        tab = page.context.new_page()
        self.watch.follow(tab)
        self.load(tab)
        return tab

    def load(self, page: Page) -> None:
        page.goto(f"{self.stub.url}/")
        self.ready(page)

    @staticmethod
    def ready(page: Page, known: bool = True) -> None:
        """After a load or reload: the front end is up and our extension is registered. known: the host has the pack."""
        page.wait_for_function(READY, timeout=60_000)
        if not known:
            return
        page.wait_for_function(
            "() => window.app.extensionManager.setting.get('BalancedOffload.RestoreStock') !== undefined",
            timeout=60_000,
        )

    def blank(self, size: dict[str, int] | None = None, **context: Any) -> Page:
        """A page that has not gone anywhere."""
        made = self.browser.new_context(viewport=size or SIZE, **context)
        self._contexts.append(made)
        page = made.new_page()
        page.set_default_timeout(30_000)
        self.watch.follow(page)
        return page

    def plain(self, theme: str = "dark", size: dict[str, int] | None = None, **context: Any) -> Page:
        """An empty page on the stub with the host's CSS variables: for parts that need no front end. A tenth of a
        second where a front end takes seconds. Import a part by `await import("/extensions/balanced_offload/js/...")`.
        """
        page = self.blank(size=size, **context)
        page.goto(f"{self.stub.url}/plain?theme={theme}")
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self._contexts.clear()


def shooter(usual: Path) -> Callable[..., Path]:
    """Writes PNGs below BALANCED_OFFLOAD_SHOTS, or below `usual`."""
    folder = Path(os.environ.get("BALANCED_OFFLOAD_SHOTS") or usual)
    folder.mkdir(parents=True, exist_ok=True)

    def write(what: Any, name: str, **options: Any) -> Path:
        path = folder / f"{name}.png"
        what.screenshot(path=path, **options)
        return path

    return write


# ---------------------------------------------------------------------- what a user does
def load_workflow(page: Page, graph: str | dict[str, Any]) -> None:
    """Open a workflow: a name in the pack's folder `workflows`, or the workflow itself."""
    if isinstance(graph, str):
        graph = json.loads((ROOT / "workflows" / f"{graph}.json").read_text(encoding="utf-8"))
        for node in graph["nodes"]:  # the front end itself would ask there how large they are
            node.get("properties", {}).pop("models", None)
    page.evaluate("graph => app.loadGraphData(graph, true, true, 'test')", graph)
    page.wait_for_function("count => app.rootGraph.nodes.length === count", arg=len(graph["nodes"]))


def queue(page: Page) -> None:
    """Press Run, without the mouse."""
    page.evaluate("async () => { await app.queuePrompt(0, 1) }")


def saved(page: Page) -> dict[str, Any]:
    """The workflow as it would be saved."""
    found: dict[str, Any] = json.loads(page.evaluate("() => JSON.stringify(app.rootGraph.serialize())"))
    return found


def api_prompt(page: Page) -> dict[str, Any]:
    """The prompt as it would be queued."""
    found: dict[str, Any] = json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
    return found


def command(page: Page, name: str) -> None:
    page.evaluate("name => app.extensionManager.command.execute(name)", name)


def heap(page: Page) -> float:
    """Bytes of JavaScript's heap in use after two collections."""
    session = page.context.new_cdp_session(page)
    for _ in range(2):
        session.send("HeapProfiler.collectGarbage")
    used: float = session.send("Runtime.getHeapUsage")["usedSize"]
    session.detach()
    return used


def look_at(page: Page, node: str, zoom: float, x: int, y: int) -> None:
    """Move the graph so that this node begins x and y pixels from the canvas' corner."""
    page.evaluate(
        """([id, zoom, x, y]) => {
          const node = app.canvas.graph.getNodeById(Number(id));
          app.canvas.ds.scale = zoom;
          app.canvas.ds.offset = [x / zoom - node.pos[0], y / zoom - node.pos[1]];
          app.canvas.setDirty(true, true);
        }""",
        [node, zoom, x, y],
    )
