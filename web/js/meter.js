/**
 * Invariant: a part's width is its share of the bar, to the pixel; the marks stand where their bytes are; what is not
 * known is hatched and says n/a. The same figures are written below, so nothing is told by colour alone.
 */
import { dress } from "./dress.js";
import { el, setAttr, setText, setValue } from "./dom.js";
import { bytes, pair } from "./format.js";
import { placeLabels } from "./labels.js";
import { makeLegend } from "./legend.js";
import { PARTS } from "./look.js";
import { textWidth } from "./paint.js";
import { barOf, known } from "./scale.js";

/** @typedef {import("./types.d.ts").Vram} Vram */
/** @typedef {import("./scale.js").Bar} Bar */

const KEYS = /** @type {const} */ (["weights", "activations", "unknown", "others", "free"]);
/** What the bar is while a run is on; and after it, as nothing is asked of the device while none is on. */
export const LABEL = "VRAM now";
const AT_END = "VRAM at the end of the last run";
/** @param {{running: unknown}} store @param {boolean} [known] whether there is anything of a run */
export const titleOf = ({ running }, known = true) => (running || !known ? LABEL : AT_END);
const UNACCOUNTED = "not accounted for";
const LANE = 14;
/** Room for a mark's triangle, between its label and the bar. */
const GLYPH = 6;
/** Less than this has no room for a text. */
const LEAST_TEXT = 30;

/**
 * The bar of what the card holds now: weights | activations and cache | other programs | free.
 * @param {{label: string, height?: number, legend?: boolean}} options height: of the bar itself, in pixels
 * @returns {{element: HTMLElement, update: (vram: Partial<Vram> | null, said?: string) => void, destroy: () => void}}
 */
export function makeMeter({ label, height = 18, legend = true }) {
  const element = el("div", "bo-meter");
  const head = el("div", "bo-head");
  const used = el("span", "bo-num bo-strong");
  const peak = el("span", "bo-num");
  used.dataset.figure = "used";
  peak.dataset.figure = "peak";
  const figures = el("span", "bo-figures");
  figures.append(used, peak);
  const title = el("span", "bo-title", label);
  head.append(title, figures);

  const gauge = el("div", "bo-gauge");
  gauge.tabIndex = 0;
  const bar = el("div", "bo-bar");
  bar.style.height = `${height}px`;
  const segments = new Map(KEYS.map((key) => [key, segmentOf(key)]));
  bar.append(...segments.values());
  const above = el("div", "bo-lane");
  const below = el("div", "bo-lane");
  const marks = { high: markOf("high"), low: markOf("low"), peak: markOf("peak") };
  gauge.append(above, bar, below, ...Object.values(marks).map((mark) => mark.line));
  for (const { text } of Object.values(marks)) gauge.append(text);
  const key = makeLegend("What the bar shows");
  element.append(head, gauge);
  if (legend) element.append(key.element);

  /** @type {Bar} */
  let drawn = barOf(null);
  let width = 0;
  const place = () => {
    if (!(width > 0)) return;
    placeUnknown(drawn, /** @type {HTMLElement} */ (segments.get("unknown")), width);
    placeMarks(drawn, marks, { above, below }, width, height, look.theme().font);
  };
  const look = dress(element, place);
  const resized = new ResizeObserver(([entry]) => {
    width = entry.contentRect.width;
    look.refresh();
    place();
  });
  resized.observe(gauge);

  /** @param {Partial<Vram> | null} vram @param {string} [said] what the bar is, where it is not its label */
  const update = (vram, said = label) => {
    setText(title, said);
    drawn = barOf(vram);
    for (const [part, segment] of segments) {
      const found = drawn.parts.find((one) => one.key === part);
      const share = found ? found.to - found.from : 0;
      segment.style.left = `${(found?.from ?? 0) * 100}%`;
      segment.style.width = `${share * 100}%`;
      segment.hidden = share <= 0;
      setValue(segment, found?.bytes ?? null);
    }
    const unknown = segments.get("unknown");
    if (unknown) setText(unknown.children[0], unknown.hidden ? "" : "n/a");
    const top = known(vram?.peak);
    setText(used, pair(drawn.used, drawn.total));
    setValue(used, drawn.used);
    setText(peak, `peak ${bytes(top)}`);
    setValue(peak, top);
    key.update(legendOf(drawn));
    speak(gauge, said, drawn);
    place();
  };
  update(null);
  return {
    element,
    update,
    destroy: () => {
      resized.disconnect();
      look.off();
    },
  };
}

/**
 * The n/a stands in the unknown part where no mark goes through it.
 * @param {Bar} drawn
 * @param {HTMLElement} segment
 * @param {number} width
 */
function placeUnknown(drawn, segment, width) {
  const hole = drawn.parts.find((part) => part.key === "unknown");
  const room = hole ? (hole.to - hole.from) * width : 0;
  const text = /** @type {HTMLElement} */ (segment.children[0]);
  const free = [0.5, 0.25, 0.75, 0.12, 0.88].find((share) => {
    const middle = (hole?.from ?? 0) * width + room * share;
    const inside = room * Math.min(share, 1 - share) >= LEAST_TEXT / 2;
    return inside && drawn.marks.every((mark) => Math.abs(mark.at * width - middle) > LEAST_TEXT / 2);
  });
  text.hidden = free === undefined;
  text.style.left = `${(free ?? 0.5) * 100}%`;
}

