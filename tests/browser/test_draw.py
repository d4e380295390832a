"""The meter, the sparkline and the tables in a real browser: figures to pixels, labels that never overlap, both themes.

What is drawn over time (steps, timeline) is in test_draw_time.py.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .canned import GIB, MIB
from .drawn import boxes, column, like, put, rgb, settle, update, words

VRAM: dict[str, Any] = {
    "weights": 5 * GIB + 123_456_789,
    "activations": 2 * GIB + 900 * MIB,
    "others": 1 * GIB,
    "high": 12 * GIB + 800 * MIB,
    "low": 3 * GIB + 200 * MIB,
    "peak": 11 * GIB + 7,
    "total": 16 * GIB,
}
VRAM["free"] = 16 * GIB - VRAM["weights"] - VRAM["activations"] - VRAM["others"]
NONE = dict.fromkeys(VRAM)
ODD: list[Any] = [float("nan"), float("inf"), -5, "12", None, {}, [], True]

METER = """() => {
  const bar = document.querySelector(".bo-bar").getBoundingClientRect();
  const at = (one) => {
    const { left, width } = one.getBoundingClientRect();
    return { from: left - bar.left, width, value: one.dataset.value, hidden: one.hidden };
  };
  const named = (selector, name) => Object.fromEntries(
    [...document.querySelectorAll(selector)].map((one) => [one.dataset[name], at(one)]));
  return { width: bar.width, parts: named(".bo-seg", "part"), marks: named(".bo-mark", "mark") };
}"""


@pytest.mark.parametrize("width", [200, 380, 1200])
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_a_parts_width_is_its_bytes(open_plain: Callable[..., Any], shot: Any, theme: str, width: int) -> None:
    page = open_plain(theme=theme, size={"width": width + 40, "height": 300})
    put(page, "meter", "makeMeter", {"label": "VRAM"}, width)
    update(page, VRAM)
    drawn = page.evaluate(METER)
    at = 0.0
    for name in ("weights", "activations", "others", "free"):
        part = drawn["parts"][name]
        assert part["value"] == str(VRAM[name])
        assert part["from"] == pytest.approx(at, abs=1)
        assert part["width"] == pytest.approx(VRAM[name] / VRAM["total"] * drawn["width"], abs=1)
        at += part["width"]
    assert at == pytest.approx(drawn["width"], abs=1)
    assert drawn["parts"]["unknown"]["hidden"]
    for name in ("high", "low", "peak"):
        mark = drawn["marks"][name]
        assert mark["value"] == str(VRAM[name])
        assert mark["from"] + mark["width"] / 2 == pytest.approx(VRAM[name] / VRAM["total"] * drawn["width"], abs=1)
    assert page.locator("[data-figure=used]").inner_text() == "9.0 / 16.0 GiB"
    assert page.locator("[data-figure=peak]").inner_text() == "peak 11.0 GiB"
    assert page.locator("[data-figure=peak]").get_attribute("data-value") == str(VRAM["peak"])
    shot(page, f"draw-meter-{theme}-{width}")


def test_the_meter_is_one_for_those_who_hear_it(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    put(page, "meter", "makeMeter", {"label": "VRAM"})
    update(page, VRAM)
    gauge = page.locator(".bo-gauge")
    used = VRAM["weights"] + VRAM["activations"] + VRAM["others"]
    assert gauge.get_attribute("role") == "meter"
    assert gauge.get_attribute("aria-label") == "VRAM"
    assert (gauge.get_attribute("aria-valuemin"), gauge.get_attribute("aria-valuemax")) == ("0", str(16 * GIB))
    assert gauge.get_attribute("aria-valuenow") == str(used)
    assert "weights 5.1 GiB" in str(gauge.get_attribute("aria-valuetext"))
    assert "low mark 3.2 GiB; peak 11.0 GiB" in str(gauge.get_attribute("aria-valuetext"))
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "bo-gauge"
    update(page, NONE)
    assert gauge.get_attribute("role") == "img"
    assert gauge.get_attribute("aria-valuenow") is None
    assert str(gauge.get_attribute("aria-label")).startswith("VRAM: n/a in use")


def test_what_is_not_known_is_hatched_and_says_so(open_plain: Callable[..., Any], shot: Any) -> None:
    page = open_plain()
    put(page, "meter", "makeMeter", {"label": "VRAM"})
    update(page, {**VRAM, "weights": None, "activations": None})
    drawn = page.evaluate(METER)
    hole = drawn["parts"]["unknown"]
    missing = VRAM["weights"] + VRAM["activations"]
    assert hole["value"] == str(missing)
    assert hole["width"] == pytest.approx(missing / VRAM["total"] * drawn["width"], abs=1)
    assert page.locator(".bo-seg[data-part=unknown]").inner_text() == "n/a"
    assert page.locator("[data-figure=weights]").inner_text() == "n/a"
    assert page.locator("[data-figure=weights]").get_attribute("data-value") is None
    assert "gradient" in page.locator(".bo-seg[data-part=unknown]").evaluate("one => getComputedStyle(one).background")
    shot(page, "draw-meter-unknown")
    update(page, NONE)
    assert page.evaluate(METER)["parts"]["unknown"]["width"] == pytest.approx(drawn["width"], abs=1)
    assert page.locator("[data-figure=used]").inner_text() == "n/a"
    assert page.locator("[data-figure=peak]").inner_text() == "peak n/a"


def test_a_mark_past_the_card_stays_at_its_end(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    put(page, "meter", "makeMeter", {"label": "VRAM"})
    update(page, {**VRAM, "high": 40 * GIB})
    drawn = page.evaluate(METER)
    assert drawn["marks"]["high"]["from"] == pytest.approx(drawn["width"] - 2, abs=1)
    assert "high 40.0 GiB →" in words(page)


def test_labels_lie_on_nothing(open_plain: Callable[..., Any]) -> None:
    """200 cards: no label over another, over the bar, or out of the box; the high mark's always has room."""
    page = open_plain()
    put(page, "meter", "makeMeter", {"label": "VRAM"}, 200)
    dice = random.Random(5)
    for _ in range(200):
        width = dice.choice([140, 200, 260, 380])
        marks = {name: dice.choice([None, dice.randrange(0, 18 * GIB)]) for name in ("high", "low", "peak")}
        page.evaluate(
            "([vram, width]) => { document.querySelector('main').style.width = `${width}px`; part.update(vram); }",
            [{**VRAM, **marks}, width],
        )
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        labels = boxes(page, ".bo-mark-text")
        bars = boxes(page, ".bo-bar") + boxes(page, ".bo-legend") + boxes(page, ".bo-head")
        gauge = boxes(page, ".bo-gauge")[0]
        for one, other in [*itertools.combinations(labels, 2), *itertools.product(labels, bars)]:
            apart = (
                one["right"] <= other["left"] + 0.5
                or other["right"] <= one["left"] + 0.5
                or one["bottom"] <= other["top"] + 0.5
                or other["bottom"] <= one["top"] + 0.5
            )
            assert apart, (width, marks, one, other)
        for label in labels:
            assert label["left"] >= gauge["left"] - 1 and label["right"] <= gauge["right"] + 1, (width, label)
        if marks["high"] is not None:
            assert any(label["text"].startswith("high ") for label in labels)


