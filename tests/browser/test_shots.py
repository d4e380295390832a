"""Invariant: each state of what a user sees is there to be looked at, in both modes and both themes.

Written by `shot`; a person looks at them (BALANCED_OFFLOAD_SHOTS=FOLDER keeps them). What is tested here is that each
state is reached, and that none of our texts is smaller than 11 px.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import canned
from .pages import command, load_workflow, queue
from .places import NEWEST, Where
from .stub import Stub

GRAPH = "02-fit-aware-hires"
STATES = [
    pytest.param(Where(NEWEST, vue), theme, id=f"{Where(NEWEST, vue)}-{theme}", marks=pytest.mark.slow if slow else [])
    for vue in (False, True)
    for theme, slow in (("dark", False), ("light", True))
]
SIZE = {"width": 1440, "height": 900}
PEAK = "() => /peak/.test(document.querySelector('.bo-chip')?.textContent ?? '')"
VIEW = """([x, y, scale]) => { app.canvas.ds.scale = scale; app.canvas.ds.offset = [x, y];
  app.canvas.setDirty(true, true); }"""
SMALL = """() => [...document.querySelectorAll('.bo-root, .bo-root *')]
  .filter(e => e.offsetParent && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
  .filter(e => !e.closest('.bo-node') && parseFloat(getComputedStyle(e).fontSize) < 11)
  .map(e => e.className + ' ' + e.textContent.slice(0, 40))"""
"""Texts on nodes are scaled with the graph by its zoom; they are 11 px at a zoom of one."""


@pytest.mark.slow
@pytest.mark.parametrize(("place", "theme"), STATES)
def test_each_state(open_page: Any, stub: Stub, shot: Callable[..., Any], place: Where, theme: str) -> None:
    def take(page: Any, state: str) -> None:
        page.wait_for_timeout(500)
        shot(page, f"{place}-{theme}-{state}")
        assert page.evaluate(SMALL) == [], state

    sampler, hints = "7", [canned.hint()]
    stub.add_run(canned.report("before", nodes=("4", sampler, "10"), created="2026-01-31T11:58:00.000Z"))
    stub.make_report = lambda prompt_id, prompt: canned.report(prompt_id, nodes=("4", sampler, "10"), hints=hints)
    page = open_page(*place, theme=theme, size=SIZE)
    load_workflow(page, GRAPH)
    page.evaluate(VIEW, [-900, 170, 0.8])
    page.wait_for_selector(".bo-chip")
    take(page, "1-idle")
    stub.steps, stub.delay = 400, 0.1
    queue(page)
    page.wait_for_function(PEAK)
    page.evaluate(VIEW, [-900, 170, 0.8])
    page.wait_for_timeout(2000)
    take(page, "2-running")
    command(page, "BalancedOffload.TogglePanel")
    page.locator(".bo-panel").wait_for(state="visible")
    take(page, "3-panel-running")
    stub.steps = 20
    page.evaluate("() => app.api.interrupt(null)")
    page.wait_for_timeout(500)
    stub.delay = 0.02
    queue(page)
    page.locator(".bo-hint:visible").wait_for()
    page.wait_for_timeout(1000)
    take(page, "4-panel-hint")
    for number, name in enumerate(("Nodes", "Timers")):
        page.get_by_role("tab", name=name, exact=True).click()
        take(page, f"{5 + number}-panel-{name.lower()}")
    command(page, "BalancedOffload.TogglePanel")
    page.evaluate(VIEW, [-900, 170, 0.8])
    take(page, "7-after")
    page.evaluate(VIEW, [30, -500, 1.0])
    page.locator(".bo-node-policy").first.wait_for(state="visible")
    take(page, "8-policy")
    x, y = page.evaluate(
        "() => { const n = app.rootGraph.nodes.find(n => n.type === 'VRAMReport'); return [...n.pos]; }"
    )
    page.evaluate(VIEW, [400 - x, 120 - y, 1.0])
    page.locator(".bo-node-report").first.wait_for(state="visible")
    take(page, "9-report")
