/**
 * Invariant: reads the state, draws it, keeps nothing but where the glyphs are; two texts never lie on each other.
 */
import { bytes, seconds } from "./format.js";
import { componentLook, PARTS } from "./look.js";
import { inkOf, line, markLine, shorten, textWidth, write } from "./paint.js";
import { clamp, ticks, ticksBetween } from "./scale.js";
import { columnsOf } from "./stack.js";
import { BAND, glyphs, LANE, markNames, overlaps, spotsOf, stems } from "./timemarks.js";
import { cssColor, mix, parseColor } from "./color.js";

/** @typedef {import("./look.js").Theme} Theme */
/** @typedef {import("./stack.js").Stack} Stack */
/** @typedef {import("./stack.js").TimelineModel} TimelineModel */
/** @typedef {import("./scale.js").View} View */
/** @typedef {import("./surface.js").Box} Box */
/** @typedef {import("./timemarks.js").Spot} Spot */
/** @typedef {import("./timemarks.js").TimeEvent} TimeEvent */
/**
 * @typedef {object} State
 * @property {TimelineModel} model
 * @property {Stack} stack
 * @property {TimeEvent[]} events ascending
 * @property {View} view
 * @property {number | null} cursor a time
 */

const AXIS = 18;

/**
 * @param {number} width
 * @param {number} height
 * @param {Theme} theme
 * @param {number} extent bytes at the top
 */
export function frameOf(width, height, theme, extent) {
  const marks = ticks(extent, 4, 1024);
  const room = Math.max(...[0, ...marks].map((tick) => textWidth(bytes(tick), theme.font)));
  const left = width < 320 ? 0 : room + 10;
  return { left, width: width - left, top: BAND + LANE + 2, bottom: height - AXIS, marks };
}

/**
 * @param {TimelineModel} model
 * @param {Stack} stack
 */
export function extentOf(model, stack) {
  return Math.max(model.total ?? 0, stack.peak, model.high ?? 0, model.low ?? 0) || 1;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Box} box
 * @param {State} state
 * @returns {Spot[]} where the glyphs are
 */
