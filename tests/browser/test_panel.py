"""Invariant: the panel shows the report's own figures, to the byte and the millisecond, and the run that it says.

The panel is mounted alone (panels.py); how it is used, and what the front end adds, is in test_panel_use.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from . import canned
from .panels import cells, ended, figure, mount, pick, shown, tab, telemetry

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from .stub import Stub


# ---------------------------------------------------------------------- figures
def test_the_head_has_the_reports_figures(open_plain: Callable[..., Page], stub: Stub) -> None:
    report = stub.add_run(canned.report("run-1"))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    shown(page, "run-1")
    totals, peak = report["totals"], report["vram"]["peak"]
    assert figure(page, "peak") == peak
    assert figure(page, "moves") == totals["move_count"]
    assert figure(page, "moved_bytes") == totals["bytes_h2d"]
    for key in ("stall", "onload", "wall"):
        assert figure(page, key) == totals[f"{key}_s"]
    text = page.locator(".bo-panel-figures").inner_text().replace("\n", " ")
    assert f"{peak / canned.GIB:.1f} / 16.0 GiB" in text
    assert f"{totals['stall_s'] * 1e3:.1f} ms" in text
    assert report["line"] in page.locator(".bo-panel-under").inner_text()


def test_tables_hold_the_reports_rows(open_plain: Callable[..., Page], stub: Stub) -> None:
    before = canned.report("run-1")
    for row in before["by_component"]:
        row["onload_s"] += 0.5
    before["nodes"][1]["wall_s"] += 0.25
    stub.add_run(before)
    report = stub.add_run(canned.report("run-2", created="2026-01-31T12:00:10.000Z"))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    page.wait_for_function("() => bo.store.report('run-1') && bo.store.report('run-2')")
    page.wait_for_function(
        "() => document.querySelector('.bo-section-components td[data-figure=change_s]')?.dataset.value"
    )
    rows = cells(page, "components")
    assert [row["component"] for row in rows] == [row["component"] for row in report["by_component"]]
    for drawn, row in zip(rows, report["by_component"], strict=True):
        assert float(str(drawn["resident"])) == row["resident_bytes"] / row["weight_bytes"]
        for key in ("moves", "bytes_h2d", "onload_s", "stall_s", "peak", "weight_bytes", "avoidable_bytes"):
            assert float(str(drawn[key])) == row[key], key
        assert float(str(drawn["change_s"])) == pytest.approx(-0.5)
    assert [row["evicted"] for row in rows] == ["nothing", "need 8.0 GiB", "nothing"]
    tab(page, "Nodes")
    rows = cells(page, "nodes")
    assert [row["display"] for row in rows] == [node["display"] for node in report["nodes"]]
    assert [float(str(row["peak"])) for row in rows] == [node["peak"] for node in report["nodes"]]
    assert float(str(rows[1]["change_s"])) == pytest.approx(-0.25)
    assert [float(str(row["onload_s"])) for row in rows] == [node["onload_s"] for node in report["nodes"]]
    assert rows[1]["resident"] == "denoiser 71 %, 8.0 GiB"
    tab(page, "Timers")
    timers = cells(page, "timers")
    assert [row["turn"] for row in timers] == [timer["turn"] for timer in report["timers"]]
    assert float(str(timers[-1]["figure"])) == report["vram"]["peak"], "a size among the seconds"
    assert float(str(timers[0]["figure"])) == report["timers"][0]["seconds"]
    assert "14.1 GiB" in page.locator(".bo-section-timers").inner_text()


def test_says_what_a_change_is_against(open_plain: Callable[..., Page], stub: Stub) -> None:
    stub.add_run(canned.report("other", workload="another size"))
    stub.add_run(canned.report("alone"))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    shown(page, "alone")
    compared = page.locator(".bo-section-components .bo-compared")
    assert compared.inner_text() == "Change: no comparable run"
    assert {row["change_s"] for row in cells(page, "components")} == {"n/a"}
    stub.add_run(canned.report("again", created="2026-01-31T13:00:00.000Z"))
    page.evaluate("() => bo.host.get('/offload/runs?limit=50').then(b => bo.store.setRuns(bo.readRows(b)))")
    shown(page, "again")
    assert compared.inner_text().startswith("Change: against ") and "balanced" in compared.inner_text()


# ---------------------------------------------------------------------- the picker
def test_the_picker_offers_the_last_50_newest_first(open_plain: Callable[..., Page], stub: Stub) -> None:
    for i in range(60):
        stub.add_run(canned.report(f"run-{i}", created=f"2026-01-31T12:{i:02}:00.000Z"))
    broken = {"type": "OutOfMemoryError", "message": "no room"}
    stub.add_run(canned.report("bad", created="2026-01-31T13:00:00Z", error=broken, verdict="oom", complete=False))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    shown(page, "bad")
    options = page.locator(".bo-picker option").evaluate_all("all => all.map(one => [one.value, one.textContent])")
    assert [value for value, _ in options] == ["bad", *(f"run-{i}" for i in range(59, 10, -1))]
    assert options[0][1].startswith("✕ ") and "oom" in options[0][1]
    assert "balanced · 6.45 s · peak 14.1 GiB · partial" in options[1][1]
    assert "no room" in page.locator(".bo-panel-verdict").inner_text()
    pick(page, "run-30")
    shown(page, "run-30")
    assert page.evaluate("() => bo.store.selected") == "run-30"
    pick(page, "bad")
    assert page.evaluate("() => bo.store.selected") is None, "the newest is followed"


def test_the_run_that_is_on_is_shown_and_its_report_after_it(open_plain: Callable[..., Page], stub: Stub) -> None:
    stub.add_run(canned.report("old"))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    shown(page, "old")
    places = _layout(page)
    for step in range(1, 6):
        telemetry(page, canned.telemetry("new", "3", step, 20, t=1.0 + step))
    page.wait_for_function("() => document.querySelector('.bo-panel').dataset.view === 'now'")
    page.wait_for_timeout(60)
    last = canned.telemetry("new", "3", 5, 20, t=6.0)
    vram = last["vram"]
    used = page.locator(".bo-section-vram .bo-meter [data-figure=used]").get_attribute("data-value")
    assert float(str(used)) == vram["total"] - vram["free"]
    assert (figure(page, "peak"), figure(page, "moved_bytes")) == (vram["peak"], last["moved"])
    assert figure(page, "stall") == pytest.approx(5 * last["stall_ms"] / 1e3)
    assert figure(page, "moves") is None, "counted at the end"
    rows = cells(page, "components")
    assert [(row["name"], float(str(row["bytes"]))) for row in rows] == [
        (one["name"], one["bytes"]) for one in last["components"]
    ]
    assert "step 5 of 20" in page.locator(".bo-panel-under").inner_text()
    assert page.locator(".bo-picker").input_value() == "now:"
    assert _layout(page) == places, "nothing jumps when a run begins"
    report = stub.add_run(canned.report("new", created="2026-01-31T13:00:00.000Z"))
    page.evaluate("() => bo.store.endRun('new')")
    page.wait_for_timeout(100)
    assert page.evaluate("() => document.querySelector('.bo-panel').dataset.view") == "now", (
        "the old one does not flash"
    )
    ended(page, canned.row(report))
    shown(page, "new")
    assert figure(page, "peak") == report["vram"]["peak"]
    assert page.get_by_role("status").inner_text() == "Run ended: partial, 6.45 s, peak 14.1 GiB."
    assert _layout(page) == places, "nor when it ends"


def _layout(page: Page) -> Any:
    return page.locator(
        ".bo-panel-head, .bo-panel-under, .bo-section-vram, .bo-section-steps, .bo-tables"
    ).evaluate_all(
        "all => all.map(one => { const b = one.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] })"
    )


def test_the_end_of_a_run_is_said_while_the_next_one_runs(open_plain: Callable[..., Page], stub: Stub) -> None:
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    telemetry(page, canned.telemetry("first", "3", 1, 20))
    page.evaluate("() => { bo.store.setRunning('second', '3') }")
    ended(page, canned.row(stub.add_run(canned.report("first"))))
    page.wait_for_selector(".bo-panel[data-view=now]")
    assert page.get_by_role("status").inner_text().startswith("Run ended: partial, 6.45 s")
    assert page.evaluate("() => bo.store.running.prompt_id") == "second"


def test_what_the_user_picked_stays(open_plain: Callable[..., Page], stub: Stub) -> None:
    for name in ("a", "b"):
        stub.add_run(canned.report(name))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    shown(page, "b")
    telemetry(page, canned.telemetry("c", "3", 1, 20))
    page.wait_for_selector(".bo-panel[data-view=now]")
    pick(page, "b")  # the newest, but picked while another was on
    ended(page, canned.row(stub.add_run(canned.report("c"))))
    page.wait_for_timeout(150)
    assert page.locator(".bo-picker").input_value() == "b"
    telemetry(page, canned.telemetry("d", "3", 1, 20))
    page.wait_for_timeout(150)
    assert page.locator(".bo-panel").get_attribute("data-view") == "run"
    pick(page, "now:")
    page.wait_for_selector(".bo-panel[data-view=now]")


def test_a_run_whose_report_does_not_come_gives_way(open_plain: Callable[..., Page], stub: Stub) -> None:
    stub.add_run(canned.report("old"))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    telemetry(page, canned.telemetry("lost", "3", 1, 20))
    page.wait_for_selector(".bo-panel[data-view=now]")
    page.evaluate("() => bo.store.endRun('lost')")
    page.wait_for_selector(".bo-panel[data-view=run]", timeout=8000)
    assert page.locator(".bo-picker").input_value() == "old"


# ---------------------------------------------------------------------- downloads
def test_downloads_are_the_servers_documents(open_plain: Callable[..., Page], stub: Stub) -> None:
    report = stub.add_run(canned.report("run/1"))
    page = open_plain(size={"width": 1600, "height": 400})
    stub.answers["/offload/report/run/1"] = (200, json.dumps(report))
    stub.answers["/offload/trace/run/1"] = (200, json.dumps({"traceEvents": [1, 2]}))
    mount(page)
    page.locator(".bo-download-report").click()
    page.wait_for_function("() => bo.saved.length === 1")
    page.locator(".bo-download-trace").click()
    page.wait_for_function("() => bo.saved.length === 2")
    (name, text), (trace, events) = page.evaluate("() => bo.saved")
    assert (name, trace) == ("offload-report_run_1.json", "offload-trace_run_1.json")
    assert json.loads(text) == json.loads(json.dumps(report)) and json.loads(events) == {"traceEvents": [1, 2]}


def test_a_download_that_fails_is_said(open_plain: Callable[..., Page], stub: Stub) -> None:
    stub.add_run(canned.report("run-1"))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    shown(page, "run-1")
    stub.answers["/offload/trace/run-1"] = (500, "oops")
    open_plain.__self__.allow("status of 500")  # type: ignore[attr-defined]
    page.locator(".bo-download-trace").click()
    page.wait_for_selector(".bo-panel-problem:visible")
    assert "The trace could not be read (HTTP 500)" in page.locator(".bo-panel-problem").inner_text()
    assert page.evaluate("() => bo.saved.length") == 0


# ---------------------------------------------------------------------- nothing, errors, garbage
def test_without_a_run_it_says_what_will_come(open_plain: Callable[..., Page], stub: Stub) -> None:
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    page.wait_for_selector(".bo-panel-empty:visible")
    text = page.locator(".bo-panel-empty").inner_text()
    assert "No run yet" in text and "Offload Policy" in text and "VRAM Report" in text
    assert page.locator(".bo-body").is_hidden()
    assert page.locator(".bo-download-report").is_disabled()


def test_a_server_that_fails_is_said_and_asked_again(open_plain: Callable[..., Page], stub: Stub) -> None:
    stub.answers["/offload/runs"] = (500, "oops")
    open_plain.__self__.allow("status of 500")  # type: ignore[attr-defined]
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    problem = page.locator(".bo-panel-problem")
    page.wait_for_selector(".bo-panel-problem:visible")
    assert "The list of runs could not be read (HTTP 500)" in problem.inner_text()
    assert "restart ComfyUI" in problem.inner_text()
    stub.add_run(canned.report("run-1"))
    del stub.answers["/offload/runs"]
    shown(page, "run-1")
    assert problem.is_hidden()


def test_a_report_that_is_gone_is_said(open_plain: Callable[..., Page], stub: Stub) -> None:
    stub.add_run(canned.report("run-1"))
    stub.answers["/offload/report/run-1"] = (404, json.dumps({"error": "no report of this prompt"}))
    open_plain.__self__.allow("status of 404")  # type: ignore[attr-defined]
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    page.wait_for_selector(".bo-panel-problem:visible")
    assert "no report of this prompt" in page.locator(".bo-panel-problem").inner_text()
    assert figure(page, "moves") == 23, "the row of the list has the figures of the head"


def test_a_newer_schema_is_shown_as_far_as_it_is_understood(open_plain: Callable[..., Page], stub: Stub) -> None:
    report = stub.add_run(canned.report("run-1", schema="offload-report/2", new_field={"x": [1]}))
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    shown(page, "run-1")
    note = page.locator(".bo-panel-note")
    assert "offload-report/2" in note.inner_text() and "update the pack" in note.inner_text()
    assert figure(page, "peak") == report["vram"]["peak"]
    assert len(cells(page, "components")) == 3


GARBAGE: list[dict[str, Any]] = [
    {"totals": None, "vram": "much", "steps": "many", "moves": [None, 1, {"t": "x"}], "stages": {}},
    {"totals": {"wall_s": float("nan"), "stall_s": -1, "move_count": "3"}, "vram": {"peak": float("inf"), "total": -5}},
    {"by_component": [None, {"component": 7}, {"component": "a", "moves": "many"}], "nodes": [{"id": None}, 3]},
    {"residency": [{"t": -1, "component": "x", "bytes": None}, 5], "vram_track": [{"t": "a"}], "timers": [{}, 1]},
    {"created": "yesterday", "verdict": None, "world": 4, "hints": ["x", None, {"code": 1}], "hint_note": 7},
    {"error": "text", "line": None, "steps": [{"i": 1e300, "compute_s": None}, {"i": "a"}], "events": [[]]},
]


@pytest.mark.parametrize("over", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_never_shown_as_a_figure(open_plain: Callable[..., Page], stub: Stub, over: Any) -> None:
    whole = {**canned.report("run-1"), **over}
    row = {**canned.row(canned.report("run-1")), **{key: value for key, value in over.items() if key != "nodes"}}

    def written(body: Any) -> tuple[int, str]:
        return 200, json.dumps(body).replace("NaN", "1e999").replace("Infinity", "1e999")  # which reads as infinite

    stub.answers["/offload/runs"] = written({"runs": [row, None, 3]})
    stub.answers["/offload/report/run-1"] = written(whole)
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    page.wait_for_function("() => bo.store.report('run-1')")
    for name in ("Nodes", "Timers", "Components"):
        tab(page, name)
        page.wait_for_timeout(40)
        text = page.locator(".bo-panel").inner_text()
        for bad in ("NaN", "undefined", "[object", "Infinity", "null"):
            assert bad not in text, bad


def test_markup_in_names_is_text(open_plain: Callable[..., Page], stub: Stub) -> None:
    evil = '<img src=x onerror="window.hacked=1"><b>bold</b>'
    report = canned.report(
        "run-1", line=evil, hints=[canned.hint(sentence=evil)], error={"type": evil, "message": evil}
    )
    report["by_component"][0]["component"] = report["nodes"][0]["type"] = report["stages"][0]["component"] = evil
    report["timers"][0]["means"] = evil
    stub.add_run(report)
    page = open_plain(size={"width": 1600, "height": 400})
    mount(page)
    shown(page, "run-1")
    for name in ("Nodes", "Timers", "Components"):
        tab(page, name)
    page.locator(".bo-hint-summary").click()
    assert evil in page.locator(".bo-hint-text").inner_text()
    assert evil in str(cells(page, "components")[0]["component"])
    assert page.locator(".bo-panel img, .bo-panel b").count() == 0
    assert page.evaluate("() => window.hacked") is None
