/**
 * Invariant: a mark's name, an event's glyph and the number of events on it have a place each; a name that finds
 * none is left to the legend and the text below.
 */
import { bytes } from "./format.js";
import { glyph, line, textWidth, write } from "./paint.js";
import { clamp } from "./scale.js";

/** @typedef {import("./look.js").Theme} Theme */
/** @typedef {import("./stack.js").TimelineModel} TimelineModel */
/** @typedef {{left: number, width: number, top: number, bottom: number}} Frame where the plot lies on the canvas */
/** @typedef {{x: number, oom: boolean, events: TimeEvent[]}} Spot events that fall on one glyph */
/** @typedef {{t: number, kind: "stage" | "evict" | "oom", text: string}} TimeEvent */

/** Heights of the stages' band and of the events' lane below it. */
export const BAND = 20;
export const LANE = 16;

/** @typedef {{x: number, y: number, width: number}} TextBox x: its middle */

/**
 * @param {TextBox} a
 * @param {TextBox} b
 */
export function overlaps(a, b) {
  return Math.abs(a.x - b.x) < (a.width + b.width) / 2 + 6 && Math.abs(a.y - b.y) < 15;
}

/**
 * High above its line and low below it, at the right; the card's total at the left.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {TimelineModel} model
 * @param {Frame} frame
 * @param {(n: number) => number} y
 * @param {number} width
 * @returns {TextBox[]}
 */
export function markNames(ctx, theme, model, frame, y, width) {
  /** @type {TextBox[]} */
  const taken = [];
  for (const kind of /** @type {const} */ (["high", "low", "total"])) {
    const at = model[kind];
    if (at === null) continue;
    const text = kind === "total" ? `card ${bytes(at)}` : `${kind} ${bytes(at)}`;
    const size = textWidth(text, theme.font);
    const sides = kind === "low" ? [10, -9] : kind === "high" ? [-9, 10] : [10];
    const rows = sides
      .map((shift) => y(at) + shift)
      .filter((place) => place > frame.top - 10 && place < frame.bottom - 5);
    const middles =
      kind === "total" ? [frame.left + 6 + size / 2] : [width - 8 - size / 2, width - 8 - size * 1.5 - 30];
    const free = middles
      .flatMap((middle) => rows.map((row) => ({ x: middle, y: row, width: size + (kind === "total" ? 0 : 14) })))
      .find((box) => !taken.some((other) => overlaps(box, other)));
    if (!free) continue;
    taken.push(free);
    write(ctx, text, free.x, free.y, theme, { align: "center", color: kind === "total" ? theme.muted : theme.text });
    if (kind !== "total") {
      const above = free.y < y(at);
      glyph(
        ctx,
        kind === "high" ? "down" : "up",
        free.x - size / 2 - 8,
        above ? y(at) - 5 : y(at) + 5,
        8,
        theme.text,
        theme.bg,
      );
    }
  }
  return taken;
}

/**
 * Neighbouring events share a glyph.
 * @param {TimeEvent[]} events
 * @param {Frame} frame
 * @param {(time: number) => number} x
 * @returns {Spot[]}
 */
export function spotsOf(events, frame, x) {
  /** @type {Spot[]} */
  const spots = [];
  for (const event of events) {
    const at = x(event.t);
    if (event.kind === "stage" || at < frame.left - 1 || at > frame.left + frame.width + 1) continue;
    const last = spots[spots.length - 1];
    const oom = event.kind === "oom";
    if (last && last.oom === oom && at - last.x < 24) last.events.push(event);
    else spots.push({ x: clamp(at, frame.left + 6, frame.left + frame.width - 6), oom, events: [event] });
  }
  return spots;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {Spot[]} spots
 * @param {Frame} frame
 */
export function stems(ctx, theme, spots, frame) {
  ctx.save();
  for (const { x, oom } of spots) {
    ctx.strokeStyle = oom ? theme.alarm : theme.muted;
    ctx.lineWidth = oom ? 1.5 : 1;
    ctx.setLineDash(oom ? [] : [2, 3]);
    line(ctx, Math.round(x) + 0.5, BAND + LANE, Math.round(x) + 0.5, frame.bottom);
  }
  ctx.restore();
}

/**
 * Evictions as open triangles, what ran out of memory as a cross, with their number where they are several.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {Spot[]} spots
 * @param {Frame} frame
 */
export function glyphs(ctx, theme, spots, frame) {
  const y = BAND + LANE / 2 - 1;
  spots.forEach(({ x, oom, events }, i) => {
    glyph(ctx, oom ? "oom" : "evict", x, y, 9, oom ? theme.alarm : theme.text, theme.bg);
    const end = spots[i + 1] ? spots[i + 1].x - 6 : frame.left + frame.width;
    const text = oom && events.length === 1 ? "OOM" : events.length > 1 ? `${oom ? "OOM " : ""}${events.length}` : "";
    if (x + 8 + textWidth(text, theme.font) > end) return;
    write(ctx, text, x + 8, y, theme, { color: oom ? theme.alarm : theme.muted });
  });
}
