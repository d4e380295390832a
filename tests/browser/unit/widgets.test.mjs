// A policy asks once for what its inputs are now, whoever answers when; a report knows of which runs it was part.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { FIELDS, makeAsker, questionOf, WAIT } from "../../../web/js/policywidget.js";
import { isOn, newestOf, rowOf, withoutHint } from "../../../web/js/reportwidget.js";
import { chain } from "../../../web/js/nodewidget.js";
import { Store } from "../../../web/js/store.js";
import { readReport, readRow, readTelemetry } from "../../../web/js/wire.js";

const snapshot = JSON.parse(readFileSync(new URL("../../host/object_info.json", import.meta.url), "utf8"));

test("the fields are the inputs of the node, in their order", () => {
  assert.deepEqual(FIELDS, Object.keys(snapshot.OffloadPolicy.inputs));
});

test("the question spells the widgets; what a link sets, and what is not ours, is left out", () => {
  const widgets = [
    ...[["mode", "auto"], ["high", "60%"], ["low", "a b&c=d"], ["fit_aware", false], ["never", undefined]],
    ...[["reserve", 0], ["of another pack", "x"], ["always", { no: "text" }]],
  ].map(([name, value]) => ({ name, value }));
  const node = { widgets, inputs: [{ name: "mode" }, { name: "high", widget: { name: "high" } }], isInputConnected: (slot) => slot === 1 };
  const { query, linked } = questionOf(node);
  assert.deepEqual(linked, ["high"]);
  assert.deepEqual(Object.fromEntries(new URLSearchParams(query)), { mode: "auto", low: "a b&c=d", reserve: "0", fit_aware: "false" });
  assert.deepEqual(questionOf({}), { query: "", linked: [] });
});

/** Answers that come when the test says so. */
function held() {
  const asked = [];
  return { asked, answer: (question) => new Promise((resolve, reject) => asked.push({ question, resolve, reject })) };
}
const turn = () => new Promise((resolve) => setImmediate(resolve));

test("changes are waited for, and only the answer to the last question is told", async (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const [told, server] = [[], held()];
  let question = "a";
  const asker = makeAsker(() => question, server.answer, (found) => told.push(found));
  for (let i = 0; i < 5; i += 1) {
    asker.later();
    context.mock.timers.tick(WAIT - 1);
  }
  assert.equal(server.asked.length, 0, "a hand that types is waited for");
  context.mock.timers.tick(1);
  question = "b";
  asker.check();
  context.mock.timers.tick(WAIT);
  assert.deepEqual(server.asked.map((one) => one.question), ["a", "b"]);
  server.asked[1].resolve({ high: 2 });
  await turn();
  server.asked[0].resolve({ high: 1 });
  await turn();
  assert.deepEqual(told.map((found) => found.marks.high), [2]);
  asker.check();
  context.mock.timers.tick(10 * WAIT);
  assert.equal(server.asked.length, 2, "the same question is not asked twice");
});

test("what fails is said; after the end nothing is told and nothing asked", async (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const [told, server] = [[], held()];
  const asker = makeAsker(() => "a", server.answer, (found) => told.push(found));
  asker.later();
  context.mock.timers.tick(WAIT);
  server.asked[0].reject(new Error("away"));
  await turn();
  asker.later();
  context.mock.timers.tick(WAIT);
  server.asked[1].resolve("no object");
  await turn();
  assert.deepEqual(told, [{ marks: null, problem: "away" }, { marks: null, problem: "the answer is none" }]);
  asker.later();
  asker.stop();
  context.mock.timers.tick(10 * WAIT);
  assert.equal(server.asked.length, 2);
  asker.later();
  context.mock.timers.tick(WAIT);
  asker.stop();
  server.asked[2].resolve({ high: 3 });
  await turn();
  assert.equal(told.length, 2, "an answer that comes after the end is nobody's");
});

