"""Invariant: in every front end and mode the pack adds no error, no foreign request and nothing to what is saved.

And a server that sends garbage, fails, or never answers breaks nothing: what is wrong is shown as not known, and the
next good message is shown as if nothing had been.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from . import canned, garbage
from .pages import api_prompt, load_workflow, queue, saved
from .places import Where
from .shared import OURS, Here
from .stub import Stub

GRAPH = "02-fit-aware-hires"
WRONG = re.compile(r"NaN|undefined|Infinity|\[object |Invalid Date|\bnull\b")
TEXT = """() => [...document.querySelectorAll('.bo-root')].filter(e => !e.parentElement.closest('.bo-root'))
  .map(e => e.innerText + ' ' + [...e.querySelectorAll('[aria-label],[aria-valuetext],[title]')].map(
    x => [x.getAttribute('aria-label'), x.getAttribute('aria-valuetext'), x.title].join(' ')).join(' ')).join('\\n')"""
FAILED = r"status of (404|500|503) .*/offload/"


def shown(page: Any) -> str:
    """All that our elements say, to eyes and ears."""
    found: str = page.evaluate(TEXT)
    return found


def sane(page: Any, what: object) -> None:
    found = WRONG.search(text := shown(page))
    assert found is None, f"{what!r:.300} is shown as {text[max(0, found.start() - 80) : found.end() + 40]!r}"
    assert page.evaluate("() => window.hacked") is None, f"{what!r:.300} was interpreted"


def opened_panel(page: Any) -> Any:
    page.evaluate("() => app.extensionManager.command.execute('BalancedOffload.TogglePanel')")
    panel = page.locator(".bo-panel")
    panel.wait_for(state="visible")
    return panel


# ---------------------------------------------------------------------- quiet
def test_boots_and_runs_quietly(open_page: Any, stub: Stub, where: Where) -> None:
    """Boot, run, reload in the middle, a second run: no complaint, no foreign request, nothing in what is saved."""
    page = open_page(*where)
    settings = page.evaluate("ids => ids.map(id => app.extensionManager.setting.get(id))", list(OURS))
    assert settings == list(OURS.values())
    load_workflow(page, GRAPH)
    before, prompt = _settled(page), api_prompt(page)
    stub.steps, stub.delay = 200, 0.05
    queue(page)
    page.wait_for_selector(".bo-chip")
    page.wait_for_function("() => /moved|peak/.test(document.querySelector('.bo-chip')?.textContent ?? '')")
    assert stub.running(), "the chip shows the run while it is on"
    page.reload()
    open_page.ready(page)
    page.wait_for_function("() => /peak/.test(document.querySelector('.bo-chip')?.textContent ?? '')")
    load_workflow(page, GRAPH)
    panel = opened_panel(page)
    page.evaluate("() => app.api.interrupt(null)")
    _until(page, lambda: not stub.running() and len(stub.reports) == 1)
    stub.steps, stub.delay = 20, 0.02
    queue(page)
    _until(page, lambda: not stub.running() and len(stub.reports) == 2)
    page.wait_for_function("() => document.querySelectorAll('.bo-picker option').length >= 2")
    assert panel.locator("[data-figure=peak]").first.get_attribute("data-value") == str(canned.PEAK)
    assert api_prompt(page) == prompt, "telemetry got into the prompt"
    assert _bare(saved(page)) == _bare(before), "telemetry got into the workflow"


def _bare(workflow: dict[str, Any]) -> dict[str, Any]:
    """Without what the front end counts itself: its own version of the graph, and where the view is.

    Nodes 2.0 gives a node the height of what is on it, so that the heights of our two widgets' nodes follow what they
    show; with every other node, and every other field of these, nothing may change.
    """
    kept = {key: value for key, value in workflow.items() if key not in ("revision", "extra", "id")}
    nodes = [
        {**node, "size": [node["size"][0], "as shown"]} if node["type"] in ("VRAMReport", "OffloadPolicy") else node
        for node in workflow["nodes"]
    ]
    return {**kept, "nodes": nodes}


def _settled(page: Any) -> dict[str, Any]:
    """The workflow once nodes have the height that their widgets need."""
    page.locator(".bo-node-policy [data-figure=high]").first.wait_for(state="attached")
    found = saved(page)
    while True:
        page.wait_for_timeout(300)
        found, earlier = saved(page), found
        if found == earlier:
            return found


def _until(page: Any, ready: Callable[[], bool], seconds: float = 30) -> None:
    """While the page goes on."""
    for _ in range(int(seconds * 20)):
        if ready():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within {seconds:g} s")


def test_the_settings_dialog_has_our_rows(here: Here) -> None:
    page = here.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.get_by_text("Balanced Offload", exact=True).first.click()
    for name in ("Restore stock behaviour", "Show VRAM above nodes", "Show the VRAM chip", "Show hints"):
        page.get_by_text(name, exact=True).first.wait_for(state="visible")
    page.keyboard.press("Escape")


@pytest.mark.slow
def test_a_workflow_saved_while_a_run_is_shown(here: Here) -> None:
    """Saved in the middle of a run, loaded again: the same graph, and none of our state in it."""
    page, stub = here.page, here.stub
    before = _settled(page)
    stub.steps, stub.delay = 40, 0.05
    queue(page)
    page.wait_for_function("() => /peak/.test(document.querySelector('.bo-chip')?.textContent ?? '')")
    during = saved(page)
    assert _bare(during) == _bare(before)
    words = json.dumps(during)
    assert not re.search(r"step_ms|stall_ms|prompt_id|\bbo-", words)
    load_workflow(page, during)
    assert _bare(_settled(page)) == _bare(during)
    _until(page, lambda: not stub.running())


@pytest.mark.slow
def test_nodes_deleted_while_they_run(here: Here) -> None:
    """The node that runs, then all of them, our widgets too."""
    page, stub = here.page, here.stub
    stub.steps, stub.delay = 60, 0.05
    queue(page)
    page.wait_for_function("() => /peak/.test(document.querySelector('.bo-chip')?.textContent ?? '')")
    page.evaluate("() => app.rootGraph.nodes.filter(n => n.type === 'KSampler').forEach(n => app.rootGraph.remove(n))")
    page.wait_for_timeout(300)
    page.evaluate("() => { app.rootGraph.clear(); app.canvas.setDirty(true, true); }")
    page.wait_for_timeout(300)
    sane(page, "a run without its graph")
    load_workflow(page, GRAPH)
    _until(page, lambda: not stub.running())
    page.wait_for_timeout(200)
    sane(page, "the graph after it")


# ---------------------------------------------------------------------- garbage
def test_garbage_by_events(here: Here) -> None:
    page, stub = here.page, here.stub
    opened_panel(page)
    stub.send("execution_start", {"prompt_id": "garbage"})
    stub.send("offload.telemetry", canned.telemetry("garbage", "7", 1, 20))
    for number, bad in enumerate(garbage.telemetry()):
        stub.send("offload.telemetry", bad)
        if number % 40 == 0:
            page.wait_for_timeout(20)
            sane(page, bad)
    for bad in (*garbage.PLAIN, *garbage.reports()):
        row = bad
        if isinstance(bad, dict) and isinstance(bad.get("totals"), dict) and isinstance(bad.get("resolved"), dict):
            row = {**bad, "mode": None, "text": None}
        stub.send("offload.report", row)
    page.wait_for_timeout(200)
    sane(page, "reports")
    for event in ("offload.telemetry", "offload.report"):
        stub.send_text(f'{{"type": "{event}"}}')
        stub.send_text(f'{{"type": "{event}", "data": null}}')
    good = canned.telemetry("good", "7", 20, 20)
    stub.send("execution_start", {"prompt_id": "good"})
    stub.send("offload.telemetry", good)
    peak = page.locator(f".bo-chip [data-figure=peak][data-value='{canned.PEAK}']")
    peak.wait_for(state="attached", timeout=10_000)
    sane(page, good)


def test_garbage_by_reports(here: Here) -> None:
    """Every report is picked in the panel, and none is shown as what it is not."""
    page, stub = here.page, here.stub
    here.allow(FAILED)
    bad = garbage.reports()
    picked = bad[:: max(1, len(bad) // 12)] + bad[-3:]
    rows = [{**canned.row(canned.report()), "prompt_id": report["prompt_id"]} for report in picked]
    stub.answers["/offload/runs"] = (200, {"runs": rows, "kept": 64})
    for report in picked:
        stub.answers[f"/offload/report/{report['prompt_id']}"] = (200, report)
    _ask_again(page)
    panel = opened_panel(page)
    page.wait_for_function(f"() => document.querySelectorAll('.bo-picker option').length >= {len(picked)}")
    for report in picked:
        panel.locator(".bo-picker").select_option(report["prompt_id"])
        page.wait_for_timeout(60)
        sane(page, report["prompt_id"])


@pytest.mark.slow
def test_routes_that_answer_nonsense(here: Here) -> None:
    page, stub = here.page, here.stub
    here.allow(FAILED)
    opened_panel(page)
    for answer in garbage.ANSWERS:
        for path in ("/offload/runs", "/offload/status", "/offload/marks"):
            stub.answers[path] = answer
        _ask_again(page)
        page.evaluate("""() => { const node = app.rootGraph.nodes.find(n => n.type === 'OffloadPolicy');
          const widget = node.widgets.find(w => w.name === 'high');
          widget.value = widget.value === '50%' ? '60%' : '50%'; widget.callback?.(widget.value); }""")
        page.wait_for_timeout(150)
        sane(page, answer)
    stub.answers.clear()
    stub.add_run(canned.report("after-nonsense"))
    _ask_again(page)
    page.wait_for_function("() => document.querySelector('.bo-picker option[value=after-nonsense]')")


@pytest.mark.slow
def test_a_server_that_never_answers(here: Here) -> None:
    page, stub = here.page, here.stub
    for path in ("/offload/runs", "/offload/status", "/offload/marks"):
        stub.answers[path] = None
    page.reload()
    here.pages.ready(page)
    load_workflow(page, GRAPH)
    opened_panel(page)
    page.wait_for_timeout(500)
    sane(page, "no answer")
    stub.send("offload.telemetry", canned.telemetry("unasked", "7", 20, 20))
    page.locator(f".bo-chip [data-figure=peak][data-value='{canned.PEAK}']").wait_for(state="attached")


def _ask_again(page: Any) -> None:
    """As after the socket was lost: the page asks the server for everything."""
    page.evaluate("() => app.api.dispatchEvent(new CustomEvent('reconnected'))")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_no_host_of_ours_at_all(open_page: Any, stub: Stub, theme: str) -> None:
    """The scripts on a server without the pack's routes, as after a failed start of the pack."""
    open_page.allow(FAILED)
    for path in ("/offload/runs", "/offload/status", "/offload/marks"):
        stub.answers[path] = (404, "404: Not Found")
    page = open_page(theme=theme)
    load_workflow(page, GRAPH)
    opened_panel(page)
    page.wait_for_timeout(300)
    sane(page, "no routes")
    queue(page)
    _until(page, lambda: not stub.running() and len(stub.prompts) == 1)
    sane(page, "a run without routes")
