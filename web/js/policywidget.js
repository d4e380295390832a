/**
 * Invariant: what an Offload Policy shows belongs to the inputs that it shows now: the answer to an older question never
 * takes the place of a newer one's, and an input that a link sets is said to be unknown, not guessed.
 *
 * The server resolves the policy, with the same words and the same errors as in a run; nothing is computed here.
 */
import { el, setText, setValue } from "./dom.js";
import { bytes } from "./format.js";
import { LABEL, makeMeter, titleOf } from "./meter.js";
import { usedOf, vramOf } from "./model.js";
import { attachWidget, chain } from "./nodewidget.js";
import { readMarks } from "./wire.js";

/** @typedef {import("./types.d.ts").Host} Host */
/** @typedef {import("./types.d.ts").StoreLike} StoreLike */
/** @typedef {import("./types.d.ts").Marks} Marks */

export const POLICY = "OffloadPolicy";
/** The fields of a policy; another pack may have put widgets of its own on the node. */
export const FIELDS = [
  ...["mode", "high", "low", "never", "always", "vae_tiling", "before_decode", "on_oom", "headroom", "reserve"],
  ...["pinned_ram", "gc_threshold", "prefetch", "fit_aware", "use_core_dynamic"],
];
/** Milliseconds after the last change of an input. */
export const WAIT = 150;

/**
 * The question to the server, and the inputs that a link sets.
 * @param {any} node
 * @returns {{query: string, linked: string[]}}
 */
export function questionOf(node) {
  const asked = new URLSearchParams();
  /** @type {string[]} */
  const linked = [];
  for (const name of FIELDS) {
    const slot = node.inputs?.findIndex((/** @type {any} */ input) => (input.widget?.name ?? input.name) === name) ?? -1;
    if (slot >= 0 && node.isInputConnected?.(slot)) {
      linked.push(name);
      continue;
    }
    const widget = node.widgets?.find((/** @type {any} */ one) => one.name === name);
    const { value } = widget ?? {};
    if (["string", "number", "boolean"].includes(typeof value)) asked.set(name, String(value));
  }
  return { query: String(asked), linked };
}

/**
 * Asks some time after the last change; only the answer to the last question is told.
 * @param {() => string} question
 * @param {(question: string) => Promise<any>} answer
 * @param {(found: {marks: Marks | null, problem: string | null}) => void} tell
 */
export function makeAsker(question, answer, tell) {
  let turn = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  /** @type {string | null} */
  let last = null;
  const ask = async () => {
    const mine = turn;
    last = question();
    /** @type {{marks: Marks | null, problem: string | null}} */
    let found;
    try {
      const marks = readMarks(await answer(last));
      found = { marks, problem: marks ? null : "the answer is none" };
    } catch (reason) {
      found = { marks: null, problem: reason instanceof Error ? reason.message : String(reason) };
    }
    if (mine === turn) tell(found);
  };
  const later = () => {
    turn += 1;
    clearTimeout(timer);
    timer = setTimeout(() => void ask(), WAIT);
  };
  return {
    /** Something changed that the answer may depend on. */
    later,
    /** Asks only if the inputs are others than those that were asked about. */
    check: () => {
      if (question() !== last) later();
    },
    stop: () => {
      turn += 1;
      clearTimeout(timer);
      last = null;
    },
  };
}

/**
 * @param {any} node
 * @param {Host} host
 * @param {StoreLike} store
 */
export function attachPolicy(node, host, store) {
  let changed = () => {};
  for (const widget of node.widgets ?? []) if (FIELDS.includes(widget.name)) chain(widget, "callback", () => changed());
  for (const name of ["onConfigure", "onConnectionsChange"]) chain(node, name, () => changed());
  attachWidget(node, host, {
    name: "policy",
    label: "Offload Policy: what it means on this card",
    height: 150,
    mount: ({ top }) => {
      const view = makeView(top);
      /** @type {{marks: Marks | null, problem: string | null}} */
      let found = { marks: null, problem: null };
      const draw = () => view.update(found, questionOf(node).linked, store);
      const asker = makeAsker(
        () => questionOf(node).query,
        (query) => host.get(`/offload/marks?${query}`),
        (next) => {
          found = next;
          draw();
        },
      );
      changed = () => {
        draw();
        asker.later();
      };
      const offs = [
        store.on("live", () => {
          draw();
          asker.check();
        }),
        store.on("run", draw), // "now" is said while one is on
        // What a run learned may change what fits.
        store.on("runs", asker.later),
        // Undo, a script, or another pack may set a widget without a word to it.
        host.on("graphChanged", asker.check),
      ];
      changed();
      return () => {
        changed = () => {};
        asker.stop();
        for (const off of offs) off();
        view.destroy();
      };
    },
  });
}

