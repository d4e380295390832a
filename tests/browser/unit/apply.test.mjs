// A hint sets inputs of the Offload Policy nodes that it means, all or none, as one undo step, and says what it did.
import assert from "node:assert/strict";
import { test } from "node:test";
import { applyHint, asWidget, meant, placeOf, policyNodes, spells, whatToSet } from "../../../web/js/apply.js";

const FIELDS = { mode: "auto", high: "auto", low: "auto", never: "", always: "", reserve: "0", fit_aware: true };
const POLICY = { ...FIELDS, never: [], always: [], reserve: 0, schema: "offload-policy/1" };

function policyNode(id, values = {}, more = {}) {
  const widgets = Object.entries({ ...FIELDS, ...values }).map(([name, value]) => ({ name, value, options: {} }));
  widgets[0].options.values = ["auto", "none", "balanced", "model", "sequential"];
  const kind = { type: "OffloadPolicy", comfyClass: "OffloadPolicy", title: "Offload Policy" };
  return { id, ...kind, mode: 0, inputs: [], widgets, ...more };
}
const value = (node, field) => node.widgets.find((one) => one.name === field).value;
const hint = (set) => ({ code: "FITS_BUT_MOVED", action: { set, label: "Do it" } });

function hostOf(root) {
  const host = { steps: 0, redraws: 0, rootGraph: () => root, redraw: () => (host.redraws += 1) };
  host.undoable = (change) => {
    host.steps += 1;
    change();
  };
  return host;
}

/** An Offload Policy inside a subgraph whose `fit_aware` is an input of the subgraph node "3". */
function nested() {
  const inner = policyNode(7, {}, { inputs: [{ name: "fit_aware", widget: { name: "fit_aware" } }] });
  const link = { origin_id: -10, origin_slot: 0, target_id: 7, target_slot: 0 };
  const subgraph = { nodes: [inner], links: new Map([[5, link]]) };
  const widget = { name: "fit_aware", value: false, options: {} };
  const outer = { id: 3, type: "uuid", title: "Group", mode: 0, subgraph, widgets: [widget] };
  outer.inputs = [{ name: "fit_aware", widget: { name: "fit_aware" } }];
  return { root: { nodes: [outer] }, inner, outer, widget };
}

