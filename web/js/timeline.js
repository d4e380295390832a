/**
 * Invariant: what is in the picture is also in the text below it and in the table behind it; zoom and pan never
 * change the figures, only which of them are seen.
 */
import { makeBehind } from "./behind.js";
import { attachControl } from "./control.js";
import { button, el, setAttr, setText } from "./dom.js";
import { bytes, seconds } from "./format.js";
import { makeLegend } from "./legend.js";
import { componentLook, PARTS } from "./look.js";
import { View, clamp, monotone } from "./scale.js";
import { cleanModel, momentAt, stackOf } from "./stack.js";
import { makeSurface } from "./surface.js";
import { drawTimeline, extentOf, frameOf } from "./timepaint.js";

/** @typedef {import("./types.d.ts").TimelineModel} Model */
/** @typedef {import("./timemarks.js").TimeEvent} TimeEvent */

/**
 * VRAM by component over the run, with the marks, the stages and the evictions.
 * @param {{label: string, height?: number}} options
 * @returns {{element: HTMLElement, update: (model: Model | null) => void, destroy: () => void}}
 */
export function makeTimeline({ label, height = 220 }) {
  const element = el("div", "bo-timeline");
  let raw = /** @type {any} */ (null);
  let stack = stackOf(null);
  let model = cleanModel(null, stack);
  /** @type {TimeEvent[]} */
  let events = [];
  /** @type {import("./timemarks.js").Spot[]} */
  let spots = [];
  const view = new View();
  /** @type {number | null} */
  let cursor = null;
  /** @type {number | null} */
  let walked = null;

  const surface = makeSurface({
    root: element,
    label,
    height,
    draw: (ctx, box) => {
      spots = drawTimeline(ctx, box, { model, stack, events, view, cursor });
      recolor();
    },
  });
  const bar = el("div", "bo-tools");
  const readout = el("p", "bo-readout");
  const legend = makeLegend("What the picture shows");
  const behind = makeBehind({ caption: `${label}, as a table`, columns: COLUMNS, rows: () => rowsOf(raw, events) });
  const plot = () => {
    const frame = frameOf(surface.width(), height, surface.theme(), extentOf(model, stack));
    return { left: frame.left, width: frame.width };
  };
  const zoom = (/** @type {number} */ factor) => {
    view.zoom(factor);
    changed();
  };
  const less = button("−", "Zoom out", () => zoom(1 / 1.5));
  const closer = button("+", "Zoom in", () => zoom(1.5));
  const all = button("All", "All of the run", () => {
    view.reset();
    changed();
  });
  bar.append(less, closer, all);
  const head = el("div", "bo-head");
  head.append(el("span", "bo-title", label), bar);
  element.append(head, surface.canvas, readout, legend.element, behind.element);

  let colors = "";
  /** The legend wears the colours that the picture was drawn with. */
  const recolor = () => {
    const theme = surface.theme();
    const key = `${theme.components.join()} ${stack.names.join("\n")} ${events.length} ${model.high} ${model.low}`;
    if (key === colors) return;
    colors = key;
    legend.update(legendOf(stack, model, events, theme));
  };
  const say = (/** @type {string} */ text, /** @type {boolean} */ aloud) => {
    setAttr(readout, "aria-live", aloud ? "polite" : null);
    setText(readout, text);
  };
  const changed = () => {
    less.disabled = all.disabled = !view.zoomed;
    if (cursor === null) say(summary(model, stack, events, view), false);
    surface.redraw();
  };
  const clear = () => {
    cursor = walked = null;
    changed();
  };
  const walk = (/** @type {number} */ by) => {
    if (!events.length) return;
    walked = clamp((walked ?? (by > 0 ? -1 : events.length)) + by, 0, events.length - 1);
    const event = events[walked];
    cursor = event.t;
    if (view.at(cursor) < 0 || view.at(cursor) > 1) view.pan(view.at(cursor) - 0.5);
    say(`${seconds(event.t)}: ${event.text}; ${heldText(stack, event.t)}`, true);
    surface.redraw();
  };
  /** @type {Record<string, () => void>} */
  const keys = {
    ArrowLeft: () => view.pan(-0.15),
    ArrowRight: () => view.pan(0.15),
    Home: () => view.pan(-Infinity),
    End: () => view.pan(Infinity),
  };
  const detach = attachControl({
    canvas: surface.canvas,
    view,
    plot,
    changed,
    hover: (x) => {
      if (x === null) return walked === null ? clear() : undefined;
      walked = null;
      const { left, width } = plot();
      cursor = clamp(view.from + ((x - left) / Math.max(1, width)) * (view.to - view.from), 0, model.end);
      const near = spots.find((spot) => Math.abs(spot.x - x) <= 12);
      const what = near ? `${near.events.map((event) => event.text).join("; ")}; ` : "";
      say(`${seconds(cursor)}: ${what}${heldText(stack, cursor)}`, false);
      surface.redraw();
    },
    key: (key) => {
      if (key === "ArrowDown" || key === "ArrowUp") walk(key === "ArrowDown" ? 1 : -1);
      else if (key === "Escape" && cursor !== null) clear();
      else if (keys[key]) {
        keys[key]();
        changed();
      } else return false;
      return true;
    },
  });

  /** @param {Model | null} next */
  const update = (next) => {
    raw = next;
    stack = stackOf(next);
    model = cleanModel(next, stack);
    events = eventsOf(model);
    view.extend(model.end);
    if (walked !== null && walked >= events.length) cursor = walked = null;
    setAttr(
      surface.canvas,
      "aria-label",
      `${label}: ${summary(model, stack, events, null) || "nothing recorded yet"}. ${HELP}`,
    );
    behind.update();
    changed();
  };
  update(null);
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

const HELP = "Up and down go from event to event, plus and minus zoom, left and right move, 0 shows all.";

/** @type {import("./table.js").Column[]} */
const COLUMNS = [
  { key: "t", title: "At", kind: "seconds" },
  { key: "what", title: "What", kind: "text" },
  { key: "bytes", title: "Bytes", kind: "bytes" },
  { key: "note", title: "Note", kind: "text" },
];

/**
 * @param {import("./stack.js").TimelineModel} model
 * @returns {TimeEvent[]}
 */
function eventsOf(model) {
  /** @type {TimeEvent[]} */
  const events = [
    ...model.stages.map(({ t0, t1, name, component }) => ({
      t: t0,
      kind: /** @type {const} */ ("stage"),
      text: `${stageName(name, component)} begins, takes ${seconds(t1 - t0)}`,
    })),
    ...model.evictions.map(({ t, component, bytes: n, reason }) => ({
      t,
      kind: /** @type {const} */ ("evict"),
      text: `${component || "a component"} evicted, ${bytes(n)}${reason ? ` (${reason})` : ""}`,
    })),
    ...model.ooms.map(({ t, text }) => ({
      t,
      kind: /** @type {const} */ ("oom"),
      text: `ran out of memory${text ? `: ${text}` : ""}`,
    })),
  ];
  return events.sort((a, b) => a.t - b.t);
}

/**
 * @param {string} name
 * @param {string} component
 */
function stageName(name, component) {
  return `${name || "stage"}${component && component !== name ? ` of ${component}` : ""}`;
}

/**
 * @param {import("./stack.js").Stack} stack
 * @param {number} time
 */
function heldText(stack, time) {
  const at = momentAt(stack, time);
  if (at < 0) return "nothing known yet";
  const value = (/** @type {number} */ row) => (Number.isNaN(stack.values[row][at]) ? null : stack.values[row][at]);
  const parts = stack.names.map((name, row) => ({ name, n: value(row) })).filter(({ n }) => n);
  const held = value(stack.names.length);
  return [...parts.map(({ name, n }) => `${name} ${bytes(n)}`), `allocated ${bytes(held)}`].join(", ");
}

/**
 * @param {import("./stack.js").TimelineModel} model
 * @param {import("./stack.js").Stack} stack
 * @param {TimeEvent[]} events
 * @param {View | null} view
 */
function summary(model, stack, events, view) {
  if (!stack.times.length && !events.length) return "";
  const count = (/** @type {string} */ kind) => events.filter((event) => event.kind === kind).length;
  const [out, ooms] = [count("evict"), count("oom")];
  const seen = view?.zoomed
    ? `${seconds(view.from)} to ${seconds(view.to)} of ${seconds(model.end)}`
    : seconds(model.end);
  const parts = [
    seen,
    `highest recorded ${bytes(stack.times.length ? stack.peak : null)}`,
    `high mark ${bytes(model.high)}`,
    `low mark ${bytes(model.low)}`,
  ];
  if (out) parts.push(`${out} ${out === 1 ? "eviction" : "evictions"}`);
  if (ooms) parts.push(`out of memory ${ooms} ${ooms === 1 ? "time" : "times"}`);
  return parts.join(", ");
}

/**
 * @param {import("./stack.js").Stack} stack
 * @param {import("./stack.js").TimelineModel} model
 * @param {TimeEvent[]} events
 * @param {import("./look.js").Theme} theme
 * @returns {import("./legend.js").LegendItem[]}
 */
function legendOf(stack, model, events, theme) {
  /** @type {import("./legend.js").LegendItem[]} */
  const items = stack.names.map((name, i) => ({ key: `component-${i}`, title: name, ...componentLook(i, theme) }));
  if (stack.times.length) items.push({ key: "activations", title: PARTS.activations.title, fill: "dots" });
  if (model.high !== null) items.push({ key: "high", title: "high mark", fill: "high" });
  if (model.low !== null) items.push({ key: "low", title: "low mark", fill: "low" });
  if (events.some((event) => event.kind === "evict")) items.push({ key: "evict", title: "eviction", fill: "evict" });
  if (events.some((event) => event.kind === "oom")) items.push({ key: "oom", title: "out of memory", fill: "oom" });
  return items;
}

/**
 * @param {any} raw the model as it came
 * @param {TimeEvent[]} events
 * @returns {import("./table.js").Row[]}
 */
function rowsOf(raw, events) {
  const rows = events.map((event) => ({
    t: event.t,
    what: WORDS[event.kind],
    bytes: /** @type {unknown} */ (null),
    note: event.text,
  }));
  const add = (/** @type {unknown} */ points, /** @type {string} */ what, /** @type {string} */ note) => {
    for (const [t, n] of monotone(points)) rows.push({ t, what, bytes: n, note });
  };
  for (const one of Array.isArray(raw?.components) ? raw.components : [])
    add(one?.points, String(one?.name ?? "unnamed"), "on the device from here");
  add(raw?.allocated, "allocated", "held by the allocator from here");
  return rows.sort((a, b) => a.t - b.t);
}

const WORDS = { stage: "stage", evict: "eviction", oom: "out of memory" };
