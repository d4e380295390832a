/**
 * Invariant: pure; one column of pixels shows the moment of its span at which most was held, with every component
 * as it was at that moment: the picture keeps each peak and never shows an amount that was not there at once.
 */
import { known, monotone } from "./scale.js";

/** @typedef {[number, number][]} Course a step function: [t, bytes], each holds until the next */
/**
 * @typedef {object} Stack
 * @property {string[]} names
 * @property {Float64Array} times ascending
 * @property {Float64Array[]} values one row per component, then (last) what the allocator held; NaN before it is known
 * @property {Float64Array} height what is drawn: the components' sum, or what the allocator held where that is more
 * @property {number} peak the greatest height
 */

/**
 * @param {any} model components and allocated of the timeline's model
 * @returns {Stack}
 */
export function stackOf(model) {
  const components = (Array.isArray(model?.components) ? model.components : []).filter(
    (/** @type {any} */ one) => one && typeof one === "object",
  );
  const courses = [...components.map((/** @type {any} */ one) => monotone(one.points)), monotone(model?.allocated)];
  const times = momentsOf(courses);
  const values = courses.map((course) => held(course, times));
  const height = new Float64Array(times.length);
  let peak = 0;
  for (let i = 0; i < times.length; i += 1) {
    let sum = 0;
    for (let row = 0; row < components.length; row += 1) sum += values[row][i] || 0;
    height[i] = Math.max(sum, values[components.length][i] || 0);
    peak = Math.max(peak, height[i]);
  }
  return {
    names: components.map((/** @type {any} */ one) =>
      typeof one.name === "string" && one.name ? one.name : "unnamed",
    ),
    times,
    values,
    height,
    peak,
  };
}

/**
 * Every time at which something changes, once each.
 * @param {Course[]} courses
 */
function momentsOf(courses) {
  const all = new Float64Array(courses.reduce((sum, course) => sum + course.length, 0));
  let at = 0;
  for (const course of courses) for (const [time] of course) all[at++] = time;
  all.sort();
  let kept = 0;
  for (const time of all) if (!kept || time !== all[kept - 1]) all[kept++] = time;
  return all.slice(0, kept);
}

/**
 * The course at each of the times; the highest of what it took at one and the same time.
 * @param {Course} course
 * @param {Float64Array} times
 */
function held(course, times) {
  const out = new Float64Array(times.length);
  let next = 0;
  let value = NaN;
  times.forEach((time, i) => {
    let first = true;
    while (next < course.length && course[next][0] <= time) {
      value = first ? course[next][1] : Math.max(value, course[next][1]);
      first = false;
      next += 1;
    }
    out[i] = value;
    // What it took last holds on, what it took most is shown.
    if (!first) value = course[next - 1][1];
  });
  return out;
}

/**
 * @param {Stack} stack
 * @param {number} time
 * @returns {number} index of the moment that holds at `time`; -1 before the first
 */
export function momentAt(stack, time) {
  let low = 0;
  let high = stack.times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (stack.times[middle] <= time) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/**
 * For each column the moment to draw, -1 where nothing is known yet.
 * @param {Stack} stack
 * @param {number} from time at the left edge
 * @param {number} to time at the right edge
 * @param {number} columns
 * @param {number} end nothing is known past it
 * @returns {Int32Array}
 */
export function columnsOf(stack, from, to, columns, end) {
  const out = new Int32Array(Math.max(0, columns)).fill(-1);
  let at = momentAt(stack, from);
  for (let i = 0; i < columns; i += 1) {
    const start = from + ((to - from) * i) / columns;
    const stop = from + ((to - from) * (i + 1)) / columns;
    if (start > end) break;
    while (at + 1 < stack.times.length && stack.times[at + 1] <= start) at += 1;
    let most = at;
    while (at + 1 < stack.times.length && stack.times[at + 1] < stop) {
      at += 1;
      if (most < 0 || stack.height[at] > stack.height[most]) most = at;
    }
    out[i] = most;
  }
  return out;
}

/**
 * @typedef {object} TimelineModel as makeTimeline takes it, read with care: see types.d.ts
 * @property {number} end
 * @property {number | null} total
 * @property {number | null} high
 * @property {number | null} low
 * @property {{name: string, component: string, t0: number, t1: number}[]} stages
 * @property {{t: number, component: string, bytes: number | null, reason: string}[]} evictions
 * @property {{t: number, text: string}[]} ooms
 */

/**
 * @param {any} model
 * @param {Stack} stack
 * @returns {TimelineModel}
 */
export function cleanModel(model, stack) {
  const list = (/** @type {unknown} */ value) =>
    (Array.isArray(value) ? value : []).filter((one) => one && typeof one === "object");
  const text = (/** @type {unknown} */ value) => (typeof value === "string" ? value : "");
  const stages = list(model?.stages).flatMap((/** @type {any} */ one) => {
    const [t0, t1] = [known(one.t0), known(one.t1)];
    return t0 === null || t1 === null || t1 < t0
      ? []
      : [{ name: text(one.name), component: text(one.component), t0, t1 }];
  });
  const evictions = list(model?.evictions).flatMap((/** @type {any} */ one) => {
    const t = known(one.t);
    return t === null ? [] : [{ t, component: text(one.component), bytes: known(one.bytes), reason: text(one.reason) }];
  });
  const ooms = list(model?.ooms).flatMap((/** @type {any} */ one) => {
    const t = known(one.t);
    return t === null ? [] : [{ t, text: text(one.text) }];
  });
  const ends = [known(model?.end_s) ?? 0, stack.times[stack.times.length - 1] ?? 0, ...stages.map((one) => one.t1)];
  const events = [...evictions, ...ooms].map((one) => one.t);
  return {
    end: [...ends, ...events].reduce((a, b) => Math.max(a, b), 0),
    total: known(model?.total) || null,
    high: known(model?.high),
    low: known(model?.low),
    stages,
    evictions,
    ooms,
  };
}
