// @ts-check
/**
 * Invariant: the panel draws what the store holds and changes nothing but what is picked in it; after unmount nothing
 * of it listens, waits or draws. What goes wrong is said in words, with what to do.
 *
 * One live region: at the end of a run, and after a press of a hint's button, one sentence.
 */
import { el, setText } from "./dom.js";
import { dress } from "./dress.js";
import { bytes, seconds } from "./format.js";
import { HIDDEN, HINTS, makeHintBox } from "./hintbox.js";
import { comparable } from "./model.js";
import { makeBody } from "./panelbody.js";
import { figuresOf, liveFigures, makeDownloads, makeFigures, verdictOf } from "./panelhead.js";
import { LIMIT, makeLoader, makePicker, NOW, optionsOf, pickedOf, runLabel, viewOf } from "./runs.js";

/** @typedef {import("./types").Host} Host */
/** @typedef {import("./types").Report} Report */
/** @typedef {import("./types").RunRow} RunRow */
/** @typedef {import("./types").StoreLike} StoreLike */

const SCHEMA = "offload-report/1";
/** How long the end of a run waits for its report before the run before it is shown. */
const PATIENCE_MS = 4000;
/** Below this width the head's figures stand closer. */
const NARROW = 700;
/** Pixels of what stands above the sections where they share one place. */
const ABOVE = 130;
const REMEDY_RUNS = "If the pack was just installed or updated, restart ComfyUI; asking again.";
const REMEDY_REPORT = "The server keeps the last runs until it restarts: pick another run; asking again.";
const EMPTY =
  "No run yet. Press Run: after the first prompt this panel shows VRAM over time by component, the steps, and what " +
  "was moved and what it cost. To say how much VRAM a model may use, add an Offload Policy node (category Offload) " +
  "and connect it to Model Loader with Offload or Apply Offload Policy; add VRAM Report for the figures on the graph.";

/**
 * @param {HTMLElement} place
 * @param {Host} host
 * @param {StoreLike} store
 * @returns {() => void} unmount
 */
