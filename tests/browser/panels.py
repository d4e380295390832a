"""Invariant: the panel under test is the pack's own, in a page with no front end; its host is the stub's routes.

`mount(page)` leaves `window.bo` there: the store, the host with its settings and what was saved, `unmount`, and the
readers that make of a message what the panel is handed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from . import places

if TYPE_CHECKING:
    from playwright.sync_api import Page

MOUNT = """async ({width, height, settings, graph}) => {
  const base = "/extensions/balanced_offload/js/";
  const [{ mountPanel }, { Store }, wire] = await Promise.all(
    ["panel.js", "store.js", "wire.js"].map((name) => import(base + name)));
  document.body.style.margin = "0";
  const place = document.createElement("div");
  place.id = "place";
  Object.assign(place.style, { width: `${width}px`, height: `${height}px`, overflow: "hidden" });
  document.body.append(place);
  const inner = document.createElement("div"); // as in the front end: as high as what is in it
  place.append(inner);
  const store = new Store();
  const watchers = new Map();
  const kept = { "BalancedOffload.Hints": true, "BalancedOffload.HiddenHints": "", ...settings };
  const saved = [];
  let undo = 0;
  const host = {
    async get(path) {
      const answer = await fetch(path);
      const body = await answer.json().catch(() => null);
      if (!answer.ok) throw new Error(body?.error ?? `HTTP ${answer.status}`);
      return body;
    },
    on: () => () => {},
    clientId: () => "a-client",
    setting: (id) => kept[id],
    setSetting(id, value) {
      for (const told of watchers.get(id) ?? []) told(value);
      kept[id] = value;
    },
    onSetting(id, callback) {
      const known = watchers.get(id) ?? new Set();
      watchers.set(id, known.add(callback));
      return () => known.delete(callback);
    },
    rootGraph: () => graph,
    openGraph: () => graph,
    redraw() {},
    undoable(change) { undo += 1; change(); },
    addWidget: () => null,
    openPanel() {},
    save: (name, text) => saved.push([name, text]),
    toast() {},
    vue: () => false,
  };
  window.bo = { store, host, kept, saved, graph, undone: () => undo, watchers, ...wire };
  window.bo.unmount = mountPanel(inner, host, store);
}"""

WIDE = {"width": 1600, "height": 300}


def mount(
    page: Page,
    size: dict[str, int] | None = None,
    settings: dict[str, Any] | None = None,
    graph: Any = None,
) -> None:
    """The panel in a place of this size. graph: LiteGraph-like objects that a hint's button may change."""
    page.evaluate(MOUNT, {**(size or WIDE), "settings": settings or {}, "graph": graph})
    page.wait_for_function("() => document.querySelector('.bo-panel')?.dataset.view")


def telemetry(page: Page, message: Any) -> None:
    """One message of the server, whatever it is, as it would come in."""
    page.evaluate("m => { const read = bo.readTelemetry(m); if (read) bo.store.setTelemetry(read); }", message)


def ended(page: Page, row: Any) -> None:
    """The end of a run: the host's event and the server's row, as listen.js hands them on."""
    page.evaluate("r => { bo.store.endRun(r.prompt_id); bo.store.addRow(bo.readRow(r)); }", row)


def pick(page: Page, prompt_id: str) -> None:
    page.locator(".bo-picker").select_option(prompt_id)


def figure(page: Page, key: str) -> float | None:
    """The exact number behind a figure of the head; None where it is not known."""
    value = page.locator(f".bo-panel-figures [data-figure={key}]").get_attribute("data-value")
    return None if value is None else float(value)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def cells(page: Page, section: str) -> list[dict[str, str | None]]:
    """The rows of a table: by column, the exact number or else the text."""
    script = """rows => rows.map(row => Object.fromEntries(
      [...row.cells].map(cell => [cell.dataset.figure, cell.dataset.value ?? cell.textContent])))"""
    found: list[dict[str, str | None]] = page.locator(
        f".bo-section-{section} .bo-table-box:visible tbody tr"
    ).evaluate_all(script)
    return found


def axe(page: Page) -> list[str]:
    """What axe-core has against the panel, serious or worse."""
    reason = places.no_tool("axe-core")
    if reason is not None:
        pytest.skip(reason)
    page.add_script_tag(path=places.NODE_TOOLS / "axe-core" / "axe.min.js")
    found: list[str] = page.evaluate(
        """async () => (await axe.run(".bo-panel")).violations
          .filter((one) => ["serious", "critical"].includes(one.impact))
          .map((one) => one.id + ": " + one.nodes.map((node) => node.html + " " + node.failureSummary).join(" ;; "))"""
    )
    return found


def shown(page: Page, prompt_id: str) -> None:
    """Wait until this run's report is what is seen."""
    page.wait_for_function(
        "id => bo.store.report(id) && document.querySelector('.bo-picker').value === id"
        " && !document.querySelector('.bo-body').hidden",
        arg=prompt_id,
    )
    page.wait_for_timeout(60)  # one frame to draw it
