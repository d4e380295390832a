/**
 * Invariant: pure arithmetic from figures to places; what is unknown (null, NaN, negative) stays null and takes no
 * place.
 */

/**
 * @param {unknown} value
 * @returns {number | null} a finite number >= 0, or null
 */
export function known(value) {
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : null;
}

/**
 * @param {number} value
 * @param {number} low
 * @param {number} high
 */
export function clamp(value, low, high) {
  return Math.min(Math.max(value, low), Math.max(low, high));
}

/**
 * The order of the parts of memory, everywhere.
 * @typedef {"weights" | "activations" | "unknown" | "others" | "free"} PartKey
 * @typedef {{key: PartKey, bytes: number | null, from: number, to: number}} Part from, to: shares of the bar, 0 to 1
 * @typedef {{key: "high" | "low" | "peak", bytes: number, at: number, beyond: boolean}} Mark beyond: past the bar's end
 * @typedef {{extent: number, total: number | null, used: number | null, parts: Part[], marks: Mark[]}} Bar
 */
/** @type {Exclude<PartKey, "unknown">[]} */
export const ORDER = ["weights", "activations", "others", "free"];

/**
 * A bar of memory: the known parts in their order, what is not accounted for as one part of its own.
 * @param {any} vram {weights, activations, others, free, high, low, peak, total}, each a number or null
 * @returns {Bar}
 */
export function barOf(vram) {
  const bytes = ORDER.map((key) => known(vram?.[key]));
  const total = known(vram?.total) || null;
  const sum = bytes.reduce((/** @type {number} */ all, n) => all + (n ?? 0), 0);
  const marks = /** @type {const} */ (["high", "low", "peak"]).map((key) => ({ key, bytes: known(vram?.[key]) }));
  const top = Math.max(sum, ...marks.map((mark) => mark.bytes ?? 0));
  const extent = Math.max(total ?? top, sum) || 1;
  // Parts are looked at one after another: a gap of less than 1/100 lies between two looks, and is not unknown.
  const gap = extent - sum > (bytes.includes(null) ? 0 : extent / 100) ? extent - sum : 0;
  const hole = bytes.includes(null) ? bytes.indexOf(null) : 3;
  /** @type {Part[]} */
  const parts = [];
  let at = 0;
  const put = (/** @type {PartKey} */ key, /** @type {number | null} */ size, shown = size) => {
    const to = at + (size ?? 0) / extent;
    parts.push({ key, bytes: shown, from: at, to });
    at = to;
  };
  ORDER.forEach((key, i) => {
    if (i === hole && gap) put("unknown", gap, total === null ? null : gap);
    put(key, bytes[i]);
  });
  return {
    extent,
    total,
    used: usedOf(bytes, total),
    parts,
    marks: marks.flatMap(({ key, bytes: n }) =>
      n === null ? [] : [{ key, bytes: n, at: Math.min(1, n / extent), beyond: n > extent }],
    ),
  };
}

/**
 * What is in use on the device: what is not free, or the sum of the parts where all of them are known.
 * @param {(number | null)[]} bytes in ORDER
 * @param {number | null} total
 */
function usedOf(bytes, total) {
  const [weights, activations, others, free] = bytes;
  if (weights !== null && activations !== null && others !== null) return weights + activations + others;
  return total !== null && free !== null ? Math.max(0, total - free) : null;
}

/**
 * Round ticks from 0 to `end`, at most `most` of them after the 0; `base` 1024 for bytes.
 * @param {number} end
 * @param {number} most
 * @param {number} [base]
 * @returns {number[]}
 */
export function ticks(end, most, base = 10) {
  return ticksBetween(0, end, most, base);
}

/**
 * @param {number} from
 * @param {number} to
 * @param {number} most
 * @param {number} [base]
 * @returns {number[]}
 */
export function ticksBetween(from, to, most, base = 10) {
  const span = to - from;
  if (!(span > 0) || !(most >= 1) || !Number.isFinite(span)) return [];
  const step = roundStep(span / most, base);
  const first = Math.ceil(from / step - 1e-9);
  const count = Math.floor(to / step + 1e-9) - first + 1;
  return Array.from({ length: Math.max(0, Math.min(count, 100)) }, (_, i) => (first + i) * step);
}

/**
 * The least of 1, 2, 5 times a power (for bytes: 1, 2, 4, ... 512 times a unit) that is at least `least`.
 * @param {number} least
 * @param {number} base
 */
export function roundStep(least, base) {
  if (base === 1024) return Math.max(1, 2 ** Math.ceil(Math.log2(least) - 1e-9));
  const power = 10 ** Math.floor(Math.log10(least) + 1e-9);
  return /** @type {number} */ ([1, 2, 5, 10].find((n) => n * power >= least * (1 - 1e-9))) * power;
}

/**
 * Points in the order in which they came, their time never going back: a clock that was set back by more than a second
 * goes on from where it was, a smaller step back is held. What is not a number is left out.
 * @param {any} points [[t, value], ...]
 * @returns {[number, number][]}
 */
export function monotone(points) {
  /** @type {[number, number][]} */
  const out = [];
  let last = -Infinity;
  let shift = 0;
  for (const point of Array.isArray(points) ? points : []) {
    const value = known(point?.[1]);
    const time = typeof point?.[0] === "number" && Number.isFinite(point[0]) ? point[0] : null;
    if (value === null || time === null) continue;
    if (time + shift < last - 1) shift = last - time;
    last = Math.max(last, time + shift);
    out.push([last, value]);
  }
  return out;
}

/**
 * A window on 0..end: zoom about a point, pan, never past the ends.
 */
export class View {
  /** @param {number} [most] how many times it can be zoomed */
  constructor(most = 10_000) {
    this.end = 1;
    this.from = 0;
    this.to = 1;
    this.most = most;
  }

  /** @param {number} end a zoomed window stays where it is while the end grows */
  extend(end) {
    const whole = !this.zoomed;
    this.end = end > 0 && Number.isFinite(end) ? end : 1;
    if (whole || this.from >= this.end) this.reset();
    else this.to = Math.min(this.to, this.end);
  }

  get zoomed() {
    return this.from > 0 || this.to < this.end;
  }

  reset() {
    this.from = 0;
    this.to = this.end;
  }

  /**
   * @param {number} factor above 1 goes closer
   * @param {number} [about] share of the window that stays in place
   */
  zoom(factor, about = 0.5) {
    const span = this.to - this.from;
    const next = clamp(span / factor, this.end / this.most, this.end);
    const fixed = this.from + span * about;
    this.from = clamp(fixed - next * about, 0, this.end - next);
    this.to = this.from + next;
    // Rounding must not leave a whole window a hair short of whole.
    if (next > this.end * (1 - 1e-9)) this.reset();
  }

  /** @param {number} share of the window, negative to the left */
  pan(share) {
    const span = this.to - this.from;
    this.from = clamp(this.from + span * share, 0, this.end - span);
    this.to = this.from + span;
  }

  /** @param {number} value @returns {number} share of the window */
  at(value) {
    return (value - this.from) / (this.to - this.from);
  }
}
