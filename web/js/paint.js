/**
 * Invariant: what is drawn on a canvas follows look.js: a colour always comes with a pattern, a glyph or a text,
 * and every line has an edge of the background's colour, so that it can be seen on whatever lies below.
 */

/** @typedef {import("./look.js").Theme} Theme */
/** @typedef {import("./look.js").Fill} Fill */

export const TEXT_PX = 11;

/** @type {CanvasRenderingContext2D | null | undefined} */
let ruler;
/** @type {Map<string, number>} */
const widths = new Map();

/**
 * The width of a text in CSS pixels, without asking the layout.
 * @param {string} text
 * @param {string} font a family
 * @param {string} [weight]
 * @returns {number}
 */
export function textWidth(text, font, weight = "400") {
  const key = `${weight} ${font} ${text}`;
  const seen = widths.get(key);
  if (seen !== undefined) return seen;
  ruler ??= document.createElement("canvas").getContext("2d");
  let width = text.length * 6.5;
  if (ruler) {
    ruler.font = `${weight} ${TEXT_PX}px ${font}`;
    width = Math.ceil(ruler.measureText(text).width);
  }
  if (widths.size > 500) widths.clear();
  widths.set(key, width);
  return width;
}

/**
 * As much of `text` as fits, with an ellipsis; "" where nothing readable would be left.
 * @param {string} text
 * @param {number} room
 * @param {string} font
 */
export function shorten(text, room, font) {
  if (textWidth(text, font) <= room) return text;
  for (let length = Math.min(text.length - 1, Math.floor(room / 4)); length >= 2; length -= 1) {
    const cut = `${text.slice(0, length).trimEnd()}…`;
    if (textWidth(cut, font) <= room) return cut;
  }
  return "";
}

/** @type {Map<string, CanvasPattern | null>} */
const patterns = new Map();

/**
 * Paints a box as `fill` says. `back` is what lies below; it is also the colour of the gaps in a pattern.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Fill} fill
 * @param {string} color
 * @param {string} back
 * @param {number} x
 * @param {number} y
 * @param {number} width
 * @param {number} height
 */
export function fillBox(ctx, fill, color, back, x, y, width, height) {
  if (width <= 0 || height <= 0) return;
  if (fill === "empty") {
    ctx.fillStyle = back;
    ctx.fillRect(x, y, width, height);
    return;
  }
  if (fill === "dotted") {
    ctx.fillStyle = back;
    ctx.fillRect(x, y, width, height);
    ctx.save();
    ctx.strokeStyle = color;
    ctx.lineWidth = 1;
    ctx.setLineDash([2, 2]);
    if (width > 2 && height > 2) ctx.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
    else {
      ctx.setLineDash([1, 1]);
      line(ctx, x + width / 2, y, x + width / 2, y + height);
    }
    ctx.restore();
    return;
  }
  ctx.fillStyle = inkOf(ctx, fill, color, back);
  ctx.fillRect(x, y, width, height);
}

/**
 * What to fill with: a colour, or the pattern in it.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Fill} fill
 * @param {string} color
 * @param {string} back
 * @returns {string | CanvasPattern}
 */
export function inkOf(ctx, fill, color, back) {
  if (fill === "solid" || fill === "empty" || fill === "dotted") return color;
  const scale = Math.max(1, Math.round(ctx.getTransform?.().a ?? 1));
  const key = `${fill} ${color} ${back} ${scale}`;
  let pattern = patterns.get(key);
  if (pattern === undefined) {
    const tile = tileOf(fill, color, back, scale);
    pattern = tile ? ctx.createPattern(tile, "repeat") : null;
    pattern?.setTransform?.(new DOMMatrix([1 / scale, 0, 0, 1 / scale, 0, 0]));
    if (patterns.size > 100) patterns.clear();
    patterns.set(key, pattern);
  }
  return pattern ?? color;
}

/**
 * @param {Fill} fill
 * @param {string} color
 * @param {string} back
 * @param {number} scale
 */
