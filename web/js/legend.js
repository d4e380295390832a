/**
 * Invariant: what a pattern means is written beside it, with the same colour and the same pattern.
 */
import { el, setText, setValue } from "./dom.js";

/** @typedef {import("./look.js").Fill} Fill */

/**
 * @typedef {object} LegendItem
 * @property {string} key
 * @property {string} title
 * @property {string} [short] where it is narrow
 * @property {Fill | "high" | "low" | "peak" | "line" | "evict" | "oom"} fill
 * @property {string} [color] a CSS colour; else --bo-<key>
 * @property {string} [figure] shown after the title
 * @property {number | null} [value] the exact number of the figure
 */

/**
 * @param {string} label read aloud before the list
 * @returns {{element: HTMLElement, update: (items: LegendItem[]) => void}}
 */
export function makeLegend(label) {
  const element = el("ul", "bo-legend");
  element.setAttribute("aria-label", label);
  let shape = "";

  /** @param {LegendItem[]} items */
  const update = (items) => {
    const next = JSON.stringify(items.map(({ key, fill, color, title }) => [key, fill, color, title]));
    if (next !== shape) {
      shape = next;
      element.replaceChildren(...items.map(itemOf));
    }
    items.forEach((item, i) => {
      const figure = /** @type {HTMLElement | null} */ (element.children[i].querySelector(".bo-num"));
      if (!figure) return;
      setText(figure, item.figure ?? "");
      setValue(figure, item.value ?? null);
    });
  };
  return { element, update };
}

/** @param {LegendItem} item */
function itemOf(item) {
  const row = el("li", "bo-legend-item");
  row.dataset.key = item.key;
  const swatch = el("span", `bo-swatch bo-fill-${item.fill}`);
  swatch.setAttribute("aria-hidden", "true");
  swatch.style.setProperty("--bo-ink", item.color ?? `var(--bo-${item.key}, var(--bo-muted))`);
  const title = el("span", item.short ? "bo-long" : "", item.title);
  row.append(swatch, title);
  if (item.short) row.append(el("span", "bo-short", item.short));
  if (item.figure !== undefined) {
    const figure = el("span", "bo-num");
    figure.dataset.figure = item.key;
    row.append(figure);
  }
  return row;
}
