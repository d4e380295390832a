/**
 * Invariant: a column's height is the step's time, compute and stall on top of each other; copies that ran behind
 * compute cost nothing and add no height. Where a pixel has several steps it shows the slowest of them, and says
 * so.
 */
import { makeBehind } from "./behind.js";
import { attachControl } from "./control.js";
import { el, setAttr, setText } from "./dom.js";
import { bytes, seconds } from "./format.js";
import { makeLegend } from "./legend.js";
import { PARTS } from "./look.js";
import { fillBox, line, shorten, textWidth, write } from "./paint.js";
import { clamp, roundStep, ticks, View } from "./scale.js";
import { bucketsOf, cleanSteps, groupsOf, sumOf } from "./steps.js";
import { makeSurface } from "./surface.js";

/** @typedef {import("./types.d.ts").Step} Step */
/** @typedef {import("./steps.js").CleanStep} CleanStep */

const TOP = 16;
const BOTTOM = 17;
const LEAST_COLUMN = 3;
const WIDEST = 60;

/**
 * Per-step bars: compute | stall | copies behind compute.
 * @param {object} options
 * @param {string} options.label
 * @param {(step: Step) => void} [options.onSelect] Enter, or a click on a column
 * @param {number} [options.height]
 * @param {boolean} [options.compact] on a node: no legend, no zoom, the table is only read aloud
 * @returns {{element: HTMLElement, update: (steps: readonly Step[]) => void, destroy: () => void}}
 */
export function makeSteps({ label, onSelect, height = 120, compact = false }) {
  const element = el("div", "bo-steps");
  /** @type {CleanStep[]} */
  let steps = [];
  const view = new View(1);
  /** @type {number | null} */
  let chosen = null;
  /** @type {number | null} */
  let hovered = null;
  let left = 0;
  /** How many steps share a column of pixels. */
  let packed = 1;

  const surface = makeSurface({
    root: element,
    label,
    height,
    draw: (ctx, box) => {
      left = axisWidth(steps, view, box, compact);
      const shared = draw(ctx, box, { steps, view, left, chosen: hovered ?? chosen });
      if (shared === packed) return;
      packed = shared;
      tell();
    },
  });
  const readout = el("p", "bo-readout");
  const behind = makeBehind({
    caption: `${label}, as a table`,
    columns: COLUMNS,
    rows: () => steps.map(rowOf),
    unseen: compact,
  });
  const legend = makeLegend("What the columns show");
  if (!compact) {
    legend.update(
      ["compute", "stall", "overlapped"].map((key) => ({ key, title: PARTS[key].title, fill: PARTS[key].fill })),
    );
    element.append(surface.canvas, readout, legend.element, behind.element);
  } else element.append(surface.canvas, readout, behind.element);

  const tell = () => {
    const at = hovered ?? chosen;
    const note = packed > 1 ? `; each column is the slowest of ${packed}` : "";
    setText(readout, at !== null ? stepText(steps[at]) : steps.length ? `${summary(steps, compact)}${note}` : "");
  };
  const say = () => {
    tell();
    surface.redraw();
  };
  const plot = () => ({ left, width: surface.width() - left });
  const stepAt = (/** @type {number} */ x) => {
    const { width } = plot();
    if (x < left || width <= 0 || !steps.length) return null;
    const share = (x - left) / width;
    const bucket = bucketsOf(steps, view, width, LEAST_COLUMN).find((one) => share >= one.from && share < one.to);
    return bucket ? bucket.worst : null;
  };
  const choose = (/** @type {number | null} */ next) => {
    setAttr(readout, "aria-live", next === null ? null : "polite");
    chosen = next;
    hovered = null;
    if (next !== null && view.zoomed) {
      if (next < view.from) view.pan((next - view.from) / (view.to - view.from));
      if (next + 1 > view.to) view.pan((next + 1 - view.to) / (view.to - view.from));
    }
    say();
  };
  const key = (/** @type {string} */ name) => {
    const goes = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[name];
    if (goes !== undefined && steps.length) {
      const from = chosen ?? (goes > 0 && Number.isFinite(goes) ? -1 : steps.length);
      choose(clamp(from + goes, 0, steps.length - 1));
      return true;
    }
    if (name === "Escape" && chosen !== null) {
      choose(null);
      return true;
    }
    if (name !== "Enter" || chosen === null || !onSelect) return false;
    onSelect(steps[chosen].step);
    return true;
  };
  const detach = attachControl({
    canvas: surface.canvas,
    view,
    plot,
    changed: say,
    hover: (x) => {
      const at = x === null ? null : stepAt(x);
      if (at === hovered) return;
      setAttr(readout, "aria-live", null);
      hovered = at;
      say();
    },
    pick: (x) => {
      const at = stepAt(x);
      choose(at);
      if (at !== null) onSelect?.(steps[at].step);
    },
    key,
    fixed: compact,
  });

  /** @param {readonly Step[]} next */
  const update = (next) => {
    steps = cleanSteps(next);
    view.most = Math.max(1, steps.length / 4);
    view.extend(steps.length);
    if (chosen !== null && chosen >= steps.length) chosen = null;
    if (hovered !== null && hovered >= steps.length) hovered = null;
    setAttr(surface.canvas, "aria-label", `${label}: ${summary(steps, false)}`);
    behind.update();
    say();
  };
  update([]);
  return {
    element,
    update,
    destroy: () => {
      detach();
      behind.destroy();
      surface.destroy();
    },
  };
}

