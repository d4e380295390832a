"""Invariant: a front end that lacks something costs only what needs it; what comes from the server is never shown raw.

What is asked of the front end (`Host`) is tried in each front end by a probe in place of a widget's module.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, Route

from offload import summary

from . import canned
from .pages import api_prompt, load_workflow, queue, saved
from .places import Where
from .shared import Here

JS = "/extensions/balanced_offload/js"
PROBE = "export function attachPolicy(node, host, store) { globalThis.probe = { node, host, store }; }"
CHIP = ".bo-chip"
POLICY = "OffloadPolicy"


@pytest.fixture(scope="module")
def figures() -> list[float]:
    """Numbers of every size, whole and broken, and ties of the decimal digit."""
    chance = random.Random(5)
    found = [chance.uniform(0.1, 10) * 10 ** chance.randint(-7, 14) for _ in range(1500)]
    found += [chance.randint(0, 64) * 2.0 ** chance.randint(-8, 42) for _ in range(1500)]
    return [*found, 0.0, 1.0, 0.999995, 1023.0, 1024.0, 0.001, 0.00099999]


# ------------------------------------------------------------------------------------------------ a page alone
def test_figures_read_as_in_the_log(open_plain: Callable[..., Page], figures: list[float]) -> None:
    page = open_plain()
    shown = page.evaluate(
        """async ([from, figures]) => {
          const { bytes, seconds } = await import(from);
          return figures.map((each) => [bytes(Math.round(each)), seconds(each % 1e6)]);
        }""",
        [f"{JS}/format.js", figures],
    )
    # Whole numbers are told to both: a size in bytes is one.
    wanted = [[summary.size(_rounded(each)), summary.seconds(each % 1e6)] for each in figures]
    wrong = [(each, got, want) for each, got, want in zip(figures, shown, wanted, strict=True) if got != want]
    assert not wrong, wrong[:5]


def _rounded(value: float) -> int:
    """As JavaScript's Math.round."""
    return int(value + 0.5)


@pytest.fixture
def bare(open_plain: Callable[..., Page]) -> Iterator[Page]:
    """A page whose front end has `registerExtension` and events, and nothing else at all."""
    page = open_plain()

    def script(text: str) -> Callable[[Route], None]:
        return lambda route: route.fulfill(body=text, content_type="text/javascript")

    page.route(
        "**/scripts/app.js", script("export const app = { registerExtension: (given) => (globalThis.ours = given) };")
    )
    page.route("**/scripts/api.js", script("export const api = new EventTarget();"))
    yield page


def test_a_front_end_that_has_nothing_is_left_alone(bare: Page) -> None:
    failed = bare.evaluate(
        """async (from) => {
          const failed = [];
          const warned = console.warn;
          console.warn = (...said) => failed.push(said.map(String).join(" "));
          await import(from);
          ours.setup();
          const kinds = ["VRAMReport", "OffloadPolicy", "KSampler", undefined];
          for (const comfyClass of kinds) ours.nodeCreated({ comfyClass });
          for (const setting of ours.settings) setting.onChange(undefined);
          const place = document.createElement("div");
          document.body.append(place);
          for (const tab of ours.bottomPanelTabs) { tab.render(place); tab.render(place); tab.destroy(); }
          ours.commands[0].function();
          await new Promise((resolve) => setTimeout(resolve, 3000));
          console.warn = warned;
          return failed;
        }""",
        f"{JS}/adapter.js",
    )
    assert failed == []


def test_importing_a_module_does_nothing(open_plain: Callable[..., Page]) -> None:
    """The front end imports every file by itself: only the entry may do something."""
    page = open_plain()
    names = page.evaluate(
        "async () => (await (await fetch('/extensions')).json()).map((each) => each.split('/').pop())"
    )
    names.remove("adapter.js")
    changed = page.evaluate(
        """async ([folder, names]) => {
          const before = Object.keys(globalThis).length;
          const asked = performance.getEntriesByType("resource").length;
          let seen = 0;
          new MutationObserver((all) => (seen += all.length)).observe(document, { subtree: true, childList: true });
          let listened = 0;
          const add = EventTarget.prototype.addEventListener;
          EventTarget.prototype.addEventListener = function (...rest) { listened += 1; return add.apply(this, rest); };
          for (const name of names) await import(`${folder}/${name}`);
          await new Promise((resolve) => setTimeout(resolve, 100));
          const names_ = performance.getEntriesByType("resource").slice(asked).map((each) => each.name);
          const fetched = names_.filter((each) => !each.endsWith(".js"));
          return { globals: Object.keys(globalThis).length - before, seen, listened, fetched };
        }""",
        [JS, names],
    )
    assert changed == {"globals": 0, "seen": 0, "listened": 0, "fetched": []}


