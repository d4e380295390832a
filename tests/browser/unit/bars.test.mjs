// Invariant: a column is a step's time, each step of the window is in exactly one column, and the slowest is never lost.
import assert from "node:assert/strict";
import { test } from "node:test";
import { stepText } from "../../../web/js/bars.js";
import { bucketsOf, cleanSteps, groupsOf, sumOf } from "../../../web/js/steps.js";

const step = (i, more = {}) => ({ node: "5", i, t0: null, t1: null, compute_s: 0.4, stall_s: 0.1, overlapped_s: 0.2, bytes_h2d: 2 ** 20, count: 1, ...more });
const many = (n) => cleanSteps(Array.from({ length: n }, (_, i) => step(i, i === 1234 ? { stall_s: 9 } : {})));

test("a step's wall is its compute and its stall; copies behind compute add nothing", () => {
  const [one] = cleanSteps([step(6)]);
  assert.deepEqual([one.name, one.node, one.wall, one.count], ["7", "5", 0.5, 1]);
  assert.equal(
    stepText(one),
    "step 7, node 5: compute 400.0 ms, stall 100.0 ms, copies behind compute 200.0 ms, moved 1.0 MiB",
  );
});

test("an entry that stands for several is shown as their mean and counted as all of them", () => {
  const steps = cleanSteps([step(40, { count: 20, compute_s: 8, stall_s: 2, bytes_h2d: 20 * 2 ** 20 })]);
  assert.deepEqual([steps[0].name, steps[0].wall, steps[0].count], ["41-60", 0.5, 20]);
  assert.equal(sumOf(steps, "compute_s"), 8);
  assert.equal(sumOf(steps, "bytes"), 20 * 2 ** 20);
  assert.match(stepText(steps[0]), /^steps 41-60, node 5, each on average: compute 400\.0 ms/);
});

test("unknown is null, not 0, and garbage does not throw", () => {
  const [none, half] = cleanSteps([step(0, { compute_s: null, stall_s: NaN }), step(1, { compute_s: "x", stall_s: 0.1, node: 7 })]);
  assert.equal(none.wall, null);
  assert.deepEqual([half.wall, half.node, half.each.compute_s], [0.1, null, null]);
  assert.equal(sumOf([none], "compute_s"), null);
  assert.equal(sumOf([], "stall_s"), null);
  assert.match(stepText(none), /compute n\/a, stall n\/a/);
  for (const odd of [null, undefined, "x", 5, {}, [null, 3, "x"]]) assert.deepEqual(cleanSteps(odd), []);
  const [odd] = cleanSteps([{}]);
  assert.deepEqual([odd.name, odd.wall, odd.count], ["1", null, 1]);
  assert.deepEqual(cleanSteps([step(0, { count: -4 }), step(0, { count: 0 })]).map(({ count }) => count), [1, 1]);
});

test("every step is in exactly one column, and columns are as wide as was asked for", () => {
  for (const [n, width, least] of [[1, 300, 3], [20, 300, 3], [2000, 300, 3], [2000, 1137, 3], [7, 5, 3]]) {
    const steps = many(n);
    const buckets = bucketsOf(steps, { from: 0, to: n }, width, least);
    assert.deepEqual([buckets[0].first, buckets[buckets.length - 1].last], [0, n - 1]);
    buckets.forEach((bucket, i) => {
      if (i) assert.equal(bucket.first, buckets[i - 1].last + 1);
      assert.ok(bucket.worst >= bucket.first && bucket.worst <= bucket.last);
      if (i < buckets.length - 1) assert.ok((bucket.to - bucket.from) * width >= least - 1e-9);
    });
  }
});

test("the slowest of 2,000 steps is seen at any width", () => {
  const steps = many(2000);
  for (const width of [60, 200, 380, 1200]) {
    assert.ok(bucketsOf(steps, { from: 0, to: 2000 }, width, 3).some((bucket) => bucket.worst === 1234));
  }
});

test("a window shows its own steps only", () => {
  const buckets = bucketsOf(many(100), { from: 10, to: 20 }, 300, 3);
  assert.deepEqual(buckets.map((bucket) => bucket.first), [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]);
  assert.deepEqual([buckets[0].from, buckets[9].to], [0, 1]);
  assert.deepEqual(bucketsOf([], { from: 0, to: 1 }, 300, 3), []);
  assert.deepEqual(bucketsOf(many(3), { from: 0, to: 3 }, 0, 3), []);
});

test("neighbouring steps of one node are one group", () => {
  const steps = cleanSteps([step(0), step(1), step(0, { node: "12" }), step(1, { node: "12" }), step(2, { node: null })]);
  assert.deepEqual(groupsOf(steps), [
    { node: "5", from: 0, to: 2 },
    { node: "12", from: 2, to: 4 },
    { node: null, from: 4, to: 5 },
  ]);
});
