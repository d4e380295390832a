// Invariant: a cell shows its number with its unit, and what is not known is n/a and sorts last either way.
import assert from "node:assert/strict";
import { test } from "node:test";
import { cellText, sortRows } from "../../../web/js/table.js";

const COLUMNS = [
  { key: "name", title: "Name", kind: "text" },
  { key: "bytes", title: "Bytes", kind: "bytes" },
];
const ROWS = [
  { name: "b", bytes: 5 },
  { name: "node 10", bytes: null },
  { name: "node 9", bytes: 50 },
  { name: "a", bytes: 5 },
];
const names = (rows) => rows.map(({ name }) => name);

test("a column whose unit differs from row to row is sorted by unit, then by its numbers", () => {
  const columns = [{ key: "figure", title: "Figure", kind: "seconds", kindKey: "unit" }];
  const rows = [[5, "bytes"], [9, "seconds"], [null, "seconds"], [7, "bytes"], [8, "of what"]].map(([figure, unit]) => ({ figure, unit }));
  const sorted = (down) => sortRows(rows, columns, { key: "figure", down }).map(({ figure }) => figure);
  assert.deepEqual(sorted(true), [9, 8, 7, 5, null]);
  assert.deepEqual(sorted(false), [8, 9, 5, 7, null]);
});

test("cells have units and never say what is no number", () => {
  assert.equal(cellText(9.8 * 2 ** 30, "bytes"), "9.8 GiB");
  assert.equal(cellText(0.0831, "seconds"), "83.1 ms");
  assert.equal(cellText(0.63, "percent"), "63 %");
  assert.equal(cellText(2000, "count"), "2,000");
  assert.equal(cellText(0.31, "delta"), "+310.0 ms");
  assert.equal(cellText("<b>unet</b>", "text"), "<b>unet</b>");
  assert.equal(cellText(7, "text"), "7");
  for (const kind of ["bytes", "seconds", "percent", "count", "delta", "text"]) {
    for (const odd of [null, undefined, NaN, Infinity, {}, [], ""]) assert.equal(cellText(odd, kind), "n/a", `${kind} ${odd}`);
  }
  for (const kind of ["bytes", "seconds", "percent", "count", "delta"]) assert.equal(cellText("5", kind), "n/a");
});

test("sorted by the exact number, equal ones in their order, unknown ones last", () => {
  assert.deepEqual(names(sortRows(ROWS, COLUMNS, { key: "bytes", down: true })), ["node 9", "b", "a", "node 10"]);
  assert.deepEqual(names(sortRows(ROWS, COLUMNS, { key: "bytes", down: false })), ["b", "a", "node 9", "node 10"]);
});

test("text is sorted as people count", () => {
  assert.deepEqual(names(sortRows(ROWS, COLUMNS, { key: "name", down: false })), ["a", "b", "node 9", "node 10"]);
  assert.deepEqual(names(sortRows([...ROWS, { name: null }], COLUMNS, { key: "name", down: true })).slice(-1), [null]);
});

test("without an order, or by a column that is not there, rows stay as they came", () => {
  assert.deepEqual(sortRows(ROWS, COLUMNS, null), ROWS);
  assert.deepEqual(sortRows(ROWS, COLUMNS, { key: "x", down: true }), ROWS);
  assert.notEqual(sortRows(ROWS, COLUMNS, null), ROWS);
});
