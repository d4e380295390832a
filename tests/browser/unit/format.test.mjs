// Invariant: a figure reads here as the server's summary says it; what is no number is n/a.
import assert from "node:assert/strict";
import { test } from "node:test";
import { bare, brief, bytes, count, delta, fixed, pair, percent, seconds, unit } from "../../../web/js/format.js";

const GIB = 2 ** 30;
const ODD = [null, undefined, NaN, Infinity, -Infinity, "12", {}, [], true, 5n];

test("bytes take the largest unit that they fill, as the summary does", () => {
  const said = [0, 512, 1023, 1024, 1536, 12 * 2 ** 20, 9.8 * GIB, 2 ** 40].map((n) => bytes(n));
  assert.deepEqual(said, ["0 B", "512 B", "1023 B", "1.0 KiB", "1.5 KiB", "12.0 MiB", "9.8 GiB", "1.0 TiB"]);
});

test("a tie goes to the even digit, as Python rounds", () => {
  assert.deepEqual([1.25, 1.75, 0.25, 2.5, -1.25].map((n) => fixed(n, 1)), ["1.2", "1.8", "0.2", "2.5", "-1.2"]);
  assert.deepEqual([1.125, 1.375, 0.625].map((n) => fixed(n, 2)), ["1.12", "1.38", "0.62"]);
  assert.deepEqual([0.5, 1.5, 2.5].map((n) => fixed(n, 0)), ["0", "2", "2"]);
  assert.equal(fixed(0.35, 1), (0.35).toFixed(1)); // no tie: the double lies below
  assert.equal(bytes(1.25 * GIB), "1.2 GiB");
});

test("a pair is in the unit of the whole", () => {
  assert.equal(pair(9.8 * GIB, 16 * GIB), "9.8 / 16.0 GiB");
  assert.equal(pair(5 * 2 ** 20, 16 * GIB), "0.0 / 16.0 GiB");
  assert.equal(pair(null, 16 * GIB), "n/a / 16.0 GiB");
  assert.equal(pair(GIB, null), "1.0 GiB / n/a");
  assert.equal(pair(null, null), "n/a");
});

test("seconds choose s, ms or us", () => {
  assert.deepEqual([0, 5.519, 1, 0.0831, 0.001, 12e-6].map(seconds), ["0.00 s", "5.52 s", "1.00 s", "83.1 ms", "1.0 ms", "12.0 us"]);
  assert.deepEqual([12.44, 0.0831].map(brief), ["12.4 s", "83.1 ms"]);
});

test("a change has its sign", () => {
  assert.deepEqual([0.31, -0.0831, 0, 2].map((n) => delta(n)), ["+310.0 ms", "-83.1 ms", "0.00 s", "+2.00 s"]);
  assert.equal(delta(GIB, bytes), "+1.0 GiB");
  assert.equal(delta(-GIB, bytes), "-1.0 GiB");
});

test("counts and shares", () => {
  assert.equal(count(2000), "2,000");
  assert.equal(percent(0.634), "63 %");
  assert.equal(unit(16 * GIB), "GiB");
  assert.equal(bare(9.8 * GIB, "GiB"), "9.8");
});

test("what is no number is n/a, never NaN", () => {
  for (const say of [bytes, seconds, brief, percent, count, delta, (n) => pair(n, n), (n) => bare(n, "GiB")]) {
    for (const odd of ODD) assert.equal(say(odd), "n/a");
  }
});
