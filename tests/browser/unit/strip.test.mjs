// A strip is placed outside the node's box, is legible at any zoom at which it is drawn, and never cuts a figure.
import assert from "node:assert/strict";
import { test } from "node:test";

// No page here: the width of a text is then a fixed number of pixels a letter.
globalThis.document = { createElement: () => ({ getContext: () => null }) };
const { choose, drawLive, drawNotes, LEAST_ZOOM, LIVE_HEIGHT, place, seen, unitOf, unplaced, zoomOf } = await import(
  "../../../web/js/strip.js"
);
const { themeOn } = await import("../../../web/js/look.js");
const { barOf } = await import("../../../web/js/scale.js");

const GIB = 2 ** 30;
const TEXTS = ["VRAM 9.8 GiB, peak 11.2, step moves 83.0 ms", "9.8 GiB, peak 11.2", "9.8 GiB"];
const width = (text) => Math.ceil(text.length * 6.5);
const boxOf = (texts, live, zoom, nodeWidth = 270) => {
  const box = unplaced();
  place(box, texts, live, 100, 50, nodeWidth, zoom, "Arial");
  return box;
};

/** A canvas that writes down what is drawn on it, in the coordinates of the screen. */
function paper(zoom, ratio = 1) {
  const at = { a: zoom * ratio, e: 0, f: 0 };
  const kept = [];
  const calls = [];
  const state = {};
  const note = (name) => (...args) => void calls.push({ name, args, at: { ...at }, style: { ...state } });
  return {
    calls,
    depth: () => kept.length,
    getTransform: () => ({ ...at }),
    save: () => void kept.push({ ...at }),
    restore: () => void Object.assign(at, kept.pop()),
    translate: (x, y) => void ((at.e += x * at.a), (at.f += y * at.a)),
    scale: (k) => void (at.a *= k),
    setLineDash: () => {},
    ...Object.fromEntries(
      ["beginPath", "moveTo", "lineTo", "closePath", "stroke", "fill", "rect", "roundRect", "fillRect", "strokeRect", "rotate"]
        .concat(["fillText", "strokeText", "clearRect", "createPattern"])
        .map((name) => [name, note(name)]),
    ),
    ...Object.fromEntries(["measureText"].map((name) => [name, (text) => ({ width: width(text) })])),
    set font(value) {
      state.font = value;
    },
    set fillStyle(value) {
      state.fillStyle = value;
    },
    set globalAlpha(value) {
      state.alpha = value;
    },
  };
}

test("the zoom is read off the canvas, whatever the screen's density", () => {
  assert.equal(zoomOf({ getTransform: () => ({ a: 0.8 }) }, 1), 0.8);
  assert.equal(zoomOf({ getTransform: () => ({ a: 1.6 }) }, 2), 0.8);
  assert.equal(zoomOf({ getTransform: () => ({ a: 0.8 }) }, undefined), 0.8);
  assert.equal(zoomOf({ getTransform: () => ({ a: Number.NaN }) }, 1), 0);
  assert.equal(zoomOf({}, 1), 0);
});

test("text is at least 11 pixels on the screen at every zoom, and a strip never covers its node", () => {
  for (const zoom of [LEAST_ZOOM, 0.5, 0.75, 0.9, 1, 1.5, 3]) {
    assert.ok(11 * unitOf(zoom) * zoom >= 11 - 1e-9, `at ${zoom}`);
    for (const live of [true, false]) {
      const box = boxOf(TEXTS, live, zoom);
      assert.equal(box.x, 100);
      assert.ok(Math.abs(box.y + box.height - 50) < 1e-9, "its lower edge is where it was put");
      const pixels = box.width / unitOf(zoom);
      assert.ok(width(box.text) <= pixels, `${box.text} fits into ${pixels}`);
    }
  }
});

test("the longest text that fits is shown, and the last one whole where none does", () => {
  assert.equal(choose(TEXTS, 1000, "Arial"), TEXTS[0]);
  assert.equal(choose(TEXTS, width(TEXTS[1]), "Arial"), TEXTS[1]);
  assert.equal(choose(TEXTS, width(TEXTS[1]) - 1, "Arial"), TEXTS[2]);
  assert.equal(choose(TEXTS, 1, "Arial"), TEXTS[2]);
  assert.equal(choose([], 100, "Arial"), "");
  // Far away the same node has less room.
  assert.equal(boxOf(TEXTS, true, 1, 400).text, TEXTS[0]);
  assert.equal(boxOf(TEXTS, true, 0.4, 400).text, TEXTS[1]);
});

test("a live strip is as wide as its node, a note only as wide as its text", () => {
  assert.equal(boxOf(TEXTS, true, 1, 600).width, 600);
  assert.ok(boxOf(TEXTS, false, 1, 600).width < 400);
  assert.ok(boxOf(["9.8 GiB"], true, 1, 0).width > 0, "a node without a width has a strip all the same");
});

test("what is outside the picture is not drawn", () => {
  const box = { x: 0, y: 0, width: 100, height: 20 };
  assert.equal(seen(box, [-50, -50, 60, 60]), true);
  assert.equal(seen(box, [100, 0, 50, 50]), false);
  assert.equal(seen(box, [0, 20, 50, 50]), false);
  assert.equal(seen(box, [200, 200, 50, 50]), false);
});

test("the bar's parts are their shares to the pixel, on a plate, and the canvas is left as it was", () => {
  const theme = themeOn("#202020");
  const bar = barOf({ weights: 8 * GIB, activations: GIB, others: GIB, free: 6 * GIB, high: 12 * GIB, low: 4 * GIB, peak: 11 * GIB, total: 16 * GIB });
  const ctx = paper(1);
  const box = boxOf(TEXTS, true, 1, 600);
  drawLive(ctx, theme, box, unitOf(1), bar);
  assert.equal(ctx.depth(), 0, "what was saved was restored");
  const [plate] = ctx.calls.filter((call) => call.name === "roundRect");
  assert.ok(plate, "a plate first");
  const fills = ctx.calls.filter((call) => call.name === "fillRect");
  const inner = 600 / 1.1 - 14;
  const parts = fills.filter((call) => call.args[2] < inner - 1).map((call) => call.args[2] / inner);
  assert.deepEqual(parts.map((share) => share.toFixed(6)), ["0.500000", "0.062500", "0.062500"]);
  const drawn = ctx.calls.find((call) => call.name === "fillText");
  assert.equal(drawn.args[0], box.text);
  assert.ok(11 * drawn.at.a >= 11);
  assert.match(drawn.style.font, /\b11px\b/);
  for (const { args } of fills) assert.ok(args[1] + args[3] <= LIVE_HEIGHT, "nothing below the plate");
});

test("a note is its text on a plate; unknown figures draw too", () => {
  const theme = themeOn("#ffffff");
  const ctx = paper(0.4, 2);
  const box = boxOf(["12.4 s, moves 1.5 s, peak 9.8 GiB"], false, 0.4);
  drawNotes(ctx, theme, [box], unitOf(0.4));
  assert.deepEqual(ctx.calls.filter((call) => call.name === "fillText").map((call) => call.args[0]), [box.text]);
  drawLive(ctx, theme, boxOf(["n/a"], true, 0.4), unitOf(0.4), barOf(null));
  assert.equal(ctx.depth(), 0);
  for (const { args } of ctx.calls) for (const one of args) assert.ok(typeof one !== "number" || Number.isFinite(one));
});