/** @param {HTMLElement} top */
function makeView(top) {
  const meter = makeMeter({ label: LABEL, height: 16, legend: false });
  const rows = makeMarks();
  const sentence = el("p", "bo-note");
  sentence.style.margin = "0";
  sentence.dataset.figure = "sentence";
  const problem = el("p", "bo-alarm");
  problem.setAttribute("role", "status");
  Object.assign(problem.style, { margin: "0", color: "var(--bo-alarm)", overflowWrap: "anywhere" });
  top.append(meter.element, rows.element, sentence, problem);

  /**
   * @param {{marks: Marks | null, problem: string | null}} found
   * @param {string[]} linked
   * @param {StoreLike} store
   */
  const update = ({ marks, problem: failed }, linked, store) => {
    const now = vramOf(store.live);
    const set = marks?.error ? null : marks;
    meter.update(
      { ...now, total: marks?.total ?? now.total, high: set?.high ?? null, low: set?.low ?? null },
      titleOf(store, usedOf(now) !== null),
    );
    rows.update(marks, linked);
    const links = linked.length ? `Set by a link, so known in a run only: ${linked.join(", ")}.` : "";
    setText(sentence, [marks?.error ? "" : (marks?.sentence ?? ""), links].filter(Boolean).join(" "));
    sentence.hidden = !sentence.textContent;
    const wrong = marks?.error ?? (failed === null ? null : `the marks are not known: ${failed}`);
    setText(problem, wrong === null ? "" : `✕ ${wrong}`);
    problem.hidden = wrong === null;
    rows.element.hidden = wrong !== null;
  };
  return { update, destroy: meter.destroy };
}

const ROWS = /** @type {const} */ ([
  ["mode", "mode"],
  ["high", "▼ high mark"],
  ["low", "▲ low mark"],
  ["available", "available"],
]);

/** Where a value comes from, in words. */
const SOURCES = new Map([
  ["user", "set here"],
  ["profile", "this card's profile"],
  ["fit", "the run fits"],
  ["learned", "learned from runs"],
  ["device", "the device's own"],
]);

function makeMarks() {
  const element = el("dl", "bo-node-marks");
  Object.assign(element.style, { display: "grid", gridTemplateColumns: "auto auto 1fr", gap: "0 10px", margin: "0" });
  element.style.lineHeight = "16px"; // the triangles may come from another font
  /** @type {Map<string, {value: HTMLElement, source: HTMLElement}>} */
  const cells = new Map();
  for (const [key, title] of ROWS) {
    const value = el("dd", "bo-num bo-strong");
    const source = el("dd", "bo-muted");
    for (const cell of [value, source]) cell.style.margin = "0";
    value.style.textAlign = "right";
    value.dataset.figure = key;
    element.append(el("dt", "bo-muted", title), value, source);
    cells.set(key, { value, source });
  }
  /**
   * @param {Marks | null} marks
   * @param {string[]} linked
   */
  const update = (marks, linked) => {
    for (const [key, { value, source }] of cells) {
      const known = marks && !marks.error && !linked.includes(key) ? marks : null;
      if (key === "mode") setText(value, known?.mode ?? "n/a");
      else {
        const figure = known?.[/** @type {"high" | "low" | "available"} */ (key)] ?? null;
        // On a card that is known, no figure means that there is no such mark.
        setText(value, figure === null && key !== "available" && known?.total ? "none" : bytes(figure));
        setValue(value, figure);
      }
      setText(source, linked.includes(key) ? "set by a link" : known ? sourceOf(known, key) : "");
    }
  };
  return { element, update };
}

/**
 * @param {Marks} marks
 * @param {string} key
 */
function sourceOf(marks, key) {
  if (key === "available") return marks.total === null ? "" : `of ${bytes(marks.total)}`;
  const source = marks.sources[key];
  return source === undefined ? "" : (SOURCES.get(source) ?? `from ${source}`);
}
