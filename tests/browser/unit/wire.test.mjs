// Invariant: whatever a server sends, the reader answers with the shape of types.d.ts or with null, and never throws.
import assert from "node:assert/strict";
import { test } from "node:test";
import { number, readMarks, readReport, readRow, readRows, readTelemetry, text } from "../../../web/js/wire.js";

const READERS = { readTelemetry, readReport, readRow, readRows, readMarks };
const JUNK = [null, undefined, 0, -1, NaN, Infinity, "", "x", true, [], [[]], [null], {}, { vram: 3 }, Symbol.iterator, () => 1];
const REPORT = {
  schema: "offload-report/1",
  prompt_id: "p",
  created: "2026-01-01T00:00:00Z",
  complete: true,
  error: null,
  host: { gpu: "Card" },
  policy: { mode: "auto", never: ["vae"], reserve: 0 },
  resolved: { mode: "balanced", high: 10, low: 0, sentence: "s" },
  vram: { total: 16, peak_device: 9, peak_torch: 12, peak_noted: null },
  totals: { wall_s: 2, onload_s: 0.5, stall_s: 0.25, evict_s: 0 },
  stages: [{ name: "denoise", component: "denoiser", t0: 0, t1: 1, need: 1, have: 2, peak: 3 }],
  nodes: [{ id: 3, type: "KSampler", t0: 1, t1: 3, onload_s: 0.25, stall_s: 0.5, evict_s: 0, peak: 12, cached: false }],
  steps: [{ node: "3", i: 0, compute_s: 0.1, stall_s: 0, overlapped_s: 0, bytes_h2d: 7 }],
  moves: [{ t: 0, dur_s: 1, component: "denoiser", dir: "h2d", bytes: 7, reason: "forward", step: null, avoidable: false }],
  by_component: [{ component: "denoiser", weight_bytes: 10, onload_s: 1 }],
  residency: [{ t: 0, component: "denoiser", bytes: 5 }],
  hints: [
    { code: "A", sentence: "one", saving_s: 1, action: { set: { fit_aware: true }, label: "Do" } },
    { code: "B", sentence: "two", saving_s: 1, action: null },
  ],
};

/** Every value of a JSON text, replaced by each piece of junk in turn. */
function* broken(value, path = []) {
  for (const key of Object.keys(value)) {
    for (const junk of JUNK.slice(0, 14)) {
      const copy = structuredClone(REPORT);
      let at = copy;
      for (const step of path) at = at[step];
      at[key] = junk;
      yield copy;
    }
    if (typeof value[key] === "object" && value[key] !== null) yield* broken(value[key], [...path, key]);
  }
}

/** No number anywhere that is not one, no undefined. */
function sound(value) {
  if (typeof value === "number") assert.ok(Number.isFinite(value), String(value));
  assert.notEqual(value, undefined);
  if (typeof value === "object" && value !== null) Object.values(value).forEach(sound);
}

test("junk is null, or a shape without a wrong number", () => {
  for (const [name, read] of Object.entries(READERS)) {
    for (const junk of JUNK) assert.doesNotThrow(() => sound(read(junk)), `${name}(${String(junk)})`);
  }
  for (const read of [readTelemetry, readReport, readRow, readMarks]) assert.equal(read([]), null);
  assert.deepEqual(readRows({ runs: "x" }), []);
});

test("a report with anything in any place is read as far as it goes", () => {
  let tried = 0;
  for (const copy of broken(REPORT)) {
    for (const read of [readReport, readRow, (body) => readRows({ runs: [body] })]) assert.doesNotThrow(() => sound(read(copy)));
    tried += 1;
  }
  assert.ok(tried > 800, String(tried));
});

test("what is right is read as it is", () => {
  const report = readReport(structuredClone(REPORT));
  assert.equal(report.vram.peak, 12, "the highest that anybody saw");
  assert.equal(readReport({ ...REPORT, vram: { ...REPORT.vram, peak: 13 } }).vram.peak, 13);
  assert.deepEqual(
    report.nodes.map(({ id, display, wall_s, moves_s, peak }) => ({ id, display, wall_s, moves_s, peak })),
    [{ id: "3", display: "3", wall_s: 2, moves_s: 0.75, peak: 12 }],
  );
  assert.equal(report.by_component[0].stall_s, null);
  assert.equal(report.totals.decode_s, null);
  assert.deepEqual(report.policy, { mode: "auto", never: ["vae"], reserve: 0 });
  assert.equal(report.hints.length, 1, "never more than one hint");
  assert.deepEqual(report.hints[0].action, { set: { fit_aware: true }, label: "Do" });
  assert.equal(readReport({ ...REPORT, nodes: [{ ...REPORT.nodes[0], display: "1:3" }] }).nodes[0].display, "1:3");
});

