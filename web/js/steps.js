/**
 * Invariant: pure; a step's times are those of one step (an entry that stands for several is their mean), unknown stays
 * null, and every step of the window is in exactly one column.
 */
import { known } from "./scale.js";

/** @typedef {import("./types.d.ts").Step} Step */
/** @typedef {import("./types.d.ts").Point} Point */
/**
 * @typedef {{compute_s: number | null, stall_s: number | null, overlapped_s: number | null, bytes: number | null}} Each
 * @typedef {object} CleanStep
 * @property {Step} step as it came
 * @property {string} name its number for people, from 1: "7", or "41-60"
 * @property {string | null} node
 * @property {number} count how many steps it stands for
 * @property {Each} each
 * @property {number | null} wall of one: compute and stall
 */
/** from, to: shares of the width.
 * @typedef {{first: number, last: number, worst: number, from: number, to: number}} Bucket */

/**
 * @param {any} steps
 * @returns {CleanStep[]}
 */
export function cleanSteps(steps) {
  return (Array.isArray(steps) ? steps : []).flatMap((step) => {
    if (!step || typeof step !== "object") return [];
    const count = Math.max(1, Math.round(known(step.count) ?? 1));
    const first = Math.round(known(step.i) ?? 0) + 1;
    const one = (/** @type {unknown} */ value) => {
      const n = known(value);
      return n === null ? null : n / count;
    };
    const each = {
      compute_s: one(step.compute_s),
      stall_s: one(step.stall_s),
      overlapped_s: one(step.overlapped_s),
      bytes: one(step.bytes_h2d),
    };
    const none = each.compute_s === null && each.stall_s === null;
    return [
      {
        step,
        name: count > 1 ? `${first}-${first + count - 1}` : String(first),
        node: typeof step.node === "string" && step.node ? step.node : null,
        count,
        each,
        wall: none ? null : (each.compute_s ?? 0) + (each.stall_s ?? 0),
      },
    ];
  });
}

/**
 * @param {CleanStep[]} steps
 * @param {"compute_s" | "stall_s" | "overlapped_s" | "bytes"} key
 * @returns {number | null} null where none is known
 */
export function sumOf(steps, key) {
  return steps.reduce((/** @type {number | null} */ all, step) => {
    const value = step.each[key];
    return value === null ? all : (all ?? 0) + value * step.count;
  }, null);
}

/**
 * Columns of at least `least` pixels.
 * @param {CleanStep[]} steps
 * @param {{from: number, to: number}} view in steps
 * @param {number} width
 * @param {number} least
 * @returns {Bucket[]}
 */
export function bucketsOf(steps, view, width, least) {
  if (!steps.length || !(width > 0)) return [];
  const span = view.to - view.from;
  const each = Math.max(1, Math.ceil((span * least) / width));
  /** @type {Bucket[]} */
  const out = [];
  const start = Math.max(0, Math.floor(view.from / each) * each);
  for (let first = start; first < Math.min(steps.length, view.to); first += each) {
    const last = Math.min(first + each, steps.length) - 1;
    let worst = first;
    for (let i = first; i <= last; i += 1) if ((steps[i].wall ?? -1) > (steps[worst].wall ?? -1)) worst = i;
    out.push({ first, last, worst, from: (first - view.from) / span, to: (last + 1 - view.from) / span });
  }
  return out;
}

/**
 * Neighbouring steps of one node.
 * @param {CleanStep[]} steps
 * @returns {{node: string | null, from: number, to: number}[]}
 */
export function groupsOf(steps) {
  /** @type {{node: string | null, from: number, to: number}[]} */
  const out = [];
  steps.forEach((step, i) => {
    const last = out[out.length - 1];
    if (last && last.node === step.node) last.to = i + 1;
    else out.push({ node: step.node, from: i, to: i + 1 });
  });
  return out;
}

/** How far a span may be from the sum of its steps: clocks and rounding. */
const SLACK_S = 0.002;
const SLACK_SHARE = 0.02;

/**
 * Exact points at step boundaries as the steps that they end. Where the host passed over steps a point has the mean of
 * all since the one before.
 * @param {readonly Point[]} points
 * @returns {Step[]}
 */
export function pointSteps(points) {
  /** @type {Step[]} */
  const steps = [];
  /** @type {Point | null} */
  let last = null;
  for (const point of points) {
    const { step, step_ms, stall_ms, moved, node, t } = point;
    if (step_ms !== null) {
      const since = sinceOf(last, point);
      const count = since ?? 1;
      const before = since === null ? null : (last?.moved ?? null);
      steps.push({
        ...{ node, i: step === null ? steps.length : Math.max(0, step - count), count },
        ...{ t0: t === null ? null : Math.max(0, t - (count * step_ms) / 1e3), t1: t, overlapped_s: null },
        compute_s: (count * Math.max(0, step_ms - (stall_ms ?? 0))) / 1e3,
        stall_s: stall_ms === null ? null : (count * stall_ms) / 1e3,
        bytes_h2d: moved !== null && before !== null && moved >= before ? moved - before : null,
      });
    }
    last = point;
  }
  return steps;
}

/**
 * How many steps a point ends; null where that is not known, as points between the two were missed.
 * @param {Point | null} last
 * @param {Point} point
 */
function sinceOf(last, { step, step_ms, node, t }) {
  if (!last || last.node !== node || last.step === null || step === null || step <= last.step) return null;
  const count = Math.round(step - last.step);
  if (count <= 1 || t === null || last.t === null || step_ms === null) return Math.max(1, count);
  const sum = (count * step_ms) / 1e3;
  return Math.abs(t - last.t - sum) <= SLACK_S + SLACK_SHARE * sum ? count : null;
}
