"""Invariant tested: what a user sees of a real run is what its report says, to the byte and to the last digit.

A tiny model on the simulated accelerator under a cap: the bars move because weights really moved. Front ends 1.49.6 and
1.58.1, one drawing nodes on the canvas and one as elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..browser.places import Where
from . import graphs
from .browsing import Tab, chromium, open_tab, shot, simulated
from .server import HostServer

__all__ = ["chromium", "open_tab", "shot"]  # the fixtures

CAP = 16 << 20
"""Bytes: the tiny models have 23 MiB of weights."""
WHERES = (Where("1.49.6", False), Where("1.58.1", True))
BARS = """() => { window.bars = []; setInterval(() => {
  const bar = document.querySelector('.bo-panel .bo-meter');
  if (!bar || !bar.offsetParent) return;
  const figures = {};
  for (const each of bar.querySelectorAll('[data-figure]')) figures[each.dataset.figure] = each.dataset.value;
  const width = bar.querySelector('.bo-seg')?.getBoundingClientRect().width ?? null;
  window.bars.push([figures.weights, figures.used, width]); }, 40); }"""


@pytest.fixture
def where(host: Any) -> Where:
    """The older host with the older front end on the canvas, the newer one with the newer in Nodes 2.0."""
    return WHERES[0] if host.old else WHERES[1]


@pytest.fixture
def capped(where: Where, servers: Callable[..., HostServer], vram: Any) -> HostServer:
    return simulated(servers, CAP, where.frontend)


def drawn(fields: dict[str, Any], **options: Any) -> tuple[graphs.Graph, str]:
    """A graph with a report at its end -> it, and the sampler's id."""
    build = graphs.Builder()
    graph = graphs.draw(build, *graphs.our_loaders(build, fields), **options)
    source = next(key for key, node in graph.items() if node["class_type"] == "VAEDecode")
    build.add("VRAMReport", anything=[source, 0])
    return graph, next(key for key, node in graph.items() if node["class_type"] == "KSampler")


def figures(place: Any) -> dict[str, str]:
    """Of an element: {figure: its exact value}."""
    found: dict[str, str] = place.evaluate(
        "e => Object.fromEntries([...e.querySelectorAll('[data-figure][data-value]')].reverse()"
        ".map(x => [x.dataset.figure, x.dataset.value]))"
    )
    return found


def rows(panel: Any, section: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = panel.locator(f".bo-section-{section} .bo-table-box:visible tbody tr").evaluate_all(
        "rows => rows.map(r => Object.fromEntries("
        "[...r.cells].map(c => [c.dataset.figure, c.dataset.value ?? c.textContent])))"
    )
    return found


def test_panel_and_node_say_what_the_report_says(
    where: Where, capped: HostServer, open_tab: Callable[..., Tab], shot: Callable[..., Any]
) -> None:
    tab = open_tab(capped, where.vue)
    graph, sampler = drawn({"mode": "sequential"}, steps=120, seed=901)
    tab.open_graph(graph)
    tab.open_panel()
    tab.page.evaluate(BARS)
    capped.reset_counters()
    report = tab.run()
    copied = capped.counters()["copied"]["h2d_bytes"]
    totals, peak = report["totals"], report["vram"]["peak"]
    assert 0 < totals["bytes_h2d"] <= copied and peak <= CAP and totals["stall_s"] + totals["onload_s"] > 0

    bars = tab.page.evaluate("() => window.bars")
    weights = {float(value) for value, _, _ in bars if value is not None}
    assert len(weights) >= 2 and max(weights) <= CAP, f"the bar of weights stood still: {weights}"
    drawn_at = [value for value in weights if value > 0]
    if max(drawn_at) - min(drawn_at) > CAP / 50:  # else it is less than pixels can show
        assert len({round(width, 1) for _, _, width in bars if width}) >= 2, "its width too"

    panel = tab.picked(report["prompt_id"])
    head = figures(panel.locator(".bo-panel-figures"))
    expected = {
        **{"wall": totals["wall_s"], "peak": peak, "moves": totals["move_count"], "moved_bytes": totals["bytes_h2d"]},
        **{"onload": totals["onload_s"], "stall": totals["stall_s"]},
    }
    assert {name: float(head[name]) for name in expected} == expected
    tab.page.get_by_role("tab", name="Nodes", exact=True).click()
    told = next(row for row in report["nodes"] if row["id"] == sampler)
    seen = next(row for row in rows(panel, "nodes") if row["type"] == "KSampler")
    assert float(seen["stall_s"]) == told["stall_s"] and (told["peak"] is None or float(seen["peak"]) == told["peak"])
    shot(tab.page, f"host-panel-{where}")

    node = tab.page.locator(".bo-node-report").first
    own = figures(node)
    assert float(own["peak"]) == peak and float(own["stall"]) == totals["stall_s"]
    moves = totals["onload_s"] + totals["stall_s"] + totals["evict_s"]
    assert float(own["moves"]) == pytest.approx(moves, abs=1e-12)


SEED = {"mode": "balanced", "fit_aware": False}


def test_the_second_seed_by_its_button(
    where: Where, servers: Callable[..., HostServer], vram: Any, open_tab: Callable[..., Tab], shot: Callable[..., Any]
) -> None:
    """Two generations, one hint, one press; the third onloads at most once, the fourth moves nothing."""
    server = simulated(servers, 64 << 20, where.frontend)
    tab = open_tab(server, where.vue)
    graph, _ = drawn(SEED, steps=4 if where.vue else 5)
    tab.open_graph(graph)
    first = _generation(tab, 1)
    assert first["hints"] == [] and _hint(tab, first).count() == 0
    second = _generation(tab, 2)
    (hint,) = second["hints"]
    box = _hint(tab, second)
    assert box.count() == 1 and hint["code"] == "FITS_BUT_MOVED"
    text = box.inner_text()
    assert hint["sentence"] in text.replace("\n", " ") and "64.0 MiB" in text, "the budget"
    moved = next(row for row in second["by_component"] if row["avoidable_bytes"] and row["component"] in text)
    assert f"{moved['weight_bytes'] / (1 << 20):.1f} MiB" in text, "the component's size"
    shot(tab.page, f"host-hint-{where}")

    assert tab.input_of("OffloadPolicy", "fit_aware") is False
    box.locator(".bo-hint-act").click()
    tab.page.wait_for_function(
        "() => app.rootGraph.nodes.find(n => n.type === 'OffloadPolicy')"
        ".widgets.find(w => w.name === 'fit_aware').value"
    )
    third, fourth = _generation(tab, 3), _generation(tab, 4)
    assert third["policy"]["fit_aware"] is True
    for row in third["by_component"]:
        assert row["bytes_h2d"] <= (row["weight_bytes"] or 0), "onloaded at most once"
    assert fourth["totals"]["bytes_h2d"] == fourth["totals"]["move_count"] == 0
    for report in (third, fourth):
        assert report["hints"] == [] and _hint(tab, report).count() == 0
    assert float(figures(tab.picked(fourth["prompt_id"]).locator(".bo-panel-figures"))["moved_bytes"]) == 0


def _generation(tab: Tab, number: int) -> dict[str, Any]:
    """Another prompt text each time, so that the encoder is wanted again."""
    tab.set_input("CLIPTextEncode", text=f"a cat {number}")
    tab.set_input("KSampler", seed=900 + number)
    return tab.run()


def _hint(tab: Tab, report: dict[str, Any]) -> Any:
    """The hints that are seen with this run in the panel."""
    return tab.picked(report["prompt_id"]).locator(".bo-hint:visible")
