/**
 * Invariant: a VRAM Report shows one run at a time and says so: the one that is on, else the last one that it was part
 * of; its figures are those of that run's report, to the byte, and what is not known is n/a.
 *
 * While a run is on the figures come from telemetry, at its end from the server's row and report, after a reload from the
 * rows that the server keeps. Nothing here survives in the workflow.
 */
import { makeSteps } from "./bars.js";
import { button, el, setText, setValue } from "./dom.js";
import { bytes, seconds } from "./format.js";
import { HIDDEN, hintOf, HINTS } from "./hintbox.js";
import { executionIds, find, isHere } from "./ids.js";
import { fetchReport } from "./listen.js";
import { LABEL, makeMeter, titleOf } from "./meter.js";
import { movesOf, stepsOf, vramOf } from "./model.js";
import { attachWidget, chain } from "./nodewidget.js";
import { makeSpark } from "./spark.js";
import { pointSteps } from "./steps.js";
import { readReport } from "./wire.js";

/** @typedef {import("./types.d.ts").Host} Host */
/** @typedef {import("./types.d.ts").StoreLike} StoreLike */
/** @typedef {import("./types.d.ts").RunRow} RunRow */
/** @typedef {import("./types.d.ts").Report} Report */
/** @typedef {import("./types.d.ts").Sample} Sample */
/** @typedef {import("./types.d.ts").Step} Step */
/** @typedef {import("./types.d.ts").Vram} Vram */

export const REPORT = "VRAMReport";
const BEFORE = "After the next run: VRAM now and at its peak against the marks, each step's moves, and where the time went.";
const TEXT_HEIGHT = 96;
/** In their order; while a run is on others than after it. */
const FIGURES = /** @type {const} */ ({
  step: ["step", "Seconds of the last step"],
  step_moves: ["step moves", "Seconds of the last step in which it waited for a copy"],
  moves: ["moves", "Seconds that this run waited for weights: onload, stall and evict together"],
  onload: ["onload", "Seconds blocked on a copy outside a step"],
  stall: ["stall", "Seconds in which a step waited for a copy"],
  wall: ["wall", "Seconds of the whole run"],
  moved: ["moved", "Bytes that were copied to VRAM"],
});

/**
 * What one node knows of itself.
 * @typedef {object} Own
 * @property {string | null} prompt the last prompt in which it ran
 * @property {Report | null} record what it was handed then, of a run that went on
 * @property {string} text
 * @property {{prompt: string | null, samples: readonly Sample[]}} course seen live
 */
/**
 * @typedef {object} Shown
 * @property {boolean} live
 * @property {RunRow | null} row
 * @property {Report | null} report
 */

/**
 * @param {any} node
 * @param {Host} host
 * @param {StoreLike} store
 */
export function attachReport(node, host, store) {
  /** @type {Own} */
  const own = { prompt: null, record: null, text: "", course: { prompt: null, samples: [] } };
  let render = () => {};
  chain(node, "onExecuted", (output) => {
    const record = readReport(output?.vram_report?.[0]);
    const lines = Array.isArray(output?.text) ? output.text : [];
    own.prompt = record?.prompt_id ?? store.running?.prompt_id ?? null;
    own.record = record;
    own.text = lines.filter((/** @type {unknown} */ line) => typeof line === "string").join("\n");
    render();
  });
  attachWidget(node, host, {
    name: "report",
    label: "VRAM Report: where the time and the VRAM of the run went",
    height: 48,
    width: 340,
    rest: TEXT_HEIGHT,
    mount: (place) => {
      const view = makeView(place, host);
      /** @type {unknown} */
      let asked = null;
      const draw = () => {
        const shown = shownOf(own, node, host, store);
        const id = shown.row?.prompt_id;
        if (!shown.live && id && !shown.report?.ended && asked !== shown.row) {
          asked = shown.row;
          void fetchReport(host, store, id);
        }
        view.update(shown, own, store);
      };
      const drawing = onFrame(draw);
      render = drawing.ask;
      const offs = [
        ...(/** @type {const} */ (["live", "run", "runs", "report"]).map((kind) => store.on(kind, render))),
        ...[HINTS, HIDDEN].map((id) => host.onSetting(id, () => setTimeout(render))),
      ];
      draw();
      return () => {
        render = () => {};
        drawing.stop();
        for (const off of offs) off();
        view.destroy();
      };
    },
  });
}

/**
 * At most one `work` in an animation frame.
 * @param {() => void} work
 */
function onFrame(work) {
  let frame = 0;
  return {
    ask: () => {
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        work();
      });
    },
    stop: () => cancelAnimationFrame(frame),
  };
}

/**
 * Which run a node shows.
 * @param {Own} own
 * @param {any} node
 * @param {Host} host
 * @param {StoreLike} store
 * @returns {Shown}
 */
