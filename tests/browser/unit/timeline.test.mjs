// Invariant: a column of pixels shows a moment that there was, the one at which most was held; no peak is ever lost.
import assert from "node:assert/strict";
import { test } from "node:test";
import { cleanModel, columnsOf, momentAt, stackOf } from "../../../web/js/stack.js";

const MODEL = {
  end_s: 10, total: 100, high: 60, low: 20,
  components: [
    { name: "te", points: [[0, 0], [1, 30], [4, 0]] },
    { name: "unet", points: [[4, 50], [9, 0]] },
  ],
  allocated: [[0, 5], [2, 45], [6, 80], [9, 10]],
  stages: [{ name: "encode", component: "te", t0: 0, t1: 4 }],
  evictions: [{ t: 4, component: "te", bytes: 30, reason: "need" }],
  ooms: [{ t: 12, text: "no room" }],
};
const row = (stack, i) => [...stack.values].map((values) => values[i]);

test("courses are merged into moments at which every component has its bytes", () => {
  const stack = stackOf(MODEL);
  assert.deepEqual(stack.names, ["te", "unet"]);
  assert.deepEqual([...stack.times], [0, 1, 2, 4, 6, 9]);
  assert.deepEqual(row(stack, 2), [30, NaN, 45]); // nothing was said of the unet yet
  assert.deepEqual(row(stack, 3), [0, 50, 45]);
  // What the allocator held where that was more than the weights, else their sum.
  assert.deepEqual([...stack.height], [5, 30, 45, 50, 80, 10]);
  assert.equal(stack.peak, 80);
});

test("a moment holds until the next", () => {
  const stack = stackOf(MODEL);
  assert.deepEqual([-1, 0, 0.5, 1, 3.9, 4, 100].map((t) => momentAt(stack, t)), [-1, 0, 0, 1, 2, 3, 5]);
});

test("each column shows the moment at which most was held in it", () => {
  const stack = stackOf(MODEL);
  assert.deepEqual([...columnsOf(stack, 0, 10, 10, 10)], [0, 1, 2, 2, 3, 3, 4, 4, 4, 5]);
  assert.deepEqual([...columnsOf(stack, 0, 10, 1, 10)], [4]);
  assert.deepEqual([...columnsOf(stack, 0, 10, 2, 10)], [3, 4]);
  // Nothing is drawn past the end of what is known, and nothing before it begins.
  assert.deepEqual([...columnsOf(stack, 8, 12, 4, 10)], [4, 5, 5, -1]);
  assert.deepEqual([...columnsOf(stackOf({ components: [], allocated: [[5, 1]] }), 0, 10, 4, 10)], [-1, -1, 0, 0]);
});

test("two values at one moment: the higher is shown, the last holds", () => {
  const stack = stackOf({ components: [{ name: "a", points: [[1, 9], [1, 3], [2, 4]] }, { name: "b", points: [[1.5, 1]] }], allocated: [] });
  assert.deepEqual([...stack.values[0]], [9, 3, 4]);
});

test("10,000 points: one column in a thousand pixels has the one that was highest", () => {
  const points = Array.from({ length: 10_000 }, (_, i) => [i / 1000, i === 6789 ? 999 : 10 + (i % 7)]);
  const stack = stackOf({ components: [{ name: "a", points }], allocated: points });
  for (const columns of [1, 37, 380, 1137]) {
    const drawn = columnsOf(stack, 0, 10, columns, 10);
    assert.equal(Math.max(...[...drawn].map((at) => stack.height[at])), 999);
    // It is held for a millisecond, which may reach into the next column.
    assert.ok([...drawn].filter((at) => stack.height[at] === 999).length <= 2);
  }
  // Zoomed in until the point has columns of its own.
  const close = columnsOf(stack, 6.788, 6.79, 20, 10);
  assert.deepEqual([...close].map((at) => stack.height[at] === 999), Array.from({ length: 20 }, (_, i) => i >= 10));
});

test("a clock that goes back leaves the moments in order", () => {
  const stack = stackOf({ components: [{ name: "a", points: [[0, 1], [5, 2], [4.8, 3], [1, 4], [2, 5]] }], allocated: [] });
  const times = [...stack.times];
  assert.deepEqual(times, [...times].sort((a, b) => a - b));
  assert.equal(stack.values[0][times.length - 1], 5);
});

test("nothing, garbage and half a model do not throw and draw no figure that is none", () => {
  const odd = [
    null, undefined, 7, "x", {}, { components: "x", allocated: 5 }, { components: [null, 5, { name: 7, points: "x" }], allocated: [[NaN, 1], ["1", 2]] },
    { components: [{ name: "a", points: [[0, -5], [1, NaN]] }], stages: [null, { t0: 3, t1: 1 }, { t0: "x", t1: 2 }], evictions: [5, { t: NaN }], ooms: "x", end_s: NaN, total: 0, high: -1, low: "3" },
  ];
  for (const one of odd) {
    const stack = stackOf(one);
    const model = cleanModel(one, stack);
    assert.equal(stack.peak, 0);
    assert.deepEqual([model.stages, model.evictions, model.ooms], [[], [], []]);
    assert.deepEqual([model.total, model.high, model.low, model.end], [null, null, null, 0]);
    assert.deepEqual([...columnsOf(stack, 0, 1, 3, 1)], [-1, -1, -1]);
  }
  assert.deepEqual(stackOf({ components: [{ points: [[0, 1]] }] }).names, ["unnamed"]);
});

test("the run ends where its last event is", () => {
  const stack = stackOf(MODEL);
  assert.equal(cleanModel(MODEL, stack).end, 12);
  assert.deepEqual(cleanModel({ ...MODEL, evictions: [{ t: 1, bytes: "x" }] }, stack).evictions, [{ t: 1, component: "", bytes: null, reason: "" }]);
});
