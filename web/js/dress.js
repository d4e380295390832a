/**
 * Invariant: whoever dresses an element undresses it; one observer of the host's palette serves all of them and
 * goes with the last. The style sheets are added once per document.
 */
import { theme } from "./look.js";

/** @typedef {import("./look.js").Theme} Theme */

/** @type {Map<Element, () => void>} */
const dressed = new Map();
/** @type {MutationObserver | null} */
let observer = null;
/** @type {MediaQueryList | null} */
let motion = null;
let pending = 0;

const SHEETS = ["./offload.css", "./meter.css"];

/** Adds the style sheets beside this file to the page. */
export function ensureStyle() {
  const known = new Set([...document.querySelectorAll("link.bo-style")].map((link) => link.getAttribute("href")));
  for (const sheet of SHEETS) {
    const href = new URL(sheet, import.meta.url).href;
    if (known.has(href)) continue;
    const link = document.createElement("link");
    link.className = "bo-style";
    link.rel = "stylesheet";
    link.href = href;
    link.addEventListener("load", later);
    document.head.append(link);
  }
}

/**
 * Gives `element` the look: class bo-root, the colours as CSS variables (--bo-weights ...), and again when the
 * palette changes.
 * @param {HTMLElement} element
 * @param {(theme: Theme) => void} [changed] called on every change after the first
 * @returns {{theme: () => Theme, refresh: () => void, off: () => void}} refresh: measure again, as once it is mounted
 */
export function dress(element, changed) {
  ensureStyle();
  element.classList.add("bo-root");
  let worn = theme(element);
  let key = put(element, worn);
  const refresh = () => {
    const next = theme(element);
    const nextKey = keyOf(next);
    if (nextKey === key) return;
    worn = next;
    key = put(element, next);
    changed?.(next);
  };
  dressed.set(element, refresh);
  watch();
  return {
    theme: () => worn,
    refresh,
    off: () => {
      dressed.delete(element);
      if (!dressed.size) unwatch();
    },
  };
}

/**
 * @param {Theme} worn
 * @returns {string}
 */
function keyOf(worn) {
  return JSON.stringify(worn);
}

/**
 * @param {HTMLElement} element
 * @param {Theme} worn
 * @returns {string}
 */
function put(element, worn) {
  element.dataset.boTheme = worn.dark ? "dark" : "light";
  element.classList.toggle("bo-still", worn.still);
  const { bg, text, muted, border, grid, raised, weights, activations, others, compute, alarm, focus } = worn;
  const colors = { bg, text, muted, border, grid, raised, weights, activations, others, compute, alarm, focus };
  for (const [name, color] of Object.entries(colors)) element.style.setProperty(`--bo-${name}`, color);
  return keyOf(worn);
}

function watch() {
  if (observer) return;
  observer = new MutationObserver(later);
  for (const place of [document.documentElement, document.body]) {
    if (place) observer.observe(place, { attributes: true, attributeFilter: ["class", "style", "data-theme"] });
  }
  motion = window.matchMedia?.("(prefers-reduced-motion: reduce)") ?? null;
  motion?.addEventListener("change", later);
}

function unwatch() {
  observer?.disconnect();
  observer = null;
  motion?.removeEventListener("change", later);
  motion = null;
  if (pending) cancelAnimationFrame(pending);
  pending = 0;
}

/** A palette is set one variable after another: they are looked at once, in the next frame. */
function later() {
  if (pending) return;
  pending = requestAnimationFrame(() => {
    pending = 0;
    for (const refresh of [...dressed.values()]) refresh();
  });
}