export function drawTimeline(ctx, { width, height, theme }, state) {
  const { model, stack, view } = state;
  if (!stack.times.length && !model.stages.length && !state.events.length) {
    write(ctx, "nothing recorded yet", width / 2, height / 2, theme, {
      align: "center",
      color: theme.muted,
      halo: false,
    });
    return [];
  }
  const extent = extentOf(model, stack);
  const frame = frameOf(width, height, theme, extent);
  const x = (/** @type {number} */ time) => frame.left + view.at(time) * frame.width;
  const y = (/** @type {number} */ n) => frame.bottom - (clamp(n, 0, extent) / extent) * (frame.bottom - frame.top);
  grid(ctx, theme, frame, y, width);
  ctx.save();
  ctx.beginPath();
  ctx.rect(frame.left, 0, frame.width, height);
  ctx.clip();
  // A column is a whole pixel, or seams would show between them: the last one may be cut.
  const count = Math.max(1, Math.ceil(frame.width));
  const to = view.from + ((view.to - view.from) * count) / Math.max(1, frame.width);
  const runs = runsOf(columnsOf(stack, view.from, to, count, model.end));
  const labels = areas(ctx, theme, stack, runs, frame.left, y);
  bands(ctx, theme, model, frame, x);
  if (model.total !== null) markLine(ctx, "total", theme, frame.left, y(model.total), width, y(model.total));
  for (const kind of /** @type {const} */ (["high", "low"])) {
    const at = model[kind];
    if (at !== null) markLine(ctx, kind, theme, frame.left, y(at), width, y(at));
  }
  const spots = spotsOf(state.events, frame, x);
  stems(ctx, theme, spots, frame);
  const taken = markNames(ctx, theme, model, frame, y, width);
  for (const label of labels) {
    if (!taken.some((box) => overlaps(box, label)))
      write(ctx, label.text, label.x, label.y, theme, { align: "center" });
  }
  if (state.cursor !== null) {
    ctx.strokeStyle = theme.text;
    ctx.lineWidth = 1;
    line(ctx, Math.round(x(state.cursor)) + 0.5, 0, Math.round(x(state.cursor)) + 0.5, frame.bottom);
  }
  glyphs(ctx, theme, spots, frame);
  ctx.restore();
  times(ctx, theme, frame, view, width, height);
  if (!frame.left && model.total === null)
    for (const tick of frame.marks.slice(-1)) write(ctx, bytes(tick), 2, y(tick) + 8, theme, { color: theme.muted });
  return spots;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {ReturnType<typeof frameOf>} frame
 * @param {(n: number) => number} y
 * @param {number} width
 */
function grid(ctx, theme, frame, y, width) {
  ctx.lineWidth = 1;
  for (const tick of [0, ...frame.marks]) {
    const at = Math.round(y(tick)) + 0.5;
    ctx.strokeStyle = tick ? theme.grid : theme.border;
    line(ctx, frame.left, at, width, at);
    if (frame.left)
      write(ctx, bytes(tick), frame.left - 6, at, theme, { align: "right", color: theme.muted, halo: false });
  }
}

/**
 * Neighbouring columns of the same moment.
 * @param {Int32Array} columns of one pixel
 * @returns {{moment: number, from: number, to: number}[]}
 */
function runsOf(columns) {
  /** @type {{moment: number, from: number, to: number}[]} */
  const runs = [];
  columns.forEach((moment, i) => {
    const last = runs[runs.length - 1];
    if (last && last.moment === moment) last.to = i + 1;
    else runs.push({ moment, from: i, to: i + 1 });
  });
  return runs.filter((run) => run.moment >= 0);
}

/**
 * The areas from the bottom up: the components in their order, on top what else the allocator held.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {Stack} stack
 * @param {ReturnType<typeof runsOf>} runs
 * @param {number} left
 * @param {(n: number) => number} y
 * @returns {{text: string, x: number, y: number, width: number}[]} the names that have room in their area
 */
function areas(ctx, theme, stack, runs, left, y) {
  const base = new Float64Array(runs.length);
  /** @type {{text: string, x: number, y: number, width: number}[]} */
  const labels = [];
  const rows = stack.names.length;
  for (let row = 0; row <= rows; row += 1) {
    const last = row === rows;
    const { color, fill } = last
      ? { color: theme.activations, fill: /** @type {const} */ ("dots") }
      : componentLook(row, theme);
    const ink = inkOf(ctx, fill, color, soft(color, theme));
    const [tall, least] = [makeStretch(28), makeStretch(16)];
    const tops = runs.map(({ moment, from, to }, i) => {
      const value = stack.values[row][moment] || 0;
      const next = last ? Math.max(base[i], value) : base[i] + value;
      const [y0, y1] = [y(base[i]), y(next)];
      if (y0 - y1 > 0) {
        ctx.fillStyle = ink;
        ctx.fillRect(left + from, y1, to - from, y0 - y1);
      }
      for (const stretch of [tall, least]) stretch.add(left + from, left + to, y1, y0);
      base[i] = next;
      return { from, to, y0, y1 };
    });
    edge(ctx, color, theme, left, tops);
    const name = last ? PARTS.activations.title : stack.names[row];
    const whole = textWidth(name, theme.font) + 12;
    const best = tall.longest().to - tall.longest().from >= whole ? tall.longest() : least.longest();
    const text = shorten(name, best.to - best.from - 12, theme.font);
    if (text)
      labels.push({
        text,
        x: (best.from + best.to) / 2,
        y: (best.top + best.bottom) / 2,
        width: textWidth(text, theme.font),
      });
  }
  return labels;
}

/**
 * The longest stretch of an area that is at least so high all along.
 * @param {number} height
 */
function makeStretch(height) {
  let best = { from: 0, to: 0, top: 0, bottom: 0 };
  let now = { ...best };
  return {
    /**
     * @param {number} from
     * @param {number} to
     * @param {number} top
     * @param {number} bottom
     */
    add(from, to, top, bottom) {
      const both = { from: now.from, to, top: Math.max(now.top, top), bottom: Math.min(now.bottom, bottom) };
      const joins = from - now.to < 0.5 && both.bottom - both.top >= height;
      now = joins ? both : bottom - top >= height ? { from, to, top, bottom } : { from: to, to, top: 0, bottom: 0 };
      if (now.to - now.from > best.to - best.from) best = now;
    },
    longest: () => best,
  };
}

/**
 * The upper edge of an area, in its own colour.
 * @param {CanvasRenderingContext2D} ctx
 * @param {string} color
 * @param {Theme} theme
 * @param {number} left
 * @param {{from: number, to: number, y0: number, y1: number}[]} tops
 */
function edge(ctx, color, theme, left, tops) {
  ctx.beginPath();
  let open = false;
  for (const { from, to, y0, y1 } of tops) {
    if (y0 - y1 <= 0) {
      open = false;
      continue;
    }
    ctx[open ? "lineTo" : "moveTo"](left + from, y1 + 0.75);
    ctx.lineTo(left + to, y1 + 0.75);
    open = true;
  }
  ctx.strokeStyle = color;
  ctx.lineWidth = 1.5;
  ctx.stroke();
}

/**
 * @param {string} color
 * @param {Theme} theme
 */
function soft(color, theme) {
  const [a, b] = [parseColor(theme.bg), parseColor(color)];
  return a && b ? cssColor(mix(a, b, 0.25)) : theme.bg;
}

/**
 * The stages as bands with their names, their bounds through the whole picture.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {TimelineModel} model
 * @param {ReturnType<typeof frameOf>} frame
 * @param {(time: number) => number} x
 */
function bands(ctx, theme, model, frame, x) {
  model.stages.forEach((stage) => {
    const from = clamp(x(stage.t0), frame.left - 2, frame.left + frame.width + 2);
    const to = clamp(x(stage.t1), frame.left - 2, frame.left + frame.width + 2);
    if (to <= frame.left || from >= frame.left + frame.width) return;
    const width = Math.max(1, to - from);
    ctx.fillStyle = theme.band;
    ctx.fillRect(from, 1, width, BAND - 3);
    ctx.strokeStyle = theme.border;
    ctx.lineWidth = 1;
    if (width > 3) ctx.strokeRect(Math.round(from) + 0.5, 1.5, Math.round(width) - 1, BAND - 4);
    ctx.strokeStyle = theme.grid;
    for (const at of [from, to]) line(ctx, Math.round(at) + 0.5, BAND, Math.round(at) + 0.5, frame.bottom);
    const name = stage.component && stage.component !== stage.name ? `${stage.name} (${stage.component})` : stage.name;
    const [seen, end] = [Math.max(from, frame.left), Math.min(to, frame.left + frame.width)];
    const full = textWidth(name, theme.font) <= end - seen - 10;
    write(ctx, shorten(full ? name : stage.name, end - seen - 10, theme.font), seen + 5, BAND / 2, theme, {
      halo: false,
    });
  });
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {ReturnType<typeof frameOf>} frame
 * @param {View} view
 * @param {number} width
 * @param {number} height
 */
function times(ctx, theme, frame, view, width, height) {
  const most = Math.max(1, Math.floor(frame.width / 80));
  let edge = -Infinity;
  for (const tick of ticksBetween(view.from, view.to, most)) {
    const at = frame.left + view.at(tick) * frame.width;
    const text = seconds(tick);
    const size = textWidth(text, theme.font);
    const middle = clamp(at, frame.left + size / 2, width - size / 2);
    ctx.strokeStyle = theme.border;
    ctx.lineWidth = 1;
    line(ctx, Math.round(at) + 0.5, frame.bottom, Math.round(at) + 0.5, frame.bottom + 4);
    if (middle - size / 2 < edge + 10) continue;
    write(ctx, text, middle, height - 6, theme, { align: "center", color: theme.muted, halo: false });
    edge = middle + size / 2;
  }
}
