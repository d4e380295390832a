/**
 * Invariant: one grammar of colour, pattern and glyph for canvas and DOM, measured against the background that is
 * really there: text keeps 4.5:1, graphic edges 3:1, in any palette of the host. Nothing happens on import.
 *
 * Colours are Okabe and Ito's, which stay apart for colour-blind people; a pattern and a text say the same again.
 */
import { contrast, cssColor, luminance, mix, over, parseColor, readable } from "./color.js";

/** @typedef {import("./color.js").Rgba} Rgba */
/** @typedef {"solid" | "hatch" | "back" | "dots" | "cross" | "dotted" | "empty" | "unknown"} Fill */
/**
 * @typedef {object} Theme
 * @property {boolean} dark
 * @property {boolean} still no motion is wanted
 * @property {string} bg what everything is measured against
 * @property {string} text
 * @property {string} muted text of less weight, as readable
 * @property {string} border edge of a control or bar
 * @property {string} grid decoration only
 * @property {string} raised a control's surface
 * @property {string} band a stage's surface, less than a control's
 * @property {string} weights
 * @property {string} activations
 * @property {string} others
 * @property {string} compute
 * @property {string} alarm
 * @property {string} focus outlines, and the text of links
 * @property {string[]} components one after another
 * @property {string} font family of the text
 */

const DARK = {
  weights: "#56b4e9",
  activations: "#e69f00",
  others: "#999999",
  compute: "#009e73",
  alarm: "#d55e00",
  focus: "#56b4e9",
  components: ["#56b4e9", "#cc79a7", "#f0e442", "#009e73"],
};
const LIGHT = {
  weights: "#0072b2",
  activations: "#d55e00",
  others: "#6b6b6b",
  compute: "#007a59",
  alarm: "#b3261e",
  focus: "#0072b2",
  components: ["#0072b2", "#a8457c", "#7a6a00", "#007a59"],
};

/** A component's pattern: with four colours and four patterns the first sixteen differ. Dots are the activations'. */
/** @type {Fill[]} */
const FILLS = ["solid", "hatch", "cross", "back"];

/**
 * @param {number} index of the component, in order of appearance
 * @param {Theme} theme
 * @returns {{color: string, fill: Fill}}
 */
export function componentLook(index, theme) {
  const turn = Math.floor(index / theme.components.length);
  return { color: theme.components[index % theme.components.length], fill: FILLS[(index + turn) % FILLS.length] };
}

/** What each part of memory and of a step looks like: the same everywhere. */
/** @type {Record<string, {title: string, fill: Fill}>} */
export const PARTS = {
  weights: { title: "weights", fill: "solid" },
  activations: { title: "activations and cache", fill: "dots" },
  others: { title: "other programs", fill: "hatch" },
  free: { title: "free", fill: "empty" },
  unknown: { title: "n/a", fill: "unknown" },
  compute: { title: "compute", fill: "solid" },
  stall: { title: "stall (waits for a copy)", fill: "dotted" },
  overlapped: { title: "copies behind compute", fill: "hatch" },
};

/**
 * @param {string} key of PARTS
 * @param {Theme} theme
 * @returns {string}
 */
export function partColor(key, theme) {
  switch (key) {
    case "weights":
      return theme.weights;
    case "activations":
      return theme.activations;
    case "others":
      return theme.others;
    case "compute":
    case "overlapped":
      return theme.compute;
    case "stall":
      return theme.text;
    default:
      return theme.muted;
  }
}

/**
 * The colours against one background; the host's own colours are kept where they can be read.
 * @param {string} background
 * @param {{text?: string, muted?: string, border?: string, raised?: string, font?: string, still?: boolean}} [host]
 * @returns {Theme}
 */
