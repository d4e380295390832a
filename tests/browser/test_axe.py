"""Invariant: everything of ours can be reached and left by keys alone, and axe-core has nothing serious against it.

In the real front end, where our elements lie among the host's; what is theirs is not judged.
"""

from __future__ import annotations

from typing import Any

import pytest

from . import canned, places
from .pages import load_workflow, queue
from .places import Where
from .shared import Here
from .stub import Stub

GRAPH = "02-fit-aware-hires"
PLACES = [(Where("1.49.6", False), "light"), (Where("1.49.6", False), "dark")]
PLACES += [(Where("1.58.1", True), "light"), (Where("1.58.1", True), "dark")]
SERIOUS = """async () => {
  const roots = [...document.querySelectorAll('.bo-root')].filter(e => !e.parentElement.closest('.bo-root'));
  roots.forEach((e, i) => { e.dataset.axe = i; });
  const found = await axe.run({include: roots.map((e, i) => [`[data-axe="${i}"]`])});
  return [roots.length, found.passes.length, found.violations.filter(v => ['serious', 'critical'].includes(v.impact))
    .map(v => v.id + ': ' + v.nodes.map(n => n.html.slice(0, 160) + ' ' + n.failureSummary).join(' ;; '))]; }"""
CONTROLS = """() => [...document.querySelector('.bo-panel').querySelectorAll(
    'a[href],button,input,select,summary,textarea,[tabindex]:not([tabindex="-1"])')]
  .filter(e => !e.disabled && e.checkVisibility({visibilityProperty: true, contentVisibilityAuto: true}))
  .filter(e => !(e.getAttribute('role') === 'tab' && e.getAttribute('aria-selected') === 'false'))
  .map((e, i) => { e.dataset.control = i; return i; })"""
FOCUSED = "() => document.activeElement?.dataset?.control ?? null"
HTML = "() => document.activeElement.outerHTML.slice(0, 200)"
SEEN = """() => { const e = document.activeElement, look = getComputedStyle(e);
  return !e.dataset?.control || look.outlineStyle !== 'none' || look.boxShadow !== 'none'; }"""
IN_PANEL = "() => !!document.activeElement?.closest('.bo-panel')"


@pytest.mark.parametrize(("place", "theme"), PLACES, ids=[f"{place}-{theme}" for place, theme in PLACES])
def test_axe_has_nothing_serious(open_page: Any, stub: Stub, place: Where, theme: str) -> None:
    """The chip, both widgets and the panel, while a run is on and after it, with a hint."""
    reason = places.no_tool("axe-core")
    if reason is not None:
        pytest.skip(reason)
    stub.make_report = lambda prompt_id, prompt: canned.report(
        prompt_id, nodes=("4", "7", "10"), hints=[canned.hint()], hint_note=None
    )
    page = open_page(*place, theme=theme)
    load_workflow(page, GRAPH)
    page.evaluate("() => app.extensionManager.command.execute('BalancedOffload.TogglePanel')")
    page.locator(".bo-panel").wait_for(state="visible")
    page.evaluate((places.NODE_TOOLS / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    stub.steps, stub.delay = 200, 0.05
    queue(page)
    page.wait_for_function("() => /peak/.test(document.querySelector('.bo-chip')?.textContent ?? '')")
    _judge(page)
    page.evaluate("() => app.api.interrupt(null)")
    for _ in range(200):
        if not stub.running():
            break
        page.wait_for_timeout(50)
    page.locator(".bo-hint:visible").wait_for()
    _judge(page)


def _judge(page: Any) -> None:
    roots, passes, serious = page.evaluate(SERIOUS)
    assert roots >= 2 and passes > 5, "axe-core looked at nothing"
    assert not serious, "\n".join(serious)


def test_by_keys_alone(here: Here) -> None:
    """Open, reach every control by Tab, leave by Esc, and close by the key that opened."""
    page, stub = here.page, here.stub
    stub.make_report = lambda prompt_id, prompt: canned.report(prompt_id, hints=[canned.hint()])
    queue(page)
    for _ in range(200):
        page.wait_for_timeout(50)
        if stub.reports and not stub.running():
            break
    page.locator("canvas#graph-canvas").focus()
    page.keyboard.press("Alt+Shift+O")
    page.wait_for_function(IN_PANEL)
    page.locator(".bo-panel .bo-picker option").nth(0).wait_for(state="attached")
    page.wait_for_timeout(300)
    wanted = {str(each) for each in page.evaluate(CONTROLS)}
    assert len(wanted) > 6, "the panel has its picker, downloads, a hint, a timeline and tables"
    reached = set()
    for _ in range(len(wanted) + 12):
        reached.add(page.evaluate(FOCUSED))
        assert page.evaluate(SEEN), f"no focus is seen on {page.evaluate(HTML)}"
        page.keyboard.press("Tab")
    missed = [
        page.locator(f"[data-control='{each}']").evaluate("e => e.outerHTML.slice(0, 160)") for each in wanted - reached
    ]
    assert not missed, f"not reached by Tab: {missed}"
    page.locator(".bo-panel .bo-picker").focus()
    page.keyboard.press("Escape")
    assert not page.evaluate(IN_PANEL), "Esc leaves the panel to the graph's own keys"
    page.keyboard.press("Alt+Shift+O")
    page.locator(".bo-panel").wait_for(state="hidden")