test("sets the node whose inputs are the run's policy, and no other, as one undo step", () => {
  const mine = policyNode(1, { fit_aware: false, never: "clip-l,  t5" });
  const other = policyNode(2, { fit_aware: false });
  const host = hostOf({ nodes: [mine, other, { id: 9, type: "KSampler", widgets: [] }] });
  const report = { policy: { ...POLICY, fit_aware: false, never: ["clip-l", "t5"] } };
  const out = applyHint(host, hint({ fit_aware: true, high: "80%" }), report);
  assert.equal(out.done, true);
  assert.deepEqual([value(mine, "fit_aware"), value(mine, "high")], [true, "80%"]);
  assert.equal(value(other, "fit_aware"), false);
  assert.deepEqual([host.steps, host.redraws], [1, 1]);
  assert.match(out.text, /Set Fit-aware to on, High mark \(VRAM\) to 80% in "Offload Policy" \(#1\)\./);
  assert.match(out.text, /undo with Ctrl\+Z/);
});

test("sets every node that spells the policy, in one undo step", () => {
  const nodes = [policyNode(1), policyNode(2)];
  const host = hostOf({ nodes });
  assert.equal(applyHint(host, hint({ mode: "none" }), { policy: POLICY }).done, true);
  assert.deepEqual(nodes.map((node) => value(node, "mode")), ["none", "none"]);
  assert.equal(host.steps, 1);
});

test("the only node is meant, even when its inputs were changed since, and that is said", () => {
  const node = policyNode(1, { high: "50%" });
  const out = applyHint(hostOf({ nodes: [node] }), hint({ mode: "none" }), { policy: POLICY });
  assert.equal(value(node, "mode"), "none");
  assert.match(out.text, /were not those of this run/);
});

test("without a node, or with several that differ, nothing is set and the text says what to set", () => {
  const host = hostOf({ nodes: [{ id: 1, type: "KSampler" }] });
  const none = applyHint(host, hint({ fit_aware: true }), { policy: POLICY });
  assert.equal(none.done, false);
  assert.match(none.text, /no Offload Policy node\. Add one .* set Fit-aware to on\./);
  const nodes = [policyNode(1, { high: "10%" }), policyNode(2, { high: "20%" })];
  const two = hostOf({ nodes });
  const out = applyHint(two, hint({ mode: "none" }), { policy: POLICY });
  assert.equal(out.done, false);
  assert.match(out.text, /None of the 2 Offload Policy nodes .* Set Mode to none in yours\./);
  assert.deepEqual([host.steps, two.steps, value(nodes[0], "mode")], [0, 0, "auto"]);
});

test("muted and bypassed nodes are not meant", () => {
  const running = policyNode(3);
  const root = { nodes: [policyNode(1, {}, { mode: 2 }), policyNode(2, {}, { mode: 4 }), running] };
  assert.deepEqual(policyNodes(root).map((found) => found.id), ["3"]);
});

test("inside a subgraph the value is set where it lives: on the widget that the subgraph node shows", () => {
  const { root, inner, widget } = nested();
  assert.deepEqual(policyNodes(root).map((found) => found.id), ["3:7"]);
  const host = hostOf(root);
  const out = applyHint(host, hint({ fit_aware: true, mode: "none" }), { policy: { ...POLICY, fit_aware: false } });
  assert.equal(out.done, true);
  assert.equal(widget.value, true);
  assert.equal(value(inner, "mode"), "none");
  assert.equal(host.steps, 1);
});

test("a subgraph input that is itself linked, in the root graph, belongs to the node behind it", () => {
  const { root, outer, inner } = nested();
  root.nodes.push({ id: 4, type: "PrimitiveBoolean", title: "Switch", widgets: [] });
  root.links = { 8: { origin_id: 4, origin_slot: 0, target_id: 3, target_slot: 0 } };
  outer.graph = root;
  const host = hostOf(root);
  const out = applyHint(host, hint({ fit_aware: true, mode: "none" }), { policy: POLICY });
  assert.equal(out.done, false);
  assert.match(out.text, /Fit-aware of "Offload Policy" \(#3:7\) comes from "Switch" \(#4\)/);
  assert.equal(value(inner, "mode"), "auto", "half of a hint is not applied");
  assert.equal(host.steps, 0);
});

test("two instances of one subgraph share a widget: set once", () => {
  const inner = policyNode(7);
  const subgraph = { nodes: [inner] };
  const root = { nodes: [{ id: 1, subgraph, mode: 0 }, { id: 2, subgraph, mode: 0 }] };
  let calls = 0;
  inner.widgets[0].callback = () => (calls += 1);
  assert.deepEqual(policyNodes(root).map((found) => found.id), ["1:7", "2:7"]);
  assert.equal(applyHint(hostOf(root), hint({ mode: "none" }), { policy: POLICY }).done, true);
  assert.equal(calls, 1);
});

test("a subgraph inside itself ends", () => {
  const subgraph = { nodes: [] };
  subgraph.nodes.push({ id: 1, subgraph, mode: 0 }, policyNode(2));
  assert.deepEqual(policyNodes({ nodes: [{ id: 5, subgraph, mode: 0 }] }).map((found) => found.id), ["5:2"]);
});

test("an input that this node lacks, or a value that it cannot hold, changes nothing", () => {
  for (const [set, text] of [
    [{ mode: "none", shiny: 1 }, /there is no shiny of/],
    [{ fit_aware: true, mode: "fast" }, /Mode of .* cannot be fast/],
    [{ fit_aware: "yes" }, /Fit-aware of .* cannot be yes/],
  ]) {
    const node = policyNode(1, { fit_aware: false });
    const host = hostOf({ nodes: [node] });
    const out = applyHint(host, hint(set), null);
    assert.match(out.text, text);
    assert.deepEqual([out.done, host.steps, value(node, "fit_aware")], [false, 0, false]);
  }
});

test("nothing to do is no undo step", () => {
  const host = hostOf({ nodes: [policyNode(1)] });
  const out = applyHint(host, hint({ fit_aware: true }), { policy: POLICY });
  assert.deepEqual([out.done, host.steps], [false, 0]);
  assert.match(out.text, /already has Fit-aware on/);
});

test("garbage in a hint, a report or a graph never throws", () => {
  for (const bad of [null, undefined, 1, "x", {}, { action: null }, { action: { set: [1] } }, { action: { set: {} } }])
    assert.equal(applyHint(hostOf(null), bad, null).done, false);
  const root = { nodes: [null, { id: 1, type: "OffloadPolicy" }, { id: 2, subgraph: {} }] };
  for (const policy of [null, 3, [], "auto", { mode: { a: 1 } }])
    assert.equal(applyHint(hostOf(root), hint({ mode: "none" }), { policy }).done, false);
  assert.deepEqual(policyNodes({ nodes: "no" }), []);
});

test("numbers, text, case and ways to write a list are one value", () => {
  const found = { node: policyNode(1, { never: "clip-l t5;vae", reserve: "0", mode: "auto" }), path: [], id: "1" };
  assert.equal(spells(found, { ...POLICY, never: ["clip-l", "t5", "vae"], mode: "AUTO", unknown_field: 3 }), true);
  assert.equal(spells(found, { ...POLICY, never: ["clip-l"] }), false);
  found.node.widgets.push({ name: "gc_threshold", value: "profile" });
  assert.equal(spells(found, { gc_threshold: null }), true);
  assert.equal(spells(found, { gc_threshold: 0.7 }), false);
  assert.equal(spells(found, {}), false, "an empty policy says nothing about any node");
});

test("values as a widget holds them", () => {
  assert.equal(asWidget({ value: "auto", options: {} }, 0.6), "0.6");
  assert.equal(asWidget({ value: "", options: {} }, ["a", "b"]), "a, b");
  assert.equal(asWidget({ value: "", options: {} }, [{}]), undefined);
  assert.equal(asWidget({ value: "", options: {} }, Number.NaN), undefined);
  assert.equal(asWidget({ value: 1, options: {} }, "2"), undefined);
  assert.equal(asWidget({ value: "a", options: { values: () => ["a", "b"] } }, "b"), "b");
  assert.equal(asWidget({ value: "", options: {} }, { a: 1 }), undefined);
});

test("what to set is said in the words of the node", () => {
  const said = "Fit-aware to off, Never offload to t5, vae, x to 1";
  assert.equal(whatToSet({ fit_aware: false, never: ["t5", "vae"], x: 1 }), said);
});

test("an input is emptied, and that is said", () => {
  const node = policyNode(1, { always: "t5" });
  const out = applyHint(hostOf({ nodes: [node] }), hint({ always: "" }), { policy: { ...POLICY, always: ["t5"] } });
  assert.equal(value(node, "always"), "");
  assert.match(out.text, /^Set Always offload to empty in /);
});

test("which nodes are meant", () => {
  const all = policyNodes({ nodes: [policyNode(1), policyNode(2, { high: "5%" })] });
  assert.deepEqual(meant(all, POLICY).nodes.map((found) => found.id), ["1"]);
  assert.deepEqual(meant(all, null).nodes, []);
  assert.equal(placeOf(all[0], "nothing"), null);
});
