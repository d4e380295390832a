// @ts-check
/**
 * Invariant: the figures in the head are the run's own, exact behind the shown text, in places that stay the same
 * whether a run is on or has ended; what is not known is n/a.
 */
import { button, el, setText, setValue } from "./dom.js";
import { bytes, count, pair, seconds } from "./format.js";
import { cleanSteps, pointSteps, sumOf } from "./steps.js";

/** @typedef {import("./types").Host} Host */
/** @typedef {import("./types").RunRow} RunRow */
/** @typedef {import("./types").StoreLike} StoreLike */
/** @typedef {{wall: number | null, peak: number | null, total: number | null, moves: number | null,
 *   moved_bytes: number | null, stall: number | null, onload: number | null}} Figures */

/** @param {Figures} figures */
const peakText = ({ peak, total }) => (total === null ? bytes(peak) : pair(peak, total));

/** @type {[keyof Figures, string, string, (figures: Figures) => string][]} */
const SHOWN = [
  ["wall", "Time", "From the first mark of the run to its last", ({ wall }) => seconds(wall)],
  ["peak", "Peak", "Most VRAM that was in use at once", peakText],
  ["moves", "Moves", "Copies from RAM to VRAM; evictions copy nothing", ({ moves }) => count(moves)],
  ["moved_bytes", "Moved", "Bytes copied from RAM to VRAM", (figures) => bytes(figures.moved_bytes)],
  ["onload", "Onload", "Blocked on a copy outside a step", ({ onload }) => seconds(onload)],
  ["stall", "Stall", "Compute waited for a copy, inside a step", ({ stall }) => seconds(stall)],
];

/** @param {RunRow} run @returns {Figures} */
export function figuresOf({ totals, vram }) {
  return {
    wall: totals.wall_s,
    peak: vram.peak,
    total: vram.total,
    moves: totals.move_count,
    moved_bytes: totals.bytes_h2d,
    stall: totals.stall_s,
    onload: totals.onload_s,
  };
}

/**
 * What is known while the run is on: moves and onload are counted at its end.
 * @param {Pick<StoreLike, "live" | "points">} store @returns {Figures}
 */
export function liveFigures({ live, points }) {
  /** @type {Figures} */
  const none = { wall: null, peak: null, total: null, moves: null, moved_bytes: null, stall: null, onload: null };
  if (!live) return none;
  const stall = sumOf(cleanSteps(pointSteps(points)), "stall_s");
  return { ...none, wall: live.t, peak: live.vram.peak, total: live.vram.total, moved_bytes: live.moved, stall };
}

export function makeFigures() {
  const element = el("dl", "bo-panel-figures");
  const cells = SHOWN.map(([key, title, help, say]) => {
    const group = el("div", "bo-panel-figure");
    const name = el("dt", "bo-panel-name", title);
    const value = el("dd", "bo-panel-value bo-num", "n/a");
    group.title = help;
    value.dataset.figure = key;
    group.append(name, value);
    element.append(group);
    return { key, value, say };
  });
  return {
    element,
    /** @param {Figures} figures */
    update(figures) {
      for (const { key, value, say } of cells) {
        setText(value, say(figures));
        setValue(value, figures[key]);
      }
    },
  };
}

/** "resident", with what else matters about how the run went. @param {RunRow} run */
export function verdictOf(run) {
  const parts = [(run.verdict ?? "verdict n/a").replaceAll("_", " ")];
  if (run.error !== null) parts.push(`✕ ${run.error.slice(0, 200)}`);
  else if (!run.complete) parts.push("incomplete");
  if (run.world === "dynamic") parts.push("ComfyUI pages the models itself, its moves are not known");
  if (run.world === "observe") parts.push("stock models only, the host's moves are not known");
  if (run.output_neutral === false) parts.push("output not bit-equal to mode none");
  return parts.join(" · ");
}

/**
 * The two downloads of a run.
 * @param {Host} host @param {(text: string | null) => void} told what went wrong, null: nothing
 */
export function makeDownloads(host, told) {
  const element = el("div", "bo-panel-downloads");
  /** @type {string | null} */
  let id = null;
  /** @param {"report" | "trace"} kind */
  const fetch = async (kind) => {
    const mine = id;
    if (mine === null) return;
    try {
      const body = await host.get(`/offload/${kind}/${encodeURIComponent(mine)}`);
      host.save(filename(kind, mine), JSON.stringify(body, null, kind === "report" ? 1 : 0));
      told(null);
    } catch (error) {
      told(`The ${kind} could not be read (${reason(error)}). Press the button again when the server answers.`);
    }
  };
  const report = button("Report", "Download the report of this run as JSON", () => void fetch("report"));
  const help = "Download the trace of this run, for ui.perfetto.dev or chrome://tracing";
  const trace = button("Trace", help, () => void fetch("trace"));
  report.classList.add("bo-download-report");
  trace.classList.add("bo-download-trace");
  element.append(report, trace);
  return {
    element,
    /** @param {string | null} next null: there is nothing to download yet */
    update(next) {
      id = next;
      report.disabled = trace.disabled = next === null;
    },
  };
}

/** A name that every file system takes, whatever the id is. @param {string} kind @param {string} id */
export const filename = (kind, id) => `offload-${kind}_${id.replace(/[^\w.-]/g, "_").slice(0, 80)}.json`;

/** @param {unknown} error */
export const reason = (error) => (error instanceof Error ? error.message : String(error)).slice(0, 200);
