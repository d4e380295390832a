"""Invariant: a part is put on an empty page as the panel puts it: in a box of a known width, with its style sheet.

`put(page, "meter", "makeMeter", {...}, width)` leaves the part as `window.part` and its element in <main>.
"""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page

PUT = """async ([file, make, options, width]) => {
  const base = "/extensions/balanced_offload/js/";
  const module = await import(base + file + ".js");
  window.part?.destroy();
  const main = document.querySelector("main");
  main.replaceChildren();
  main.style.width = width + "px";
  window.told = [];
  window.part = module[make]({ ...options, onSelect: (what) => window.told.push(what) });
  // A part of the panel lies in the panel, which is dressed.
  (await import(base + "dress.js")).dress(main);
  main.append(window.part.element);
  const link = document.querySelector("link.bo-style");
  if (!link.sheet) await new Promise((done) => link.addEventListener("load", done));
}"""

FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"

COLUMN = """([x, from, to]) => {
  // The colours of one column of a canvas' pixels, in CSS pixels from `from` down to `to`.
  const canvas = document.querySelector("canvas");
  const dots = canvas.width / canvas.clientWidth;
  const context = canvas.getContext("2d");
  const height = Math.round((to - from) * dots);
  const { data } = context.getImageData(Math.round(x * dots), Math.round(from * dots), 1, height);
  return Array.from({ length: height }, (_, i) => [...data.slice(i * 4, i * 4 + 4)]);
}"""

BOXES = """(selector) => [...document.querySelectorAll(selector)].filter((one) => one.checkVisibility()).map((one) => {
  const { left, top, right, bottom } = one.getBoundingClientRect();
  return { text: one.textContent, left, top, right, bottom };
})"""


def put(page: Page, file: str, make: str, options: dict[str, Any], width: int = 380) -> None:
    page.evaluate(PUT, [file, make, options, width])
    settle(page)


def update(page: Page, *values: Any) -> None:
    page.evaluate("values => window.part.update(...values)", list(values))
    settle(page)


def settle(page: Page) -> None:
    """A frame to measure, one to draw, and the time of a transition."""
    page.evaluate(FRAMES)
    page.wait_for_timeout(180)


def column(page: Page, x: float, top: float, bottom: float) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in page.evaluate(COLUMN, [x, top, bottom])]


def boxes(page: Page, selector: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.evaluate(BOXES, selector)
    return found


def rgb(page: Page, name: str) -> tuple[int, ...]:
    """A colour that the part wears: of its variable --bo-<name>."""
    value: str = page.evaluate("name => window.part.element.style.getPropertyValue(`--bo-${name}`)", name)
    return tuple(int(value[i : i + 2], 16) for i in (1, 3, 5))


def like(pixel: tuple[int, ...], colour: tuple[int, ...], by: int = 12) -> bool:
    return len(pixel) == 4 and pixel[3] > 200 and all(abs(a - b) <= by for a, b in zip(pixel, colour, strict=False))


def words(page: Page) -> str:
    """All text of the part and what is read aloud of it."""
    found: str = page.evaluate(
        """() => [document.querySelector("main"), ...document.querySelectorAll("main *")].map((one) =>
          [one === document.querySelector("main") ? one.textContent : "", one.getAttribute("aria-label") ?? "",
           one.getAttribute("aria-valuetext") ?? "", one.getAttribute("data-value") ?? ""].join(" ")).join(" ")"""
    )
    return found