function tileOf(fill, color, back, scale) {
  const size = fill === "dots" ? 4 : 6;
  const tile = document.createElement("canvas");
  tile.width = tile.height = size * scale;
  const ctx = tile.getContext("2d");
  if (!ctx) return null;
  ctx.scale(scale, scale);
  // Dots are holes in the colour, lines are ink on the background: told apart at 6 pixels of height.
  ctx.fillStyle = fill === "dots" ? color : back;
  ctx.fillRect(0, 0, size, size);
  ctx.strokeStyle = color;
  ctx.lineWidth = fill === "unknown" ? 1 : 2.2;
  if (fill === "dots") {
    ctx.fillStyle = back;
    ctx.beginPath();
    ctx.arc(2, 2, 0.9, 0, 7);
    ctx.fill();
  }
  for (const shift of fill === "dots" ? [] : [-size, 0, size]) {
    if (fill !== "back") line(ctx, shift - 1, size + 1, shift + size + 1, -1);
    if (fill === "back" || fill === "cross") line(ctx, shift - 1, -1, shift + size + 1, size + 1);
  }
  return tile;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {number} x0
 * @param {number} y0
 * @param {number} x1
 * @param {number} y1
 */
export function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

/**
 * The line of a mark: high solid of 2 pixels, low dashed, peak solid of 1.
 * @param {CanvasRenderingContext2D} ctx
 * @param {"high" | "low" | "peak" | "total"} kind
 * @param {Theme} theme
 * @param {number} x0
 * @param {number} y0
 * @param {number} x1
 * @param {number} y1
 */
export function markLine(ctx, kind, theme, x0, y0, x1, y1) {
  const width = kind === "peak" || kind === "total" ? 1 : 2;
  ctx.save();
  ctx.strokeStyle = theme.bg;
  ctx.lineWidth = width + 2;
  line(ctx, x0, y0, x1, y1);
  ctx.strokeStyle = kind === "total" ? theme.muted : theme.text;
  ctx.lineWidth = width;
  if (kind === "low") ctx.setLineDash([5, 4]);
  line(ctx, x0, y0, x1, y1);
  ctx.restore();
}

/**
 * Small glyphs: "down" is the high mark's triangle, "up" the low mark's, "evict" an eviction, "oom" a cross.
 * @param {CanvasRenderingContext2D} ctx
 * @param {"down" | "up" | "evict" | "oom" | "right"} kind
 * @param {number} x its middle
 * @param {number} y its middle
 * @param {number} size
 * @param {string} color
 * @param {string} back
 */
export function glyph(ctx, kind, x, y, size, color, back) {
  const half = size / 2;
  ctx.save();
  ctx.translate(x, y);
  ctx.lineJoin = "round";
  ctx.beginPath();
  if (kind === "oom") {
    ctx.moveTo(-half, -half);
    ctx.lineTo(half, half);
    ctx.moveTo(half, -half);
    ctx.lineTo(-half, half);
    ctx.strokeStyle = back;
    ctx.lineWidth = 5;
    ctx.stroke();
    ctx.strokeStyle = color;
    ctx.lineWidth = 2.5;
    ctx.stroke();
    ctx.restore();
    return;
  }
  const turn = { up: Math.PI, down: 0, right: -Math.PI / 2, evict: Math.PI }[kind];
  ctx.rotate(turn);
  ctx.moveTo(-half, -half * 0.8);
  ctx.lineTo(half, -half * 0.8);
  ctx.lineTo(0, half * 0.9);
  ctx.closePath();
  ctx.strokeStyle = back;
  ctx.lineWidth = 3;
  ctx.stroke();
  ctx.fillStyle = kind === "evict" ? back : color;
  ctx.fill();
  if (kind === "evict") {
    ctx.strokeStyle = color;
    ctx.lineWidth = 1.5;
    ctx.stroke();
  }
  ctx.restore();
}

/**
 * A text with an edge of the background's colour.
 * @param {CanvasRenderingContext2D} ctx
 * @param {string} text
 * @param {number} x
 * @param {number} y its middle
 * @param {Theme} theme
 * @param {{color?: string, align?: CanvasTextAlign, weight?: string, halo?: boolean}} [options]
 */
export function write(ctx, text, x, y, theme, options = {}) {
  if (!text) return;
  ctx.save();
  ctx.font = `${options.weight ?? "400"} ${TEXT_PX}px ${theme.font}`;
  ctx.textAlign = options.align ?? "left";
  ctx.textBaseline = "middle";
  if (options.halo !== false) {
    ctx.strokeStyle = theme.bg;
    ctx.lineWidth = 4;
    ctx.lineJoin = "round";
    ctx.strokeText(text, x, y);
  }
  ctx.fillStyle = options.color ?? theme.text;
  ctx.fillText(text, x, y);
  ctx.restore();
}