# ------------------------------------------------------------------------------------------------ the front end
@pytest.fixture
def probe(here: Here) -> Iterator[Callable[..., Any]]:
    """Runs a function of (host, store, node) in the page; the node is an Offload Policy of the graph."""
    page = here.page
    page.route(f"**{JS}/policywidget.js", lambda route: route.fulfill(body=PROBE, content_type="text/javascript"))
    page.reload()
    here.pages.ready(page)
    load_workflow(page, "02-fit-aware-hires")
    page.wait_for_function("() => globalThis.probe")
    yield lambda body, given=None: page.evaluate(
        f"async (given) => {{ const {{ host, store, node }} = probe; {body} }}", given
    )
    page.unroute_all()


def test_the_host_that_parts_are_handed(here: Here, probe: Callable[..., Any]) -> None:
    page, stub = here.page, here.stub
    assert probe("return host.vue();") is here.where.vue
    assert [probe("return host.clientId();")] == stub.clients()
    assert probe("return (await host.get('/offload/runs?limit=1')).kept;") == 64
    stub.answers["/offload/marks"] = (400, {"error": "high: got 'x'"})
    here.allow("status of 400 .*offload/marks")
    assert probe("return host.get('/offload/marks').catch((error) => error.message);") == "high: got 'x'"
    stub.answers["/offload/marks"] = (500, "<b>oops</b>")
    here.allow("status of 500 .*offload/marks")
    assert probe("return host.get('/offload/marks').catch((error) => error.message);") == "HTTP 500"
    assert probe("return host.rootGraph() === app.rootGraph && host.openGraph() === app.canvas.graph;") is True
    assert probe("return host.rootGraph().nodes.includes(node);") is True

    probe("globalThis.heard = []; globalThis.off = host.on('offload.report', (detail) => heard.push(detail));")
    stub.send("offload.report", {"prompt_id": "one", "text": "<img src=x onerror=alert(1)>"})
    page.wait_for_function("() => heard.length === 1")
    probe("off();")
    stub.send("offload.report", {"prompt_id": "two"})
    page.wait_for_function("() => probe.store.runs[0]?.prompt_id === 'two'")
    assert page.evaluate("() => heard.map((detail) => detail.prompt_id)") == ["one"]


@pytest.mark.slow
def test_settings_are_kept_and_told(here: Here, probe: Callable[..., Any]) -> None:
    told = probe(
        """const told = [];
        const id = "BalancedOffload.HiddenHints";
        const off = host.onSetting(id, (value) => told.push([value, host.setting(id)]));
        host.setSetting("BalancedOffload.HiddenHints", "A,B");
        await new Promise((resolve) => setTimeout(resolve, 300));
        off();
        host.setSetting("BalancedOffload.HiddenHints", "C");
        await new Promise((resolve) => setTimeout(resolve, 300));
        return told;"""
    )
    assert told == [["A,B", "A,B"]], "a callback that asks is told what it was called for"
    assert here.stub.settings["BalancedOffload.HiddenHints"] == "C"
    assert probe("return host.setting('BalancedOffload.Overlay');") is True


def test_one_undo_step_and_one_frame(here: Here, probe: Callable[..., Any]) -> None:
    page = here.page
    before = probe(
        """const value = (name) => node.widgets.find((widget) => widget.name === name).value;
        const before = [value("mode"), value("high"), value("fit_aware")];
        const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
        tracker.captureCanvasState(); // what the load itself still had to note
        globalThis.steps = tracker.undoQueue.length;
        host.undoable(() => {
          for (const [name, wanted] of [["mode", "model"], ["high", "30%"], ["fit_aware", false]]) {
            const widget = node.widgets.find((each) => each.name === name);
            widget.value = wanted;
            widget.callback?.(wanted, app.canvas, node);
          }
        });
        globalThis.steps = tracker.undoQueue.length - steps;
        return before;"""
    )
    assert page.evaluate("() => steps") == 1
    page.evaluate("async () => { await app.extensionManager.command.execute('Comfy.Undo') }")
    name = f"() => app.rootGraph.nodes.find((each) => each.comfyClass === '{POLICY}')"
    page.wait_for_function(f"({name})()?.widgets")
    after = page.evaluate(
        f"() => {{ const all = ({name})().widgets; const of = (key) => all.find((each) => each.name === key).value;"
        " return ['mode', 'high', 'fit_aware'].map(of); }"
    )
    assert after == before

    drawn = probe(
        """let drawn = 0;
        const set = app.canvas.setDirty;
        app.canvas.setDirty = function (...rest) { drawn += 1; return set.apply(this, rest); };
        for (let i = 0; i < 50; i += 1) host.redraw();
        await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
        app.canvas.setDirty = set;
        return drawn;"""
    )
    assert 1 <= drawn <= 3, "our redraws are gathered into one frame; the front end may add its own"


