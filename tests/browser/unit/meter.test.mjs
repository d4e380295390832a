// Invariant: the meter says in words the same figures that it draws; importing a module does nothing.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { spokenOf, titleOf } from "../../../web/js/meter.js";
import { barOf } from "../../../web/js/scale.js";
import { cleanSamples, columnsOf } from "../../../web/js/spark.js";

const GIB = 2 ** 30;
const FULL = { weights: 5 * GIB, activations: 3 * GIB, others: 1 * GIB, free: 7 * GIB, high: 12 * GIB, low: 4 * GIB, peak: 11 * GIB, total: 16 * GIB };
const WEB = new URL("../../../web/js/", import.meta.url);

test("the spoken text has every figure with its unit", () => {
  assert.equal(
    spokenOf(barOf(FULL)),
    "9.0 / 16.0 GiB in use: weights 5.0 GiB, activations and cache 3.0 GiB, other programs 1.0 GiB, free 7.0 GiB; " +
      "high mark 12.0 GiB; low mark 4.0 GiB; peak 11.0 GiB",
  );
});

test("what is not known is said to be, and is never 0 or NaN", () => {
  const none = spokenOf(barOf(null));
  assert.equal(none, "n/a in use: weights n/a, activations and cache n/a, other programs n/a, free n/a");
  const some = spokenOf(barOf({ ...FULL, weights: null, peak: NaN }));
  assert.match(some, /not accounted for 5\.0 GiB, weights n\/a/);
  assert.doesNotMatch(some, /peak|NaN|undefined/);
});

test("the sparkline keeps the highest sample of each column and a gap stays a gap", () => {
  const samples = Array.from({ length: 1200 }, (_, i) => ({ t: i, used: i === 777 ? 100 : 10 }));
  const columns = columnsOf(cleanSamples(samples), 200);
  assert.equal(columns.length, 200);
  assert.equal(columns.filter((n) => n === 100).length, 1);
  assert.ok(columns.every((n) => n === 10 || n === 100));
  const gap = columnsOf(cleanSamples([{ t: 0, used: 5 }, { t: 5, used: null }, { t: 10, used: 5 }]), 11);
  assert.deepEqual(gap, [5, 5, 5, 5, 5, null, null, null, null, null, 5]);
});

test("samples of a broken host and of a clock set back", () => {
  for (const odd of [null, undefined, "x", 7, {}, [null, 5, {}, { t: NaN }, { t: "1", used: 1 }]]) assert.deepEqual(cleanSamples(odd), []);
  assert.deepEqual(columnsOf([], 3), [null, null, null]);
  assert.deepEqual(columnsOf(cleanSamples([{ t: 1, used: 4 }]), 2), [4, 4]);
  const times = (list) => cleanSamples(list.map((t) => ({ t, used: 1 }))).map(({ t }) => t);
  assert.deepEqual(times([1, 2, 1.5, 3]), [1, 2, 2, 3]);
  assert.deepEqual(times([4000, 4001, 5, 6]), [5, 6]); // a new line from where the clock is now
  assert.deepEqual(cleanSamples([{ t: 1, used: -5 }, { t: 2, used: NaN }]), [{ t: 1, used: null }, { t: 2, used: null }]);
});

test("importing any module but adapter.js does nothing to the page", async () => {
  // There is no document here: whoever touches it on import fails.
  assert.equal(typeof document, "undefined");
  for (const name of readdirSync(WEB).filter((file) => file.endsWith(".js") && file !== "adapter.js")) await import(new URL(name, WEB).href);
});

test("no module turns text into markup", () => {
  for (const name of readdirSync(WEB).filter((file) => file.endsWith(".js"))) {
    assert.doesNotMatch(readFileSync(new URL(name, WEB), "utf8"), /\.(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(|new Function/, name);
  }
});

test("the bar is of now while a run is on, and of the last run's end after it", () => {
  assert.equal(titleOf({ running: { prompt_id: "p", node: null } }), "VRAM now");
  assert.equal(titleOf({ running: null }), "VRAM at the end of the last run");
  assert.equal(titleOf({ running: null }, false), "VRAM now", "there was none");
});
