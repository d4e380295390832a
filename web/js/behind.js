/**
 * Invariant: behind every canvas lies a real table of the same figures. It is made when somebody opens it, and
 * follows at most once a second: nobody pays for a table that nobody reads.
 */
import { el } from "./dom.js";
import { makeTable } from "./table.js";

/** @typedef {import("./table.js").Column} Column */
/** @typedef {import("./table.js").Row} Row */

const EVERY_MS = 1000;

/**
 * @param {object} options
 * @param {string} options.caption
 * @param {Column[]} options.columns
 * @param {() => Row[]} options.rows asked for when they are shown
 * @param {boolean} [options.unseen] for a place without room: only read aloud, and then the first rows alone
 * @returns {{element: HTMLElement, update: () => void, destroy: () => void}}
 */
export function makeBehind({ caption, columns, rows, unseen = false }) {
  const table = makeTable({ caption, columns });
  let timer = 0;
  let last = -Infinity;
  const open = () => unseen || /** @type {HTMLDetailsElement} */ (element).open;
  const show = () => {
    timer = 0;
    if (!open()) return;
    last = performance.now();
    const all = rows();
    table.update(unseen ? all.slice(-20) : all);
  };
  const update = () => {
    if (timer || !open()) return;
    timer = window.setTimeout(show, Math.max(0, last + EVERY_MS - performance.now()));
  };
  const element = unseen ? el("div", "bo-hidden") : el("details", "bo-behind");
  if (unseen) {
    // Not to be seen, so nothing in it may take the focus.
    element.append(table.element);
    for (const part of element.querySelectorAll("button, [tabindex]")) part.setAttribute("tabindex", "-1");
  } else {
    const summary = el("summary", "bo-summary", "as a table");
    element.append(summary, table.element);
    element.addEventListener("toggle", show);
  }
  return {
    element,
    update,
    destroy: () => {
      window.clearTimeout(timer);
      table.destroy();
    },
  };
}
