// Invariant: what is drawn agrees with the report to the byte and the second, and what is not known stays unknown.
import assert from "node:assert/strict";
import { test } from "node:test";
import * as model from "../../../web/js/model.js";
import { readReport, readRow, readTelemetry } from "../../../web/js/wire.js";

const GIB = 2 ** 30;
const row = (prompt_id, more = {}) => readRow({ prompt_id, complete: true, workload: "w", totals: {}, ...more });
const report = (more = {}) => readReport({ schema: "offload-report/1", prompt_id: "p", complete: true, ...more });
const sums = (component, more = {}) => ({ component, weight_bytes: 10, resident_bytes: 5, left_bytes: 3, onload_s: 1, stall_s: 0.5, evict_s: 0, ...more });

test("the newest older whole run of the same workload", () => {
  const rows = [row("e"), row("d", { workload: "x" }), row("c", { complete: false }), row("b"), row("a")];
  assert.equal(model.comparable(rows, rows[0]).prompt_id, "b");
  assert.equal(model.comparable(rows, rows[3]).prompt_id, "a");
  assert.equal(model.comparable(rows, rows[4]), null);
  assert.equal(model.comparable(rows, rows[1]), null);
  assert.equal(model.comparable(rows, null), null);
});

test("an unknown workload is comparable with nothing, itself included", () => {
  const rows = [row("b", { workload: null }), row("a", { workload: null })];
  assert.equal(model.comparable(rows, rows[0]), null);
});

test("a run that has left the list is compared with what is older", () => {
  const rows = [row("b", { created: "2026-02" }), row("a", { created: "2026-01" })];
  assert.equal(model.comparable(rows, row("gone", { created: "2026-01-15" })).prompt_id, "a");
  assert.equal(model.comparable(rows, row("gone", { created: null })), null);
});

test("the card: of telemetry now, of a report what was left", () => {
  assert.deepEqual(model.vramOf(null).weights, null);
  const live = readTelemetry({ t: 1, vram: { weights: 4, total: 9 } });
  assert.equal(model.vramOf(live), live.vram);
  const ended = model.vramOf(report({
    ...{ by_component: [sums("a"), sums("b", { left_bytes: 4 }), sums("", { left_bytes: null })] },
    ...{ vram: { total: 16, peak: 12, others_start: 2 }, resolved: { high: 8, low: 1 } },
  }));
  assert.deepEqual(ended, { weights: 7, activations: null, others: 2, free: null, high: 8, low: 1, peak: 12, total: 16 });
  assert.equal(model.vramOf(report({ by_component: [sums("a", { left_bytes: null })] })).weights, null);
  assert.equal(model.vramOf(row("p", { vram: { total: 16 } })).total, 16);
});

test("components: the share that was resident, moves in seconds, the change", () => {
  const now = report({ by_component: [sums("a"), sums("b", { stall_s: null }), sums("", { weight_bytes: null })] });
  const then = report({ by_component: [sums("a", { onload_s: 0.25 }), sums("b")] });
  const [a, b, outside] = model.componentRows(now, then);
  assert.deepEqual([a.resident, a.moves_s, a.change_s], [0.5, 1.5, 0.75]);
  assert.deepEqual([b.moves_s, b.change_s], [null, null]);
  assert.deepEqual([outside.resident, outside.change_s], [null, null]);
  assert.equal(model.componentRows(now)[0].change_s, null, "nothing to compare with");
  assert.deepEqual(model.componentRows(report()), []);
});

test("nodes: those that ran, with the change of their time", () => {
  const node = (id, t1, more = {}) => ({ id, type: "T", t0: 0, t1, onload_s: 0.5, stall_s: 0.25, evict_s: 0, peak: 9, cached: false, ...more });
  const now = report({ nodes: [node("1", 3), node("2", 1, { cached: true }), node("3:4", 2, { display: "3" })] });
  const then = report({ nodes: [node("1", 2), node("3:4", 2, { type: "Other" })] });
  const rows = model.nodeRows(now, then);
  assert.deepEqual(rows.map(({ display, wall_s, moves_s, change_s }) => [display, wall_s, moves_s, change_s]), [
    ["1", 3, 0.75, 1],
    ["3", 2, 0.75, null],
  ]);
});

test("components: what they were evicted for, the most first", () => {
  const dropped = (dropped_for) => model.componentRows(report({ by_component: [sums("a", { dropped_for })] }))[0].evicted;
  assert.equal(dropped({ need: GIB, low: 4.8 * GIB, before_decode: 1 }), "low 4.8 GiB, need 1.0 GiB, before decode 1 B");
  assert.equal(dropped({}), "nothing");
  assert.equal(dropped(undefined), null);
});

test("nodes: the components of the stages that began in them, inside the node that made them", () => {
  const node = (id, t0, t1) => ({ id, type: "T", t0, t1, wall_s: 1, onload_s: 0.5, stall_s: 0, evict_s: 0 });
  const stage = (component, t0) => ({ name: "s", component, t0, t1: t0 + 1 });
  const whole = report({
    nodes: [node("1", 0, 2), node("2", 2, 9), node("2.0", 3, 8), node("3", 9, 10)],
    stages: [stage("text", 0.5), stage("a+b", 4), stage("vae", 2.5), stage("x", 11), stage("y", null)],
    by_component: [sums("text", { weight_bytes: 10, resident_bytes: 5 }), sums("a", { weight_bytes: null })],
  });
  const said = model.nodeRows(whole).map(({ display, resident, onload_s }) => [display, resident, onload_s]);
  assert.deepEqual(said, [
    ["1", "text 50 %, 5 B", 0.5],
    ["2", "vae n/a", 0.5],
    ["2.0", "a n/a, 5 B; b n/a", 0.5],
    ["3", null, 0.5],
  ]);
  assert.equal(model.nodeRows(row("p", { nodes: [node("1", 0, 2)] }))[0].resident, null);
});

