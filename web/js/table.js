/**
 * Invariant: what a cell shows is its exact number (data-value) rounded, with its unit; what is not known is n/a,
 * and sorts last whichever way it is sorted. Rows are changed in place, so that focus and selection survive the
 * next update.
 */
import { button, el, setAttr, setText, setValue } from "./dom.js";
import { bytes, count, delta, percent, seconds } from "./format.js";

/**
 * @typedef {object} Column
 * @property {string} key
 * @property {string} title
 * @property {"text" | "bytes" | "seconds" | "percent" | "count" | "delta"} kind delta: seconds, signed
 * @property {string} [kindKey] the row's field that says "seconds" or "bytes", where they differ from row to row
 * @property {string} [help] what the column means: its tooltip
 * @typedef {Record<string, unknown>} Row
 */

/** How many rows are made at once: a run has up to 2,000 steps. */
export const PAGE = 200;

/**
 * @param {object} options
 * @param {string} options.caption
 * @param {Column[]} options.columns
 * @param {string} [options.empty] shown where there is no row
 * @param {(row: Row) => void} [options.onSelect] a click on a row, or Enter on it
 * @returns {{element: HTMLElement, update: (rows: readonly Row[]) => void, destroy: () => void}}
 */
export function makeTable({ caption, columns, empty = "Nothing to show yet.", onSelect }) {
  const element = el("div", "bo-table-box");
  const scroller = el("div", "bo-table-scroll");
  // A region that scrolls has to be reached by the keyboard.
  scroller.tabIndex = 0;
  scroller.setAttribute("role", "region");
  scroller.setAttribute("aria-label", caption);
  const table = el("table", "bo-table");
  table.append(el("caption", "bo-caption", caption));
  const head = table.createTHead().insertRow();
  const body = table.createTBody();
  const none = el("p", "bo-muted bo-empty", empty);
  scroller.append(table);
  /** @type {{key: string, down: boolean} | null} */
  let order = null;
  /** @type {readonly Row[]} */
  let rows = [];
  let shown = PAGE;
  const more = button("", "", () => {
    shown += PAGE * 5;
    draw();
  });
  more.removeAttribute("aria-label");
  element.append(scroller, none, more);

  const arrows = columns.map((column) => {
    const cell = el("th", `bo-cell bo-${column.kind}`);
    cell.scope = "col";
    const sort = button("", "", () => {
      const first = column.kind !== "text";
      order = order?.key === column.key ? { key: column.key, down: !order.down } : { key: column.key, down: first };
      draw();
    });
    sort.className = "bo-sort";
    sort.removeAttribute("aria-label");
    if (column.help) sort.title = column.help;
    const arrow = el("span", "bo-arrow");
    arrow.setAttribute("aria-hidden", "true");
    sort.append(el("span", "", column.title), arrow);
    cell.append(sort);
    head.append(cell);
    return { cell, arrow, key: column.key };
  });

  const draw = () => {
    for (const { cell, arrow, key } of arrows) {
      const on = order?.key === key ? order : null;
      setAttr(cell, "aria-sort", on ? (on.down ? "descending" : "ascending") : null);
      setText(arrow, on ? (on.down ? "▼" : "▲") : "");
    }
    const sorted = sortRows(rows, columns, order).slice(0, shown);
    while (body.rows.length > sorted.length) body.deleteRow(-1);
    sorted.forEach((row, i) => fillRow(body.rows[i] ?? newRow(body, columns, onSelect), row, columns));
    none.hidden = rows.length > 0;
    scroller.hidden = rows.length === 0;
    more.hidden = rows.length <= shown;
    setText(more, more.hidden ? "" : `Show more (${shown} of ${rows.length})`);
  };

  /** @param {readonly Row[]} next */
  const update = (next) => {
    rows = Array.isArray(next) ? next.filter((row) => row && typeof row === "object") : [];
    draw();
  };
  update([]);
  return {
    element,
    update,
    destroy: () => {
      rows = [];
      element.replaceChildren();
    },
  };
}

/** Which data a row of the page shows now. @type {WeakMap<Element, Row>} */
const chosen = new WeakMap();

/**
 * @param {HTMLTableSectionElement} body
 * @param {Column[]} columns
 * @param {((row: Row) => void) | undefined} onSelect
 */
function newRow(body, columns, onSelect) {
  const row = body.insertRow();
  columns.forEach((column, i) => {
    const cell = el(i === 0 ? "th" : "td", `bo-cell bo-${column.kind}`);
    if (i === 0) cell.setAttribute("scope", "row");
    cell.dataset.figure = column.key;
    row.append(cell);
  });
  if (onSelect) {
    const act = () => {
      const data = chosen.get(row);
      if (data) onSelect(data);
    };
    row.classList.add("bo-pick");
    row.tabIndex = 0;
    row.addEventListener("click", act);
    row.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.target !== row) return;
      event.preventDefault();
      event.stopPropagation();
      act();
    });
  }
  return row;
}

/**
 * @param {HTMLTableRowElement} element
 * @param {Row} row
 * @param {Column[]} columns
 */
function fillRow(element, row, columns) {
  chosen.set(element, row);
  columns.forEach((column, i) => {
    const cell = /** @type {HTMLElement} */ (element.cells[i]);
    const value = row[column.key];
    setText(cell, cellText(value, kindOf(column, row)));
    setValue(cell, column.kind === "text" ? null : numberOf(value));
    if (column.kind === "text")
      setAttr(cell, "title", cell.textContent && cell.textContent.length > 24 ? cell.textContent : null);
  });
}

/** @param {Column} column @param {Row} row @returns {Column["kind"]} */
function kindOf({ kind, kindKey }, row) {
  const own = kindKey === undefined ? null : row[kindKey];
  return own === "bytes" || own === "seconds" ? own : kind;
}

/** @param {unknown} value */
function numberOf(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

/**
 * @param {unknown} value
 * @param {Column["kind"]} kind
 * @returns {string}
 */
export function cellText(value, kind) {
  if (kind === "text") {
    return typeof value === "string" && value
      ? value
      : typeof value === "number" && Number.isFinite(value)
        ? String(value)
        : "n/a";
  }
  const number = numberOf(value);
  switch (kind) {
    case "bytes":
      return bytes(number);
    case "seconds":
      return seconds(number);
    case "percent":
      return percent(number);
    case "delta":
      return delta(number);
    default:
      return count(number);
  }
}

/**
 * @param {readonly Row[]} rows
 * @param {Column[]} columns
 * @param {{key: string, down: boolean} | null} order null: as they came
 * @returns {Row[]} a new list; equal ones stay in their order, unknown ones are last
 */
export function sortRows(rows, columns, order) {
  const column = order && columns.find(({ key }) => key === order.key);
  if (!order || !column) return [...rows];
  const text = column.kind === "text";
  const of = (/** @type {Row} */ row) => {
    const value = row[order.key];
    return text ? (cellText(value, "text") === "n/a" ? null : cellText(value, "text")) : numberOf(value);
  };
  return rows
    .map((row) => ({ row, value: of(row) }))
    .sort((a, b) => {
      const units = [kindOf(column, a.row), kindOf(column, b.row)];
      if (units[0] !== units[1] && a.value !== null && b.value !== null) return units[0] < units[1] ? 1 : -1;
      if (a.value === null || b.value === null) return Number(a.value === null) - Number(b.value === null);
      const less =
        text || typeof a.value === "string" || typeof b.value === "string"
          ? String(a.value).localeCompare(String(b.value), "en", { numeric: true })
          : a.value - b.value;
      return order.down ? -less : less;
    })
    .map(({ row }) => row);
}
