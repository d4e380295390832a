// @ts-check
/**
 * Invariant: the chip says what the store holds, in text; its bar is a second way to read the first figure and no more.
 * It is read aloud once, at a run's end; what is not known is "n/a" and no meter.
 */
import { el, setAttr, setText, setValue } from "./dom.js";
import { dress } from "./dress.js";
import { bytes, seconds } from "./format.js";
import { chipFigures, chipParts, movesOf } from "./model.js";

/** @typedef {import("./types").Host} Host */
/** @typedef {import("./types").StoreLike} StoreLike */

const OPENS = "Open the Offload panel";

/**
 * @param {Host} host
 * @param {StoreLike} store
 * @param {object} options
 * @param {() => void} options.open what a press does
 * @param {() => boolean} options.heard whether the end of a run is to be read aloud here
 * @param {() => void} [options.drawn] called after each drawing
 * @returns {{element: HTMLElement, refresh: () => void, off: () => void}}
 */
export function makeChip(host, store, { open, heard, drawn = () => {} }) {
  ensureStyle();
  const element = el("div", "bo-chip");
  const button = el("button", "bo-chip-button");
  button.type = "button";
  button.title = OPENS;
  button.addEventListener("click", open);
  const figures = {
    used: figure("used", ""),
    peak: figure("peak", "bo-chip-more"),
    moves: figure("moves", "bo-chip-more"),
  };
  button.append(...Object.values(figures));
  const meter = el("div", "bo-chip-meter");
  const bar = el("div", "bo-chip-bar");
  meter.append(bar);
  const said = el("span", "bo-chip-said");
  said.setAttribute("aria-live", "polite");
  element.append(button, meter, said);
  const look = dress(element);

  function draw() {
    const now = chipFigures(store);
    const parts = chipParts(now);
    for (const [name, span] of Object.entries(figures)) {
      const part = parts[/** @type {keyof typeof figures} */ (name)];
      setText(span, part.text);
      setValue(span, part.value);
      setAttr(span, "data-unit", part.unit);
    }
    const text = Object.values(parts)
      .map((part) => part.text)
      .join("");
    // Nothing samples the card between two runs: what is known is how the last one left it.
    const when = !now.running && now.used !== null ? ", at the end of the last run" : "";
    setAttr(button, "aria-label", `${text}${when}. ${OPENS}`);
    setAttr(button, "title", when ? `${OPENS} (figures${when})` : OPENS);
    measure(now, when);
    element.dataset.running = String(now.running);
    drawn();
  }

  /** @param {ReturnType<typeof chipFigures>} now @param {string} when */
  function measure({ used, total }, when) {
    const measured = used !== null && total !== null && total > 0;
    meter.hidden = !measured;
    element.dataset.measured = String(measured);
    const share = measured ? Math.min(1, used / total) : 0;
    bar.style.transform = `scaleX(${share.toFixed(4)})`;
    setAttr(meter, "role", measured ? "meter" : null);
    setAttr(meter, "aria-label", measured ? `VRAM in use${when}` : null);
    setAttr(meter, "aria-valuemin", measured ? "0" : null);
    setAttr(meter, "aria-valuemax", measured ? String(total) : null);
    setAttr(meter, "aria-valuenow", measured ? String(Math.min(used, total)) : null);
    setAttr(meter, "aria-valuetext", measured ? `${bytes(used)} of ${bytes(total)}` : null);
  }

  let frame = 0;
  const later = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  };
  let newest = newestEnd(store);
  const rowsCame = () => {
    const first = newestEnd(store);
    // Rows that were there when the page came are no news.
    if (first !== newest && newest !== null && first !== null && heard()) setText(said, ended(store));
    newest = first ?? "";
    later();
  };
  const offs = [store.on("live", later), store.on("run", later), store.on("runs", rowsCame)];
  draw();
  return {
    element,
    refresh() {
      look.refresh();
      draw();
    },
    off() {
      offs.forEach((off) => off());
      cancelAnimationFrame(frame);
      look.off();
      element.remove();
    },
  };
}

/** @param {string} name @param {string} more */
function figure(name, more) {
  const span = el("span", more);
  span.dataset.figure = name;
  return span;
}

/** The newest run that has ended; null before any list of runs came. @param {StoreLike} store */
const newestEnd = (store) => store.runs.find((row) => row.ended)?.prompt_id ?? null;

/** @param {StoreLike} store */
function ended(store) {
  const row = store.runs.find((each) => each.ended);
  if (!row) return "";
  const outcome = row.error === null ? "Run ended" : "Run ended by an error";
  return `${outcome}: VRAM peak ${bytes(row.vram.peak)}, moves ${seconds(movesOf(row))}.`;
}

/** The chip's own style sheet, once per page. */
function ensureStyle() {
  const href = new URL("./chip.css", import.meta.url).href;
  if ([...document.querySelectorAll("link.bo-style")].some((link) => link.getAttribute("href") === href)) return;
  const link = el("link", "bo-style");
  link.rel = "stylesheet";
  link.href = href;
  document.head.append(link);
}