test("the newest run of which the node was part; or which would have come to it, had it not failed", () => {
  const nodes = [
    { id: 7, type: "KSampler" },
    { id: 12, type: "VRAMReport" },
  ];
  const root = { _nodes: nodes, getNodeById: (id) => nodes.find((node) => node.id === id) ?? null };
  for (const node of nodes) node.graph = root;
  const run = (prompt_id, rows, more = {}) =>
    readRow({ prompt_id, nodes: rows.map(([id, type]) => ({ id, display: id, type })), ...more });
  const sampler = ["7", "KSampler"];
  const ours = run("ours", [sampler, ["12", "VRAMReport"]]);
  const failed = run("failed", [sampler], { error: { type: "OOM", message: "" } });
  const other = run("other", [sampler]);
  const foreign = run("foreign", [["7", "LoadImage"]], { error: "stopped" });
  const early = run("early", [], { error: "stopped" });
  const found = (...rows) => newestOf(nodes[1], root, rows)?.prompt_id;
  assert.equal(found(other, ours), "ours");
  assert.equal(found(failed, ours), "failed");
  assert.equal(found(foreign, early, other), undefined);
  assert.equal(newestOf({ id: 12, graph: null }, null, [ours]), null);
});

test("of two runs the newer is shown, also where it failed before it came to the node", () => {
  const row = (prompt_id, created = null) => readRow({ prompt_id, created });
  const [a, b] = [row("a", "2026-01-01T00:00:01+00:00"), row("b", "2026-01-01T00:00:02+00:00")];
  const store = { runs: [b, a] };
  const record = (created) => readReport({ schema: "offload-report/1", prompt_id: "c", created });
  assert.equal(rowOf({ prompt: "a", record: null }, b, store), b, "b failed later");
  assert.equal(rowOf({ prompt: "b", record: null }, a, store), b);
  assert.equal(rowOf({ prompt: "a", record: null }, null, store), a);
  assert.equal(rowOf({ prompt: null, record: null }, a, store), a);
  assert.equal(rowOf({ prompt: "c", record: record("2026-01-01T00:00:03+00:00") }, b, store), null, "its row is on its way");
  assert.equal(rowOf({ prompt: "c", record: record("2026-01-01T00:00:01+00:00") }, b, store), b, "the list has lost it");
});

test("the run is on for a node of this page's prompt, or that ran in another's; for no other", () => {
  const nodes = [{ id: 7, type: "KSampler" }, { id: 12, type: "VRAMReport" }];
  const root = { _nodes: nodes, getNodeById: (id) => nodes.find((node) => node.id === id) ?? null };
  for (const node of nodes) node.graph = root;
  const told = (store, node, type, more = {}) => {
    store.setTelemetry(readTelemetry({ prompt_id: "p", node, type, t: 1, ...more }));
    return isOn(nodes[1], root, store);
  };
  const ours = new Store();
  assert.equal(isOn(nodes[1], root, ours), false);
  ours.setRunning("p", null);
  assert.equal(isOn(nodes[1], root, ours), true);
  ours.setRunning("p", "404");
  assert.equal(isOn(nodes[1], root, ours), false, "another workflow is open");
  assert.deepEqual([told(ours, "7", "KSampler"), told(ours, "7", null), told(ours, "7", "LoadImage")], [true, true, false]);
  const other = new Store();
  assert.deepEqual([told(other, "7", "KSampler"), told(other, "12", null), told(other, "12", "KSampler")], [false, false, false]);
  assert.equal(told(other, "12", "VRAMReport"), true);
  const ended = [{ id: "12", display: "12", type: "VRAMReport" }];
  assert.equal(told(other, "7", "KSampler", { ended }), true, "it went past the node");
});

test("a hint has a place of its own, and is not in the text as well", () => {
  assert.equal(withoutHint("Partial. Mode balanced.\nHint: All fits. Turn it on.\nNote: x"), "Partial. Mode balanced.\nNote: x");
  assert.equal(withoutHint("The Hint: stays"), "The Hint: stays");
});

test("a callback that is chained keeps its own answer, its own this and its arguments", () => {
  const heard = [];
  const node = { onExecuted: function (output) { return [this === node, output]; } };
  chain(node, "onExecuted", (output) => heard.push(output));
  chain(node, "onNothing", (output) => heard.push(output));
  assert.deepEqual(node.onExecuted("a"), [true, "a"]);
  assert.equal(node.onNothing("b"), undefined);
  assert.deepEqual(heard, ["a", "b"]);
});
