/**
 * Invariant: what stands above a node is that node's own, of the run that is on or of the newest that ended, and is
 * drawn outside its box; whatever a graph, a run or a setting does meanwhile, nothing is thrown into the host's frame.
 *
 * The host draws its canvas at any time. What is drawn is worked out only when something changed; a frame only places
 * and paints it. Canvas and Nodes 2.0 both call us; there the nodes lie over the canvas, so that all of it is above them.
 */
import { el } from "./dom.js";
import { bare, bytes, seconds, unit } from "./format.js";
import { find, isHere, localId, prefixes, rowsByNode } from "./ids.js";
import { theme } from "./look.js";
import { nodeText } from "./model.js";
import { barOf } from "./scale.js";
import { drawLive, drawNotes, LEAST_ZOOM, place, seen, unitOf, unplaced, zoomOf } from "./strip.js";

/** @typedef {import("./types.d.ts").Host} Host */
/** @typedef {import("./types.d.ts").StoreLike} StoreLike */
/** @typedef {import("./types.d.ts").NodeRow} NodeRow */
/** @typedef {import("./types.d.ts").Telemetry} Telemetry */
/** @typedef {import("./strip.js").Placed} Placed */
/** @typedef {{node: any, texts: string[], bar: import("./scale.js").Bar | null, marks: string, box: Placed}} Item */

export const SETTING = "BalancedOffload.Overlay";
const TITLE_HEIGHT = 30;
const NO_TITLE = 1;
/** Between a node and its strip: room for the outline of a DOM node; in the canvas for the row of the host's badges. */
const GAP_DOM = 9;
const GAP_CANVAS = 26;
const COLLAPSED_WIDTH = 80;
/** What a DOM node takes at least, whatever its size says. */
const DOM_WIDTH = 225;
/** Milliseconds after which a plan, and the colours, are looked at again although nobody said that they changed. */
const RECHECK = 1000;

/**
 * Draws the strips of the open graph; called by the host in each frame, in graph coordinates.
 * @param {CanvasRenderingContext2D} ctx
 * @param {ArrayLike<number> | null | undefined} area what is seen: x, y, width, height
 * @param {Host} host
 * @param {StoreLike} store
 */
export function drawOverlay(ctx, area, host, store) {
  const state = stateOf(host, store);
  if (host.setting(SETTING) === false) return;
  const zoom = zoomOf(ctx, globalThis.devicePixelRatio);
  // Zooming goes in steps of 1.1: what is meant as 0.4 may be a little less.
  if (zoom < LEAST_ZOOM - 1e-3) return;
  const graph = host.openGraph();
  const items = planned(state, graph, host, store);
  if (!items.length) return;
  const now = performance.now();
  if (!state.theme || now - state.themed > RECHECK) {
    state.theme = theme((state.surface ??= makeSurface()));
    state.themed = now;
  }
  const vue = host.vue();
  const gap = vue ? GAP_DOM : GAP_CANVAS;
  const scale = unitOf(zoom);
  let notes = 0;
  for (const { node, texts, bar, marks, box } of items) {
    const { pos } = node;
    const x = pos?.[0];
    const y = pos?.[1];
    if (!Number.isFinite(x) || !Number.isFinite(y)) continue;
    const width = Math.max(widthOf(node), vue ? DOM_WIDTH : 0);
    place(box, texts, bar !== null, x, y - titleOf(node) - gap, width, zoom, state.theme.font);
    if (area && !seen(box, area)) continue;
    if (bar) drawLive(ctx, state.theme, box, scale, bar, marks);
    else state.notes[notes++] = box;
  }
  state.notes.length = notes;
  if (notes) drawNotes(ctx, state.theme, state.notes, scale);
}

/** An element that is never seen, on the surface on which all that is ours stands: a plate has the colours that it has. */
function makeSurface() {
  const surface = el("div", "bo-surface");
  surface.style.display = "none";
  surface.style.background = "var(--comfy-menu-bg, #202020)";
  document.body.append(surface);
  return surface;
}

/** @param {any} node */
function titleOf(node) {
  return (node.title_mode ?? node.constructor?.title_mode) === NO_TITLE ? 0 : TITLE_HEIGHT;
}

/** @param {any} node */
function widthOf(node) {
  const width = node.flags?.collapsed ? node._collapsed_width || COLLAPSED_WIDTH : node.size?.[0];
  return Number.isFinite(width) ? width : 0;
}

/**
 * @typedef {object} State
 * @property {boolean} stale
 * @property {any} graph
 * @property {number} count
 * @property {any} last
 * @property {number} made when the plan was made
 * @property {Item[]} items
 * @property {import("./look.js").Theme | null} theme
 * @property {number} themed
 * @property {HTMLElement | null} surface
 * @property {Placed[]} notes those that are seen in this frame
 */

/** @type {WeakMap<StoreLike, State>} */
const states = new WeakMap();

/**
 * @param {Host} host
 * @param {StoreLike} store
 * @returns {State}
 */