function shownOf(own, node, host, store) {
  const root = host.rootGraph();
  const { running } = store;
  if (running && isOn(node, root, store)) return { live: true, row: null, report: null };
  const row = rowOf(own, newestOf(node, root, store.runs), store);
  if (!row) return { live: false, row: null, report: own.record };
  const kept = row.prompt_id === null ? null : store.report(row.prompt_id);
  const found = kept ?? (own.record?.prompt_id === row.prompt_id ? own.record : null);
  if (found?.ended) own.record = found; // the store lets go of the oldest
  return { live: false, row, report: found };
}

/**
 * Whether the run that is on is this node's: the page queued it in this workflow, or the node itself ran in it.
 * @param {any} node
 * @param {any} root
 * @param {Pick<StoreLike, "running" | "live" | "mine" | "sampled" | "ended">} store
 * @returns {boolean}
 */
export function isOn(node, root, store) {
  const { running, mine, sampled, ended } = store;
  if (running === null) return false;
  if (running.prompt_id === null || running.prompt_id === mine) {
    return running.node === null || (find(root, running.node) !== null && isHere(root, store));
  }
  const ids = executionIds(root, node.graph, node);
  const now = store.live?.type === REPORT && ids.includes(running.node ?? "") && isHere(root, store);
  const rows = sampled === running.prompt_id ? ended : [];
  return now || rows.some((row) => row.type === REPORT && ids.includes(row.display));
}

/**
 * The newer of the run in which the node ran last and the newest that was to be its own, had it not failed. Null: what
 * the node was handed itself is newer than both.
 * @param {Pick<Own, "prompt" | "record">} own
 * @param {RunRow | null} newest
 * @param {Pick<StoreLike, "runs">} store
 * @returns {RunRow | null}
 */
export function rowOf({ prompt, record }, newest, { runs }) {
  const ran = prompt === null ? null : (runs.find((one) => one.prompt_id === prompt) ?? null);
  if (ran) return runs.find((one) => one === ran || one === newest) ?? null;
  if (!record || newest === null) return newest;
  return newest.created !== null && record.created !== null && newest.created > record.created ? newest : null;
}

/**
 * A run's text without its hint, which has a place of its own, where it can be hidden.
 * @param {string} text
 */
export const withoutHint = (text) =>
  text
    .split("\n")
    .filter((line) => !line.startsWith("Hint: "))
    .join("\n");

/**
 * The newest run that this node was part of; or that would have been, had it not ended by an error before.
 * @param {any} node
 * @param {any} root
 * @param {readonly RunRow[]} runs
 * @returns {RunRow | null}
 */
export function newestOf(node, root, runs) {
  const ids = executionIds(root, node.graph, node);
  const mine = (/** @type {RunRow} */ row) =>
    row.nodes.some((one) => ids.includes(one.display) && one.type === REPORT) ||
    (row.error !== null &&
      row.nodes.length > 0 &&
      row.nodes.every((one) => {
        const found = find(root, one.display);
        return found && (one.id !== one.display || (found.comfyClass ?? found.type) === one.type);
      }));
  return runs.find(mine) ?? null;
}

/**
 * @param {import("./nodewidget.js").Place} place
 * @param {Host} host
 */
function makeView({ top, rest }, host) {
  const before = el("p", "bo-note", BEFORE);
  Object.assign(before.style, { margin: "0" });
  const meter = makeMeter({ label: LABEL, height: 16 });
  const spark = makeSpark({ label: "VRAM over the run", height: 36 });
  const steps = makeSteps({ label: "Steps", height: 84, compact: true });
  const figures = makeFigures();
  const hint = makeHint(host);
  const text = el("textarea", "bo-report-text comfy-multiline-input");
  text.readOnly = true;
  text.setAttribute("aria-label", "Where time and VRAM went");
  Object.assign(text.style, {
    ...{ flex: "1 1 0px", minHeight: "0", width: "100%", boxSizing: "border-box", resize: "none" },
    fontSize: "max(11px, var(--comfy-textarea-font-size, 11px))",
  });
  top.append(before, meter.element, spark.element, figures.element, steps.element, hint.element);
  rest.append(text);

  /**
   * @param {Shown} shown
   * @param {Own} own
   * @param {StoreLike} store
   */
  const update = (shown, own, store) => {
    const { live, row, report } = shown;
    const run = row ?? report;
    const empty = !live && !run && !own.text;
    before.hidden = !empty;
    for (const part of [meter.element, figures.element, rest]) part.hidden = empty;
    if (live) own.course = { prompt: store.running?.prompt_id ?? null, samples: store.samples };
    const course = live ? store.samples : courseOf(own, report, run);
    const vram = live ? vramOf(store.live) : vramAfter(store, row, report);
    meter.update(vram, titleOf(store, Boolean(run)));
    spark.update([...course], vram);
    const bars = live ? pointSteps(store.points) : report ? stepsOf(report) : [];
    steps.update(bars);
    spark.element.hidden = empty || course.length < 2;
    steps.element.hidden = empty || !bars.length;
    figures.update(live ? figuresNow(store, bars) : figuresOf(run));
    hint.update(live ? null : row);
    const kept = !row || row.prompt_id === own.prompt ? own.text : ""; // another run's text would be wrong
    const said = live
      ? "The run is on: this is what is measured so far. Its text comes at the end."
      : withoutHint(row?.text || kept);
    if (text.value !== said) text.value = said;
  };
  return {
    update,
    destroy: () => {
      for (const part of [meter, spark, steps]) part.destroy();
    },
  };
}