/** @param {typeof KEYS[number]} key */
function segmentOf(key) {
  const segment = el("div", `bo-seg bo-fill-${PARTS[key].fill}`);
  segment.dataset.part = key;
  if (key === "unknown") segment.append(el("span", "bo-seg-text"));
  segment.style.setProperty("--bo-ink", `var(--bo-${key}, var(--bo-muted))`);
  return segment;
}

/** @param {"high" | "low" | "peak"} kind */
function markOf(kind) {
  const line = el("div", `bo-mark bo-mark-${kind}`);
  line.dataset.mark = kind;
  return { line, text: el("span", `bo-mark-text bo-mark-text-${kind}`) };
}

/**
 * High and peak are labelled above the bar, low below it; a label without room goes to the other side.
 * @param {Bar} drawn
 * @param {Record<"high" | "low" | "peak", {line: HTMLElement, text: HTMLElement}>} marks
 * @param {{above: HTMLElement, below: HTMLElement}} lanes
 * @param {number} width
 * @param {number} height
 * @param {string} font
 */
function placeMarks(drawn, marks, lanes, width, height, font) {
  const texts = drawn.marks.map((mark) => ({
    mark,
    // The peak's figure stands in the head.
    text: mark.key === "peak" ? "peak" : `${mark.key} ${bytes(mark.bytes)}${mark.beyond ? " →" : ""}`,
    at: mark.at * width,
  }));
  const label = (/** @type {typeof texts[number]} */ one) => ({ at: one.at, width: textWidth(one.text, font) });
  const top = texts.filter((one) => one.mark.key !== "low");
  const high = placeLabels(top.map(label), width, 1);
  const low = texts.filter((one) => one.mark.key === "low" || high[top.indexOf(one)].row < 0);
  low.sort((a, b) => Number(b.mark.key === "low") - Number(a.mark.key === "low"));
  const under = placeLabels(low.map(label), width, 2);
  const rows = Math.max(0, ...under.map((one) => one.row + 1));
  const upper = high.some((one) => one.row === 0) ? LANE + GLYPH : GLYPH;
  lanes.above.style.height = `${upper}px`;
  lanes.below.style.height = `${rows * LANE + GLYPH}px`;
  for (const kind of /** @type {const} */ (["high", "low", "peak"])) {
    const one = texts.find(({ mark }) => mark.key === kind);
    const { line, text } = marks[kind];
    line.hidden = !one;
    text.hidden = true;
    if (!one) continue;
    const over = high[top.indexOf(one)];
    const spot = over && over.row >= 0 ? over : under[low.indexOf(one)];
    const half = kind === "peak" ? 0.5 : 1;
    line.style.left = `${Math.min(Math.max(one.at - half, 0), width - half * 2)}px`;
    line.style.top = `${upper - 2}px`;
    line.style.height = `${height + 4}px`;
    setValue(line, one.mark.bytes);
    line.classList.toggle("bo-beyond", one.mark.beyond);
    if (spot.row < 0) continue;
    text.hidden = false;
    setText(text, one.text);
    text.style.left = `${spot.left}px`;
    text.style.top = spot === over ? "0" : `${upper + height + GLYPH + spot.row * LANE}px`;
  }
}

/**
 * @param {Bar} drawn
 * @returns {import("./legend.js").LegendItem[]}
 */
function legendOf(drawn) {
  return drawn.parts
    .filter((part) => part.key !== "unknown" || part.to > part.from)
    .map((part) => ({
      key: part.key,
      title: part.key === "unknown" ? UNACCOUNTED : PARTS[part.key].title,
      short: SHORT[part.key],
      fill: PARTS[part.key].fill,
      figure: bytes(part.bytes),
      value: part.bytes,
    }));
}

/** @type {Record<string, string | undefined>} */
const SHORT = { activations: "activations", others: "others", unknown: "unknown" };

/**
 * The bar in words, whole.
 * @param {Bar} drawn
 * @returns {string}
 */
export function spokenOf(drawn) {
  const parts = drawn.parts
    .filter((part) => part.key !== "unknown" || part.bytes !== null)
    .map((part) => `${part.key === "unknown" ? UNACCOUNTED : PARTS[part.key].title} ${bytes(part.bytes)}`);
  const marks = drawn.marks.map((mark) => `${mark.key}${mark.key === "peak" ? "" : " mark"} ${bytes(mark.bytes)}`);
  return `${pair(drawn.used, drawn.total)} in use: ${[parts.join(", "), ...marks].join("; ")}`;
}

/**
 * @param {HTMLElement} gauge
 * @param {string} label
 * @param {Bar} drawn
 */
function speak(gauge, label, drawn) {
  const text = spokenOf(drawn);
  const exact = drawn.used !== null;
  // A meter must have a number; what has none is a picture with a text.
  setAttr(gauge, "role", exact ? "meter" : "img");
  setAttr(gauge, "aria-label", exact ? label : `${label}: ${text}`);
  setAttr(gauge, "aria-valuemin", exact ? "0" : null);
  setAttr(gauge, "aria-valuemax", exact ? String(Math.round(drawn.extent)) : null);
  setAttr(gauge, "aria-valuenow", exact ? String(drawn.used) : null);
  setAttr(gauge, "aria-valuetext", exact ? text : null);
}
