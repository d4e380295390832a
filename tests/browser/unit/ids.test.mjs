// Invariant: an execution id leads to its node and back through any depth of subgraphs; what leads nowhere is null.
import assert from "node:assert/strict";
import { test } from "node:test";
import { executionIds, find, localId, prefixes, rowsByNode } from "../../../web/js/ids.js";

/** A graph that answers as LiteGraph's do: ids may be numbers or text. */
const graph = (...nodes) => ({ _nodes: nodes, getNodeById: (id) => nodes.find((node) => node.id === id) ?? null });
const inner = graph({ id: 7, type: "KSampler" }, { id: 8, type: "VAEDecode" });
const middle = graph({ id: 2, subgraph: inner }, { id: 5, type: "Other" });
const root = graph({ id: 1, type: "Loader" }, { id: 3, subgraph: middle }, { id: 4, subgraph: inner }, { id: "named", type: "Odd" });
const row = (display, wall_s, moves_s = 0, more = {}) => ({
  ...{ id: display, display, type: "T", wall_s, moves_s, onload_s: null, stall_s: moves_s, evict_s: 0, peak: null, cached: false },
  ...more,
});

test("find walks down", () => {
  assert.equal(find(root, "1").type, "Loader");
  assert.equal(find(root, "3:2:7").type, "KSampler");
  assert.equal(find(root, "4:8").type, "VAEDecode");
  assert.equal(find(root, "named").type, "Odd");
  assert.equal(find(root, "3").subgraph, middle);
});

test("what leads nowhere is null", () => {
  for (const id of ["9", "3:9", "1:2", "3:2:7:1", "", ":", "3:", null, undefined, 3, {}]) assert.equal(find(root, id), null, String(id));
  for (const none of [null, undefined, {}]) assert.equal(find(none, "1"), null);
});

test("a graph that several nodes use has several beginnings", () => {
  assert.deepEqual(prefixes(root, root), [""]);
  assert.deepEqual(prefixes(root, middle), ["3:"]);
  assert.deepEqual(prefixes(root, inner), ["3:2:", "4:"]);
  assert.deepEqual(prefixes(root, graph()), []);
  assert.deepEqual(executionIds(root, inner, inner._nodes[0]), ["3:2:7", "4:7"]);
});

test("a graph that holds itself ends", () => {
  const loop = graph();
  loop._nodes.push({ id: 1, subgraph: loop });
  assert.ok(prefixes(loop, loop).length < 100);
});

test("an id in another graph is that of the node around it", () => {
  assert.equal(localId([""], "3:2:7"), "3");
  assert.equal(localId(["3:"], "3:2:7"), "2");
  assert.equal(localId(["3:2:", "4:"], "4:8"), "8");
  assert.equal(localId(["3:"], "4:8"), null);
  assert.equal(localId(["3:"], "33:8"), null, "3: is not the beginning of 33:");
  assert.equal(localId([""], null), null);
});

test("a subgraph is the sum of its nodes", () => {
  const rows = [row("1", 1), row("3:2:7", 2, 0.5, { peak: 5 }), row("3:5", 3, 0.25, { peak: 9 }), row("4:7", 10)];
  const top = rowsByNode([""], rows);
  assert.deepEqual([...top.keys()], ["1", "3", "4"]);
  assert.deepEqual([top.get("3").wall_s, top.get("3").moves_s, top.get("3").peak], [5, 0.75, 9]);
  assert.equal(rowsByNode(["3:2:", "4:"], rows).get("7").wall_s, 12, "both uses of the open subgraph");
  assert.equal(rowsByNode([], rows).size, 0);
});

test("a node and those that it made add up to what all of them took", () => {
  // The server leaves out of a node what ran while it was suspended.
  const rows = [row("5", 0.25, 0.0), row("5", 2.5, 1, { id: "5.0.1" }), row("5", 0.5, 0.25, { id: "5.0.2" })];
  const sums = rowsByNode([""], rows).get("5");
  assert.deepEqual([sums.wall_s, sums.moves_s], [3.25, 1.25]);
});

test("an unknown part leaves the sum unknown, a cached one costs nothing", () => {
  const cached = row("3:8", null, null, { cached: true });
  const sums = rowsByNode([""], [row("3:7", 2, 0.5), cached]).get("3");
  assert.deepEqual([sums.wall_s, sums.moves_s, sums.cached], [2, 0.5, false]);
  assert.equal(rowsByNode([""], [row("3:7", 2), row("3:8", null)]).get("3").wall_s, null);
  assert.equal(rowsByNode([""], [cached, cached]).get("3").cached, true);
});
