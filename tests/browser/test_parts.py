"""Invariant: a part of the page that fails costs itself and nothing else, and is said once in the console."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page

from . import canned
from .pages import load_workflow

JS = "/extensions/balanced_offload/js"
CHIP = ".bo-chip"
POLICY = "OffloadPolicy"

BROKEN = {
    "missing": lambda route: route.fulfill(status=404, body="not here"),
    "syntax": lambda route: route.fulfill(body="export function {", content_type="text/javascript"),
    "throws": lambda route: route.fulfill(body="throw new Error('broken')", content_type="text/javascript"),
}


def _boot(open_page: Any, broken: dict[str, str]) -> Page:
    """A page on the newest front end in which these of our files are broken."""
    open_page.allow("Balanced Offload: a part failed")
    open_page.allow("|".join(f"js/{name}.js" for name in broken))
    # The front end imports every file by itself too, and says what it thinks of it.
    open_page.allow(r"Error loading extension|\[vite:preloadError\]")
    page = open_page.blank()
    for name, how in broken.items():
        page.route(f"**{JS}/{name}.js", BROKEN[how])
    open_page.load(page)
    return page


def _ours(open_page: Any) -> list[str]:
    """The names of the parts that were said to have failed."""
    told = [text for text in open_page.watch.complaints if text.startswith("Balanced Offload: a part failed")]
    return sorted(text.split(": ")[2].split(":")[0] for text in told)


def test_a_part_that_cannot_be_loaded_costs_itself(open_page: Any) -> None:
    page = _boot(open_page, {"panel": "missing", "reportwidget": "syntax", "overlay": "throws"})
    page.wait_for_selector(CHIP)
    load_workflow(page, "02-fit-aware-hires")
    page.wait_for_selector(".bo-node-policy", state="attached")
    assert page.locator(".bo-node-report").count() == 0
    open_page.stub.send("offload.telemetry", canned.telemetry("p", "3", 3, 20))
    page.wait_for_function("() => document.querySelector('.bo-chip').dataset.running === 'true'")
    assert _ours(open_page) == ["the panel", "the strips above nodes", "the widget of VRAM Report"]


@pytest.mark.slow
def test_without_the_store_the_setting_is_still_there(open_page: Any) -> None:
    open_page.allow("SyntaxError|does not provide an export|Failed to fetch dynamically")
    page = _boot(open_page, {"wire": "missing", "store": "throws"})
    load_workflow(page, "02-fit-aware-hires")
    assert page.evaluate("() => app.extensionManager.setting.get('BalancedOffload.RestoreStock')") is False
    assert page.locator(CHIP).count() == 0
    assert page.evaluate(
        f"() => app.rootGraph.nodes.some((each) => each.comfyClass === '{POLICY}' && each.widgets.length > 5)"
    )
    assert "what the page knows" in _ours(open_page)


@pytest.mark.slow
def test_a_part_that_throws_in_each_frame_is_said_once(open_page: Any) -> None:
    open_page.allow("Balanced Offload: a part failed")
    page = open_page.blank()
    throwing = (
        "export function drawOverlay(ctx) { ctx.globalAlpha = 0;"
        " globalThis.tried = (globalThis.tried ?? 0) + 1; throw new Error('each'); }"
    )
    page.route(f"**{JS}/overlay.js", lambda route: route.fulfill(body=throwing, content_type="text/javascript"))
    open_page.load(page)
    load_workflow(page, "02-fit-aware-hires")
    for _ in range(4):
        page.evaluate("() => { app.canvas.setDirty(true, true); app.canvas.draw(true, true); }")
    assert page.evaluate("() => tried") >= 4
    assert page.evaluate("() => app.canvas.ctx.globalAlpha") == 1, "what it left in the context is put back"
    assert _ours(open_page) == ["the strips above nodes"]


def test_who_drew_before_us_still_draws(open_page: Any) -> None:
    """Another pack's hook is called first, with what it was called with, and as the canvas."""
    page = open_page.blank()
    page.add_init_script("globalThis.other = { calls: 0, right: true };")
    open_page.load(page)
    page.evaluate(
        """() => {
          const ours = app.canvas.onDrawForeground;
          app.canvas.onDrawForeground = function (ctx, area, ...rest) {
            other.calls += 1;
            other.right &&= this === app.canvas && Boolean(ctx.fillRect);
            return ours.call(this, ctx, area, ...rest);
          };
          app.canvas.setDirty(true, true);
          app.canvas.draw(true, true);
        }"""
    )
    assert page.evaluate("() => other.calls >= 1 && other.right")
