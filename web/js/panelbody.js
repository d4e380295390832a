// @ts-check
/**
 * Invariant: the run that is on and the run that has ended use the same places, so that nothing jumps when one becomes
 * the other; whatever is not known of a run is said in its place.
 */
import { makeSteps } from "./bars.js";
import { el, setText } from "./dom.js";
import { helpLink } from "./hintbox.js";
import { LABEL, makeMeter, titleOf } from "./meter.js";
import { componentRows, nodeRows, stepsOf, timelineOf, vramOf } from "./model.js";
import { runLabel } from "./runs.js";
import { makeSpark } from "./spark.js";
import { pointSteps } from "./steps.js";
import { makeTable } from "./table.js";
import { makeTabs } from "./tabs.js";
import { makeTimeline } from "./timeline.js";

/** @typedef {import("./types").Report} Report */
/** @typedef {import("./types").RunRow} RunRow */
/** @typedef {import("./types").StoreLike} StoreLike */
/** @typedef {import("./table.js").Column} Column */

/** Below this width the sections share one place. */
const WIDE = 1000;
const ALL = ["vram", "steps", "components", "nodes", "timers"];
const TABLES = ["components", "nodes", "timers"];
const OUTSIDE = "(outside the stages)";
const LATER = "Known when the run has ended.";

/** @type {Column[]} */
const COMPONENTS = [
  { key: "component", title: "Component", kind: "text" },
  { key: "resident", title: "Resident", kind: "percent", help: "Most of its weights that were on the device at once" },
  { key: "moves", title: "Moves", kind: "count", help: "Copies from RAM to VRAM; evictions copy nothing" },
  { key: "bytes_h2d", title: "Moved", kind: "bytes", help: "Bytes copied from RAM to VRAM" },
  { key: "onload_s", title: "Onload", kind: "seconds", help: "Blocked on a copy outside a step" },
  { key: "stall_s", title: "Stall", kind: "seconds", help: "Compute waits for a copy, inside a step" },
  { key: "peak", title: "Peak", kind: "bytes", help: "Most VRAM in use during its stages" },
  { key: "change_s", title: "Change", kind: "delta", help: "Time of its moves against the comparable run" },
  { key: "weight_bytes", title: "Weights", kind: "bytes" },
  { key: "avoidable_bytes", title: "Avoidable", kind: "bytes", help: "Bytes of moves that the run did not need" },
  { key: "evicted", title: "Evicted for", kind: "text", help: "Bytes that left the device, by reason" },
  { key: "evict_s", title: "Evict", kind: "seconds", help: "Giving room back" },
  { key: "compute_s", title: "Compute", kind: "seconds" },
];
/** @type {Column[]} */
const NODES = [
  { key: "display", title: "Node", kind: "text" },
  { key: "type", title: "Type", kind: "text" },
  { key: "wall_s", title: "Time", kind: "seconds" },
  { key: "resident", title: "Resident", kind: "text", help: "Most of each of its components on the device" },
  { key: "moves_s", title: "Moves", kind: "seconds", help: "Onload, stall and evict together" },
  { key: "onload_s", title: "Onload", kind: "seconds", help: "Blocked on a copy outside a step" },
  { key: "stall_s", title: "Stall", kind: "seconds", help: "Compute waits for a copy, inside a step" },
  { key: "peak", title: "Peak", kind: "bytes" },
  { key: "change_s", title: "Change", kind: "delta", help: "Time of the node against the comparable run" },
];
/** @type {Column[]} */
const TIMERS = [
  { key: "name", title: "Timer", kind: "text" },
  { key: "figure", title: "Figure", kind: "seconds", kindKey: "unit", help: "Seconds, or the size of what has none" },
  { key: "means", title: "What it is", kind: "text" },
  { key: "turn", title: "What to turn", kind: "text" },
];
/** @type {Column[]} */
const NOW_COMPONENTS = [
  { key: "name", title: "Component", kind: "text" },
  { key: "resident", title: "Resident", kind: "percent" },
  { key: "bytes", title: "On the device", kind: "bytes" },
  { key: "total", title: "Weights", kind: "bytes" },
];
let made = 0;

/** What the change column is measured against. @param {RunRow | null} before */
export function comparedWith(before) {
  return before ? `Change: against ${runLabel(before)}` : "Change: no comparable run";
}

