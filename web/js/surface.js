/**
 * Invariant: a canvas is drawn at most once a frame, in device pixels, only while it is in the page and has a
 * size; after destroy() nothing of it is left running.
 */
import { dress } from "./dress.js";

/** @typedef {import("./look.js").Theme} Theme */
/** @typedef {{width: number, height: number, theme: Theme}} Box */

const REST_MS = 250;

/**
 * A canvas with a name, focusable, as wide as its place.
 * @param {object} options
 * @param {HTMLElement} options.root dressed; the canvas is somewhere in it
 * @param {string} options.label
 * @param {number} options.height CSS pixels
 * @param {(ctx: CanvasRenderingContext2D, box: Box) => void} options.draw
 * @returns {{canvas: HTMLCanvasElement, redraw: () => void, width: () => number, theme: () => Theme,
 *   destroy: () => void}}
 */
export function makeSurface({ root, label, height, draw }) {
  const canvas = document.createElement("canvas");
  canvas.className = "bo-canvas";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  canvas.tabIndex = 0;
  canvas.style.height = `${height}px`;
  canvas.width = canvas.height = 1;
  let width = 0;
  let frame = 0;
  let gone = false;
  let drawn = 0;
  let timer = 0;

  const redraw = () => {
    if (!frame && !gone) frame = requestAnimationFrame(paint);
  };
  const look = dress(root, redraw);
  const paint = () => {
    frame = 0;
    const ctx = width > 0 && canvas.isConnected ? canvas.getContext("2d") : null;
    if (!ctx) return;
    const scale = scaleOf(canvas);
    drawn = scale;
    const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
    ctx.setTransform(across / width, 0, 0, down / height, 0, 0);
    ctx.clearRect(0, 0, width, height);
    draw(ctx, { width, height, theme: look.theme() });
  };
  const resized = new ResizeObserver(([entry]) => {
    width = entry.contentRect.width;
    look.refresh();
    redraw();
  });
  resized.observe(canvas);
  window.addEventListener("resize", redraw);
  // A graph is zoomed by the wheel, and nothing is told of it: looked at when the wheel rests.
  const rest = () => {
    timer = 0;
    if (drawn && canvas.isConnected && scaleOf(canvas) !== drawn) redraw();
  };
  const turned = () => {
    clearTimeout(timer);
    timer = window.setTimeout(rest, REST_MS);
  };
  window.addEventListener("wheel", turned, { passive: true, capture: true });

  return {
    canvas,
    redraw,
    width: () => width,
    theme: look.theme,
    destroy: () => {
      gone = true;
      resized.disconnect();
      window.removeEventListener("resize", redraw);
      window.removeEventListener("wheel", turned, { capture: true });
      clearTimeout(timer);
      cancelAnimationFrame(frame);
      look.off();
      canvas.width = canvas.height = 1;
    },
  };
}

/**
 * Device pixels to a CSS pixel, with the zoom of the graph where the canvas lies on a node.
 * @param {HTMLCanvasElement} canvas
 */
function scaleOf(canvas) {
  const zoom = canvas.offsetWidth > 0 ? canvas.getBoundingClientRect().width / canvas.offsetWidth : 1;
  const scale = (window.devicePixelRatio || 1) * Math.max(0.5, zoom || 1);
  return Math.min(4, Math.round(scale * 100) / 100);
}