export function themeOn(background, host = {}) {
  const bg = over(parseColor(background) ?? [32, 32, 32, 1], [32, 32, 32, 1]);
  const dark = luminance(bg) < 0.2;
  const set = dark ? DARK : LIGHT;
  const at = (/** @type {string | undefined} */ color, /** @type {string} */ fallback, /** @type {number} */ ratio) =>
    cssColor(readable(over(parseColor(color) ?? parse(fallback), bg), bg, ratio));
  const soft = (/** @type {string} */ color, /** @type {number} */ alpha) => {
    const [red, green, blue] = parse(color);
    return cssColor(over([red, green, blue, alpha], bg));
  };
  const text = at(host.text, dark ? "#dddddd" : "#222222", 4.5);
  const muted = at(host.muted, dark ? "#a8a8a8" : "#555555", 4.5);
  /** A surface that texts lie on: as near to the background as they need it. */
  const surface = (/** @type {Rgba} */ color) => {
    for (let share = 0; share < 1; share += 0.2) {
      const tried = mix(color, bg, share);
      if ([text, muted].every((ink) => contrast(parse(ink), tried) >= 4.55)) return cssColor(tried);
    }
    return cssColor(bg);
  };
  const faint = parse(soft(text, 0.08));
  const raised = parseColor(host.raised);
  return {
    dark,
    still: host.still ?? false,
    bg: cssColor(bg),
    text,
    muted,
    border: at(host.border, dark ? "#6e6e6e" : "#888888", 3),
    grid: soft(text, 0.14),
    raised: surface(raised ? over(raised, bg) : faint),
    band: surface(faint),
    weights: at(set.weights, set.weights, 3),
    activations: at(set.activations, set.activations, 3),
    others: at(set.others, set.others, 3),
    compute: at(set.compute, set.compute, 3),
    alarm: at(set.alarm, set.alarm, 4.5),
    focus: at(set.focus, set.focus, 4.5),
    components: set.components.map((color) => at(color, color, 3)),
    font: host.font || "Inter, Arial, sans-serif",
  };
}

/**
 * @param {string} color one of this file's own
 * @returns {Rgba}
 */
function parse(color) {
  return /** @type {Rgba} */ (parseColor(color));
}

/**
 * The theme where `element` is: the background is what is seen behind it, layer over layer.
 * @param {Element | null | undefined} element
 * @returns {Theme}
 */
export function theme(element) {
  const root = document.documentElement;
  const place = element?.isConnected ? element : (document.body ?? root);
  const vars = getComputedStyle(place);
  const read = (/** @type {string} */ name) => vars.getPropertyValue(name).trim();
  return themeOn(cssColor(behind(place)), {
    text: shown(read("--input-text")),
    muted: shown(read("--descrip-text")),
    border: shown(read("--border-color")),
    raised: shown(read("--comfy-input-bg")),
    font: vars.fontFamily,
    still: stillness(),
  });
}

/** @returns {boolean} */
function stillness() {
  return (
    window.matchMedia?.("(prefers-reduced-motion: reduce)").matches === true ||
    document.body?.classList.contains("disable-animations") === true
  );
}

/**
 * @param {Element} place
 * @returns {Rgba}
 */
function behind(place) {
  /** @type {Rgba[]} */
  const layers = [];
  for (let at = /** @type {Element | null} */ (place); at; at = at.parentElement) {
    const color = parseColor(shown(getComputedStyle(at).backgroundColor));
    if (color && color[3] > 0) layers.push(color);
    if (color && color[3] >= 1) break;
  }
  const vars = getComputedStyle(document.documentElement);
  const base = parseColor(shown(vars.getPropertyValue("--comfy-menu-bg").trim()));
  /** @type {Rgba} */
  const white = [255, 255, 255, 1];
  return layers.reduceRight((under, layer) => over(layer, under), base ? over(base, white) : parse("#202020"));
}

/** @type {CanvasRenderingContext2D | null | undefined} */
let probe;

/**
 * The colour as sRGB, whatever notation the host wrote it in (oklch, color-mix, a name).
 * @param {string} color
 * @returns {string} "" for none
 */
function shown(color) {
  if (!color || parseColor(color)) return color;
  if (probe === undefined) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    probe = canvas.getContext("2d", { willReadFrequently: true });
  }
  if (!probe) return "";
  probe.clearRect(0, 0, 1, 1);
  probe.fillStyle = "rgb(0 0 0 / 0)";
  probe.fillStyle = color;
  probe.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = probe.getImageData(0, 0, 1, 1).data;
  return alpha ? `rgb(${red} ${green} ${blue} / ${alpha / 255})` : "";
}