/** @type {import("./table.js").Column[]} */
const COLUMNS = [
  { key: "name", title: "Step", kind: "text" },
  { key: "node", title: "Node", kind: "text" },
  { key: "compute_s", title: "Compute", kind: "seconds" },
  { key: "stall_s", title: "Stall", kind: "seconds", help: "Compute waited for a copy" },
  { key: "overlapped_s", title: "Behind compute", kind: "seconds", help: "Copies that ran while the device computed" },
  { key: "bytes_h2d", title: "Moved to VRAM", kind: "bytes" },
];

/** @param {CleanStep} step */
function rowOf(step) {
  return { ...step.each, name: step.name, node: step.node, bytes_h2d: step.each.bytes };
}

/**
 * @param {CleanStep} step
 * @returns {string}
 */
export function stepText(step) {
  const { compute_s, stall_s, overlapped_s, bytes: moved } = step.each;
  const many = step.count > 1 ? ", each on average" : "";
  const node = step.node === null ? "" : `, node ${step.node}`;
  const word = step.count > 1 ? "steps" : "step";
  return (
    `${word} ${step.name}${node}${many}: compute ${seconds(compute_s)}, stall ${seconds(stall_s)}, ` +
    `copies behind compute ${seconds(overlapped_s)}, moved ${bytes(moved)}`
  );
}

/**
 * @param {CleanStep[]} steps
 * @param {boolean} brief
 * @returns {string}
 */
function summary(steps, brief) {
  if (!steps.length) return "no steps yet";
  const count = steps.reduce((all, step) => all + step.count, 0);
  const wall = steps.reduce(
    (/** @type {number | null} */ top, step) => (step.wall === null ? top : Math.max(top ?? 0, step.wall)),
    null,
  );
  const begin = `${count} ${count === 1 ? "step" : "steps"}, slowest ${seconds(wall)}`;
  if (brief) return `${begin}, stall ${seconds(sumOf(steps, "stall_s"))}, moved ${bytes(sumOf(steps, "bytes"))}`;
  return (
    `${begin}: compute ${seconds(sumOf(steps, "compute_s"))}, stall ` +
    `${seconds(sumOf(steps, "stall_s"))}, copies behind compute ${seconds(sumOf(steps, "overlapped_s"))}, moved ` +
    `${bytes(sumOf(steps, "bytes"))}`
  );
}

/**
 * @param {CleanStep[]} steps
 * @param {View} view
 * @returns {number} the slowest step in the window
 */
function slowest(steps, view) {
  const seen = steps.slice(Math.floor(view.from), Math.ceil(view.to));
  return seen.reduce((top, step) => Math.max(top, step.wall ?? 0, step.each.overlapped_s ?? 0), 0);
}

/**
 * @param {CleanStep[]} steps
 * @param {View} view
 * @param {import("./surface.js").Box} box
 * @param {boolean} compact
 */
