/**
 * Invariant: two labels of a row never touch, none leaves the width, and a label stays over its mark; what does not fit
 * goes to the next row, and where no row has room it is left out (row -1), as its figure is written elsewhere too.
 */
import { clamp } from "./scale.js";

/** @typedef {{at: number, width: number}} Label at: the mark's place in pixels */
/** @typedef {{left: number, row: number}} Place */

const GAP = 8;

/**
 * @param {Label[]} labels the more important first
 * @param {number} width
 * @param {number} [rows]
 * @returns {Place[]} in the order of `labels`
 */
export function placeLabels(labels, width, rows = 2) {
  /** @type {Place[]} */
  const places = labels.map(() => ({ left: 0, row: -1 }));
  /** @type {number[][]} */
  const taken = Array.from({ length: rows }, () => []);
  labels.forEach((_, i) => {
    for (let row = 0; row < rows; row += 1) {
      const here = [...taken[row], i];
      const lefts = spread(
        here.map((n) => labels[n]),
        width,
      );
      if (!lefts) continue;
      taken[row] = here;
      here.forEach((n, k) => {
        places[n] = { left: lefts[k], row };
      });
      return;
    }
  });
  return places;
}

/**
 * @param {Label[]} labels of one row
 * @param {number} width
 * @returns {number[] | null} their left edges; null where one had to leave its mark
 */
function spread(labels, width) {
  const order = labels.map((_, i) => i).sort((a, b) => labels[a].at - labels[b].at || a - b);
  const lefts = labels.map((label) => clamp(label.at - label.width / 2, 0, width - label.width));
  let edge = -GAP;
  for (const i of order) {
    lefts[i] = Math.max(lefts[i], edge + GAP);
    edge = lefts[i] + labels[i].width;
  }
  edge = width + GAP;
  for (const i of order.slice().reverse()) {
    lefts[i] = Math.min(lefts[i], edge - GAP - labels[i].width);
    edge = lefts[i];
  }
  const fits = labels.every(
    (label, i) => lefts[i] >= 0 && lefts[i] <= label.at + GAP && lefts[i] + label.width >= label.at - GAP,
  );
  return fits ? lefts : null;
}
