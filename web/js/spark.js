/**
 * Invariant: one column of pixels shows the highest sample that falls into it, a gap stays a gap, and a clock that
 * is set back never bends the line back.
 */
import { el, setAttr, setText } from "./dom.js";
import { bytes, seconds } from "./format.js";
import { glyph, line, markLine, shorten, textWidth, write } from "./paint.js";
import { clamp, known } from "./scale.js";
import { makeSurface } from "./surface.js";

/** @typedef {import("./types.d.ts").Sample} Sample */
/** @typedef {{high?: number | null, low?: number | null, total?: number | null}} Marks */
/** @typedef {{t: number, used: number | null}[]} Clean */

const HEIGHT = 54;
const TITLE = 15;

/**
 * The course of the run: memory in use over time, with the marks.
 * @param {{label: string, height?: number}} options
 * @returns {{element: HTMLElement, update: (samples: Sample[], marks?: Marks) => void, destroy: () => void}}
 */
export function makeSpark({ label, height = HEIGHT }) {
  const element = el("div", "bo-spark");
  /** @type {Clean} */
  let samples = [];
  /** @type {Marks} */
  let marks = {};
  const surface = makeSurface({
    root: element,
    label,
    height,
    draw: (ctx, box) => {
      draw(ctx, box, samples, marks);
      title(ctx, box, label, samples);
    },
  });
  const behind = summaryTable(label);
  element.append(surface.canvas, behind.element);

  /**
   * @param {Sample[]} next
   * @param {Marks} [limits]
   */
  const update = (next, limits = {}) => {
    samples = cleanSamples(next);
    marks = limits;
    const figures = figuresOf(samples, marks);
    behind.update(figures);
    setAttr(surface.canvas, "aria-label", `${label}: ${figures.map(([name, text]) => `${name} ${text}`).join(", ")}`);
    surface.redraw();
  };
  update([]);
  return { element, update, destroy: surface.destroy };
}

/**
 * Samples in time; a clock that went back by more than a second starts a new line.
 * @param {any} samples
 * @returns {Clean}
 */
export function cleanSamples(samples) {
  /** @type {Clean} */
  let out = [];
  for (const sample of Array.isArray(samples) ? samples : []) {
    const time = sample?.t;
    if (typeof time !== "number" || !Number.isFinite(time)) continue;
    const last = out.length ? out[out.length - 1].t : time;
    if (time < last - 1) out = [];
    out.push({ t: out.length ? Math.max(time, last) : time, used: known(sample.used) });
  }
  return out;
}

/**
 * The highest sample of each column; null where none fell into it and none lies to its left, or that one was unknown.
 * @param {Clean} samples
 * @param {number} columns
 * @returns {(number | null)[]}
 */
export function columnsOf(samples, columns) {
  /** @type {(number | null)[]} */
  const out = new Array(columns).fill(null);
  if (!samples.length) return out;
  const start = samples[0].t;
  const span = samples[samples.length - 1].t - start || 1;
  const filled = new Uint8Array(columns);
  for (const { t, used } of samples) {
    const column = clamp(Math.floor(((t - start) / span) * columns), 0, columns - 1);
    filled[column] = 1;
    if (used !== null) out[column] = Math.max(out[column] ?? 0, used);
  }
  // Four samples a second leave columns empty: there the last one holds.
  for (let i = 1; i < columns; i += 1) if (!filled[i]) out[i] = out[i - 1];
  return out;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {import("./surface.js").Box} box
 * @param {Clean} samples
 * @param {Marks} marks
 */
function draw(ctx, { width, height, theme }, samples, marks) {
  const values = samples.map((sample) => sample.used ?? 0);
  const [high, low] = [known(marks.high), known(marks.low)];
  const total = known(marks.total) || values.reduce((top, n) => Math.max(top, n), Math.max(high ?? 0, low ?? 0)) || 1;
  const top = TITLE + 7;
  const bottom = height - 1;
  const y = (/** @type {number} */ n) => bottom - clamp(n / total, 0, 1) * (bottom - top);
  ctx.strokeStyle = theme.border;
  ctx.lineWidth = 1;
  line(ctx, 0, bottom + 0.5, width, bottom + 0.5);
  const columns = columnsOf(samples, Math.max(1, Math.floor(width)));
  ctx.fillStyle = theme.weights;
  ctx.globalAlpha = 0.3;
  columns.forEach((used, i) => {
    if (used !== null) ctx.fillRect(i, y(used), 1, bottom - y(used));
  });
  ctx.globalAlpha = 1;
  ctx.strokeStyle = theme.weights;
  ctx.lineWidth = 1.5;
  ctx.lineJoin = "round";
  ctx.beginPath();
  let open = false;
  columns.forEach((used, i) => {
    if (used !== null) ctx[open ? "lineTo" : "moveTo"](i + 0.5, Math.min(y(used), bottom - 0.75));
    open = used !== null;
  });
  ctx.stroke();
  if (high !== null) {
    markLine(ctx, "high", theme, 0, y(high), width, y(high));
    glyph(ctx, "down", width - 6, y(high) - 4, 7, theme.text, theme.bg);
  }
  if (low !== null) {
    markLine(ctx, "low", theme, 0, y(low), width, y(low));
    glyph(ctx, "up", width - 6, Math.min(y(low) + 5, bottom - 3), 7, theme.text, theme.bg);
  }
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {import("./surface.js").Box} box
 * @param {string} label
 * @param {Clean} samples
 */
function title(ctx, { width, theme }, label, samples) {
  const over = samples.length ? `${seconds(samples[samples.length - 1].t - samples[0].t)}` : "no samples yet";
  const room = textWidth(over, theme.font);
  write(ctx, over, width, 7, theme, { align: "right", color: theme.muted, halo: false });
  write(ctx, shorten(label, width - room - 12, theme.font), 0, 7, theme, { color: theme.muted, halo: false });
}

/**
 * @param {Clean} samples
 * @param {Marks} marks
 * @returns {[string, string][]}
 */
function figuresOf(samples, marks) {
  const values = samples.flatMap((sample) => (sample.used === null ? [] : [sample.used]));
  const last = samples.length ? samples[samples.length - 1] : null;
  return [
    ["now", bytes(last?.used ?? null)],
    ["highest", bytes(values.length ? values.reduce((a, b) => Math.max(a, b)) : null)],
    ["lowest", bytes(values.length ? values.reduce((a, b) => Math.min(a, b)) : null)],
    ["over", seconds(last ? last.t - samples[0].t : null)],
    ["high mark", bytes(known(marks.high))],
    ["low mark", bytes(known(marks.low))],
    ["card", bytes(known(marks.total))],
  ];
}

/**
 * The figures as a table that is not seen but read: the height on a node is too dear for a second picture.
 * @param {string} label
 */
function summaryTable(label) {
  const element = el("table", "bo-hidden");
  element.append(el("caption", "", label));
  const body = el("tbody");
  element.append(body);
  /** @param {[string, string][]} figures */
  const update = (figures) => {
    figures.forEach(([name, text], i) => {
      let row = body.rows[i];
      if (!row) {
        row = body.insertRow();
        const head = el("th");
        head.scope = "row";
        row.append(head, el("td"));
      }
      setText(row.cells[0], name);
      setText(row.cells[1], text);
    });
  };
  return { element, update };
}
