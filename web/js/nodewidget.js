/**
 * Invariant: what we put on a node lives as long as the node is in a graph and leaves nothing behind: neither in the
 * workflow, nor in the prompt, nor a listener or an observer; and the node is never smaller than what is written on it.
 */
import { el } from "./dom.js";
import { dress } from "./dress.js";

/** @typedef {import("./types.d.ts").Host} Host */
/**
 * @typedef {object} Place
 * @property {HTMLElement} top what has its natural height
 * @property {HTMLElement} rest what takes the rest of the node
 */

/** What the canvas keeps free around a DOM widget, above and below together. */
const MARGIN = 20;
const GAP = 6;
const PADDING = 8;

/**
 * Runs `after` whenever the node's own callback `name` ran, and hands back what that one returned.
 * @param {any} object
 * @param {string} name
 * @param {(...args: any[]) => void} after
 */
export function chain(object, name, after) {
  const before = object[name];
  object[name] = /** @this {any} @param {any[]} args */ function (...args) {
    const answer = before?.apply(this, args);
    after.apply(this, args);
    return answer;
  };
}

/**
 * Puts a DOM widget on a node. `mount` fills it when the node enters a graph; what it returns undoes that.
 * @param {any} node
 * @param {Host} host
 * @param {object} options
 * @param {string} options.name
 * @param {string} options.label
 * @param {number} options.height what it takes before it was measured
 * @param {number} [options.width] of a new node at least; one that is loaded keeps its own
 * @param {number} [options.rest] the least height of what takes the rest, 0 for none
 * @param {(place: Place) => () => void} options.mount
 * @returns {HTMLElement | null} its element; null where this front end has no DOM widgets
 */
export function attachWidget(node, host, { name, label, height, width = 0, rest = 0, mount }) {
  const root = el("div", `bo-node bo-node-${name}`);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", label);
  // The colours and small things are in offload.css; what keeps texts from lying over each other is not left to a file.
  Object.assign(root.style, {
    ...{ display: "flex", flexDirection: "column", gap: `${GAP}px`, boxSizing: "border-box" },
    ...{ minWidth: "0", padding: `${PADDING}px`, overflow: "hidden", borderRadius: "6px" },
  });
  const sizes = { minHeight: height + MARGIN };
  const widget = host.addWidget(node, `balanced_offload_${name}`, root, sizes);
  if (!widget) return null;
  if (widget.options) widget.options.getMinHeight = () => sizes.minHeight;
  if (node.size?.[0] < width) node.setSize?.([width, node.size[1]]);
  chain(node, "onSerialize", (kept) => keepClean(node, kept));
  followGraph(node, () => fill(node, host, root, sizes, rest, mount));
  return root;
}

/**
 * A node whose only widgets are ours is written as if it had none.
 * @param {any} node
 * @param {any} kept
 */
function keepClean(node, kept) {
  if (node.widgets?.some((/** @type {any} */ widget) => widget.serialize !== false)) return;
  if (Array.isArray(kept?.widgets_values) && !kept.widgets_values.length) {
    delete kept.widgets_values;
    delete kept.widgets_values_named;
  }
}

/**
 * @param {any} node
 * @param {() => () => void} enter
 */
function followGraph(node, enter) {
  /** @type {(() => void) | null} */
  let leave = null;
  const come = () => {
    leave ??= enter();
  };
  chain(node, "onAdded", come);
  chain(node, "onRemoved", () => {
    leave?.();
    leave = null;
  });
  if (node.graph) come();
}

/**
 * @param {any} node
 * @param {Host} host
 * @param {HTMLElement} root
 * @param {{minHeight: number}} sizes
 * @param {number} least
 * @param {(place: Place) => () => void} mount
 */
function fill(node, host, root, sizes, least, mount) {
  const top = el("div", "bo-node-top");
  const rest = el("div", "bo-node-rest");
  Object.assign(top.style, { display: "flex", flexDirection: "column", gap: `${GAP}px`, flex: "none", minWidth: "0" });
  Object.assign(rest.style, { display: "flex", flexDirection: "column", flex: "1 1 0px" });
  root.replaceChildren(top, rest);
  const look = dress(root);
  const unmount = mount({ top, rest });
  const measure = () => {
    // Not shown: nothing is known, and what was measured last stays.
    if (!top.offsetHeight) return;
    const below = rest.hidden || !rest.childElementCount ? 0 : least;
    rest.style.minHeight = `${below}px`;
    look.refresh();
    const needed = top.offsetHeight + (below ? below + GAP : 0) + 2 * PADDING;
    if (needed + MARGIN === sizes.minHeight) return;
    sizes.minHeight = needed + MARGIN;
    grow(node, host);
  };
  const observer = new ResizeObserver(measure);
  observer.observe(top);
  return () => {
    observer.disconnect();
    look.off();
    unmount();
    root.replaceChildren();
  };
}

/**
 * In the canvas a node takes its height from us; a node that is DOM itself sees its own content.
 * @param {any} node
 * @param {Host} host
 */
function grow(node, host) {
  if (host.vue() || node.flags?.collapsed) return;
  const least = node.computeSize?.()[1];
  if (typeof least === "number" && least > node.size[1]) node.setSize?.([node.size[0], least]);
  node.setDirtyCanvas?.(true, true);
}