test("a node's time is the server's, which leaves out what ran while it was suspended", () => {
  const [node] = readReport({ ...REPORT, nodes: [{ ...REPORT.nodes[0], wall_s: 0.25 }] }).nodes;
  assert.equal(node.wall_s, 0.25);
});

test("a figure that is a size, reasons with bytes", () => {
  const timers = [{ name: "VRAM peak", seconds: null, bytes: 12, means: "m", turn: "t" }, { name: "wall", seconds: 2, bytes: -1 }];
  const by_component = [{ component: "a", dropped_for: { low: 5, need: "x", always: -1, none: 0 } }, { component: "b", dropped_for: [1] }];
  const report = readReport({ ...REPORT, timers, by_component });
  assert.deepEqual(report.timers.map(({ seconds, bytes }) => [seconds, bytes]), [[null, 12], [2, null]]);
  assert.deepEqual(report.by_component.map((row) => row.dropped_for), [[["low", 5]], null]);
});

test("a newer schema is read; another document is not", () => {
  assert.equal(readReport({ ...REPORT, schema: "offload-report/2", brand_new: { a: NaN } }).schema, "offload-report/2");
  assert.equal(readReport({ ...REPORT, schema: "offload-plan/1" }), null);
  assert.equal(readReport({ ...REPORT, schema: undefined }), null);
});

test("numbers: finite, not negative, no text", () => {
  assert.deepEqual([1.5, 0, -1, NaN, Infinity, "3", null, true].map(number), [1.5, 0, null, null, null, null, null, null]);
});

test("telemetry: what is missing is null; a missing prompt id too", () => {
  const read = readTelemetry({ v: 1, t: 1, node: 7, vram: { weights: -4, free: "x", total: 8 }, points: [3, { t: 1, node: "7" }] });
  assert.equal(read.prompt_id, null);
  assert.equal(read.node, "7");
  assert.deepEqual([read.vram.weights, read.vram.free, read.vram.total, read.vram.peak], [null, null, 8, null]);
  assert.equal(read.components, null);
  assert.equal(read.points.length, 1);
  assert.equal(readTelemetry({ components: [] }), null, "neither a time nor a card");
});

test("an action is taken whole or not at all", () => {
  const action = (set) => readRow({ hints: [{ code: "C", sentence: "s", action: { set, label: "L" } }] }).hints[0].action;
  assert.deepEqual(action({ low: "20%", fit_aware: false, gc_threshold: -0.5 }).set, { low: "20%", fit_aware: false, gc_threshold: -0.5 });
  assert.equal(action({ low: "20%", other: {} }), null);
  assert.equal(action({ "low; rm": 1 }), null);
  assert.equal(action({}), null);
  assert.equal(action(JSON.parse('{"__proto__": "x"}')), null);
});

test("text is cut, and carries no orders for a layout", () => {
  assert.equal(text("a\u202eb\u0007c\nd"), "abc\nd");
  assert.equal(text("<img src=x onerror=alert(1)>"), "<img src=x onerror=alert(1)>", "markup stays text, to be shown as text");
  assert.equal(text("x".repeat(9000)).length, 4096);
  assert.equal(text(3), null);
});

test("lists have an end", () => {
  const steps = Array.from({ length: 10000 }, (_, i) => ({ node: "1", i }));
  assert.equal(readReport({ ...REPORT, steps }).steps.length, 4096);
});

test("marks: a sentence, sources, and an error in words", () => {
  const marks = readMarks({ total: 16, high: 9, low: null, mode: "balanced", sources: { high: "user", low: 3 }, sentence: "s", error: "" });
  assert.deepEqual(marks, { total: 16, available: null, high: 9, low: null, mode: "balanced", sources: { high: "user" }, sentence: "s", error: null });
});