test("a node has a text where its moves are worth a word", () => {
  const text = (wall_s, moves_s, peak = 9.8 * GIB) => model.nodeText({ wall_s, moves_s, peak });
  assert.equal(text(12.4, 1.5), "12.4 s, moves 1.5 s, peak 9.8 GiB");
  assert.equal(text(12.4, 0.25), "12.4 s, moves 250.0 ms, peak 9.8 GiB", "a quarter of a second");
  assert.equal(text(12.4, 0.249), "");
  assert.equal(text(1, 0.05), "1.0 s, moves 50.0 ms, peak 9.8 GiB", "five per cent");
  assert.equal(text(1, 0.049), "");
  assert.equal(text(1, 0.5, null), "1.0 s, moves 500.0 ms");
  assert.equal(text(null, 0.5), "moves 500.0 ms, peak 9.8 GiB");
  for (const [wall, moves] of [[0, 0], [1, null], [null, null], [null, 0.1]]) assert.equal(text(wall, moves), "");
});

test("the chip: live while a prompt runs, the last run's moves afterwards", () => {
  const live = readTelemetry({ prompt_id: "q", t: 1, moved: 3 * GIB, vram: { total: 16 * GIB, free: 6 * GIB, peak: 11.2 * GIB } });
  const runs = [row("p", { totals: { onload_s: 1, stall_s: 0.48, evict_s: 0 }, vram: { total: 16 * GIB, peak: 12 * GIB } })];
  const say = (store) => model.chipText(model.chipFigures(store));
  assert.equal(say({ live, runs, running: null }), "VRAM 10.0 / 16.0 GiB, peak 12.0, moved 1.48 s");
  assert.equal(say({ live, runs, running: { prompt_id: "q", node: null } }), "VRAM 10.0 / 16.0 GiB, peak 11.2, moved 3.0 GiB");
  assert.equal(say({ live: null, runs: [], running: null }), "VRAM n/a");
  assert.equal(say({ live: null, runs, running: null }), "VRAM n/a / 16.0 GiB, peak 12.0, moved 1.48 s");
  const parts = model.chipParts(model.chipFigures({ live, runs, running: null }));
  assert.deepEqual([parts.used.value, parts.peak.value, parts.moves.value], [10 * GIB, 12 * GIB, 1.48]);
});

test("moves of a run are unknown where a part is", () => {
  assert.equal(model.movesOf(row("p", { totals: { onload_s: 1, stall_s: null, evict_s: 0 } })), null);
});

test("the timeline holds every component, stage, eviction and OOM", () => {
  const timeline = model.timelineOf(report({
    totals: { wall_s: 10 },
    vram: { total: 16 },
    resolved: { high: 8, low: 1 },
    residency: [{ t: 1, component: "b", bytes: 4 }, { t: 0, component: "a", bytes: 2 }, { t: 3, component: "a", bytes: 0 }],
    vram_track: [{ t: 2, allocated: 6, resident: 4 }, { t: 1, allocated: 3, resident: 2 }, { t: 3, allocated: null, resident: 1 }],
    stages: [{ name: "encode", component: "a", t0: 0, t1: 3 }, { name: "x", component: "b", t0: 3, t1: null }],
    moves: [
      { t: 3, dir: "drop", component: "a", bytes: 1, reason: "need" },
      { t: 3.01, dir: "drop", component: "a", bytes: 1, reason: "need" },
      { t: 9, dir: "drop", component: "a", bytes: 5, reason: "need" },
      { t: 3, dir: "drop", component: "a", bytes: 7, reason: "oom" },
      { t: 3, dir: "h2d", component: "a", bytes: 9, reason: "stage" },
      { t: null, dir: "drop", component: "a", bytes: 9, reason: "need" },
    ],
    events: [{ t: 4, kind: "oom", text: "full" }, { t: 5, kind: "notice", text: "no" }, { t: null, kind: "oom", text: "?" }],
  }));
  assert.equal(timeline.end_s, 10);
  assert.deepEqual([timeline.total, timeline.high, timeline.low], [16, 8, 1]);
  assert.deepEqual(timeline.components, [{ name: "a", points: [[0, 2], [3, 0]] }, { name: "b", points: [[1, 4]] }]);
  assert.deepEqual(timeline.allocated, [[1, 3], [2, 6]]);
  assert.deepEqual(timeline.stages, [{ name: "encode", component: "a", t0: 0, t1: 3 }]);
  assert.deepEqual(timeline.evictions.map(({ t, bytes, reason }) => [t, bytes, reason]), [[3, 2, "need"], [3, 7, "oom"], [9, 5, "need"]]);
  assert.deepEqual(timeline.ooms, [{ t: 4, text: "full" }]);
});

test("without components' own bytes the sum stands for them; an empty report is an empty timeline", () => {
  const timeline = model.timelineOf(report({ vram_track: [{ t: 1, allocated: 3, resident: 2 }] }));
  assert.deepEqual(timeline.components, [{ name: "weights", points: [[1, 2]] }]);
  assert.equal(timeline.end_s, 1);
  const empty = model.timelineOf(report());
  assert.deepEqual([empty.end_s, empty.components, empty.stages, empty.evictions], [0, [], [], []]);
});
