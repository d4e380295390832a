/**
 * Invariant: what is drawn above a node can be read whatever lies behind it and at whatever zoom it is shown: on a plate
 * of its own, never below 11 pixels on the screen, and never a figure that is cut in the middle.
 *
 * Pure drawing: it is handed texts and figures, and knows nothing of nodes, runs or the front end. Everything is drawn
 * in pixels of a 11 pixel text; `unitOf` says how many units of the graph such a pixel takes.
 */
import { partColor, PARTS } from "./look.js";
import { fillBox, glyph, markLine, TEXT_PX, textWidth, write } from "./paint.js";

/** @typedef {import("./look.js").Theme} Theme */
/** @typedef {import("./scale.js").Bar} Bar */
/** @typedef {{x: number, y: number, width: number, height: number}} Box */
/** @typedef {Box & {text: string, zoom: number, room: number}} Placed zoom, room: what its text was chosen for */

/** Below this zoom a strip is larger than the nodes, and nothing is drawn. */
export const LEAST_ZOOM = 0.4;
/** What a strip may take although its node is narrower: pixels on the screen, and times the node's width. */
const LEAST_ROOM = 150;
const WIDER = 1.2;
const PAD = 7;
const TEXT_HEIGHT = 16;
const BAR_HEIGHT = 8;
/** Room for the triangle of a mark above the bar, and below it. */
const OVERHANG = 6;
export const NOTE_HEIGHT = TEXT_HEIGHT + 3;
export const LIVE_HEIGHT = 2 + TEXT_HEIGHT + OVERHANG + BAR_HEIGHT + OVERHANG;

/**
 * How large a pixel of the 11 pixel text is in the graph: it grows with the nodes, and stays readable far away.
 * @param {number} zoom
 * @returns {number}
 */
export function unitOf(zoom) {
  return Math.max(1.1, 1 / zoom);
}

/**
 * The zoom of a canvas that is drawn in graph coordinates, or 0 where it cannot be told.
 * @param {CanvasRenderingContext2D} ctx
 * @param {number} ratio pixels of the screen to a CSS pixel
 * @returns {number}
 */
export function zoomOf(ctx, ratio) {
  const zoom = (ctx.getTransform?.().a ?? 0) / (ratio > 0 ? ratio : 1);
  return Number.isFinite(zoom) ? zoom : 0;
}

/**
 * The longest of `texts` that fits; where none does, the shortest, whole.
 * @param {readonly string[]} texts longest first
 * @param {number} room
 * @param {string} font
 * @returns {string}
 */
export function choose(texts, room, font) {
  for (const text of texts) if (textWidth(text, font) <= room) return text;
  return texts[texts.length - 1] ?? "";
}

/**
 * Where a strip lies, in the graph; `text` is what of it is shown. Written into `box`: this is asked in every frame.
 * @param {Placed} box
 * @param {readonly string[]} texts
 * @param {boolean} live
 * @param {number} left
 * @param {number} bottom
 * @param {number} nodeWidth
 * @param {number} zoom
 * @param {string} font
 */
export function place(box, texts, live, left, bottom, nodeWidth, zoom, font) {
  if (box.zoom !== zoom || box.room !== nodeWidth) {
    box.zoom = zoom;
    box.room = nodeWidth;
    const unit = unitOf(zoom);
    const own = Math.max(0, nodeWidth) / unit;
    const least = LEAST_ROOM / zoom / unit;
    box.text = choose(texts, Math.max(own * WIDER, least) - 2 * PAD, font);
    const needed = textWidth(box.text, font) + 2 * PAD;
    box.width = (live ? Math.max(own, needed) : needed) * unit;
    box.height = (live ? LIVE_HEIGHT : NOTE_HEIGHT) * unit;
  }
  box.x = left;
  box.y = bottom - box.height;
}

/** @returns {Placed} for `place` */
export const unplaced = () => ({ x: 0, y: 0, width: 0, height: 0, text: "", zoom: 0, room: -1 });

/**
 * @param {Box} box
 * @param {ArrayLike<number>} area x, y, width, height
 * @returns {boolean} whether any of it is seen
 */
export function seen(box, area) {
  return (
    box.x < area[0] + area[2] &&
    box.x + box.width > area[0] &&
    box.y < area[1] + area[3] &&
    box.y + box.height > area[1]
  );
}