function stateOf(host, store) {
  const known = states.get(store);
  if (known) return known;
  /** @type {State} */
  const state = {
    ...{ stale: true, graph: null, count: -1, last: null, made: 0, items: [], theme: null, themed: 0 },
    ...{ surface: null, notes: [] },
  };
  states.set(store, state);
  const changed = () => {
    state.stale = true;
    if (host.setting(SETTING) !== false) host.redraw();
  };
  for (const kind of /** @type {const} */ (["live", "run", "runs"])) store.on(kind, changed);
  host.onSetting?.(SETTING, () => host.redraw());
  return state;
}

/**
 * The plan, made again when the store or the graph changed. A node that is gone is never drawn.
 * @param {State} state
 * @param {any} graph
 * @param {Host} host
 * @param {StoreLike} store
 */
function planned(state, graph, host, store) {
  const nodes = graph?._nodes ?? graph?.nodes ?? [];
  const now = performance.now();
  const same = state.graph === graph && state.count === nodes.length && state.last === nodes[nodes.length - 1];
  if (state.stale || !same || now - state.made > RECHECK) {
    state.stale = false;
    state.graph = graph;
    state.count = nodes.length;
    state.last = nodes[nodes.length - 1];
    state.made = now;
    state.items = planOf(host.rootGraph(), graph, store);
  }
  return state.items;
}

/**
 * What is to be drawn above which node of `graph`.
 * @param {any} root
 * @param {any} graph
 * @param {StoreLike} store
 * @returns {Item[]}
 */
export function planOf(root, graph, store) {
  if (!graph) return [];
  const starts = prefixes(root ?? graph, graph);
  const { running, live, sampled } = store;
  const from = root ?? graph;
  /** @type {Item[]} */
  const items = [];
  let busy = null;
  if (running) {
    busy = localId(starts, running.node);
    const node = busy === null ? null : find(graph, busy);
    const told = live && live.prompt_id === running.prompt_id;
    if (node && told && isHere(from, store)) items.push(liveItem(node, live, running.node));
  }
  // Nodes of a run of which there is no report yet: as far as their ends were told.
  const unreported = sampled !== null && store.ended.length > 0 && !store.row(sampled);
  const early = running ? running.prompt_id === sampled : unreported;
  const told = early ? store.ended : running ? [] : (store.runs[0]?.nodes ?? []);
  const rows = told.filter((row) => fits(find(from, row.display), row));
  for (const [id, row] of rowsByNode(starts, rows)) {
    const text = id === busy ? "" : nodeText(row);
    const node = text ? find(graph, id) : null;
    if (node) items.push({ node, texts: notes(text), bar: null, marks: "", box: unplaced() });
  }
  return items;
}

/**
 * Whether a row can be of this node: another workflow may have another node under the same id. A row of a node that was
 * made while the prompt ran has the type of that one, and is shown at the one that made it.
 * @param {any} node
 * @param {NodeRow} row
 */
function fits(node, row) {
  if (!node) return false;
  const type = node.comfyClass ?? node.type;
  return row.id !== row.display || !row.type || !type || type === row.type;
}

/**
 * @param {any} node
 * @param {Telemetry} live
 * @param {string | null} running
 * @returns {Item}
 */
function liveItem(node, live, running) {
  const bar = barOf(live.vram);
  // Between two nodes the last step is still the one of the node before.
  const step = live.node === running && live.step !== null;
  const texts = liveTexts(bar.used, live.vram.peak, step ? { ms: live.stall_ms } : null);
  return { node, bar, marks: marksText(live.vram), texts, box: unplaced() };
}

/**
 * "▼ high 12.0 GiB  ▲ low 4.0 GiB", with the glyphs that the bar has at them; what there is none of is left out.
 * @param {import("./types.d.ts").Vram} vram
 */
function marksText({ high, low }) {
  const parts = [high === null ? "" : `▼ high ${bytes(high)}`, low === null ? "" : `▲ low ${bytes(low)}`];
  return parts.filter(Boolean).join("  ");
}

/**
 * "VRAM 9.8 GiB, peak 11.2, step moves 83.0 ms", and shorter ones for where there is less room.
 * @param {number | null} used
 * @param {number | null} peak
 * @param {{ms: number | null} | null} step
 * @returns {string[]} longest first
 */
export function liveTexts(used, peak, step) {
  const now = bytes(used);
  const top = used === null ? bytes(peak) : bare(peak, unit(used));
  const moves = step ? seconds(step.ms === null ? null : step.ms / 1e3) : null;
  const texts = [`VRAM ${now}, peak ${top}`, `${now}, peak ${top}`, now];
  return moves === null ? texts : [`VRAM ${now}, peak ${top}, step moves ${moves}`, `${now}, peak ${top}, moves ${moves}`, ...texts];
}

/**
 * "12.4 s, moves 1.5 s, peak 9.8 GiB", then without the peak, then the moves alone, as it is they that are shown.
 * @param {string} text
 * @returns {string[]}
 */
function notes(text) {
  const parts = text.split(", ");
  const moves = parts.find((part) => part.startsWith("moves"));
  return parts.length < 3 || !moves ? [text] : [text, parts.slice(0, 2).join(", "), moves];
}