@pytest.mark.slow
def test_a_failed_change_still_ends_its_step(here: Here, probe: Callable[..., Any]) -> None:
    assert (
        probe("try { host.undoable(() => { throw new Error('no'); }); } catch (error) { return error.message; }")
        == "no"
    )
    assert probe("return app.extensionManager.workflow.activeWorkflow.changeTracker.changeCount;") == 0


def test_a_widget_is_in_no_file_and_no_prompt(here: Here, probe: Callable[..., Any]) -> None:
    page = here.page
    before, prompt = _steady(saved(page)), api_prompt(page)
    probe(
        """const box = document.createElement("textarea");
        box.className = "probe-box";
        box.value = "telemetry";
        const widget = host.addWidget(node, "balanced_offload_probe", box, { minHeight: 50, maxHeight: 80 });
        if (!widget) throw new Error("no widget");"""
    )
    page.wait_for_selector(".probe-box")
    assert _steady(saved(page)) == before
    assert api_prompt(page) == prompt
    assert "telemetry" not in json.dumps(saved(page))
    assert probe("return host.addWidget({}, 'x', document.createElement('p'), { minHeight: 1 });") is None


def _steady(graph: dict[str, Any]) -> dict[int, Any]:
    """By node what a workflow holds of it, but for its size and place."""
    return {node["id"]: {k: v for k, v in node.items() if k not in ("size", "pos")} for node in graph["nodes"]}


@pytest.mark.slow
def test_a_file_is_saved_and_a_toast_is_text(here: Here, probe: Callable[..., Any]) -> None:
    page = here.page
    with page.expect_download() as caught:
        probe("host.save('report.json', given);", '{"text": "<b>"}')
    assert caught.value.suggested_filename == "report.json"
    assert caught.value.path().read_text(encoding="utf-8") == '{"text": "<b>"}'
    for severity in ("info", "success", "warn", "error"):
        probe("host.toast(given[0], given[1]);", [severity, f"<i>{severity}</i> said"])
        page.get_by_text(f"<i>{severity}</i> said").first.wait_for()


# ------------------------------------------------------------------------------------------------ the panel
def test_the_panel_opens_by_key_and_gives_the_focus_back(here: Here) -> None:
    page = here.page
    page.wait_for_selector(f"{CHIP}-button")
    page.focus(f"{CHIP}-button")
    page.keyboard.press("Alt+Shift+O")
    page.wait_for_selector(".bo-panel")
    page.wait_for_function("() => document.activeElement.closest('.bo-panel')")
    page.keyboard.press("Alt+Shift+O")
    page.wait_for_selector(".bo-panel", state="detached")
    assert page.evaluate("() => document.activeElement.className") == f"{CHIP[1:]}-button"


def test_the_panel_is_a_command_with_a_menu_entry(here: Here) -> None:
    page = here.page
    command = page.evaluate(
        "() => app.extensionManager.command.commands.find((each) => each.id === 'BalancedOffload.TogglePanel')?.label"
    )
    assert command == "Toggle Offload Panel"
    page.evaluate("() => app.extensionManager.command.execute('BalancedOffload.TogglePanel')")
    page.wait_for_selector(".bo-panel")
    page.evaluate("() => app.extensionManager.command.execute('BalancedOffload.TogglePanel')")
    page.wait_for_selector(".bo-panel", state="detached")


def test_no_other_binding_has_our_keys(here: Here) -> None:
    """A front end that has given the keys to something else says so when ours are registered."""
    keys = here.page.evaluate(
        """async () => {
          const found = app.extensions.flatMap((each) => each.keybindings ?? []);
          const same = ({ combo }) =>
            JSON.stringify([combo.key.toLowerCase(), !!combo.ctrl, !!combo.alt, !!combo.shift]);
          const ours = found.filter((each) => each.commandId === "BalancedOffload.TogglePanel");
          return ours.map((own) => found.filter((each) => same(each) === same(own)).length);
        }"""
    )
    assert keys == [1]
    assert not [text for text in here.pages.watch.warnings if "eybinding" in text]