/**
 * The card now, with the marks and the peak of the run that is shown.
 * @param {StoreLike} store
 * @param {RunRow | null} row
 * @param {Report | null} report
 * @returns {Vram}
 */
function vramAfter(store, row, report) {
  const left = vramOf(report ?? row);
  const peak = (row ?? report)?.vram.peak ?? left.peak;
  if (!store.live) return { ...left, peak };
  const now = vramOf(store.live);
  return { ...now, total: now.total ?? left.total, high: left.high ?? now.high, low: left.low ?? now.low, peak };
}

/**
 * What was seen of the run, else what its report says: what torch had, and what others had at the start.
 * @param {Own} own
 * @param {Report | null} report
 * @param {RunRow | Report | null} run
 * @returns {readonly Sample[]}
 */
function courseOf(own, report, run) {
  if (own.course.prompt !== null && own.course.prompt === run?.prompt_id && own.course.samples.length > 1) {
    return own.course.samples;
  }
  const others = report?.vram.others_start ?? 0;
  return (report?.vram_track ?? []).map(({ t, allocated }) => ({ t, used: allocated === null ? null : allocated + others }));
}

function makeFigures() {
  const element = el("dl", "bo-node-figures");
  const columns = "repeat(auto-fit, minmax(62px, 1fr))";
  Object.assign(element.style, { display: "grid", gridTemplateColumns: columns, gap: "4px 12px", margin: "0" });
  /** @type {Map<string, HTMLElement>} */
  const shown = new Map();
  for (const [key, [title, help]] of Object.entries(FIGURES)) {
    const pair = el("div");
    Object.assign(pair.style, { textAlign: "end", whiteSpace: "nowrap" });
    pair.title = help;
    const value = el("dd", "bo-num bo-strong");
    value.style.margin = "0";
    value.dataset.figure = key;
    pair.append(el("dt", "bo-muted", title), value);
    element.append(pair);
    shown.set(key, value);
  }
  /** @param {Partial<Record<keyof typeof FIGURES, number | null>>} values what is left out is not shown */
  const update = (values) => {
    for (const [key, place] of shown) {
      const value = values[/** @type {keyof typeof FIGURES} */ (key)];
      /** @type {HTMLElement} */ (place.parentElement).hidden = value === undefined;
      setText(place, key === "moved" ? bytes(value) : seconds(value));
      setValue(place, value ?? null);
    }
  };
  return { element, update };
}

/**
 * @param {StoreLike} store
 * @param {readonly Step[]} steps so far
 */
function figuresNow({ live }, steps) {
  const stalls = steps.map((step) => step.stall_s);
  const { step_ms = null, stall_ms = null } = live ?? {};
  return {
    step: step_ms === null ? null : step_ms / 1e3,
    step_moves: stall_ms === null ? null : stall_ms / 1e3,
    stall: !stalls.length || stalls.includes(null) ? null : stalls.reduce((/** @type {number} */ all, one) => all + (one ?? 0), 0),
    moved: live?.moved ?? null,
  };
}

/** @param {RunRow | Report | null} run */
function figuresOf(run) {
  const { onload_s = null, stall_s = null, wall_s = null } = run?.totals ?? {};
  return { moves: run ? movesOf(run) : null, onload: onload_s, stall: stall_s, wall: wall_s };
}

/** @param {Host} host */
function makeHint(host) {
  const element = el("div", "bo-node-hint");
  Object.assign(element.style, { display: "flex", flexDirection: "column", gap: "4px", alignItems: "flex-start" });
  const sentence = el("p", "bo-hint-text");
  sentence.style.margin = "0";
  element.append(sentence, button("Open the panel", "Open the panel Offload, which can act on this hint", () => host.openPanel()));
  /** @param {RunRow | null} row */
  const update = (row) => {
    const { hint } = hintOf(row, host.setting(HINTS), host.setting(HIDDEN));
    element.hidden = !hint;
    setText(sentence, hint ? `▶ Hint: ${hint.sentence}` : "");
  };
  update(null);
  return { element, update };
}
