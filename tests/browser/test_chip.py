"""Invariant: the chip's figures are the event's to the byte, in every front end; a button, and a meter where known.

It is read aloud once, at a run's end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from offload import summary

from . import canned
from .canned import TOTAL
from .shared import Here

CHIP, BUTTON, METER = ".bo-chip", ".bo-chip-button", ".bo-chip-meter"
FIGURE = """(name) => {
  const found = document.querySelector(`.bo-chip [data-figure="${name}"]`);
  return { text: found.textContent, value: found.dataset.value ?? null, unit: found.dataset.unit ?? null };
}"""


def figure(page: Page, name: str) -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate(FIGURE, name)
    return found


def said(page: Page) -> str:
    text: str = page.evaluate("() => document.querySelector('.bo-chip [aria-live=polite]').textContent")
    return text


def wait_for_value(page: Page, name: str, value: float) -> None:
    page.wait_for_function(
        "([name, value]) => Number(document.querySelector(`.bo-chip [data-figure=${name}]`)?.dataset.value) === value",
        arg=[name, value],
    )


def test_a_run_from_its_events_to_its_end(here: Here, shot: Callable[[Any, str], Path]) -> None:
    page, stub = here.page, here.stub
    page.wait_for_selector(CHIP)
    assert figure(page, "used")["value"] is None
    assert page.locator(METER).get_attribute("role") is None, "no meter of what is not known"
    live = canned.telemetry("p", "3", 7, 20)
    stub.send("offload.telemetry", live)
    vram = live["vram"]
    used = TOTAL - vram["free"]
    wait_for_value(page, "used", used)
    assert figure(page, "used")["text"] == f"VRAM {_bare(used)} / {summary.size(TOTAL)}"
    assert figure(page, "peak") == {
        "text": f", peak {_bare(vram['peak'])}",
        "value": str(vram["peak"]),
        "unit": "bytes",
    }
    moved = live["moved"]
    assert figure(page, "moves") == {"text": f", moved {summary.size(moved)}", "value": str(moved), "unit": "bytes"}
    meter = page.locator(METER)
    values = {name: meter.get_attribute(f"aria-{name}") for name in ("valuemin", "valuenow", "valuemax", "valuetext")}
    assert values == {
        **{"valuemin": "0", "valuenow": str(used), "valuemax": str(TOTAL)},
        "valuetext": f"{summary.size(used)} of {summary.size(TOTAL)}",
    }
    assert meter.get_attribute("role") == "meter" and meter.get_attribute("aria-label") == "VRAM in use"
    # To the pixel: the bar's share of its track.
    share = page.evaluate(
        "() => document.querySelector('.bo-chip-bar').getBoundingClientRect().width"
        " / document.querySelector('.bo-chip-meter').getBoundingClientRect().width"
    )
    assert share == pytest.approx(used / TOTAL, abs=0.005)
    assert said(page) == "", "nothing is read aloud while it runs"
    shot(page.locator(CHIP), f"chip-live-{here.where}")

    report = stub.add_run(canned.report("p"))
    stub.send("offload.report", canned.row(report))
    moves = sum(report["totals"][f"{name}_s"] for name in ("onload", "stall", "evict"))
    wait_for_value(page, "peak", report["vram"]["peak"])
    ended = figure(page, "moves")
    assert (ended["text"], ended["unit"]) == (f", moved {summary.seconds(moves)}", "seconds")
    assert float(ended["value"]) == pytest.approx(moves, abs=1e-12)
    assert figure(page, "peak")["text"] == f", peak {_bare(report['vram']['peak'])}"
    label = page.locator(BUTTON).get_attribute("aria-label")
    text = "".join(figure(page, name)["text"] for name in ("used", "peak", "moves"))
    assert label == f"{text}, at the end of the last run. Open the Offload panel"
    assert said(page) == f"Run ended: VRAM peak {summary.size(report['vram']['peak'])}, moves {summary.seconds(moves)}."


def _bare(size: int) -> str:
    return summary.size(size, "GiB").removesuffix(" GiB")


@pytest.mark.slow
def test_an_event_without_figures_is_said_to_be_unknown(here: Here) -> None:
    page, stub = here.page, here.stub
    page.wait_for_selector(CHIP)
    none = dict.fromkeys(("weights", "activations", "others", "free", "high", "low", "peak", "total"))
    stub.send("offload.telemetry", canned.telemetry("p", "3", 1, 20, vram=none, moved=None))
    page.wait_for_function("() => document.querySelector('.bo-chip').dataset.running === 'true'")
    assert [figure(page, name)["text"] for name in ("used", "peak", "moves")] == ["VRAM n/a", "", ""]
    assert page.locator(METER).get_attribute("role") is None and not page.locator(METER).is_visible()
    stub.send("offload.telemetry", canned.telemetry("p", "3", 2, 20))
    page.wait_for_function("() => document.querySelector('.bo-chip-meter').getAttribute('role') === 'meter'")


def test_a_failed_run_is_said_to_have_failed(here: Here) -> None:
    page, stub = here.page, here.stub
    page.wait_for_selector(CHIP)
    page.wait_for_timeout(300)
    lost = canned.report(
        "p", error={"type": "OutOfMemoryError", "message": "<b>full</b>"}, complete=False, verdict="oom"
    )
    lost["totals"] = {**lost["totals"], "stall_s": None}
    stub.send("offload.report", canned.row(lost))
    page.wait_for_function("() => document.querySelector('.bo-chip [aria-live]').textContent")
    assert said(page) == f"Run ended by an error: VRAM peak {summary.size(lost['vram']['peak'])}, moves n/a."
    assert figure(page, "moves")["text"] == ""


def test_rows_that_were_there_are_no_news(here: Here) -> None:
    page, stub = here.page, here.stub
    stub.add_run(canned.report("old"))
    page.reload()
    here.pages.ready(page)
    page.wait_for_selector(CHIP)
    wait_for_value(page, "peak", stub.reports["old"]["vram"]["peak"])
    assert said(page) == ""
    assert figure(page, "used")["text"] == f"VRAM n/a / {summary.size(TOTAL)}", "the card is known, its use is not"


def test_it_opens_the_panel_which_speaks_for_itself(here: Here) -> None:
    page, stub = here.page, here.stub
    page.click(BUTTON)
    page.wait_for_selector(".bo-panel")
    stub.send("offload.report", canned.row(stub.add_run(canned.report("p"))))
    wait_for_value(page, "peak", stub.reports["p"]["vram"]["peak"])
    assert said(page) == "", "one live region at a time"
    page.focus(BUTTON)
    page.keyboard.press("Enter")
    page.wait_for_selector(".bo-panel", state="detached")


def test_the_setting_takes_it_away_and_brings_it_back(here: Here) -> None:
    page = here.page
    page.wait_for_selector(CHIP)
    set_it = "value => app.extensionManager.setting.set('BalancedOffload.Chip', value)"
    page.evaluate(set_it, False)
    page.wait_for_selector(CHIP, state="detached")
    page.wait_for_timeout(700)
    assert page.locator(CHIP).count() == 0 and not page.locator(".bo-chip-anchor").is_visible()
    page.evaluate(set_it, True)
    page.wait_for_selector(CHIP)
    here.stub.send("offload.telemetry", canned.telemetry("p", "3", 3, 20))
    page.wait_for_function("() => document.querySelector('.bo-chip').dataset.running === 'true'")
    assert page.locator(CHIP).count() == 1


def test_it_can_be_read_and_hit(here: Here) -> None:
    page = here.page
    page.wait_for_selector(BUTTON)
    here.stub.send("offload.telemetry", canned.telemetry("p", "3", 3, 20))
    page.wait_for_function("() => document.querySelector('.bo-chip').dataset.running === 'true'")
    found = page.evaluate(
        """() => {
          const button = document.querySelector(".bo-chip-button");
          const { width, height } = button.getBoundingClientRect();
          const spans = [...button.querySelectorAll("span")].filter((each) => each.textContent);
          const px = Math.min(...spans.map((each) => parseFloat(getComputedStyle(each).fontSize)));
          const inside = button.scrollWidth <= button.clientWidth + 1;
          const hidden = getComputedStyle(document.querySelector(".bo-chip-anchor") ?? document.body).display;
          const bar = document.querySelector("[data-testid='action-bar-buttons']");
          return { width, height, px, inside, hidden, bar: bar?.contains(button) ?? null };
        }"""
    )
    assert found["width"] >= 24 and found["height"] >= 24 and found["px"] >= 11 and found["inside"]
    assert found["bar"] is True and found["hidden"] == "none", "it stands in the action bar, in place of a plain button"


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_without_an_action_bar_it_stands_in_the_corner(
    open_page: Any, theme: str, shot: Callable[[Any, str], Path]
) -> None:
    page = open_page(theme=theme, settings={"Comfy.UseNewMenu": "Disabled"})
    page.wait_for_selector(f"{CHIP}.bo-chip-floating")
    box = page.locator(BUTTON).bounding_box()
    assert box and box["x"] < 100 and box["y"] < 100
    hit = page.evaluate(
        "([x, y]) => Boolean(document.elementFromPoint(x, y).closest('.bo-chip'))", [box["x"] + 20, box["y"] + 10]
    )
    assert hit, "nothing lies over it"
    shot(page, f"chip-floating-{theme}")
    # This menu shows no panel: it says so, and leaves no empty one behind.
    page.click(BUTTON)
    page.get_by_text("This menu has no bottom panel for Offload").first.wait_for()
    page.wait_for_function("() => app.extensionManager.bottomPanel.bottomPanelVisible === false")
    page.evaluate("() => app.extensionManager.setting.set('Comfy.UseNewMenu', 'Top')")
    page.wait_for_selector(f"{CHIP}:not(.bo-chip-floating)")
    assert page.locator(CHIP).count() == 1


@pytest.mark.slow
def test_it_costs_little(open_plain: Callable[..., Page]) -> None:
    """Two thousand messages and their drawing: one drawing a frame, and little of it."""
    page = open_plain()
    cost = page.evaluate(
        """async ([folder, message]) => {
          const { makeChip } = await import(`${folder}/chip.js`);
          const { Store } = await import(`${folder}/store.js`);
          const { readTelemetry } = await import(`${folder}/wire.js`);
          const store = new Store();
          let drawn = 0;
          const options = { open() {}, heard: () => true, drawn: () => (drawn += 1) };
          const chip = makeChip({ vue: () => false }, store, options);
          document.body.append(chip.element);
          drawn = 0;
          const frames = { count: 0 };
          let busy = 0;
          for (let i = 0; i < 2000; i += 1) {
            const from = performance.now();
            store.setTelemetry(readTelemetry({ ...message, t: i, step: i }));
            busy += performance.now() - from;
            if (i % 100 === 99) {
              await new Promise(requestAnimationFrame);
              frames.count += 1;
            }
          }
          await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          const from = performance.now();
          for (let i = 0; i < 200; i += 1) chip.refresh();
          const draw_ms = (performance.now() - from) / 200;
          return { drawn, each_ms: busy / 2000, draw_ms, kept: store.samples.length, frames: frames.count };
        }""",
        ["/extensions/balanced_offload/js", canned.telemetry("p", "3", 1, 20)],
    )
    assert cost["drawn"] <= cost["frames"] + 2 + 200, cost
    assert cost["kept"] <= 1200
    assert cost["each_ms"] < 1 and cost["draw_ms"] < 4, cost
