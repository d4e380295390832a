// Invariant: while a run is on its steps have the counts, times and bytes that the report will have, or say n/a.
import assert from "node:assert/strict";
import { test } from "node:test";
import { liveFigures } from "../../../web/js/panelhead.js";
import { cleanSteps, pointSteps, sumOf } from "../../../web/js/steps.js";
import { readTelemetry } from "../../../web/js/wire.js";

const point = (step, t, more = {}) => ({ node: "3", step, steps: 20, t, step_ms: 200, stall_ms: 50, moved: step * 10, ...more });
const points = (...given) => readTelemetry({ t: 9, points: given }).points;
const first = point(1, 1, { step_ms: null, stall_ms: null });

test("a point that stands for steps passed over counts for all of them", () => {
  const steps = pointSteps(points(first, point(2, 1.2), point(6, 2)));
  assert.deepEqual(steps.map(({ i, count }) => [i, count]), [[1, 1], [2, 4]]);
  const [, four] = steps;
  assert.ok(Math.abs(four.stall_s - 0.2) < 1e-9 && Math.abs(four.compute_s - 0.6) < 1e-9);
  assert.ok(Math.abs(four.t0 - 1.2) < 1e-9);
  assert.deepEqual(steps.map((step) => step.bytes_h2d), [10, 40]);
  const clean = cleanSteps(steps);
  assert.deepEqual(clean.map(({ name, each }) => [name, each.bytes]), [["2", 10], ["3-6", 10]]);
  assert.ok(Math.abs(sumOf(clean, "stall_s") - 0.25) < 1e-9);
});

test("the head's stall while a run is on has the steps passed over", () => {
  const live = readTelemetry({ t: 9, vram: {} });
  const { stall } = liveFigures({ live, points: points(first, point(11, 3)) });
  assert.ok(Math.abs(stall - 0.5) < 1e-9, String(stall));
  assert.equal(liveFigures({ live, points: points(first) }).stall, null);
});

test("where points were missed, as by a hidden page, a mean stands for one step, and bytes are not known", () => {
  const [, late] = pointSteps(points(first, point(2, 1.2), point(12, 9)));
  assert.deepEqual([late.i, late.count, late.bytes_h2d], [11, 1, null]);
});

test("another node, a second pass and a first point that is no boundary begin anew", () => {
  const steps = pointSteps(points(point(5, 1), point(1, 1.2), point(2, 1.4, { node: "4" }), point(3, 1.6, { node: "4" })));
  assert.deepEqual(steps.map(({ node, count, bytes_h2d }) => [node, count, bytes_h2d]), [
    ["3", 1, null],
    ["3", 1, null],
    ["4", 1, null],
    ["4", 1, 10],
  ]);
});

test("garbage is no step and no NaN", () => {
  const junk = points({ step_ms: 5 }, { step: "x", t: -1, step_ms: 1, stall_ms: NaN }, point(3, null), point(9, null));
  for (const step of cleanSteps(pointSteps(junk))) for (const value of Object.values(step.each)) assert.ok(value === null || value >= 0);
});
