"""Steps and timeline in a real browser: heights are times and bytes to the pixel, keys do what the pointer does, and a
part that is gone leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .canned import GIB, MIB
from .drawn import column, like, put, rgb, settle, update, words
from .pages import heap
from .test_draw import COURSE

TOP, BOTTOM = 16, 17
"""What a picture of steps keeps free above and below its columns."""


LEAKED = "() => { window.leaked = []; addEventListener('keydown', (event) => window.leaked.push(event.key)); }"


def step(i: int, **more: Any) -> dict[str, Any]:
    known = {"node": "5", "i": i, "compute_s": 0.4, "stall_s": 0.1, "overlapped_s": 0.0, "bytes_h2d": MIB, "count": 1}
    return {**known, **more}


@pytest.mark.parametrize("width", [200, 380, 1200])
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_a_columns_height_is_the_steps_time(open_plain: Callable[..., Any], shot: Any, theme: str, width: int) -> None:
    page = open_plain(theme=theme, size={"width": width + 40, "height": 400}, device_scale_factor=2)
    put(page, "bars", "makeSteps", {"label": "Steps", "height": 160, "compact": True}, width)
    slow = step(1, compute_s=1.0, stall_s=1.0, overlapped_s=0.5)
    update(page, [step(0), slow, step(2, compute_s=None, stall_s=None), step(3, compute_s=1.5, stall_s=0)])
    room, bottom = 160 - TOP - BOTTOM, 160 - BOTTOM
    ink = rgb(page, "compute")

    def solid(index: int) -> list[float]:
        pixels = column(page, width * (index + 0.5) / 4, TOP - 4, bottom)
        return [TOP - 4 + i / 2 for i, pixel in enumerate(pixels) if like(pixel, ink, 40)]

    assert min(solid(0)) == pytest.approx(bottom - 0.4 / 2 * room, abs=1)
    assert min(solid(3)) == pytest.approx(bottom - 1.5 / 2 * room, abs=1)
    assert min(solid(1)) == pytest.approx(bottom - 1.0 / 2 * room, abs=1)
    # The upper half of the slow step's compute is solid, the lower has the holes of the hatch.
    upper = [y for y in solid(1) if y < bottom - 0.25 * room - 1]
    assert len(upper) == pytest.approx(2 * 0.25 * room, abs=4)
    lower = [y for y in solid(1) if y > bottom - 0.25 * room + 1]
    assert 0.3 < len(lower) / (2 * 0.25 * room) < 0.8
    # The stall has the outline only, and ends at the step's whole time.
    x = width * 1.5 / 4
    text = rgb(page, "text")
    outline = [
        TOP - 4 + i / 2
        for at in (x, x + 2)
        for i, pixel in enumerate(column(page, at, TOP - 4, bottom - 0.5 * room - 4))
        if like(pixel, text, 90)
    ]
    assert outline and min(outline) == pytest.approx(TOP, abs=1.5) and max(outline) <= TOP + 2
    assert not solid(2)  # n/a is no height
    assert "4 steps, slowest 2.00 s, stall 1.10 s" in page.locator(".bo-readout").inner_text()
    shot(page, f"draw-steps-{theme}-{width}")


def test_steps_by_the_keyboard(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    page.evaluate(LEAKED)
    put(page, "bars", "makeSteps", {"label": "Steps"})
    update(page, [step(i, stall_s=i / 10) for i in range(20)])
    page.locator("canvas").focus()
    readout = page.locator(".bo-readout")
    expected = {"ArrowRight": "step 1,", "End": "step 20,", "ArrowLeft": "step 19,", "Home": "step 1,"}
    for key, text in expected.items():
        page.keyboard.press(key)
        assert readout.inner_text().startswith(text)
    assert readout.get_attribute("aria-live") == "polite"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert [one["i"] for one in page.evaluate("() => window.told")] == [1]
    for key in ("+", "+", "-", "0", "Escape"):
        page.keyboard.press(key)
    assert readout.inner_text().startswith("20 steps")
    assert page.evaluate("() => window.leaked") == []  # the host's own shortcuts heard nothing
    page.keyboard.press("q")
    page.keyboard.press("Escape")
    assert page.evaluate("() => window.leaked") == ["q", "Escape"]  # what is not ours is left to it


def test_two_thousand_steps(open_plain: Callable[..., Any], shot: Any) -> None:
    page = open_plain(size={"width": 420, "height": 500})
    put(page, "bars", "makeSteps", {"label": "Steps", "compact": True}, 380)
    steps = [step(i, stall_s=2.0 if i == 1234 else 0.1) for i in range(2000)]
    update(page, steps)
    ink = rgb(page, "text")
    tall = [x for x in range(380) if any(like(pixel, ink, 90) for pixel in column(page, x, TOP - 1, 60))]
    assert tall and max(tall) - min(tall) <= 4  # the slow one alone, in its place
    assert tall[0] == pytest.approx(1234 / 2000 * 380, abs=4)
    assert "slowest 2.40 s" in words(page) and "each column is the slowest of" in words(page)
    milliseconds = page.evaluate(
        """async (steps) => {
          const frame = () => new Promise((done) => requestAnimationFrame(done));
          const all = [];
          for (let i = 0; i < 30; i += 1) {
            const start = performance.now();
            window.part.update(steps);
            all.push(performance.now() - start);
            await frame();
          }
          return all.sort((a, b) => a - b)[0];
        }""",
        steps,
    )
    assert milliseconds < 16, "an update takes more than a frame"
    shot(page, "draw-steps-2000")


def test_the_table_behind_has_every_step(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    put(page, "bars", "makeSteps", {"label": "Steps"})
    update(page, [step(0), step(1, stall_s=None), step(2, count=4, compute_s=2.0)])
    assert page.locator("tbody tr").count() == 0  # nobody reads it yet
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    page.locator("tbody tr").nth(2).wait_for()
    rows = [row.split("\t") for row in page.locator("tbody tr").all_inner_texts()]
    assert [row[0] for row in rows] == ["1", "2", "3-6"]
    assert rows[1][3] == "n/a" and rows[2][2] == "500.0 ms"
    assert page.locator("[data-figure=compute_s]").nth(2).get_attribute("data-value") == "0.5"


# ---------------------------------------------------------------------------------------------- timeline
FRAME = """async () => {
  const { frameOf } = await import("/extensions/balanced_offload/js/timepaint.js");
  const { theme } = await import("/extensions/balanced_offload/js/look.js");
  const canvas = document.querySelector("canvas");
  return frameOf(canvas.clientWidth, canvas.clientHeight, theme(canvas), %d);
}"""


@pytest.mark.parametrize("width", [200, 380, 1200])
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_an_areas_height_is_its_bytes(open_plain: Callable[..., Any], shot: Any, theme: str, width: int) -> None:
    page = open_plain(theme=theme, size={"width": width + 40, "height": 420})
    put(page, "timeline", "makeTimeline", {"label": "VRAM", "height": 240}, width)
    update(page, COURSE)
    frame = page.evaluate(FRAME % COURSE["total"])
    ink, text = rgb(page, "weights"), rgb(page, "text")
    high = frame["top"] + (frame["bottom"] - frame["top"]) * 0.25

    def y(nbytes: float) -> float:
        return float(frame["bottom"] - nbytes / (4 * GIB) * (frame["bottom"] - frame["top"]))

    for share, nbytes in [(0.2, GIB), (0.8, 3 * GIB)]:
        x = frame["left"] + frame["width"] * share
        pixels = column(page, x, high + 14, frame["bottom"] - 2)
        area = [high + 14 + i for i, pixel in enumerate(pixels) if like(pixel, ink)]
        assert min(area) == pytest.approx(max(y(nbytes), high + 14), abs=2)
    # The allocator held more than the weights at first: that lies on top of them, in its own colour.
    pixels = column(page, frame["left"] + frame["width"] * 0.2, 0, frame["bottom"])
    more = [i for i, pixel in enumerate(pixels) if like(pixel, rgb(page, "activations"))]
    assert min(more) == pytest.approx(y(2 * GIB), abs=2) and max(more) <= y(GIB) + 1
    marks = [i for i, pixel in enumerate(pixels) if like(pixel, text, 40)]
    assert any(abs(i - y(3 * GIB)) <= 1.5 for i in marks)
    shot(page, f"draw-timeline-{theme}-{width}")


def test_the_timeline_by_the_keyboard(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    page.evaluate(LEAKED)
    put(page, "timeline", "makeTimeline", {"label": "VRAM"}, 600)
    update(page, {**COURSE, "ooms": [{"t": 3, "text": "tried 2.0 GiB"}]})
    readout = page.locator(".bo-readout")
    assert readout.inner_text().startswith("4.00 s, highest recorded 3.0 GiB, high mark 3.0 GiB, low mark 1.0 GiB")
    page.locator("canvas").focus()
    said = []
    for _ in range(3):
        page.keyboard.press("ArrowDown")
        said.append(readout.inner_text())
    assert said[0].startswith("0.00 s: denoise of unet begins, takes 4.00 s; unet 1.0 GiB, allocated 2.0 GiB")
    assert said[1].startswith("2.00 s: te evicted, 1.0 GiB (need); unet 3.0 GiB")
    assert said[2].startswith("3.00 s: ran out of memory: tried 2.0 GiB")
    page.keyboard.press("ArrowUp")
    assert readout.inner_text() == said[1]
    page.keyboard.press("Escape")
    for key in ("+", "+", "ArrowRight", "ArrowRight", "End"):
        page.keyboard.press(key)
    assert readout.inner_text().startswith("2.22 s to 4.00 s of 4.00 s")
    page.keyboard.press("Home")
    assert readout.inner_text().startswith("0.00 s to 1.78 s of 4.00 s")
    page.keyboard.press("0")
    assert readout.inner_text().startswith("4.00 s,")
    assert page.evaluate("() => window.leaked") == []
    page.keyboard.press("Escape")  # there is nothing left to leave: the host may close its panel
    assert page.evaluate("() => window.leaked") == ["Escape"]


def test_the_timeline_by_the_pointer(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    put(page, "timeline", "makeTimeline", {"label": "VRAM"}, 600)
    update(page, COURSE)
    frame = page.evaluate(FRAME % COURSE["total"])
    box = page.locator("canvas").bounding_box()
    assert box
    readout = page.locator(".bo-readout")

    def at(share: float) -> tuple[float, float]:
        return box["x"] + frame["left"] + frame["width"] * share, box["y"] + 100

    page.mouse.move(*at(0.5))
    assert "te evicted, 1.0 GiB (need); unet 3.0 GiB, allocated 2.0 GiB" in readout.inner_text()
    assert readout.get_attribute("aria-live") is None  # the pointer is not read aloud
    page.mouse.wheel(0, -100)
    page.mouse.move(0, 0)
    assert readout.inner_text().startswith("4.00 s,")  # a wheel alone scrolls the panel
    page.mouse.move(*at(0.0))
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.mouse.move(0, 0)
    zoomed = readout.inner_text()
    assert zoomed.startswith("0.00 s to ")
    page.mouse.move(*at(0.8))
    page.mouse.down()
    page.mouse.move(*at(0.4), steps=5)
    page.mouse.up()
    page.mouse.move(0, 0)
    assert readout.inner_text() != zoomed and " of 4.00 s" in readout.inner_text()
    page.get_by_role("button", name="All of the run").click()
    assert readout.inner_text().startswith("4.00 s,")
    page.get_by_role("button", name="Zoom in").click()
    assert " of 4.00 s" in readout.inner_text()
    page.get_by_role("button", name="Zoom out").click()
    assert page.get_by_role("button", name="Zoom out").is_disabled()


def test_the_table_behind_the_timeline_is_exact(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    put(page, "timeline", "makeTimeline", {"label": "VRAM"}, 600)
    update(page, COURSE)
    page.locator("summary").click()
    page.locator("tbody tr").nth(4).wait_for()
    cells = page.evaluate(
        """() => [...document.querySelectorAll("tbody tr")].map((row) =>
          [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent))"""
    )
    assert ["2", "unet", str(3 * GIB), "on the device from here"] in cells
    assert ["0", "allocated", str(2 * GIB), "held by the allocator from here"] in cells
    assert ["2", "eviction", "n/a", "te evicted, 1.0 GiB (need)"] in cells


def test_ten_thousand_points_are_drawn_within_a_frame(open_plain: Callable[..., Any]) -> None:
    page = open_plain(size={"width": 1240, "height": 500})
    put(page, "timeline", "makeTimeline", {"label": "VRAM"}, 1200)
    took = page.evaluate(
        """async () => {
          const points = Array.from({ length: 10_000 }, (_, i) => [i / 100, (1 + (i % 97) / 50) * 2 ** 30]);
          const names = ["te", "unet", "vae"];
          const model = { end_s: 100, total: 2 ** 34, high: 2 ** 33, low: 2 ** 31, allocated: points,
            components: names.map((name) => ({ name, points })), stages: [], evictions: [], ooms: [] };
          const frame = () => new Promise((done) => requestAnimationFrame(done));
          const all = [];
          for (let i = 0; i < 9; i += 1) {
            const start = performance.now();
            window.part.update(model);
            all.push(performance.now() - start);
            await frame();
          }
          return all.sort((a, b) => a - b)[0];  // the others on this machine cost time too
        }"""
    )
    assert took < 100, "four updates a second would be felt"
    assert "highest recorded 8.8 GiB" in page.locator(".bo-readout").inner_text()


# ------------------------------------------------------------------------------------- what is left behind
def test_device_pixels_and_a_new_width(open_plain: Callable[..., Any]) -> None:
    page = open_plain(device_scale_factor=2)
    put(page, "timeline", "makeTimeline", {"label": "VRAM", "height": 200}, 400)
    update(page, COURSE)
    size = "() => { const { width, height } = document.querySelector('canvas'); return [width, height]; }"
    assert page.evaluate(size) == [800, 400]
    page.evaluate("() => { document.querySelector('main').style.width = '300px'; }")
    settle(page)
    assert page.evaluate(size) == [600, 400]
    page.evaluate("() => { document.querySelector('main').style.display = 'none'; }")
    settle(page)
    page.evaluate("() => { document.querySelector('main').style.display = ''; }")
    settle(page)
    assert page.evaluate(size) == [600, 400]
    # On a node the graph's zoom is a transform, of which nothing is told but the wheel.
    page.evaluate("() => { document.querySelector('main').style.transform = 'scale(1.5)'; }")
    page.mouse.move(50, 50)
    page.mouse.wheel(0, 10)
    page.wait_for_function("() => document.querySelector('canvas').width === 900")


COUNTED = """() => {
  window.counts = { observers: 0, listeners: 0, frames: 0 };
  for (const name of ["ResizeObserver", "MutationObserver"]) {
    const Base = window[name];
    window[name] = class extends Base {
      observe(...args) { if (!this.on) window.counts.observers += 1; this.on = true; return super.observe(...args); }
      disconnect() { if (this.on) window.counts.observers -= 1; this.on = false; return super.disconnect(); }
    };
  }
  const places = [[window, "addEventListener", 1], [window, "removeEventListener", -1]];
  for (const [place, name, by] of places) {
    const before = place[name];
    place[name] = function (...args) { window.counts.listeners += by; return before.apply(this, args); };
  }
}"""
CHURN = """async ([times, course, steps, vram]) => {
  const base = "/extensions/balanced_offload/js/";
  const [{ makeTimeline }, { makeSteps }, { makeMeter }, { makeSpark }] =
    await Promise.all(["timeline", "bars", "meter", "spark"].map((name) => import(base + name + ".js")));
  const main = document.querySelector("main");
  for (let i = 0; i < times; i += 1) {
    const parts = [makeTimeline, makeSteps, makeMeter, makeSpark].map((make) => make({ label: "a" }));
    for (const part of parts) main.append(part.element);
    [course, steps, vram, [{ t: 0, used: i }]].forEach((value, at) => parts[at].update(value));
    if (i % 10 === 0) await new Promise((done) => requestAnimationFrame(done));
    for (const part of parts) { part.destroy(); part.element.remove(); }
  }
  await new Promise((done) => setTimeout(done, 100));
}"""


def test_a_part_that_is_gone_leaves_nothing(open_plain: Callable[..., Any]) -> None:
    page = open_plain()
    page.evaluate(COUNTED)
    given = [COURSE, [step(i) for i in range(50)], {"weights": GIB, "total": 4 * GIB}]
    page.evaluate(CHURN, [250, *given])  # caches are filled
    assert page.evaluate("() => window.counts") == {"observers": 0, "listeners": 0, "frames": 0}
    before = heap(page)
    page.evaluate(CHURN, [200, *given])
    assert page.evaluate("() => window.counts.observers") == 0
    assert heap(page) <= before * 1.05


def test_the_heap_is_flat_over_a_long_run(open_plain: Callable[..., Any]) -> None:
    """2,000 steps seen live, four updates each: what is kept is what was handed over last."""
    page = open_plain()
    put(page, "bars", "makeSteps", {"label": "Steps"})
    live = """(count) => {
      const one = { node: "5", compute_s: 0.4, stall_s: 0.1, overlapped_s: 0.2, bytes_h2d: 1, count: 1 };
      const steps = Array.from({ length: 2000 }, (_, i) => ({ ...one, i }));
      for (let i = 0; i < count; i += 1) window.part.update(steps);
    }"""
    page.evaluate(live, 200)
    settle(page)
    before = heap(page)
    page.evaluate(live, 1000)
    settle(page)
    assert heap(page) <= before * 1.05
