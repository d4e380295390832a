// Invariant: every place is the figure's own, what is unknown takes no place, and two labels never touch.
import assert from "node:assert/strict";
import { test } from "node:test";
import { placeLabels } from "../../../web/js/labels.js";
import { barOf, clamp, known, monotone, ticks, ticksBetween, View } from "../../../web/js/scale.js";

const GIB = 2 ** 30;
const FULL = { weights: 5 * GIB, activations: 3 * GIB, others: 1 * GIB, free: 7 * GIB, high: 12 * GIB, low: 4 * GIB, peak: 11 * GIB, total: 16 * GIB };
const shares = (bar) => Object.fromEntries(bar.parts.map((part) => [part.key, part.to - part.from]));
const ODD = [undefined, NaN, Infinity, -1, "12", {}, [], true];

test("a part's share is its bytes of the card, in the fixed order", () => {
  const bar = barOf(FULL);
  assert.deepEqual(bar.parts.map((part) => part.key), ["weights", "activations", "others", "free"]);
  assert.deepEqual(shares(bar), { weights: 5 / 16, activations: 3 / 16, others: 1 / 16, free: 7 / 16 });
  assert.deepEqual(bar.marks.map(({ key, at, beyond }) => [key, at, beyond]), [["high", 0.75, false], ["low", 0.25, false], ["peak", 11 / 16, false]]);
  assert.equal(bar.used, 9 * GIB);
  assert.equal(bar.total, 16 * GIB);
});

test("parts follow each other without a gap and fill the card", () => {
  const values = [null, 0, 1, GIB, 3.5 * GIB, 40 * GIB];
  for (const weights of values) for (const activations of values) for (const others of values) for (const free of values) for (const total of [null, 0, GIB, 16 * GIB]) {
    const bar = barOf({ weights, activations, others, free, total, high: GIB });
    let at = 0;
    for (const part of bar.parts) {
      assert.ok(Math.abs(part.from - at) < 1e-9 && part.to >= part.from);
      at = part.to;
    }
    assert.ok(at <= 1 + 1e-9 && at > 0.989 - 1e-9, `${at}`);
  }
});

test("what is not known is a part of its own at its place, not nothing and not free", () => {
  const bar = barOf({ ...FULL, weights: null });
  assert.deepEqual(bar.parts.map((part) => part.key), ["unknown", "weights", "activations", "others", "free"]);
  assert.equal(shares(bar).unknown, 5 / 16);
  assert.equal(bar.parts[1].bytes, null);
  assert.equal(bar.used, 9 * GIB); // what is not free
  const both = barOf({ ...FULL, activations: null, free: null });
  assert.deepEqual(both.parts.map((part) => part.key), ["weights", "unknown", "activations", "others", "free"]);
  assert.equal(both.used, null);
  const free = barOf({ ...FULL, free: null });
  assert.deepEqual(free.parts.map((part) => part.key), ["weights", "activations", "others", "unknown", "free"]);
  assert.equal(free.used, 9 * GIB);
});

test("all unknown is a bar of nothing known; a card without a size ends at what is known", () => {
  for (const vram of [null, undefined, {}, 7, "x", { weights: null, total: null }, { total: 0 }]) {
    const bar = barOf(vram);
    assert.equal(bar.used, null);
    assert.equal(bar.total, null);
    assert.deepEqual(bar.marks, []);
    assert.equal(shares(bar).unknown, 1);
  }
  const bar = barOf({ ...FULL, total: null, free: null });
  assert.equal(bar.extent, 12 * GIB);
  assert.ok(Math.abs(shares(bar).unknown - 3 / 12) < 1e-9);
  assert.equal(bar.parts.find((part) => part.key === "unknown").bytes, null);
});

test("parts that are seen at two moments may miss a hundredth; more is not accounted for", () => {
  assert.equal(shares(barOf({ ...FULL, free: 6.9 * GIB })).unknown, undefined);
  assert.ok(Math.abs(shares(barOf({ ...FULL, free: 6 * GIB })).unknown - 1 / 16) < 1e-9);
});

test("more than the card holds makes the bar longer, a mark past its end says so", () => {
  const more = barOf({ ...FULL, free: 9 * GIB });
  assert.equal(more.extent, 18 * GIB);
  assert.equal(more.total, 16 * GIB);
  const high = barOf({ ...FULL, high: 20 * GIB }).marks[0];
  assert.deepEqual([high.at, high.beyond, high.bytes], [1, true, 20 * GIB]);
});

