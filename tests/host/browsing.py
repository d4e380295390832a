"""Invariant: a page on a real host is watched as one on the stub is: any complaint or foreign request fails the test.

The browser, the front ends and the rules are those of tests/browser; here they meet a server that really moves weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..browser import places
from ..browser.chromium import chromium_or_skip
from .graphs import Graph
from .server import HostServer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False, "Comfy.Minimap.Visible": False}


def simulated(servers: Callable[..., HostServer], size: int, frontend: str) -> HostServer:
    """The host on the simulated accelerator with so many bytes, and this front end."""
    reason = places.why_not(frontend)
    if reason is not None:
        pytest.skip(reason)
    environment = {"SIMULATED_VRAM": str(size), "BALANCED_OFFLOAD_CHECKOUT": str(ROOT)}
    arguments = ("--front-end-root", str(places.frontend(frontend)))
    return servers(*arguments, packs=(HERE / "packs" / "simulated_device",), environment=environment)


@pytest.fixture(scope="module")  # while it is there an event loop runs on this thread
def chromium() -> Iterator[Any]:
    with chromium_or_skip() as browser:
        yield browser


class Tab:
    """A page on a real host, with what a user does there."""

    def __init__(self, page: Any, server: HostServer, pages: ModuleType) -> None:
        self.page, self.server, self._pages = page, server, pages

    def open_graph(self, graph: Graph) -> None:
        """Load a graph in API format as the front end does with a dropped file."""
        self.page.evaluate("graph => app.loadApiJson(graph, 'test')", json.loads(json.dumps(graph)))
        self.page.wait_for_function("count => app.rootGraph.nodes.length === count", arg=len(graph))

    def set_input(self, kind: str, **values: Any) -> None:
        """Inputs of the first node of this class, as typed into its widgets."""
        self.page.evaluate(
            """([kind, values]) => { const node = app.rootGraph.nodes.find(n => n.type === kind);
              for (const [name, value] of Object.entries(values)) {
                const widget = node.widgets.find(w => w.name === name); widget.value = value;
                widget.callback?.(value); } }""",
            [kind, values],
        )

    def input_of(self, kind: str, name: str) -> Any:
        return self.page.evaluate(
            "([kind, name]) => app.rootGraph.nodes.find(n => n.type === kind).widgets.find(w => w.name === name).value",
            [kind, name],
        )

    def queue(self) -> str:
        """Press Run -> the prompt's id."""
        with self.page.expect_response(
            lambda answer: answer.url.endswith("/prompt") and answer.request.method == "POST"
        ) as sent:
            self._pages.queue(self.page)
        answer = sent.value.json()
        assert answer.get("prompt_id") and not answer.get("node_errors"), answer
        return str(answer["prompt_id"])

    def run(self) -> dict[str, Any]:
        """Press Run and wait, while the page goes on -> the settled report."""
        prompt_id = self.queue()
        until = time.monotonic() + 120
        while time.monotonic() < until:
            entry = self.server.history(prompt_id)
            if entry is not None and "status" in entry:
                assert entry["status"]["status_str"] == "success", self.server.error_of(entry)
                report: dict[str, Any] = self.server.get(f"/offload/report/{prompt_id}")
                if report["ended"]:
                    return report
            self.page.wait_for_timeout(50)
        raise AssertionError(f"prompt {prompt_id} did not end\n{self.server.log()[-2000:]}")

    def open_panel(self) -> Any:
        if self.page.locator(".bo-panel:visible").count() == 0:
            self.page.evaluate("() => app.extensionManager.command.execute('BalancedOffload.TogglePanel')")
        panel = self.page.locator(".bo-panel")
        panel.wait_for(state="visible")
        return panel

    def picked(self, prompt_id: str) -> Any:
        """The panel with this run in it."""
        panel = self.open_panel()
        self.page.wait_for_function(
            "id => document.querySelector(`.bo-picker option[value='${id}']`)", arg=prompt_id, timeout=15_000
        )
        panel.locator(".bo-picker").select_option(prompt_id)
        self.page.wait_for_function(
            "id => document.querySelector('.bo-picker').value === id"
            " && document.querySelector('.bo-panel-figures [data-value]')",
            arg=prompt_id,
        )
        self.page.wait_for_timeout(300)
        return panel


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """open_tab(server, vue=False, theme="dark", known=True) -> Tab; watched like a page on the stub."""
    from ..browser import pages

    contexts: list[Any] = []
    watches: list[Any] = []

    def open_(server: HostServer, vue: bool = False, theme: str = "dark", known: bool = True) -> Tab:
        """known: whether the pack is on this server."""
        wanted = {"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": theme, "BalancedOffload.HiddenHints": ""}
        server.post("/settings", {**SETTINGS, **wanted})
        context = chromium.new_context(viewport=pages.SIZE)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        watch = pages.Watch(server.port)
        watches.append(watch)
        watch.follow(page)
        page.goto(f"http://127.0.0.1:{server.port}/")
        pages.Pages.ready(page, known)
        return Tab(page, server, pages)

    yield open_
    for context in contexts:
        context.close()
    for watch in watches:
        watch.check()


@pytest.fixture
def shot(tmp_path: Path) -> Callable[[Any, str], Path]:
    from ..browser import pages

    return pages.shooter(tmp_path)
