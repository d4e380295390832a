/**
 * Invariant: what a pointer can do, the keys can do; a key or wheel that we act on goes no further, any other is
 * left to the host, whose own shortcuts listen on the window.
 */

/** @typedef {import("./scale.js").View} View */

/**
 * @typedef {object} Control
 * @property {HTMLCanvasElement} canvas
 * @property {View} view
 * @property {() => {left: number, width: number}} plot where on the canvas the view lies
 * @property {() => void} changed the view is another
 * @property {(x: number | null) => void} hover x in CSS pixels of the canvas; null: the pointer left
 * @property {(x: number) => void} [pick] a click that was no drag
 * @property {(key: string) => boolean} key the module's own keys; true: done
 * @property {boolean} [fixed] no zoom here, as on a node, where the wheel and the keys are the graph's
 */

/** Pixels that a hand may tremble during a click. */
const TREMBLE = 4;

/**
 * Ctrl and wheel, + and - zoom; drag pans; 0 shows all.
 * @param {Control} control
 * @returns {() => void} detach
 */
export function attachControl(control) {
  const { canvas, view, changed } = control;
  /** @type {{x: number, moved: boolean, id: number} | null} */
  let drag = null;
  const xOf = (/** @type {MouseEvent} */ event) => {
    const box = canvas.getBoundingClientRect();
    // On a node the whole canvas is scaled by the zoom of the graph.
    return box.width > 0 ? ((event.clientX - box.left) * canvas.offsetWidth) / box.width : 0;
  };
  const shareOf = (/** @type {number} */ x) => {
    const { left, width } = control.plot();
    return width > 0 ? Math.min(1, Math.max(0, (x - left) / width)) : 0.5;
  };

  /** @param {WheelEvent} event */
  const wheel = (event) => {
    if (control.fixed || (!event.ctrlKey && !event.metaKey)) return;
    take(event);
    view.zoom(Math.exp(-Math.sign(event.deltaY) * Math.min(Math.abs(event.deltaY), 120) * 0.003), shareOf(xOf(event)));
    changed();
  };
  /** @param {PointerEvent} event */
  const down = (event) => {
    if (event.button !== 0) return;
    event.stopPropagation();
    drag = { x: xOf(event), moved: false, id: event.pointerId };
    canvas.setPointerCapture?.(event.pointerId);
  };
  /** @param {PointerEvent} event */
  const move = (event) => {
    const x = xOf(event);
    if (!drag) return control.hover(x);
    if (!drag.moved && Math.abs(x - drag.x) < TREMBLE) return;
    drag.moved = true;
    const { width } = control.plot();
    if (width > 0 && view.zoomed) {
      view.pan((drag.x - x) / width);
      changed();
    }
    drag.x = x;
  };
  /** @param {PointerEvent} event */
  const up = (event) => {
    if (!drag) return;
    const clicked = !drag.moved && event.type === "pointerup";
    drag = null;
    if (clicked) control.pick?.(xOf(event));
  };
  const leave = () => {
    if (!drag) control.hover(null);
  };
  /** @param {KeyboardEvent} event */
  const key = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (control.key(event.key) || (!control.fixed && zoomKey(view, event.key, changed))) take(event);
  };

  canvas.addEventListener("wheel", wheel, { passive: false });
  canvas.addEventListener("pointerdown", down);
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("keydown", key);
  return () => {
    canvas.removeEventListener("wheel", wheel);
    canvas.removeEventListener("pointerdown", down);
    canvas.removeEventListener("pointermove", move);
    canvas.removeEventListener("pointerup", up);
    canvas.removeEventListener("pointercancel", up);
    canvas.removeEventListener("pointerleave", leave);
    canvas.removeEventListener("keydown", key);
  };
}

/**
 * @param {View} view
 * @param {string} key
 * @param {() => void} changed
 */
function zoomKey(view, key, changed) {
  if (key === "+" || key === "=") view.zoom(1.5);
  else if (key === "-" || key === "_") view.zoom(1 / 1.5);
  else if (key === "0") view.reset();
  else return false;
  changed();
  return true;
}

/** @param {Event} event */
function take(event) {
  event.preventDefault();
  event.stopPropagation();
}