/**
 * The short texts after a run, all at once: there may be one above every node.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {readonly Placed[]} boxes
 * @param {number} unit
 */
export function drawNotes(ctx, theme, boxes, unit) {
  ctx.save();
  clean(ctx);
  ctx.scale(unit, unit);
  ctx.beginPath();
  for (const box of boxes) outline(ctx, box.x / unit, box.y / unit, box.width / unit, NOTE_HEIGHT);
  plate(ctx, theme);
  ctx.font = `400 ${TEXT_PX}px ${theme.font}`;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  ctx.fillStyle = theme.text;
  for (const box of boxes) ctx.fillText(box.text, box.x / unit + PAD, box.y / unit + NOTE_HEIGHT / 2 + 0.5);
  ctx.restore();
}

/**
 * The strip while a node runs: what VRAM holds now, against its marks.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {Placed} box
 * @param {number} unit
 * @param {Bar} bar
 * @param {string} [marks] what the marks are, written where there is room beside the text
 */
export function drawLive(ctx, theme, box, unit, bar, marks = "") {
  const width = box.width / unit;
  ctx.save();
  clean(ctx);
  ctx.translate(box.x, box.y);
  ctx.scale(unit, unit);
  ctx.beginPath();
  outline(ctx, 0, 0, width, LIVE_HEIGHT);
  plate(ctx, theme);
  write(ctx, box.text, PAD, 2 + TEXT_HEIGHT / 2, theme, { halo: false });
  const right = width - PAD;
  if (marks && PAD + textWidth(box.text, theme.font) + 2 * PAD + textWidth(marks, theme.font) <= right) {
    write(ctx, marks, right, 2 + TEXT_HEIGHT / 2, theme, { align: "right", color: theme.muted, halo: false });
  }
  drawBar(ctx, theme, bar, PAD, 2 + TEXT_HEIGHT + OVERHANG, width - 2 * PAD);
  ctx.restore();
}

/**
 * Nothing of what others left set on the canvas.
 * @param {CanvasRenderingContext2D} ctx
 */
function clean(ctx) {
  ctx.globalAlpha = 1;
  ctx.shadowColor = "transparent";
  ctx.setLineDash([]);
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {number} x
 * @param {number} y
 * @param {number} width
 * @param {number} height
 */
function outline(ctx, x, y, width, height) {
  if (ctx.roundRect) ctx.roundRect(x + 0.5, y + 0.5, width - 1, height - 1, 4);
  else ctx.rect(x + 0.5, y + 0.5, width - 1, height - 1);
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 */
function plate(ctx, theme) {
  ctx.fillStyle = theme.bg;
  ctx.fill();
  ctx.strokeStyle = theme.border;
  ctx.lineWidth = 1;
  ctx.stroke();
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {Bar} bar
 * @param {number} x
 * @param {number} y
 * @param {number} width
 */
function drawBar(ctx, theme, bar, x, y, width) {
  fillBox(ctx, "empty", theme.muted, theme.bg, x, y, width, BAR_HEIGHT);
  for (const part of bar.parts) {
    const look = PARTS[part.key];
    if (!look || look.fill === "empty") continue;
    const from = x + part.from * width;
    fillBox(ctx, look.fill, partColor(part.key, theme), theme.bg, from, y, (part.to - part.from) * width, BAR_HEIGHT);
  }
  ctx.strokeStyle = theme.border;
  ctx.lineWidth = 1;
  ctx.strokeRect(x - 0.5, y - 0.5, width + 1, BAR_HEIGHT + 1);
  // The most important last, as it lies on top.
  for (const kind of /** @type {const} */ (["peak", "low", "high"])) {
    const mark = bar.marks.find((one) => one.key === kind);
    if (!mark) continue;
    const at = x + mark.at * width;
    markLine(ctx, kind, theme, at, y - 1, at, y + BAR_HEIGHT + 1);
    if (kind === "high") glyph(ctx, "down", at, y - OVERHANG / 2, OVERHANG, theme.text, theme.bg);
    if (kind === "low") glyph(ctx, "up", at, y + BAR_HEIGHT + OVERHANG / 2, OVERHANG, theme.text, theme.bg);
  }
}