# ------------------------------------------------------------------------------------------------ events
@pytest.mark.slow
def test_asks_once_and_drops_what_comes_while_hidden(here: Here, probe: Callable[..., Any]) -> None:
    page, stub = here.page, here.stub
    page.wait_for_function("() => document.querySelector('.bo-chip')")
    _until(page, lambda: stub.subscribed() and stub.pages())
    client = probe("return host.clientId();")
    assert stub.subscribed() == [client] and stub.pages() == [client]
    page.evaluate(
        """() => {
          Object.defineProperty(document, "hidden", { configurable: true, get: () => globalThis.away === true });
          globalThis.away = true;
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    stub.asked.clear()
    stub.send("offload.telemetry", canned.telemetry("p", "3", 3, 20))
    stub.send("offload.report", canned.row(canned.report("seen")))
    page.wait_for_function("() => probe.store.runs.some((row) => row.prompt_id === 'seen')")
    assert probe("return store.live?.prompt_id ?? null;") is None
    assert not [path for _, path in stub.asked if "/offload/status" in path]
    page.evaluate("() => { globalThis.away = false; document.dispatchEvent(new Event('visibilitychange')); }")
    _until(page, lambda: any(f"telemetry={client}" in path for _, path in stub.asked))
    assert not [path for _, path in stub.asked if "page=" in path], "said once in a socket's life"
    stub.send("offload.telemetry", canned.telemetry("p", "3", 4, 20))
    page.wait_for_function("() => probe.store.live?.step === 4")


def _until(page: Page, met: Callable[[], Any]) -> None:
    for _ in range(100):
        if met():
            return
        page.wait_for_timeout(50)
    raise AssertionError("not within 5 s")


def test_garbage_is_never_shown(here: Here, probe: Callable[..., Any]) -> None:
    page, stub = here.page, here.stub
    junk: list[Any] = [None, 3, "x", [], [[]], {}, {"vram": "x"}, {"prompt_id": {}}, {"prompt_id": -1, "runs": []}]
    junk += [
        {"prompt_id": "g", "t": "soon", "vram": {"total": "NaN", "free": -5}, "points": [None, {"t": None}], "node": {}}
    ]
    junk += [{"v": 99, "prompt_id": "g", "t": 1, "node": "404:7", "vram": {"total": 0, "free": 0}, "new": {"a": [1]}}]
    junk += [
        {"prompt_id": "g", "nodes": [None, {"id": None}], "totals": [], "vram": 7, "hints": [{}], "text": {"a": 1}}
    ]
    for event in ("offload.telemetry", "offload.report"):
        for each in junk:
            stub.send(event, each)
    stub.send("offload.telemetry", canned.telemetry("after", "3", 1, 20))
    page.wait_for_function("() => probe.store.live?.prompt_id === 'after'")
    page.keyboard.press("Alt+Shift+O")
    page.wait_for_selector(".bo-panel")
    page.wait_for_timeout(300)
    text = page.evaluate(
        "() => [...document.querySelectorAll('.bo-root, .bo-panel')].map((each) => each.innerText).join('\\n')"
    )
    assert "VRAM" in text
    for wrong in ("NaN", "undefined", "Infinity", "[object"):
        assert wrong not in text


@pytest.mark.slow
def test_two_tabs_see_the_run_of_one(open_page: Any, where: Where) -> None:
    page = open_page(*where)
    stub = open_page.stub
    stub.delay = 0.05
    load_workflow(page, "02-fit-aware-hires")
    tab = open_page.another(page)
    _until(tab, lambda: len(stub.subscribed()) == 2)
    assert len(set(stub.clients())) == 2
    queue(page)
    for each in (page, tab):
        each.wait_for_function("() => document.querySelector('.bo-chip')?.dataset.running === 'true'")
    peak = str(canned.report()["vram"]["peak"])
    for each in (page, tab):
        each.wait_for_function(
            "(peak) => document.querySelector('.bo-chip')?.dataset.running === 'false'"
            " && document.querySelector('.bo-chip [data-figure=peak]').dataset.value === peak",
            arg=peak,
        )
