// @ts-check
/**
 * Invariant: the panel shows the run that the user picked, else the one that is on, else the newest; what the server
 * did not answer is asked for again, ever more seldom, and said in words until it comes.
 *
 * The server keeps the runs, so that a reload of the page loses none.
 */
import { bytes, seconds } from "./format.js";
import { readReport, readRow } from "./wire.js";

/** @typedef {import("./types").Host} Host */
/** @typedef {import("./types").RunRow} RunRow */
/** @typedef {import("./types").StoreLike} StoreLike */
/** @typedef {{kind: "now" | "empty"} | {kind: "run", id: string}} View */
/** @typedef {{value: string, text: string}} Option */

export const LIMIT = 50;
export const NOW = "now:";
const FIRST_WAIT = 2000;
const LAST_WAIT = 30000;

/**
 * What is to be seen, from what is on, kept and picked. `waiting`: a run ended whose row has not come yet.
 * @param {{running: unknown, runs: readonly RunRow[], selected: string | null, waiting: boolean}} state
 * @returns {View}
 */
export function viewOf({ running, runs, selected, waiting }) {
  if (selected !== null) return { kind: "run", id: selected };
  if (running || waiting) return { kind: "now" };
  const newest = runs.find((row) => row.prompt_id !== null);
  return newest?.prompt_id ? { kind: "run", id: newest.prompt_id } : { kind: "empty" };
}

/**
 * What a pick means: null follows the run that is on and then the newest. While a run is on, every other pick stays;
 * with none on, the newest is where following leads anyway.
 * @param {string} value @param {{running: unknown, runs: readonly RunRow[]}} state @returns {string | null}
 */
export function pickedOf(value, { running, runs }) {
  if (value === NOW || value === "") return null;
  return !running && runs.find((row) => row.prompt_id !== null)?.prompt_id === value ? null : value;
}

/** "19:21:42 · sequential · 16.5 ms · peak 8.5 MiB · streamed", with a mark and the error where it ended by one.
 * @param {RunRow} row @param {Date} [now] */
export function runLabel(row, now = new Date()) {
  const parts = [
    timeOf(row.created, now),
    row.mode ?? (row.world === "observe" ? "stock" : "mode n/a"),
    seconds(row.totals.wall_s),
    `peak ${bytes(row.vram.peak)}`,
    (row.verdict ?? "verdict n/a").replaceAll("_", " "),
  ];
  if (row.error !== null && row.verdict !== "error") parts.push("error");
  return `${row.error === null ? "" : "✕ "}${parts.join(" · ")}`;
}

