// @ts-check
/**
 * Invariant: the server sends telemetry only while somebody looks: one subscription a page, renewed while it is visible
 * and left to end when it is hidden, when frames that still come are dropped. What arrives goes through wire.js into
 * the store and nowhere else.
 */
import { readReport, readRow, readRows, readTelemetry } from "./wire.js";

/** @typedef {import("./types").Host} Host */
/** @typedef {import("./types").StoreLike} StoreLike */

export const RENEW_MS = 20000; // the server sends for 30 s after it was asked
export const RETRY_MS = 2000; // while the socket is not known there yet
const TRIES = 5;
const KEPT = 50;

/**
 * The page as far as it is needed here, so that it can be another one in a test.
 * @typedef {object} Page
 * @property {() => boolean} hidden
 * @property {(changed: () => void) => () => void} onVisibility
 * @property {(work: () => void, ms: number) => () => void} later
 */

/** @type {Page} */
const PAGE = {
  hidden: () => document.hidden,
  onVisibility(changed) {
    document.addEventListener("visibilitychange", changed);
    return () => document.removeEventListener("visibilitychange", changed);
  },
  later(work, ms) {
    const timer = setTimeout(work, ms);
    return () => clearTimeout(timer);
  },
};

/**
 * Listen until the function that this returns is called.
 * @param {Host} host
 * @param {StoreLike} store
 * @param {Page} [page]
 * @returns {() => void}
 */
export function listen(host, store, page = PAGE) {
  const subscription = subscribe(host, store, page);
  const offs = [
    host.on("offload.telemetry", (detail) => {
      const telemetry = page.hidden() ? null : readTelemetry(detail);
      if (telemetry !== null) store.setTelemetry(telemetry);
    }),
    host.on("offload.report", (detail) => {
      const row = readRow(detail);
      if (row === null || row.prompt_id === null) return;
      store.addRow(row);
      store.endRun(row.prompt_id);
    }),
    host.on("execution_start", (detail) => store.setRunning(promptOf(detail), null)),
    host.on("executing", (detail) => {
      const node = typeof detail === "object" && detail !== null ? (detail.display_node ?? detail.node) : detail;
      if (node === null || node === undefined) store.endRun(promptOf(detail));
      else store.setRunning(promptOf(detail), String(node));
    }),
    ...["execution_success", "execution_error", "execution_interrupted"].map((event) =>
      host.on(event, (detail) => store.endRun(promptOf(detail))),
    ),
    host.on("status", () => subscription.start()),
    host.on("reconnected", () => {
      store.forgetRun(); // it may have ended meanwhile; the server is asked what runs
      subscription.again(true);
    }),
    page.onVisibility(() => subscription.again(false)),
    page.later(() => subscription.start(), RETRY_MS),
    () => subscription.stop(),
  ];
  return () => offs.forEach((off) => off());
}

/** @param {any} detail @returns {string | null} */
const promptOf = (detail) => (typeof detail?.prompt_id === "string" ? detail.prompt_id : null);

/**
 * Asking for telemetry: first when the socket is known to be open, then again and again.
 * @param {Host} host
 * @param {StoreLike} store
 * @param {Page} page
 */
function subscribe(host, store, page) {
  let started = false;
  let stopped = false;
  let tries = 0;
  /** Counts what `again` began, so that an answer to an older question changes nothing. */
  let turn = 0;
  let cancel = () => {};

  const told = { client: "" };
  /** Our scripts are here: nodes need no line of progress text for this page. Lasts as long as the socket. */
  async function present() {
    const client = host.clientId();
    if (stopped || !client || told.client === client) return;
    told.client = client;
    try {
      await host.get(`/offload/status?page=${encodeURIComponent(client)}`);
    } catch {
      told.client = "";
    }
  }

  async function ask() {
    const mine = turn;
    cancel();
    if (stopped || page.hidden()) return;
    void present();
    let wait = RENEW_MS;
    const client = host.clientId();
    const before = store.running;
    try {
      if (!client) throw new Error("no client id yet");
      const status = await host.get(`/offload/status?telemetry=${encodeURIComponent(client)}`);
      tries = 0;
      const live = readTelemetry(status?.live);
      if (mine === turn && live !== null) took(before, live);
    } catch {
      tries += 1;
      if (tries < TRIES) wait = RETRY_MS * tries;
    }
    if (mine === turn && !stopped) cancel = page.later(ask, wait);
  }

  /**
   * What the server says of now. A run that it had told of and does not name any more ended while nobody looked.
   * @param {StoreLike["running"]} before what ran when it was asked
   * @param {import("./types").Telemetry} live
   */
  function took(before, live) {
    const { running } = store;
    const known = running !== null && running === before && running.prompt_id !== null;
    if (known && running.prompt_id !== live.prompt_id && store.live?.prompt_id === running.prompt_id) {
      store.endRun(running.prompt_id);
    }
    if (store.running === null) store.setTelemetry(live);
  }

  function again() {
    if (!started || stopped) return;
    void present(); // first and for itself: also where telemetry is refused, or nobody looks
    turn += 1;
    tries = 0;
    cancel();
    if (page.hidden()) return;
    void ask();
    void fetchRuns(host, store);
  }

  return {
    start() {
      if (started) return void present(); // where it could not be said yet
      started = true;
      again();
    },
    /** @param {boolean} reopened whether the socket is a new one, of which the server knows nothing */
    again(reopened) {
      if (reopened) told.client = "";
      again();
    },
    stop() {
      stopped = true;
      turn += 1;
      cancel();
    },
  };
}

/**
 * The server's last runs into the store; what it can't say leaves the store as it is.
 * @param {Host} host
 * @param {StoreLike} store
 */
export async function fetchRuns(host, store) {
  try {
    const rows = readRows(await host.get(`/offload/runs?limit=${KEPT}`));
    store.setRuns(rows);
  } catch {
    // No such route on this server, or it is gone for now: the next turn asks again.
  }
}

/** @type {Map<string, Promise<import("./types").Report | null>>} */
const asked = new Map();

/**
 * The whole report of a prompt, from the store or the server; null where there is none. One question at a time.
 * @param {Host} host
 * @param {StoreLike} store
 * @param {string} promptId
 * @returns {Promise<import("./types").Report | null>}
 */
export function fetchReport(host, store, promptId) {
  const known = store.report(promptId);
  if (known?.ended) return Promise.resolve(known);
  const pending = asked.get(promptId);
  if (pending) return pending;
  const question = host
    .get(`/offload/report/${encodeURIComponent(promptId)}`)
    .then((body) => {
      const report = readReport(body);
      if (report !== null) store.setReport(report);
      return report;
    })
    .catch(() => null)
    .finally(() => asked.delete(promptId));
  asked.set(promptId, question);
  return question;
}