export function makeBody() {
  const timeline = makeSized((height) => makeTimeline({ label: "VRAM over the run", height }), 132);
  const meter = makeMeter({ label: LABEL });
  const spark = makeSized((height) => makeSpark({ label: "VRAM of this run so far", height }), 64);
  const steps = makeSized((height) => makeSteps({ label: "Steps", height }), 104);
  const nowSteps = makeSized((height) => makeSteps({ label: "Steps so far", height }), 104);
  const empty = "Nothing is known of components.";
  const components = makeTable({ caption: "By component", columns: COMPONENTS, empty });
  const nowComponents = makeTable({ caption: "Components now", columns: NOW_COMPONENTS, empty });
  const nodes = makeTable({ caption: "By node", columns: NODES, empty: "Nothing is known of nodes." });
  const timers = makeTable({ caption: "Where the time went", columns: TIMERS, empty: "This report has no timers." });
  const timerHelp = helpLink("PerformanceTimers", "Performance timers: each figure, and what to turn");
  const parts = [timeline, meter, spark, steps, nowSteps, components, nowComponents, nodes, timers];

  const compared = [el("p", "bo-compared"), el("p", "bo-compared")];
  const waits = [el("p", "bo-muted", LATER), el("p", "bo-muted", LATER)];
  const ofRun = [timeline, steps, components, nodes, timers].map((part) => part.element).concat(compared);
  const ofNow = [meter.element, spark.element, nowSteps.element, nowComponents.element, ...waits];
  const sections = [
    sectionOf("vram", "VRAM", [timeline.element, meter.element, spark.element]),
    sectionOf("steps", "Steps", [el("div", "bo-title bo-section-title", "Steps"), steps.element, nowSteps.element]),
    sectionOf("components", "Components", [components.element, compared[0], nowComponents.element]),
    sectionOf("nodes", "Nodes", [nodes.element, compared[1], waits[0]]),
    sectionOf("timers", "Timers", [timers.element, waits[1], timerHelp]),
  ];
  const tabs = makeTabs("What is shown", sections, `bo-panel-${(made += 1)}`, () => place());
  const tables = el("div", "bo-tables");
  const element = el("div", "bo-body");
  const own = sections.slice(0, 2).map((section) => section.element);
  tables.append(tabs.element, ...sections.slice(2).map((section) => section.element));
  element.append(...own, tables);

  /** @param {boolean} now */
  const face = (now) => {
    for (const part of ofRun) part.hidden = now;
    for (const part of ofNow) part.hidden = !now;
  };
  /** Tables share one place, which is empty while another tab is selected. */
  const place = () => {
    tables.hidden = element.dataset.columns === "one" && !TABLES.includes(tabs.active());
  };
  /** @type {Report | null} */
  let drawn = null;
  /** @type {Report | null} */
  let drawnBefore = null;

  return {
    element,
    tabs,
    /**
     * The list of tabs stands where it belongs: over all sections, or over the tables; pictures are as high as fits.
     * @param {number} width @param {number} height of the place for the sections
     */
    resize(width, height) {
      const wide = width >= WIDE;
      element.dataset.columns = wide ? "three" : "one";
      if (wide && tabs.element.parentElement !== tables) tables.prepend(tabs.element);
      if (!wide && tabs.element.parentElement !== element) element.prepend(tabs.element);
      tabs.offer(wide ? TABLES : ALL);
      place();
      // In steps, so that a hint or a drag does not draw everything anew for every pixel.
      const free = Math.floor((height - 100) / 20) * 20;
      const tall = (/** @type {number} */ least, /** @type {number} */ most) => Math.min(most, Math.max(least, free));
      timeline.resize(tall(120, 400));
      for (const bars of [steps, nowSteps]) bars.resize(tall(100, 260));
      spark.resize(Math.max(50, tall(120, 300) - 60));
    },
    /** @param {Report} report @param {Report | null} before @param {RunRow | null} beforeRow */
    showRun(report, before, beforeRow) {
      face(false);
      for (const note of compared) setText(note, comparedWith(beforeRow));
      if (report === drawn && before === drawnBefore) return;
      if (report !== drawn) {
        timeline.update(timelineOf(report));
        steps.update(stepsOf(report));
        timers.update(report.timers.map(timerRow));
      }
      components.update(componentRows(report, before).map((row) => ({ ...row, component: row.component || OUTSIDE })));
      nodes.update(nodeRows(report, before ?? beforeRow));
      drawn = report;
      drawnBefore = before;
    },
    /** @param {StoreLike} store */
    showNow(store) {
      face(true);
      const { live, running, samples, points } = store;
      const vram = live ? vramOf(live) : null;
      meter.update(vram, titleOf({ running }));
      spark.update([...samples], { high: vram?.high, low: vram?.low, total: vram?.total });
      nowSteps.update(pointSteps(points));
      nowComponents.update((live?.components ?? []).map(nowRow));
    },
    destroy: () => parts.forEach((part) => part.destroy()),
  };
}

/**
 * A part whose height is fixed when it is made: made anew where the height is another.
 * @template {any[]} A
 * @param {(height: number) => {element: HTMLElement, update: (...given: A) => void, destroy: () => void}} make
 * @param {number} height
 */
function makeSized(make, height) {
  const element = el("div", "bo-sized");
  let part = make(height);
  /** @type {A | null} */
  let last = null;
  element.append(part.element);
  return {
    element,
    /** @param {A} given */
    update(...given) {
      last = given;
      part.update(...given);
    },
    /** @param {number} next */
    resize(next) {
      if (next === height) return;
      height = next;
      part.destroy();
      part = make(height);
      element.replaceChildren(part.element);
      if (last) part.update(...last);
    },
    destroy: () => part.destroy(),
  };
}

/** @param {import("./types").Timer} timer */
function timerRow({ name, seconds, bytes, means, turn }) {
  const size = seconds === null && bytes !== null;
  return { name, figure: size ? bytes : seconds, unit: size ? "bytes" : "seconds", means, turn };
}

/** @param {import("./types").ComponentBytes} component */
function nowRow({ name, bytes, total }) {
  return { name, bytes, total, resident: bytes === null || !total ? null : bytes / total };
}

/** @param {string} id @param {string} title @param {HTMLElement[]} inside */
function sectionOf(id, title, inside) {
  const element = el("section", `bo-section bo-section-${id}`);
  element.append(...inside);
  return { id, title, element };
}