def test_garbage_is_drawn_as_not_known(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    made: list[tuple[str, str]] = [("meter", "makeMeter"), ("spark", "makeSpark"), ("bars", "makeSteps")]
    for file, make in [*made, ("timeline", "makeTimeline")]:
        put(page, file, make, {"label": "x"})
        for key, odd in itertools.product(["weights", "others", "total", "high", "peak"], ODD):
            update_raw(page, {**VRAM, key: odd})
        for odd in [*ODD, [None, 5, {"t": float("nan"), "used": "x"}, {"i": "x", "count": -3, "compute_s": "x"}]]:
            update_raw(page, odd)
        for odd in ODD:
            model = {"components": [{"name": odd, "points": [[odd, odd], odd, [1, odd]]}, odd], "allocated": odd}
            more = {"stages": [{"t0": odd, "t1": 3}], "evictions": [{"t": 1, "bytes": odd, "component": odd}]}
            update_raw(page, {**model, **more, "ooms": odd, "end_s": odd, "total": odd})
        settle(page)
        said = words(page)
        assert not any(bad in said for bad in ("NaN", "undefined", "null", "Infinity", "[object")), (make, said)


def update_raw(page: Any, value: Any) -> None:
    """NaN and its like are no JSON: they are made on the page."""
    page.evaluate("value => window.part.update(value)", value)


CONTRAST = """async () => {
  const { contrast, over, parseColor } = await import("/extensions/balanced_offload/js/color.js");
  const behind = (one) => {
    const layers = [];
    for (let at = one; at; at = at.parentElement) layers.push(parseColor(getComputedStyle(at).backgroundColor));
    return layers.filter(Boolean).reduceRight((under, layer) => over(layer, under), [255, 255, 255, 1]);
  };
  const out = [];
  for (const one of document.querySelectorAll("main *")) {
    const own = [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !one.checkVisibility() || one.closest(".bo-hidden, caption")) continue;
    const style = getComputedStyle(one);
    const seen = contrast(parseColor(style.color), behind(one));
    out.push([one.className || one.tagName, one.textContent, seen, parseFloat(style.fontSize)]);
  }
  return out;
}"""


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_every_text_can_be_read_and_every_button_hit(open_plain: Callable[..., Any], theme: str) -> None:
    page = open_plain(theme=theme)
    parts = [("meter", "makeMeter", VRAM), ("bars", "makeSteps", STEPS), ("timeline", "makeTimeline", COURSE)]
    for file, make, value in parts:
        put(page, file, make, {"label": "A part"})
        update(page, value)
        if page.locator("summary").count():
            page.locator("summary").click()
            settle(page)
        seen = page.evaluate(CONTRAST)
        assert len(seen) >= 5
        for name, text, contrast, size in seen:
            assert contrast >= 4.5, (make, name, text, contrast)
            assert size >= 11, (make, name, text, size)
        for box in boxes(page, "button, summary, canvas"):
            assert box["bottom"] - box["top"] >= 24 and box["right"] - box["left"] >= 24, box


STEPS = [
    {"node": "5", "i": i, "compute_s": 0.4, "stall_s": 0.1, "overlapped_s": 0.2, "bytes_h2d": MIB, "count": 1}
    for i in range(4)
]
COURSE = {
    "end_s": 4,
    "components": [{"name": "unet", "points": [[0, GIB], [2, 3 * GIB]]}],
    "allocated": [[0, 2 * GIB]],
    "stages": [{"name": "denoise", "component": "unet", "t0": 0, "t1": 4}],
    "evictions": [{"t": 2, "component": "te", "bytes": GIB, "reason": "need"}],
    "ooms": [],
    **{"total": 4 * GIB, "high": 3 * GIB, "low": GIB},
}

LIGHT = {
    "comfy-menu-bg": "#ffffff",
    "input-text": "#222",
    "descrip-text": "#444",
    "border-color": "#888",
    "comfy-input-bg": "#c9c9c9",
}
PALETTE = """values => {
  for (const [name, value] of Object.entries(values)) document.documentElement.style.setProperty("--" + name, value);
}"""


def test_a_new_palette_is_worn_at_once(open_plain: Callable[..., Any]) -> None:
    """The variables change while the part is there: what was measured on dark is measured again on light."""
    page = open_plain(theme="dark")
    put(page, "bars", "makeSteps", {"label": "Steps"})
    update(page, STEPS)
    assert page.locator(".bo-steps").get_attribute("data-bo-theme") == "dark"
    before, ink = column(page, 150, 60, 100), rgb(page, "compute")
    assert any(like(pixel, ink) for pixel in before)
    page.evaluate(PALETTE, LIGHT)
    page.wait_for_function("() => document.querySelector('.bo-steps').dataset.boTheme === 'light'")
    settle(page)
    light = rgb(page, "compute")
    after = column(page, 150, 60, 100)
    assert light != ink
    assert any(like(pixel, light) for pixel in after) and not any(like(pixel, ink) for pixel in after)


def test_no_motion_for_those_who_want_none(open_plain: Callable[..., Any]) -> None:
    moving = "() => getComputedStyle(document.querySelector('.bo-seg')).transitionDuration"
    page = open_plain(reduced_motion="reduce")
    put(page, "meter", "makeMeter", {"label": "VRAM"})
    assert page.evaluate(moving) == "0s"
    page = open_plain(reduced_motion="no-preference")
    put(page, "meter", "makeMeter", {"label": "VRAM"})
    assert page.evaluate(moving) != "0s"
    page.evaluate("() => document.body.classList.add('disable-animations')")
    page.wait_for_function("() => document.querySelector('.bo-still')")
    assert page.evaluate(moving) == "0s"


def test_the_sparkline_ends_where_the_last_sample_is(open_plain: Callable[..., Any], shot: Any) -> None:
    page = open_plain()
    put(page, "spark", "makeSpark", {"label": "VRAM of this run", "height": 64}, 300)
    samples = [{"t": i / 4, "used": (4 if i < 200 else 12) * GIB} for i in range(400)]
    update(page, samples, {"high": 14 * GIB, "low": None, "total": 16 * GIB})
    top, bottom = 22, 63  # below the title and a glyph, above the base line
    for x, used in [(40, 4), (260, 12)]:
        pixels = column(page, x, 0, 64)
        line = [i for i, pixel in enumerate(pixels) if like(pixel, rgb(page, "weights"), 60)]
        assert line[0] == pytest.approx(bottom - used / 16 * (bottom - top), abs=1.5)
    rows = page.locator("table tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows][:3] == ["now", "highest", "lowest"]
    assert "12.0 GiB" in rows[0] and "4.0 GiB" in rows[2]
    assert "high mark 14.0 GiB" in str(page.locator("canvas").get_attribute("aria-label"))
    shot(page, "draw-spark")


# ------------------------------------------------------------------------------------------------ tables
COLUMNS = [
    {"key": "name", "title": "Component", "kind": "text"},
    {"key": "bytes", "title": "Moved", "kind": "bytes", "help": "RAM to VRAM"},
    {"key": "change", "title": "Change", "kind": "delta"},
]
ROWS = [
    {"name": "unet", "bytes": 5 * GIB + 1, "change": -0.31},
    {"name": '<img src=x onerror="window.bad=1">', "bytes": None, "change": None},
    {"name": "vae", "bytes": 12 * MIB, "change": 0.02},
]


def test_cells_are_exact_and_sorted_by_the_keyboard(open_plain: Callable[..., Any], shot: Any) -> None:
    page = open_plain()
    put(page, "table", "makeTable", {"caption": "By component", "columns": COLUMNS}, 500)
    update(page, ROWS)
    cell = page.locator("[data-figure=bytes]").first
    assert (cell.inner_text(), cell.get_attribute("data-value")) == ("5.0 GiB", str(5 * GIB + 1))
    assert page.locator("[data-figure=change]").first.inner_text() == "-310.0 ms"
    assert cell.evaluate("one => getComputedStyle(one).textAlign") == "end"
    names = page.locator("tbody [data-figure=name]")
    page.keyboard.press("Tab")
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Moved"
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["unet", "vae", ROWS[1]["name"]]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["vae", "unet", ROWS[1]["name"]]
    update(page, [*ROWS, {"name": "te", "bytes": 1, "change": 0}])
    assert names.all_inner_texts() == ["te", "vae", "unet", ROWS[1]["name"]]  # the order is kept
    assert page.evaluate("() => document.activeElement.textContent") == "Moved▲"
    shot(page, "draw-table")


def test_a_row_is_picked_by_mouse_and_keys(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    put(page, "table", "makeTable", {"caption": "By component", "columns": COLUMNS}, 500)
    update(page, ROWS)
    page.locator("tbody tr").nth(2).click()
    page.locator("tbody tr").nth(0).focus()
    page.keyboard.press("Enter")
    assert [row["name"] for row in page.evaluate("() => window.told")] == ["vae", "unet"]


def test_text_is_never_markup(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    bad = str(ROWS[1]["name"])
    put(page, "table", "makeTable", {"caption": bad, "columns": COLUMNS})
    update(page, ROWS)
    put(page, "timeline", "makeTimeline", {"label": bad})
    update(page, {**COURSE, "components": [{"name": bad, "points": [[0, GIB]]}], "ooms": [{"t": 1, "text": bad}]})
    page.locator("summary").click()
    page.wait_for_timeout(200)
    assert page.locator("main img").count() == 0
    assert page.evaluate("() => window.bad") is None
    assert bad in page.locator(".bo-legend").inner_text()


def test_a_long_table_is_shown_in_parts(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    put(page, "table", "makeTable", {"caption": "Steps", "columns": COLUMNS})
    update(page, [{"name": f"step {i}", "bytes": i, "change": 0} for i in range(2000)])
    assert page.locator("tbody tr").count() == 200
    page.get_by_role("button", name="Show more (200 of 2000)").click()
    assert page.locator("tbody tr").count() == 1200
    update(page, [])
    assert page.locator(".bo-empty").is_visible()
    assert page.locator("tbody tr").count() == 0


def test_an_update_changes_rows_in_place(open_plain: Callable[..., Any], tmp_path: Path) -> None:
    """Focus and selection survive four updates a second."""
    page = open_plain()
    put(page, "table", "makeTable", {"caption": "By component", "columns": COLUMNS})
    update(page, ROWS)
    page.evaluate("() => { window.row = document.querySelector('tbody tr'); window.row.focus(); }")
    update(page, [{**ROWS[0], "bytes": 7}, *ROWS[1:]])
    assert page.evaluate("() => document.activeElement === window.row && window.row.isConnected")
    assert page.locator("[data-figure=bytes]").first.inner_text() == "7 B"
