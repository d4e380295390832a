// Invariant: what the page keeps has an end, belongs to one run, and tells its listeners; late news starts nothing again.
import assert from "node:assert/strict";
import { test } from "node:test";
import { POINTS, REPORTS, RUNS, SAMPLES, Store, usedOf } from "../../../web/js/store.js";
import { readReport, readRow, readTelemetry } from "../../../web/js/wire.js";

const telemetry = (prompt_id, t, more = {}) =>
  readTelemetry({ v: 1, prompt_id, t, node: "3", vram: { total: 100, free: 100 - (t % 100) }, points: [], ...more });
const row = (prompt_id, more = {}) => readRow({ prompt_id, complete: true, created: "2026", ...more });
const report = (prompt_id, more = {}) => readReport({ schema: "offload-report/1", prompt_id, ...more });

test("what is used is all that is not free, else the sum of known parts", () => {
  const none = { weights: null, activations: null, others: null, free: null, total: null, high: null, low: null, peak: null };
  assert.equal(usedOf({ ...none, total: 10, free: 4 }), 6);
  assert.equal(usedOf({ ...none, total: 10, free: 14 }), 0);
  assert.equal(usedOf({ ...none, weights: 1, activations: 2, others: 3 }), 6);
  assert.equal(usedOf({ ...none, weights: 1, activations: 2 }), null, "others are not known, so neither is the sum");
});

test("two thousand samples: the whole run in at most 1,200, with its peak", () => {
  const store = new Store();
  for (let i = 0; i < 20000; i += 1) {
    const used = i === 7777 ? 99 : 10;
    store.setTelemetry(telemetry("p", i / 4, { vram: { total: 100, free: 100 - used } }));
    assert.ok(store.samples.length <= SAMPLES);
  }
  assert.ok(store.samples.length > SAMPLES / 4);
  assert.equal(store.samples[0].t, 0);
  assert.ok(store.samples.at(-1).t > 4990);
  assert.equal(Math.max(...store.samples.map((sample) => sample.used)), 99);
  assert.deepEqual([...store.samples].sort((a, b) => a.t - b.t), store.samples);
});

test("points have an end, the newest stay", () => {
  const store = new Store();
  for (let i = 0; i < 3000; i += 1) store.setTelemetry(telemetry("p", i, { points: [{ t: i, node: "3", step: i }] }));
  assert.equal(store.points.length, POINTS);
  assert.equal(store.points.at(-1).step, 2999);
});

test("a clock that jumps leaves no wrong sample behind", () => {
  const store = new Store();
  for (const t of [0, 1, 2, 1e9, 3, 4]) store.setTelemetry(telemetry("p", t));
  assert.deepEqual(store.samples.map((sample) => sample.t), [0, 1, 2, 3, 4]);
  for (const t of [1.5, 2]) store.setTelemetry(telemetry("p", t));
  assert.deepEqual(store.samples.map((sample) => sample.t), [0, 1, 1.5, 2]);
});

test("one time that is garbage takes nothing away, wherever it comes", () => {
  for (const wrong of [0, 0.5, 1e9]) {
    const store = new Store();
    for (const t of [1, 2, 3, wrong, 4, 5, wrong, 6]) store.setTelemetry(telemetry("p", t));
    assert.deepEqual(store.samples.map((sample) => sample.t).filter((t) => t <= 6), [1, 2, 3, 4, 5, 6].slice(0, wrong > 6 ? 5 : 6), String(wrong));
  }
  const store = new Store();
  for (const t of [1, 2, 0, 0, 0, 3]) store.setTelemetry(telemetry("p", t));
  assert.deepEqual(store.samples.map((sample) => sample.t), [1, 2, 3]);
});

test("where nodes began and ended there is a sample, and no dip that is only the allocator's cache", () => {
  const store = new Store();
  const vram = (used) => ({ total: 100, free: 100 - used, others: 5 });
  const at = (t, allocated) => ({ t, node: "3", allocated });
  store.setTelemetry(telemetry("p", 1, { vram: vram(40) }));
  store.setTelemetry(telemetry("p", 2, { vram: vram(50), stages: [at(1.75, 70), at(1.25, 10), at(0.5, 99), at(9, 99), at(null, 1), at(1.5, null), 3] }));
  assert.deepEqual(store.samples, [{ t: 1, used: 40 }, { t: 1.25, used: 40 }, { t: 1.75, used: 75 }, { t: 2, used: 50 }]);
  store.setTelemetry(telemetry("p", 3, { vram: { total: 100, free: 60 }, stages: [at(2.5, 70)] }));
  assert.equal(store.samples.length, 5, "with what others have not known, neither is the sum");
});

test("nodes that ended are kept until the next run, each told once", () => {
  const store = new Store();
  const ended = (id, wall_s) => ({ id, display: id, type: "T", wall_s, moves_s: 0.5, stall_s: 0, peak: 9, cached: false });
  store.setTelemetry(telemetry("p", 1, { ended: [ended("1", 2), ended("2", 1)] }));
  store.setTelemetry(telemetry("p", 2, { ended: [ended("1", 3), null, {}] }));
  assert.deepEqual(store.ended.map(({ id, wall_s }) => [id, wall_s]), [["2", 1], ["1", 3]]);
  store.endRun("p");
  assert.equal(store.ended.length, 2, "its report is not there yet");
  store.setTelemetry(telemetry("q", 1));
  assert.deepEqual([store.ended.length, store.sampled], [0, "q"]);
});