test("what is no number is unknown", () => {
  for (const odd of ODD) {
    assert.equal(known(odd), null);
    const bar = barOf({ ...FULL, weights: odd, high: odd, total: odd });
    assert.ok(bar.parts.every((part) => Number.isFinite(part.from) && Number.isFinite(part.to)));
    assert.equal(bar.total, null);
  }
  assert.equal(known(0), 0);
  assert.equal(clamp(5, 0, -1), 0);
});

test("ticks are round, few, and none where there is nothing", () => {
  assert.deepEqual(ticks(16 * GIB, 4, 1024).map((n) => n / GIB), [0, 4, 8, 12, 16]);
  assert.deepEqual(ticks(24 * 2 ** 20, 4, 1024).map((n) => n / 2 ** 20), [0, 8, 16, 24]);
  assert.deepEqual(ticks(0.65, 4).map((n) => n.toFixed(1)), ["0.0", "0.2", "0.4", "0.6"]);
  assert.deepEqual(ticksBetween(3.1, 7.9, 3), [4, 6]);
  for (const [end, most] of [[0, 3], [NaN, 3], [Infinity, 3], [-1, 3], [5, 0]]) assert.deepEqual(ticks(end, most), []);
  for (let i = 1; i < 200; i += 1) {
    const count = ticks(i * 0.37, 4).length;
    assert.ok(count >= 2 && count <= 5, `${i}: ${count}`);
  }
});

test("a clock that is set back never leads back", () => {
  assert.deepEqual(monotone([[1, 5], [2, 6], [1.5, 7], [3, 8]]), [[1, 5], [2, 6], [2, 7], [3, 8]]);
  // Set back by an hour: it goes on from where it was.
  assert.deepEqual(monotone([[4000, 5], [4001, 6], [401, 7], [402, 8]]), [[4000, 5], [4001, 6], [4001, 7], [4002, 8]]);
  assert.deepEqual(monotone([[NaN, 1], [1, NaN], [1, null], ["1", 2], null, 5, [1], [2, 3], [3, -1]]), [[2, 3]]);
  for (const odd of [null, undefined, "x", 7, {}]) assert.deepEqual(monotone(odd), []);
});

test("a window zooms about its point, pans and never leaves the whole", () => {
  const view = new View(100);
  view.extend(10);
  assert.deepEqual([view.from, view.to, view.zoomed], [0, 10, false]);
  view.zoom(2, 0.5);
  assert.deepEqual([view.from, view.to, view.zoomed], [2.5, 7.5, true]);
  view.pan(1);
  assert.deepEqual([view.from, view.to], [5, 10]);
  view.pan(-Infinity);
  assert.deepEqual([view.from, view.to], [0, 5]);
  view.zoom(1e9);
  assert.ok(Math.abs(view.to - view.from - 0.1) < 1e-9); // a hundredth of the whole at most
  view.zoom(1e-9);
  assert.equal(view.zoomed, false);
  for (let i = 0; i < 40; i += 1) view.zoom(1.5, 0.3);
  for (let i = 0; i < 40; i += 1) view.zoom(1 / 1.5, 0.8);
  assert.deepEqual([view.from, view.to], [0, 10]);
});

test("a window that shows all goes with the run as it grows, a zoomed one stays where it is", () => {
  const view = new View();
  view.extend(10);
  view.extend(20);
  assert.deepEqual([view.from, view.to], [0, 20]);
  view.zoom(2, 0);
  view.extend(30);
  assert.deepEqual([view.from, view.to], [0, 10]);
  view.extend(4); // another run
  assert.equal(view.to <= 4, true);
  for (const odd of [0, NaN, Infinity, -3]) {
    view.extend(odd);
    assert.ok(view.to > view.from);
  }
});

test("labels never touch, never leave the width, and stay at their marks", () => {
  let seed = 7;
  const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
  for (let run = 0; run < 3000; run += 1) {
    const width = 60 + random() * 600;
    const labels = Array.from({ length: 1 + Math.floor(random() * 4) }, () => ({ at: random() * width, width: 20 + random() * 90 }));
    const places = placeLabels(labels, width, 2);
    assert.equal(places.length, labels.length);
    places.forEach((place, i) => {
      if (place.row < 0) return;
      assert.ok(place.left >= 0 && place.left + labels[i].width <= width + 1e-9);
      assert.ok(place.left <= labels[i].at + 8 && place.left + labels[i].width >= labels[i].at - 8);
      places.forEach((other, k) => {
        if (k <= i || other.row !== place.row) return;
        assert.ok(place.left + labels[i].width + 7.9 <= other.left || other.left + labels[k].width + 7.9 <= place.left);
      });
    });
    // The first has room wherever it is not wider than all.
    assert.equal(places[0].row, labels[0].width <= width ? 0 : -1);
  }
});