function axisWidth(steps, view, { width, theme }, compact) {
  if (compact || width < 320) return 0;
  const top = slowest(steps, view);
  return Math.max(...[0, ...ticks(top, 4)].map((tick) => textWidth(seconds(tick), theme.font))) + 10;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {import("./surface.js").Box} box
 * @param {{steps: CleanStep[], view: View, left: number, chosen: number | null}} state
 * @returns {number} how many steps share a column
 */
function draw(ctx, { width, height, theme }, { steps, view, left, chosen }) {
  const bottom = height - BOTTOM;
  const top = slowest(steps, view);
  const room = bottom - TOP;
  const share = width - left;
  const y = (/** @type {number} */ time) => (top > 0 ? (time / top) * room : 0);
  const marks = ticks(top, 4);
  if (!steps.length) {
    write(ctx, "no steps yet", width / 2, height / 2, theme, { align: "center", color: theme.muted, halo: false });
    return 1;
  }
  ctx.lineWidth = 1;
  ctx.strokeStyle = theme.grid;
  for (const tick of left ? marks : [])
    line(ctx, left, Math.round(bottom - y(tick)) + 0.5, width, Math.round(bottom - y(tick)) + 0.5);
  const buckets = bucketsOf(steps, view, share, LEAST_COLUMN);
  for (const bucket of buckets) {
    const x0 = left + bucket.from * share;
    const full = (bucket.to - bucket.from) * share;
    const gap = full > 6 ? Math.min(4, full * 0.15) : full > 3 ? 1 : 0;
    const wide = Math.min(full - gap, WIDEST);
    column(ctx, steps[bucket.worst], { x: x0 + (full - wide) / 2, width: wide, bottom, y, theme });
    if (chosen !== null && chosen >= bucket.first && chosen <= bucket.last) {
      ctx.strokeStyle = theme.text;
      ctx.lineWidth = 2;
      ctx.strokeRect(x0 + (full - wide) / 2 - 1, TOP - 2, wide + 2, bottom - TOP + 3);
    }
  }
  ctx.strokeStyle = theme.border;
  ctx.lineWidth = 1;
  line(ctx, left, bottom + 0.5, width, bottom + 0.5);
  if (left)
    for (const tick of [0, ...marks])
      write(ctx, tick ? seconds(tick) : "0", left - 6, Math.max(6, bottom - y(tick)), theme, {
        align: "right",
        color: theme.muted,
        halo: false,
      });
  names(ctx, { width, height, theme }, { steps, view, left });
  return Math.max(...buckets.map((bucket) => bucket.last - bucket.first + 1));
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {CleanStep} step
 * @param {{x: number, width: number, bottom: number, y: (time: number) => number, theme: import("./look.js").Theme}} at
 */
function column(ctx, step, { x, width, bottom, y, theme }) {
  const { compute_s, stall_s, overlapped_s } = step.each;
  if (step.wall === null) {
    fillBox(ctx, "unknown", theme.muted, theme.bg, x, bottom - 8, width, 8);
    return;
  }
  const compute = y(compute_s ?? 0);
  const stall = y(stall_s ?? 0);
  fillBox(ctx, "solid", theme.compute, theme.bg, x, bottom - compute, width, compute);
  const behind = Math.min(y(overlapped_s ?? 0), compute + stall);
  if (behind > 0.5) fillBox(ctx, "hatch", theme.compute, theme.bg, x, bottom - behind, width, behind);
  if (stall > 0) fillBox(ctx, "dotted", theme.text, theme.bg, x, bottom - compute - stall, width, Math.max(1, stall));
}

/**
 * Step numbers below, the node of each group above, a thin line between two nodes.
 * @param {CanvasRenderingContext2D} ctx
 * @param {import("./surface.js").Box} box
 * @param {{steps: CleanStep[], view: View, left: number}} state
 */
function names(ctx, { width, height, theme }, { steps, view, left }) {
  const share = width - left;
  const xOf = (/** @type {number} */ index) => left + view.at(index) * share;
  ctx.strokeStyle = theme.border;
  ctx.lineWidth = 1;
  let edge = left - 8;
  for (const group of groupsOf(steps)) {
    const from = Math.max(left, xOf(group.from));
    const to = Math.min(width, xOf(group.to));
    if (to - from < 4) continue;
    if (group.from > view.from) line(ctx, Math.round(from) + 0.5, 2, Math.round(from) + 0.5, height - BOTTOM);
    const name = shorten(group.node === null ? "" : `node ${group.node}`, to - from - 8, theme.font);
    write(ctx, name, from + 4, 7, theme, { color: theme.muted });
    const each = roundStep((textWidth(steps[group.to - 1].name, theme.font) + 10) / (xOf(1) - xOf(0)), 10);
    for (let i = Math.max(group.from, Math.floor(view.from)); i < Math.min(group.to, view.to); i += 1) {
      const past = i - group.from;
      if (past && ((past + 1) % Math.max(1, each) || past < each * 0.7)) continue;
      const size = textWidth(steps[i].name, theme.font);
      const middle = clamp(xOf(i + 0.5), left + size / 2, width - size / 2);
      if (middle - size / 2 < edge + 8) continue;
      write(ctx, steps[i].name, middle, height - 7, theme, { align: "center", color: theme.muted, halo: false });
      edge = middle + size / 2;
    }
  }
}