export function mountPanel(place, host, store) {
  ensureStyle();
  const root = el("div", "bo-panel");
  root.setAttribute("role", "region");
  root.setAttribute("aria-label", "Balanced Offload");
  const picker = makePicker((value) => store.select(pickedOf(value, store)));
  const figures = makeFigures();
  /** @type {string | null} */
  let failed = null;
  const downloads = makeDownloads(host, (text) => {
    failed = text;
    later();
  });
  const head = el("div", "bo-panel-head");
  head.append(picker.element, downloads.element, figures.element);
  const verdict = el("span", "bo-panel-verdict");
  const line = el("span", "bo-panel-line");
  const under = el("p", "bo-panel-under");
  under.append(verdict, line);
  const problem = el("p", "bo-panel-problem");
  const note = el("p", "bo-panel-note");
  const empty = el("p", "bo-panel-empty", EMPTY);
  const status = el("p", "bo-panel-status");
  status.setAttribute("role", "status");
  const hint = makeHintBox(host, {
    say: (text) => setText(status, text),
    changed: () => later(),
    leave: () => picker.element.focus(),
  });
  const body = makeBody();
  root.append(head, under, problem, note, hint.element, empty, body.element, status);
  place.replaceChildren(root);
  const heightBefore = place.style.height;
  place.style.height = "100%"; // the front end's own place is as high as what is in it
  const look = dress(root);

  /** The run that is on, or was last. @type {string | null} */
  let last = store.running?.prompt_id ?? null;
  /** The run whose end we saw and have not said. @type {string | null} */
  let owed = null;
  /** A run ended and its row has not come. */
  let waiting = false;
  let newest = store.runs[0]?.prompt_id ?? null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let patience;
  let frame = 0;
  let on = store.running !== null;
  /** Settings as they were changed last: the host tells before it keeps them. @type {Map<string, unknown>} */
  const changed = new Map();

  const loader = makeLoader(host, store, () => later());

  function later() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      render();
    });
  }

  function render() {
    if (!root.isConnected || !root.clientWidth) return; // another tab is open; being seen again draws
    const { running, runs, selected } = store;
    const view = viewOf({ running, runs, selected, waiting });
    const id = view.kind === "run" ? view.id : null;
    const row = id === null ? null : store.row(id);
    const report = id === null ? null : store.report(id);
    const beforeRow = comparable(runs, row ?? report);
    loader.want([id, beforeRow?.prompt_id ?? null]);
    const run = report ?? row;

    root.dataset.view = view.kind;
    picker.update(pickable(id, view.kind === "now" || running !== null), view.kind === "now" ? NOW : (id ?? ""));
    figures.update(run ? figuresOf(run) : liveFigures(view.kind === "now" ? store : { live: null, points: [] }));
    figures.element.hidden = view.kind === "empty";
    downloads.update(run ? id : null);
    setText(verdict, run ? verdictOf(run) : view.kind === "now" ? nowText(store) : "");
    verdict.dataset.verdict = run?.error ? "error" : (run?.verdict ?? "");
    setText(line, run?.line ?? "");
    const text = failed ?? problemText(id);
    setText(problem, text);
    problem.hidden = !text;
    setText(note, report && report.schema !== SCHEMA ? newer(report.schema) : "");
    note.hidden = !note.textContent;
    hint.update(run, changed.get(HINTS) ?? host.setting(HINTS), changed.get(HIDDEN) ?? host.setting(HIDDEN));
    empty.hidden = view.kind !== "empty" || loader.loading() || Boolean(text);
    body.element.hidden = view.kind === "empty" || (view.kind === "run" && !report);
    if (view.kind === "now") body.showNow(store);
    else if (report) body.showRun(report, beforeRow?.prompt_id ? store.report(beforeRow.prompt_id) : null, beforeRow);
  }

  /**
   * A run that was picked and is not among the rows is still what is shown.
   * @param {string | null} id @param {boolean} now
   */
  function pickable(id, now) {
    const rows = store.runs.slice(0, LIMIT);
    if (id === null || rows.some((row) => row.prompt_id === id)) return optionsOf(rows, now);
    const known = store.report(id);
    const text = known ? runLabel(known) : `Run ${id.slice(0, 12)}, not among those kept`;
    return [...optionsOf(rows.slice(0, LIMIT - 1), now), { value: id, text }];
  }

  /** @param {string | null} id */
  function problemText(id) {
    const found = loader.problem(id);
    if (found.runs) return `The list of runs could not be read (${found.runs}). ${REMEDY_RUNS}`;
    return found.report ? `The report of this run could not be read (${found.report}). ${REMEDY_REPORT}` : "";
  }

  /** The run began, ended, or went on to another node. */
  function turned() {
    const id = store.running?.prompt_id ?? null;
    const over = on && (store.running === null || (id !== last && last !== null));
    on = store.running !== null;
    if (over) owed = last;
    if (on) {
      last = id ?? last;
      stopWaiting();
    } else if (over) waitFor();
    pay();
    later();
  }

  /** The run before it would flash up until the report of this one comes. */
  function waitFor() {
    stopWaiting();
    if (owed !== null && store.row(owed)) return;
    waiting = true;
    patience = setTimeout(() => {
      waiting = false;
      loader.refresh();
      later();
    }, PATIENCE_MS);
  }

  function stopWaiting() {
    clearTimeout(patience);
    waiting = false;
  }

  function rowsCame() {
    const first = store.runs[0]?.prompt_id ?? null;
    if (waiting && (owed === null ? first !== newest : store.row(owed) !== null)) stopWaiting();
    newest = first;
    pay();
    later();
  }

  /** What ended is said when its row is there, also while the next one runs. */
  function pay() {
    if (owed === null || !store.row(owed)) return;
    announce(owed);
    owed = null;
  }

  /** @param {string} id */
  function announce(id) {
    const row = store.row(id);
    if (!row) return;
    const { totals, vram } = row;
    const said = `Run ended: ${verdictOf(row)}, ${seconds(totals.wall_s)}, peak ${bytes(vram.peak)}.`;
    setText(status, row.hints.length && !hint.element.hidden ? `${said} There is a hint.` : said);
  }

  const offs = [
    store.on("live", later),
    store.on("run", turned),
    store.on("runs", rowsCame),
    store.on("report", later),
    store.on("selected", () => {
      failed = null;
      later();
    }),
    ...[HINTS, HIDDEN].map((id) =>
      host.onSetting(id, (value) => {
        changed.set(id, value);
        later();
      }),
    ),
  ];
  const fit = () => {
    const wide = body.element.dataset.columns === "three";
    const height = wide && body.element.clientHeight ? body.element.clientHeight : root.clientHeight - ABOVE;
    body.resize(root.clientWidth, height);
    root.dataset.narrow = String(root.clientWidth < NARROW);
  };
  const resized = new ResizeObserver(() => {
    fit();
    look.refresh();
    later();
  });
  resized.observe(root);
  resized.observe(body.element);
  root.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented) return;
    event.stopPropagation();
    if (document.activeElement instanceof HTMLElement) document.activeElement.blur();
  });
  loader.refresh();
  later();

  return () => {
    offs.forEach((off) => off());
    stopWaiting();
    loader.stop();
    resized.disconnect();
    cancelAnimationFrame(frame);
    body.destroy();
    look.off();
    root.remove();
    place.style.height = heightBefore;
  };
}

/** @param {StoreLike} store */
function nowText({ live, running }) {
  const node = running?.node ?? live?.node;
  const parts = [running ? "running" : "the run has ended, its report is being made"];
  if (running && node) parts.push(`node ${node}`);
  if (running && live?.step != null) parts.push(`step ${live.step} of ${live.steps ?? "n/a"}`);
  return parts.join(" · ");
}

/** @param {string} schema */
const newer = (schema) =>
  `This report is of schema ${schema}, newer than this page knows (${SCHEMA}): what it understands is shown. ` +
  "Reload the page, or update the pack, to see all of it.";

/** The panel's own style sheet, once per page. */
function ensureStyle() {
  const href = new URL("./panel.css", import.meta.url).href;
  if ([...document.querySelectorAll("link.bo-style")].some((link) => link.getAttribute("href") === href)) return;
  const link = el("link", "bo-style");
  link.rel = "stylesheet";
  link.href = href;
  document.head.append(link);
}