test("a page's own prompts are those of which the host itself told it", () => {
  const store = new Store();
  store.setTelemetry(telemetry("other", 1));
  assert.equal(store.mine, null);
  store.setRunning("ours", "1");
  store.setTelemetry(telemetry("ours", 1));
  assert.equal(store.mine, "ours");
  store.setTelemetry(telemetry("next", 1));
  assert.equal(store.mine, "ours");
  const opened = new Store();
  opened.setRunning(null, "1"); // what a host says to a page that comes back
  opened.setTelemetry(telemetry("ours", 1));
  assert.equal(opened.mine, "ours");
});

test("another prompt begins anew", () => {
  const store = new Store();
  store.setTelemetry(telemetry("a", 1, { points: [{ t: 1 }] }));
  store.setTelemetry(telemetry("b", 0));
  assert.deepEqual([store.samples.length, store.points.length, store.running.prompt_id], [1, 0, "b"]);
});

test("idle telemetry is live, of no run and no sample", () => {
  const store = new Store();
  store.setTelemetry(telemetry(null, 3));
  assert.equal(store.running, null);
  assert.equal(store.samples.length, 0);
  assert.equal(store.live.t, 3);
});

test("what comes after the end does not start it again; the host's own word does", () => {
  const store = new Store();
  store.setTelemetry(telemetry("p", 1));
  store.endRun("p");
  store.setTelemetry(telemetry("p", 2));
  assert.equal(store.running, null);
  assert.equal(store.samples.length, 1);
  store.setRunning("p", "4");
  assert.deepEqual(store.running, { prompt_id: "p", node: "4" });
});

test("the end of another prompt ends nothing; an end without an id ends what runs", () => {
  const store = new Store();
  store.setRunning("a", "1");
  store.endRun("b");
  assert.equal(store.running.prompt_id, "a");
  store.endRun(null);
  assert.equal(store.running, null);
  store.setTelemetry(telemetry("a", 9));
  assert.equal(store.running, null);
});

test("executing without a prompt id belongs to the prompt that runs", () => {
  const store = new Store();
  store.setRunning("a", null);
  store.setRunning(null, "7");
  assert.deepEqual(store.running, { prompt_id: "a", node: "7" });
  store.setTelemetry(telemetry("a", 1, { node: null }));
  assert.equal(store.running.node, "7", "telemetry that names no node leaves it");
});

test("the host's end of the prompt before comes after the start of the next", () => {
  const store = new Store();
  store.setRunning("a", "1");
  store.setRunning("b", null);
  store.endRun("a");
  assert.equal(store.running.prompt_id, "b");
});

test("rows: newest first, one a prompt, at most as many as the server keeps", () => {
  const store = new Store();
  store.setRuns(Array.from({ length: 100 }, (_, i) => row(`p${i % 90}`)));
  assert.equal(store.runs.length, RUNS);
  store.addRow(row("new"));
  assert.equal(store.runs[0].prompt_id, "new");
  assert.equal(store.runs.length, RUNS);
  store.addRow(row("p3", { verdict: "oom" }));
  assert.equal(store.runs[4].verdict, "oom", "a known one is told anew where it is");
  store.addRow(row(null));
  assert.equal(store.runs[0].prompt_id, "new");
  assert.equal(store.row("p3").verdict, "oom");
  assert.equal(store.row("gone"), null);
});

test("reports: the last eight; one that was read before its end is dropped when the end comes", () => {
  const store = new Store();
  for (let i = 0; i < 12; i += 1) store.setReport(report(`p${i}`));
  assert.equal(store.reports.size, REPORTS);
  assert.equal(store.report("p3"), null);
  assert.equal(store.report("p11").prompt_id, "p11");
  store.addRow(row("p11"));
  assert.equal(store.report("p11"), null);
  store.setReport(report(null));
  assert.equal(store.reports.size, REPORTS - 1);
});

test("listeners hear what they asked for, and stop", (context) => {
  const store = new Store();
  const warn = context.mock.method(console, "warn", () => {});
  const heard = [];
  const offs = ["live", "run", "runs", "report", "selected"].map((kind) => store.on(kind, () => heard.push(kind)));
  store.on("runs", () => {
    throw new Error("a part that fails");
  });
  store.setTelemetry(telemetry("p", 1));
  store.setTelemetry(telemetry("p", 2));
  store.endRun("p");
  store.addRow(row("p"));
  store.setRuns([row("q")]);
  store.setReport(report("p"));
  store.select("p");
  store.select("p");
  assert.deepEqual(heard, ["run", "live", "live", "run", "runs", "runs", "report", "selected"]);
  assert.equal(warn.mock.callCount(), 1, "said once");
  offs.forEach((off) => off());
  store.setTelemetry(telemetry("z", 1));
  assert.equal(heard.length, 8);
});
