"""The widgets on VRAM Report and Offload Policy: figures of event and report, in no workflow and no prompt."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from . import canned, pages
from .canned import GIB
from .pages import ROOT, api_prompt, load_workflow, queue, saved

REPORT, POLICY = ".bo-node-report", ".bo-node-policy"
SAMPLER, REPORT_ID = "7", "12"
MARKUP = '<img src=x onerror="window.hacked = 1"><b>bold</b>'


def value(page: Any, place: str, figure: str) -> float | None:
    """The exact number behind a figure that is shown."""
    found = page.locator(f"{place} [data-figure='{figure}']").first.get_attribute("data-value")
    return None if found is None else float(found)


def shown(page: Any, place: str, figure: str) -> str:
    return str(page.locator(f"{place} [data-figure='{figure}']").first.text_content())


def with_our_node(prompt_id: str, **more: Any) -> dict[str, Any]:
    """A report of workflow 02 as a real one is: it has a row of the VRAM Report itself."""
    report = canned.report(prompt_id, nodes=("4", SAMPLER, "10"), **more)
    own = {**report["nodes"][-1], "id": REPORT_ID, "display": REPORT_ID, "type": "VRAMReport"}
    return {**report, "nodes": [*report["nodes"], {**own, "onload_s": 0.0, "evict_s": 0.0}]}


def clipped(page: Any, place: str) -> list[str]:
    """What of a widget lies outside its frame or over its neighbour, in words."""
    found: list[str] = page.evaluate(
        """place => {
          const root = document.querySelector(place);
          const scale = root.getBoundingClientRect().width / root.offsetWidth || 1;
          const frame = root.getBoundingClientRect();
          const wrong = [];
          const parts = [...root.querySelectorAll(":scope > * > *")].filter(part => part.offsetHeight);
          for (const [i, part] of parts.entries()) {
            const box = part.getBoundingClientRect();
            const cut = box.bottom > frame.bottom + scale || box.right > frame.right + scale;
            if (cut) wrong.push(`${part.className} is cut`);
            const next = parts[i + 1]?.getBoundingClientRect();
            if (next && box.bottom > next.top + scale) wrong.push(`${part.className} lies over the next`);
          }
          return wrong;
        }""",
        place,
    )
    return found


def look_at(page: Any, node: str, zoom: float = 1.0) -> None:
    pages.look_at(page, node, zoom, 420, 110)
    page.wait_for_timeout(300)


def test_a_report_before_in_and_after_a_run_and_a_reload(here: Any, shot: Any) -> None:
    page, stub = here.page, here.stub
    look_at(page, REPORT_ID, 0.9)
    assert "After the next run" in page.locator(REPORT).inner_text()
    assert page.locator(f"{REPORT} .bo-meter").is_hidden()
    before = page.evaluate("() => app.rootGraph.getNodeById(12).size[1]")

    stub.send("execution_start", {"prompt_id": "run-1"})
    stub.send("executing", {"node": SAMPLER, "display_node": SAMPLER, "prompt_id": "run-1"})
    for step in (1, 2, 3):
        stub.send("offload.telemetry", event := canned.telemetry("run-1", SAMPLER, step, 20, 1.5 + 0.22 * step))
    page.locator(f"{REPORT} .bo-meter").wait_for(state="visible")
    page.wait_for_timeout(300)
    vram = event["vram"]
    for part in ("weights", "activations", "others", "free"):
        segment = page.locator(f"{REPORT} .bo-seg[data-part='{part}']")
        assert float(segment.get_attribute("data-value")) == vram[part]
        assert float(segment.evaluate("e => parseFloat(e.style.width)")) == pytest.approx(
            100 * vram[part] / canned.TOTAL
        )
    assert page.locator(f"{REPORT} .bo-meter .bo-title").inner_text() == "VRAM now"
    assert value(page, REPORT, "peak") == vram["peak"]
    assert value(page, REPORT, "step") == pytest.approx(0.2215)
    assert value(page, REPORT, "step_moves") == pytest.approx(0.01425)
    assert value(page, REPORT, "stall") == pytest.approx(3 * 0.01425)
    assert value(page, REPORT, "moved") == event["moved"]
    assert "3 steps" in page.locator(f"{REPORT} .bo-readout").inner_text()
    assert clipped(page, REPORT) == []
    assert page.evaluate("() => app.rootGraph.getNodeById(12).size[1]") >= before or here.where.vue
    shot(page, f"report-live-{here.where}")

    # The node runs, then the prompt ends: what it showed is completed.
    report = stub.add_run(with_our_node("run-1", hints=[canned.hint(sentence=f"The denoiser {MARKUP} moved.")]))
    output = {"text": ["So far: 1.5 s"], "vram_report": [{**report, "ended": False, "complete": False}]}
    stub.send("executed", {"node": REPORT_ID, "display_node": REPORT_ID, "output": output, "prompt_id": "run-1"})
    stub.send("executing", {"node": None, "prompt_id": "run-1"})
    stub.send("offload.report", {**canned.row(report), "text": f"Done. {MARKUP}\nHint: {MARKUP} moved."})
    check_report(page, report, text=f"Done. {MARKUP}")  # the hint has a place of its own
    assert page.locator(f"{REPORT} .bo-meter .bo-title").inner_text() == "VRAM at the end of the last run"
    assert clipped(page, REPORT) == []
    shot(page, f"report-after-{here.where}")
    assert page.evaluate("() => window.hacked") is None
    assert page.locator(f"{REPORT} img, {REPORT} b").count() == 0
    page.locator(f"{REPORT} .bo-node-hint button").click()
    page.wait_for_function("() => app.extensionManager.bottomPanel.bottomPanelVisible")
    page.evaluate("() => app.extensionManager.bottomPanel.toggleBottomPanelTab('balanced-offload')")

    page.reload()
    here.pages.ready(page)
    load_workflow(page, "02-fit-aware-hires")
    look_at(page, REPORT_ID, 0.9)
    check_report(page, report, text=report["line"])


def check_report(page: Any, report: dict[str, Any], text: str) -> None:
    page.wait_for_function(
        "([place, text]) => document.querySelector(place)?.value === text", arg=[f"{REPORT} textarea", text]
    )
    page.wait_for_function(
        "([place, text]) => document.querySelector(place)?.textContent.includes(text)",
        arg=[f"{REPORT} .bo-readout", "20 steps"],
    )
    totals = report["totals"]
    assert value(page, REPORT, "peak") == report["vram"]["peak"]
    assert value(page, REPORT, "moves") == totals["onload_s"] + totals["stall_s"] + totals["evict_s"]
    for figure in ("onload", "stall", "wall"):
        assert value(page, REPORT, figure) == totals[f"{figure}_s"], figure
    assert shown(page, REPORT, "onload") == "1.38 s"
    assert "The denoiser <img" in page.locator(f"{REPORT} .bo-node-hint").inner_text()


def test_a_run_that_failed_before_the_node_and_one_of_another_workflow(here: Any) -> None:
    page, stub = here.page, here.stub
    look_at(page, REPORT_ID)
    error = {"type": "OOM", "message": "no room"}
    failed = stub.add_run(canned.report("run-1", nodes=("4", SAMPLER, "10"), error=error))
    stub.send("offload.report", {**canned.row(failed), "text": "It ended by an error: no room."})
    page.wait_for_function(
        "place => document.querySelector(place)?.value.includes('no room')", arg=f"{REPORT} textarea"
    )
    stub.reports.clear()
    stub.add_run(canned.report("run-2", nodes=("4", "11", "10")))  # 11 is no KSampler in this workflow
    page.reload()
    here.pages.ready(page)
    load_workflow(page, "02-fit-aware-hires")
    look_at(page, REPORT_ID)
    page.locator(f"{REPORT} p").filter(has_text="After the next run").wait_for()
    page.wait_for_timeout(300)
    assert page.locator(f"{REPORT} .bo-meter").is_hidden()


def test_garbage_takes_nothing_with_it(here: Any) -> None:
    page, stub = here.page, here.stub
    here.allow(r"JSON")  # NaN is none in JSON: the front end says so of the frame
    look_at(page, REPORT_ID, 0.9)
    for output in (None, {}, {"text": 7, "vram_report": "no"}, {"text": [None, {"a": 1}], "vram_report": [[]]}):
        stub.send("executed", {"node": REPORT_ID, "display_node": REPORT_ID, "output": output, "prompt_id": "run-1"})
    vram = {"weights": "12", "activations": -3, "others": None, "free": [], "high": {}, "total": 0}
    telemetry = {
        "v": 9,
        "prompt_id": "run-1",
        "node": SAMPLER,
        "t": -1,
        "vram": vram,
        "points": [None, 5, {"step": "x"}],
    }
    stub.send("executing", {"node": SAMPLER, "display_node": SAMPLER, "prompt_id": "run-1"})
    stub.send("offload.telemetry", {**telemetry, "stall_ms": float("nan"), "components": {"a": 1}, "more": "fields"})
    stub.send("offload.telemetry", telemetry)
    stub.send(
        "offload.report", {"prompt_id": "run-1", "verdict": 4, "text": None, "totals": [], "nodes": [1, None, {}]}
    )
    page.wait_for_timeout(400)
    for place, node in ((REPORT, REPORT_ID), (POLICY, "1")):
        look_at(page, node, 0.9)
        text = page.locator(place).first.inner_text()
        assert not re.search(r"NaN|undefined|null|\[object", text), text


def test_nothing_is_in_the_workflow_or_the_prompt(here: Any) -> None:
    page = here.page
    look_at(page, REPORT_ID)
    original = json.loads((ROOT / "workflows" / "02-fit-aware-hires.json").read_text(encoding="utf-8"))
    here.stub.send("offload.report", canned.row(here.stub.add_run(with_our_node("run-1"))))
    page.locator(f"{REPORT} .bo-meter").wait_for(state="visible")
    wanted = {node["id"]: node.get("widgets_values") for node in original["nodes"]}
    for node in saved(page)["nodes"]:
        assert (node.get("widgets_values") or None) == (wanted[node["id"]] or None), node["type"]
        assert not [name for name in node.get("widgets_values_named") or {} if "offload" in name]
        assert node["type"] != "VRAMReport" or "widgets_values" not in node
    assert "balanced_offload" not in re.sub(r'"(cnr_id|python_module|aux_id)": ?"[^"]*"', "", json.dumps(saved(page)))
    prompt = api_prompt(page)
    assert set(prompt["1"]["inputs"]) == {name for name in canned.policy() if name != "schema"}
    assert set(prompt[REPORT_ID]["inputs"]) == {"anything"}
    assert "run-1" not in json.dumps(saved(page)) + json.dumps(prompt)


@pytest.mark.slow
def test_sizes_are_the_users_where_there_is_room(here: Any, shot: Any) -> None:
    page, stub = here.page, here.stub
    look_at(page, REPORT_ID, 0.8)
    size = "() => [...app.rootGraph.getNodeById(12).size]"
    stub.send("offload.report", canned.row(stub.add_run(with_our_node("run-1", hints=[canned.hint()]))))
    page.locator(f"{REPORT} .bo-meter").wait_for(state="visible")
    page.evaluate("() => app.rootGraph.getNodeById(12).setSize([520, 860])")
    page.wait_for_timeout(300)
    stub.send("executing", {"node": SAMPLER, "display_node": SAMPLER, "prompt_id": "run-2"})
    stub.send("offload.telemetry", canned.telemetry("run-2", SAMPLER, 3, 20, 2.0))
    page.wait_for_timeout(400)
    width, height = page.evaluate(size)
    assert abs(width - 520) < 2
    assert height >= 858
    text, frame = page.locator(f"{REPORT} textarea").bounding_box(), page.locator(REPORT).bounding_box()
    assert text["width"] > 0.85 * frame["width"], "the text takes the width"
    assert frame["y"] + frame["height"] - text["y"] - text["height"] < 20, "and the rest of the height"
    assert clipped(page, REPORT) == []
    page.evaluate("() => app.rootGraph.getNodeById(12).setSize([260, 100])")
    page.wait_for_timeout(400)
    assert clipped(page, REPORT) == [], "a small node grows to what is on it"
    shot(page, f"report-narrow-{here.where}")

    page.evaluate("() => { app.rootGraph.getNodeById(12).collapse(true); app.canvas.setDirty(true, true) }")
    page.wait_for_function(f"() => !document.querySelector('{REPORT}')?.offsetParent")
    page.evaluate("() => { app.rootGraph.getNodeById(12).collapse(true); app.canvas.setDirty(true, true) }")
    page.wait_for_function(f"() => document.querySelector('{REPORT}')?.offsetParent")
    page.wait_for_timeout(300)
    assert clipped(page, REPORT) == []
    page.evaluate("() => app.rootGraph.remove(app.rootGraph.getNodeById(12))")
    stub.send("offload.telemetry", canned.telemetry("run-2", SAMPLER, 4, 20, 2.2))
    page.wait_for_function(f"() => !document.querySelector('{REPORT}')?.offsetParent")


class Slow:
    """Answers /offload/marks out of order: the first question last."""

    def __init__(self, page: Any, stub: Any) -> None:
        self.held: list[Any] = []
        self.stub = stub
        page.route("**/offload/marks?**", self._route)

    def _route(self, route: Any) -> None:
        self.held.append(route)

    def answer(self, index: int) -> None:
        route = self.held[index]
        route.fulfill(
            json=canned.marks(**dict(re.findall(r"[?&]([^=&]+)=([^&]*)", route.request.url.replace("%25", "%"))))
        )


def set_field(page: Any, name: str, text: str, node: int = 1) -> None:
    """As a user's hand does: the value, then the widget's callback."""
    page.evaluate(
        """([id, name, value]) => {
          const node = app.rootGraph.getNodeById(id);
          const widget = node.widgets.find(one => one.name === name);
          widget.value = value;
          widget.callback?.(value, app.canvas, node);
        }""",
        [node, name, text],
    )


def wait_for_value(page: Any, figure: str, wanted: int | None) -> None:
    page.wait_for_function(
        "([place, wanted]) => document.querySelector(place)?.getAttribute('data-value') === wanted",
        arg=[f"{POLICY} .bo-node-marks [data-figure='{figure}']", None if wanted is None else str(wanted)],
    )


def test_a_policys_marks_are_in_step_with_its_inputs(here: Any, shot: Any) -> None:
    page, stub = here.page, here.stub
    look_at(page, "1", 0.9)
    wait_for_value(page, "high", canned.HIGH)
    wait_for_value(page, "low", canned.LOW)
    assert shown(page, f"{POLICY} .bo-node-marks", "mode") == "balanced"
    assert "canned card" in page.locator(POLICY).inner_text()
    set_field(page, "high", "50%")
    wait_for_value(page, "high", canned.TOTAL // 2)
    assert float(page.locator(f"{POLICY} .bo-mark-high").get_attribute("data-value")) == canned.TOTAL // 2
    asked = [path for method, path in stub.asked if "/offload/marks" in path]
    assert "high=50%25" in asked[-1]
    assert "mode=auto" in asked[-1]
    assert "fit_aware=true" in asked[-1]
    for text in ("1GiB", "2GiB", "3GiB", "4GiB"):
        set_field(page, "high", text)
    wait_for_value(page, "high", 4 * GIB)
    more = [path for method, path in stub.asked if "/offload/marks" in path][len(asked) :]
    assert len(more) == 1, "a hand that types is waited for"

    set_field(page, "high", f"lots {MARKUP}")
    page.wait_for_function(f"() => document.querySelector('{POLICY} .bo-alarm')?.textContent.startsWith('✕ high: got')")
    wait_for_value(page, "high", None)
    assert shown(page, f"{POLICY} .bo-node-marks", "high") == "n/a"
    assert page.locator(f"{POLICY} img").count() == 0
    assert clipped(page, POLICY) == []
    shot(page, f"policy-error-{here.where}")
    set_field(page, "high", "25%")
    wait_for_value(page, "high", canned.TOTAL // 4)
    assert page.locator(f"{POLICY} .bo-alarm").is_hidden()
    stub.send("offload.telemetry", canned.telemetry("run-1", SAMPLER, 3, 20, 2.0))
    page.wait_for_function(
        f"() => Number(document.querySelector('{POLICY} .bo-seg[data-part=weights]').dataset.value) > 0"
    )
    high = page.locator(f"{POLICY} .bo-mark-high").get_attribute("data-value")
    assert float(high) == canned.TOTAL // 4, "the inputs' mark"
    shot(page, f"policy-{here.where}")


@pytest.mark.slow
def test_the_last_answer_wins_and_a_link_is_said(here: Any) -> None:
    page = here.page
    look_at(page, "1", 0.9)
    wait_for_value(page, "high", canned.HIGH)
    slow = Slow(page, here.stub)
    for number, text in enumerate(("1GiB", "2GiB"), start=1):
        set_field(page, "high", text)
        for _ in itertools.repeat(None, 40):
            if len(slow.held) >= number:
                break
            page.wait_for_timeout(50)
    assert len(slow.held) == 2
    slow.answer(1)
    wait_for_value(page, "high", 2 * GIB)
    slow.answer(0)
    page.wait_for_timeout(300)
    wait_for_value(page, "high", 2 * GIB)
    page.unroute("**/offload/marks?**")

    page.evaluate(
        """() => {
          const other = LiteGraph.createNode("OffloadPolicy");
          app.rootGraph.add(other);
          const node = app.rootGraph.getNodeById(1);
          other.connect(1, node, node.inputs.findIndex(one => one.name === "high"));
        }"""
    )
    look_at(page, "1", 0.9)
    place = page.locator(POLICY).filter(has_text="set by a link")
    place.wait_for()
    assert "Set by a link, so known in a run only: high." in place.inner_text()
    page.wait_for_timeout(400)
    asked = [path for method, path in here.stub.asked if "/offload/marks" in path]
    assert [path for path in asked[-4:] if "high=" not in path], "what a link sets is not guessed"


def test_no_answer_is_said_and_not_shown_as_zero(here: Any) -> None:
    page, stub = here.page, here.stub
    look_at(page, "1", 0.9)
    stub.answers["/offload/marks"] = (500, {"error": "the card is away"})
    here.allow(r"status of 500 .*/offload/marks")
    set_field(page, "low", "1GiB")
    page.wait_for_function(
        f"() => document.querySelector('{POLICY} .bo-alarm')?.textContent.includes('the card is away')"
    )
    wait_for_value(page, "low", None)
    stub.answers["/offload/marks"] = (200, [1, 2])
    set_field(page, "low", "2GiB")
    page.wait_for_function(
        f"() => document.querySelector('{POLICY} .bo-alarm')?.textContent.includes('answer is none')"
    )
    del stub.answers["/offload/marks"]
    queue(page)  # a run may change what fits: asked again at its end
    page.wait_for_function(f"() => document.querySelector('{POLICY} .bo-alarm')?.hidden")
    wait_for_value(page, "low", 2 * GIB)


def _nothing(route: Any) -> None:
    route.fulfill(body="", content_type="text/javascript")


def test_the_pack_changes_no_workflow_that_has_its_nodes(open_page: Any) -> None:
    """The same workflow in the same front end, with our scripts and without."""
    found = []
    for ours in (True, False):
        page = open_page.blank()
        if not ours:
            page.route("**/extensions/balanced_offload/**", _nothing)
        page.goto(f"{open_page.stub.url}/")
        page.wait_for_function("() => window.app?.graph && window.app.canvas && window.app.extensionManager?.setting")
        page.wait_for_timeout(1500)
        load_workflow(page, "02-fit-aware-hires")
        page.wait_for_timeout(500)
        nodes = {node["id"]: {**node, "size": None} for node in saved(page)["nodes"]}
        found.append((nodes, api_prompt(page)))
    with_ours, without = found
    assert with_ours[0] == without[0]
    assert with_ours[1] == without[1]