/** The time of day here, after the day where that was not today. @param {string | null} created @param {Date} now */
export function timeOf(created, now) {
  const at = created === null ? new Date(Number.NaN) : new Date(created);
  if (Number.isNaN(at.getTime())) return "time n/a";
  const two = (/** @type {number} */ value) => String(value).padStart(2, "0");
  const clock = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  if (at.toDateString() === now.toDateString()) return clock;
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${clock}`;
}

/** @param {readonly RunRow[]} runs @param {boolean} now whether a run is on @param {Date} [date] @returns {Option[]} */
export function optionsOf(runs, now, date = new Date()) {
  const seen = new Set();
  /** @type {Option[]} */
  const options = now ? [{ value: NOW, text: "Now: the run that is on" }] : [];
  for (const row of runs) {
    if (row.prompt_id === null || seen.has(row.prompt_id) || seen.size >= LIMIT) continue;
    seen.add(row.prompt_id);
    options.push({ value: row.prompt_id, text: runLabel(row, date) });
  }
  return options;
}

/**
 * A list of the host page's own kind, so that it works by keyboard and by screen reader as any other.
 * @param {(value: string) => void} onPick
 */
export function makePicker(onPick) {
  const element = document.createElement("select");
  element.className = "bo-picker";
  element.setAttribute("aria-label", "Run");
  element.addEventListener("change", () => onPick(element.value));
  // A letter looks for a run; the host's own shortcuts are letters, too.
  element.addEventListener("keydown", (event) => {
    if (event.key.length === 1 && !event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
  });
  let drawn = "";
  return {
    element,
    /** @param {Option[]} options @param {string} value */
    update(options, value) {
      const shown = options.length ? options : [{ value: "", text: "No run yet" }];
      const key = JSON.stringify(shown);
      // Written anew only when it changed: an open list stays as it is.
      if (key !== drawn) element.replaceChildren(...shown.map(optionElement));
      drawn = key;
      if (!shown.some((option) => option.value === value)) value = shown[0].value;
      if (element.value !== value) element.value = value;
      element.disabled = !options.length;
    },
  };
}

/** @param {Option} option */
function optionElement({ value, text }) {
  const element = document.createElement("option");
  element.value = value;
  element.textContent = text;
  return element;
}

/**
 * Asks for the list of runs and for reports, puts them into the store, and asks again what failed.
 * @param {Host} host @param {StoreLike} store @param {() => void} told what failed, or works again, has changed
 */
export function makeLoader(host, store, told) {
  const runs = makeRetry(async () => {
    const body = await host.get(`/offload/runs?limit=${LIMIT}`);
    if (!Array.isArray(body?.runs)) throw new Error("the answer is no list of runs");
    store.setRuns(body.runs.map(readRow).filter((/** @type {RunRow | null} */ row) => row !== null));
  }, told);
  /** @type {Map<string, ReturnType<typeof makeRetry>>} by prompt id: those under way, or that failed */
  const reports = new Map();
  /** Read, though the run had not ended: its row tells when there is more. @type {Set<string>} */
  const partial = new Set();
  /** @param {string} id */
  const ask = (id) =>
    makeRetry(async () => {
      const read = readReport(await host.get(`/offload/report/${encodeURIComponent(id)}`));
      if (!read) throw new Error("the answer is no report");
      read.prompt_id ??= id;
      // Another run's report would be shown under a wrong name.
      if (read.prompt_id !== id) throw new Error("the answer is the report of another run");
      if (!reports.delete(id)) return; // not wanted any more
      if (!read.ended) partial.add(id);
      store.setReport(read);
    }, told);
  /** @param {string} id */
  const missing = (id) => {
    const known = store.report(id);
    if (known === null) partial.delete(id);
    return known === null || (!known.ended && !partial.has(id));
  };
  return {
    refresh: runs.now,
    /** Which reports are wanted now; others are not asked for again. @param {(string | null)[]} ids */
    want(ids) {
      const open = new Set(ids.filter((id) => id !== null && missing(id)));
      for (const [id, retry] of reports) {
        if (open.has(id)) continue;
        retry.stop();
        reports.delete(id);
      }
      for (const id of /** @type {Set<string>} */ (open)) {
        if (reports.has(id)) continue;
        const retry = ask(id);
        reports.set(id, retry);
        retry.now();
      }
    },
    /** What is wrong with the list, and with the report of this run; null: nothing. @param {string | null} id */
    problem: (id) => ({ runs: runs.error(), report: (id !== null && reports.get(id)?.error()) || null }),
    /** Whether the list was never answered yet. */
    loading: () => runs.busy(),
    stop() {
      runs.stop();
      for (const retry of reports.values()) retry.stop();
      reports.clear();
    },
  };
}

/**
 * One piece of work that is tried until it succeeds, at growing intervals; a newer call leaves the older one behind.
 * @param {() => Promise<void>} work @param {() => void} told
 */
export function makeRetry(work, told) {
  let turn = 0;
  let wait = FIRST_WAIT;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  /** @type {string | null} */
  let error = null;
  let busy = false;
  /** @param {number} mine */
  const run = async (mine) => {
    if (mine !== turn) return;
    try {
      await work();
      if (mine !== turn) return;
      wait = FIRST_WAIT;
      error = null;
    } catch (reason) {
      if (mine !== turn) return;
      error = reason instanceof Error ? reason.message : String(reason);
      timer = setTimeout(() => void run(mine), wait);
      wait = Math.min(2 * wait, LAST_WAIT);
    }
    busy = false;
    told();
  };
  return {
    now() {
      turn += 1;
      clearTimeout(timer);
      wait = FIRST_WAIT;
      busy = true;
      error = null;
      void run(turn);
    },
    stop() {
      turn += 1;
      clearTimeout(timer);
      busy = false;
      error = null;
    },
    error: () => error,
    busy: () => busy,
  };
}
