"""Invariant: a hint changes nothing before its button is pressed, and then only the inputs that it names, undoably."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from . import canned, pages
from .panels import mount, pick, telemetry

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from .shared import Here
    from .stub import Stub

OPEN = "BalancedOffload.TogglePanel"
SIZE = {"width": 1600, "height": 400}


def _node(ident: int, **values: Any) -> dict[str, Any]:
    known = {"mode": "auto", "high": "auto", "never": "", "fit_aware": True, **values}
    widgets = [{"name": name, "value": value, "options": {}} for name, value in known.items()]
    return {
        "id": ident,
        "type": "OffloadPolicy",
        "title": "Offload Policy",
        "mode": 0,
        "inputs": [],
        "widgets": widgets,
    }


def _value(page: Page, index: int, field: str) -> Any:
    return page.evaluate(
        "([i, name]) => bo.graph.nodes[i].widgets.find(one => one.name === name).value", [index, field]
    )


def _hinted(stub: Stub, prompt_id: str = "run-1", **over: Any) -> dict[str, Any]:
    more: dict[str, Any] = {"hints": [canned.hint()], "policy": canned.policy(fit_aware=False), **over}
    return stub.add_run(canned.report(prompt_id, **more))


# ---------------------------------------------------------------------- what is seen
def test_one_hint_with_its_figures(open_plain: Callable[..., Page], stub: Stub) -> None:
    more = canned.hint(code="DECODE_PEAK", sentence="another one")
    report = _hinted(stub, hints=[canned.hint(), more])
    page = open_plain(size=SIZE)
    mount(page)
    page.wait_for_selector(".bo-hint:visible")
    assert page.locator(".bo-hint").count() == 1
    assert page.locator(".bo-hint-text").inner_text() == report["hints"][0]["sentence"]
    assert page.locator(".bo-hint-act").inner_text() == "Turn fit_aware on"
    assert "another one" not in page.locator(".bo-panel").inner_text()
    page.locator(".bo-hint-summary").click()
    why = page.locator(".bo-hint-why").inner_text()
    share = round(100 * 1.48 / report["totals"]["wall_s"])
    for text in ("1.48 s", f"{share} % of this run", "FITS_BUT_MOVED", "Fit-aware to on", "two comparable runs"):
        assert text in why, text
    link = page.locator(".bo-hint-why a")
    answer = page.request.get(str(link.evaluate("link => link.href")))
    assert answer.ok and "VRAM" in answer.text()


def test_a_note_in_place_of_a_hint(open_plain: Callable[..., Page], stub: Stub) -> None:
    stub.add_run(canned.report("run-1", hint_note="the decode of this run needed the room"))
    page = open_plain(size=SIZE)
    mount(page)
    page.wait_for_selector(".bo-hint-note:visible")
    assert page.locator(".bo-hint-note").inner_text() == "No hint: the decode of this run needed the room"
    assert page.locator(".bo-hint-act").is_hidden() and page.locator(".bo-hint-hide").is_hidden()


def test_no_hint_while_a_run_is_on_nor_of_another_run(open_plain: Callable[..., Page], stub: Stub) -> None:
    _hinted(stub, "run-1")
    stub.add_run(canned.report("run-2"))
    page = open_plain(size=SIZE)
    mount(page)
    page.wait_for_function("() => bo.store.report('run-2')")
    page.wait_for_timeout(60)
    assert page.locator(".bo-hint").is_hidden()
    pick(page, "run-1")
    page.wait_for_selector(".bo-hint:visible")
    page.evaluate("() => bo.store.select(null)")
    telemetry(page, canned.telemetry("run-3", "3", 1, 20))
    page.wait_for_selector(".bo-panel[data-view=now]")
    assert page.locator(".bo-hint").is_hidden()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "value"),
    [("Hints", False), ("HiddenHints", "OTHER, FITS_BUT_MOVED"), ("HiddenHints", "FITS_BUT_MOVED")],
)
def test_settings_hide_it_at_once(open_plain: Callable[..., Page], stub: Stub, setting: str, value: Any) -> None:
    _hinted(stub)
    page = open_plain(size=SIZE)
    mount(page)
    page.wait_for_selector(".bo-hint:visible")
    page.evaluate("([id, value]) => bo.host.setSetting(id, value)", [f"BalancedOffload.{setting}", value])
    page.wait_for_selector(".bo-hint", state="hidden")
    usual = {"Hints": True, "HiddenHints": ""}[setting]
    page.evaluate("([id, value]) => bo.host.setSetting(id, value)", [f"BalancedOffload.{setting}", usual])
    page.wait_for_selector(".bo-hint:visible")


def test_do_not_show_again_keeps_the_other_codes(open_plain: Callable[..., Page], stub: Stub) -> None:
    _hinted(stub)
    page = open_plain(size=SIZE)
    mount(page, settings={"BalancedOffload.HiddenHints": "RAM_PRESSURE"})
    page.wait_for_selector(".bo-hint:visible")
    page.locator(".bo-hint-hide").click()
    page.wait_for_selector(".bo-hint", state="hidden")
    assert page.evaluate("() => bo.kept['BalancedOffload.HiddenHints']") == "RAM_PRESSURE,FITS_BUT_MOVED"
    assert page.evaluate("() => document.activeElement.className") == "bo-picker", "the focus is not lost"
    assert "FITS_BUT_MOVED" in page.get_by_role("status").inner_text()


# ---------------------------------------------------------------------- what the button does
def test_nothing_changes_before_the_press_and_then_only_the_node_that_is_meant(
    open_plain: Callable[..., Page], stub: Stub
) -> None:
    _hinted(stub, hints=[canned.hint(action={"set": {"fit_aware": True, "never": "vae"}, "label": "Do it"})])
    page = open_plain(size=SIZE)
    mount(page, graph={"nodes": [_node(1), _node(2, fit_aware=False), _node(3, fit_aware=False, high="50%")]})
    page.wait_for_function("() => bo.store.report('run-1')")
    page.wait_for_selector(".bo-hint-act:visible")
    assert (_value(page, 1, "fit_aware"), page.evaluate("() => bo.undone()")) == (False, 0)
    page.locator(".bo-hint-act").click()
    assert [_value(page, i, "fit_aware") for i in range(3)] == [True, True, False]
    assert [_value(page, i, "never") for i in range(3)] == ["", "vae", ""]
    assert page.evaluate("() => bo.undone()") == 1
    said = page.locator(".bo-hint-said").inner_text()
    assert said == (
        'Set Fit-aware to on, Never offload to vae in "Offload Policy" (#2). The next run uses it; undo with Ctrl+Z.'
    )
    assert page.get_by_role("status").inner_text() == said
    page.locator(".bo-hint-act").click()
    assert page.evaluate("() => bo.undone()") == 1
    assert page.locator(".bo-hint-said").inner_text() == (
        '"Offload Policy" (#2) already has Fit-aware on, Never offload vae. The next run uses it.'
    )


def test_without_a_node_it_says_what_to_set(open_plain: Callable[..., Page], stub: Stub) -> None:
    _hinted(stub)
    page = open_plain(size=SIZE)
    mount(page, graph={"nodes": [{"id": 1, "type": "KSampler"}]})
    page.locator(".bo-hint-act").click()
    said = page.locator(".bo-hint-said").inner_text()
    assert "no Offload Policy node" in said and "set Fit-aware to on" in said


def test_a_hint_without_an_action_has_no_button(open_plain: Callable[..., Page], stub: Stub) -> None:
    _hinted(stub, hints=[canned.hint(action=None)])
    page = open_plain(size=SIZE)
    mount(page)
    page.wait_for_selector(".bo-hint:visible")
    assert page.locator(".bo-hint-act").is_hidden() and page.locator(".bo-hint-hide").is_visible()


# ---------------------------------------------------------------------- in the front end
TWO_NODES = """() => {
  app.rootGraph.clear();
  for (const x of [500, 900]) {
    const node = LiteGraph.createNode("OffloadPolicy");
    app.rootGraph.add(node);
    node.pos = [x, 80];
  }
  const second = app.rootGraph.nodes[1];
  second.widgets.find((one) => one.name === "fit_aware").value = false;
}"""
FIT_AWARE = """() => app.rootGraph.nodes.map(
  (node) => node.widgets?.find((one) => one.name === "fit_aware")?.value)"""
INSIDE = """() => {
  const { node } = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.nodes[1]]));
  const inner = node.subgraph.nodes[0];
  const slot = inner.inputs.find((one) => one.name === "fit_aware");
  node.subgraph.addInput("fit_aware", "BOOLEAN").connect(slot, inner);
  return node.widgets.map((one) => [one.name, one.value]);
}"""


def _press(here: Here) -> str:
    pages.command(here.page, OPEN)
    here.page.wait_for_selector(".bo-hint-act:visible")
    here.page.wait_for_function("() => !document.querySelector('.bo-body').hidden")
    here.page.locator(".bo-hint-act").click()
    return here.page.locator(".bo-hint-said").inner_text()


def test_the_button_is_one_undo_step(here: Here, shot: Callable[..., Any]) -> None:
    _hinted(here.stub)
    here.page.evaluate(TWO_NODES)
    here.page.wait_for_timeout(300)  # the front end takes down what was changed before
    said = _press(here)
    shot(here.page, f"hint-{here.where}")
    assert "(#" in said and "undo with Ctrl+Z" in said
    assert here.page.evaluate(FIT_AWARE) == [True, True]
    assert {node["inputs"]["fit_aware"] for node in pages.api_prompt(here.page).values()} == {True}
    here.page.evaluate("() => document.activeElement.blur()")
    here.page.keyboard.press("Control+z")
    here.page.wait_for_function("() => app.rootGraph.nodes.length === 2")
    here.page.wait_for_function(f"() => JSON.stringify(({FIT_AWARE})()) === '[true,false]'")


def test_inside_a_subgraph(here: Here) -> None:
    _hinted(here.stub)
    here.page.evaluate(TWO_NODES)
    assert here.page.evaluate(INSIDE) == [["fit_aware", False]]
    here.page.wait_for_timeout(300)
    said = _press(here)
    assert "Set Fit-aware to on" in said
    prompt = pages.api_prompt(here.page)
    assert {key: node["inputs"]["fit_aware"] for key, node in prompt.items() if ":" in key}, prompt
    assert all(node["inputs"]["fit_aware"] is True for node in prompt.values())


@pytest.mark.slow
def test_hidden_hints_stay_hidden_after_a_reload(here: Here) -> None:
    _hinted(here.stub)
    pages.command(here.page, OPEN)
    here.page.locator(".bo-hint-hide").click()
    here.page.wait_for_selector(".bo-hint", state="hidden")
    here.page.wait_for_timeout(300)  # the setting is on its way
    assert here.stub.settings["BalancedOffload.HiddenHints"] == "FITS_BUT_MOVED"
    here.page.reload()
    here.pages.ready(here.page)
    if not here.page.locator(".bo-panel").is_visible():
        pages.command(here.page, OPEN)
    here.page.wait_for_selector(".bo-panel[data-view=run] .bo-body:visible")
    assert here.page.locator(".bo-hint").is_hidden()
