// @ts-check
/**
 * Invariant: every change of what the page knows happens here, and what is kept has an end: samples and points of one
 * run, the last rows, a few reports. A listener that fails takes no other with it.
 */

/** @typedef {import("./types").StoreEvent} StoreEvent */
/** @typedef {import("./types").Telemetry} Telemetry */
/** @typedef {import("./types").Sample} Sample */
/** @typedef {import("./types").RunRow} RunRow */
/** @typedef {import("./types").Report} Report */
/** @typedef {import("./types").StoreLike} StoreLike */

export const SAMPLES = 1200;
export const POINTS = 2048;
export const RUNS = 64;
export const ENDED = 512;
export const REPORTS = 8;

/**
 * What is in use on the card, by everybody; null where a part of it is not known.
 * @param {import("./types").Vram} vram
 */
export function usedOf(vram) {
  if (vram.total !== null && vram.free !== null) return Math.max(0, vram.total - vram.free);
  const { weights, activations, others } = vram;
  return weights === null || activations === null || others === null ? null : weights + activations + others;
}

/** @implements {StoreLike} */
export class Store {
  constructor() {
    /** @type {Telemetry | null} */
    this.live = null;
    /** @type {{prompt_id: string | null, node: string | null} | null} */
    this.running = null;
    /** @type {Sample[]} */
    this.samples = [];
    /** @type {import("./types").Point[]} */
    this.points = [];
    /** @type {RunRow[]} */
    this.runs = [];
    /** @type {string | null} */
    this.selected = null;
    /** @type {import("./types").NodeRow[]} */
    this.ended = [];
    /** Whose samples, points and ended nodes these are. @type {string | null} */
    this.sampled = null;
    /** The last prompt that this page queued. @type {string | null} */
    this.mine = null;
    /** A sample before the last one: the next says which of the two was wrong. @type {Sample | null} */
    this.doubtful = null;
    /** Seconds between two samples; doubled each time that they are too many. */
    this.stride = 0;
    /** The prompt that ended last: what comes late does not start it again. @type {string | null} */
    this.over = null;
    /** @type {Map<string, Report>} */
    this.reports = new Map();
    /** @type {Map<StoreEvent, Set<() => void>>} */
    this.listeners = new Map();
    this.failed = false;
  }

  /**
   * @param {StoreEvent} kind
   * @param {() => void} callback
   * @returns {() => void} how to stop
   */
  on(kind, callback) {
    const known = this.listeners.get(kind) ?? new Set();
    this.listeners.set(kind, known.add(callback));
    return () => void known.delete(callback);
  }

  /** @param {StoreEvent} kind */
  tell(kind) {
    for (const callback of [...(this.listeners.get(kind) ?? [])]) {
      try {
        callback();
      } catch (error) {
        if (!this.failed) console.warn("Balanced Offload: a part of the page failed:", error);
        this.failed = true;
      }
    }
  }

  /** @param {string} promptId @returns {Report | null} */
  report(promptId) {
    return this.reports.get(promptId) ?? null;
  }

  /** @param {string} promptId @returns {RunRow | null} */
  row(promptId) {
    return this.runs.find((row) => row.prompt_id === promptId) ?? null;
  }

  /** @param {string | null} promptId */
  select(promptId) {
    if (this.selected === promptId) return;
    this.selected = promptId;
    this.tell("selected");
  }

  /** @param {Telemetry} telemetry */
  setTelemetry(telemetry) {
    const promptId = telemetry.prompt_id;
    const late = promptId !== null && promptId === this.over;
    if (promptId !== null && !late) {
      if (this.sampled !== promptId) this.begin(promptId);
      if (this.running !== null && this.running.prompt_id === null) this.mine = promptId; // the host told of it
      this.sample(telemetry);
      this.end(telemetry.ended);
      this.move(promptId, telemetry.node ?? (this.running?.prompt_id === promptId ? this.running.node : null));
    }
    this.live = telemetry;
    this.tell("live");
  }

  /**
   * The host told this page that its prompt started, or went on to a node. `promptId` null: the one that runs.
   * @param {string | null} promptId
   * @param {string | null} node
   */
  setRunning(promptId, node) {
    const known = promptId ?? this.running?.prompt_id ?? null;
    if (known !== null && known === this.over) this.over = null; // the host says so itself: it is on again
    if (known !== null && this.sampled !== known) this.begin(known);
    this.mine = known;
    this.move(known, node);
  }

  /** @param {string | null} promptId null: the one that runs */
  endRun(promptId) {
    const ended = promptId ?? this.running?.prompt_id ?? null;
    if (ended !== null) this.over = ended;
    if (this.running === null) return;
    const runs = this.running.prompt_id;
    if (promptId !== null && runs !== null && runs !== ended) return; // another one
    this.running = null;
    this.tell("run");
  }

  /** What runs is not known any more; it may be told again. */
  forgetRun() {
    if (this.running === null) return;
    this.running = null;
    this.tell("run");
  }

  /** @param {string | null} promptId @param {string | null} node */
  move(promptId, node) {
    if (this.running?.prompt_id === promptId && this.running.node === node) return;
    this.running = { prompt_id: promptId, node };
    this.tell("run");
  }

  /** @param {string} promptId */
  begin(promptId) {
    this.sampled = promptId;
    this.samples = [];
    this.points = [];
    this.ended = [];
    this.stride = 0;
    this.doubtful = null;
  }

  /** A node that ended again is told anew. @param {import("./types").NodeRow[]} rows */
  end(rows) {
    for (const row of rows) this.ended = this.ended.filter((other) => other.id !== row.id).concat(row).slice(-ENDED);
  }

  /** @param {Telemetry} telemetry */
  sample(telemetry) {
    const { t } = telemetry;
    this.points.push(...telemetry.points);
    if (this.points.length > POINTS) this.points.splice(0, this.points.length - POINTS);
    if (t === null) return;
    const used = usedOf(telemetry.vram);
    const last = this.samples[this.samples.length - 1];
    if (last && t < last.t) {
      const before = this.doubtful;
      this.doubtful = { t, used };
      if (before === null || t <= before.t) return;
      // The clock goes on from where it jumped back to: what lay after that was wrong.
      this.samples = this.samples.filter((sample) => sample.t < before.t).concat(before);
    }
    this.doubtful = null;
    for (const sample of stagesOf(telemetry, this.samples[this.samples.length - 1])) this.keep(sample);
    this.keep({ t, used });
  }

  /** @param {Sample} sample no earlier than the last one */
  keep(sample) {
    const last = this.samples[this.samples.length - 1];
    if (last && sample.t - last.t < this.stride) {
      last.used = higher(last.used, sample.used);
      return;
    }
    this.samples.push(sample);
    if (this.samples.length > SAMPLES) this.thin();
  }

  /** Half as many samples, each the higher of two: the whole run stays, and its peaks. */
  thin() {
    const half = [];
    for (let i = 0; i < this.samples.length; i += 2) {
      const [one, two] = [this.samples[i], this.samples[i + 1]];
      half.push(two ? { t: one.t, used: higher(one.used, two.used) } : one);
    }
    this.samples = half;
    this.stride = (half[half.length - 1].t - half[0].t) / half.length;
  }

  /** @param {RunRow[]} rows newest first */
  setRuns(rows) {
    const first = rows.filter((row, i) => rows.findIndex((other) => other.prompt_id === row.prompt_id) === i);
    this.runs = first.slice(0, RUNS);
    this.tell("runs");
    const runs = this.running?.prompt_id ?? null;
    if (runs !== null && this.row(runs)?.ended) this.endRun(runs); // its end was not seen
  }

  /** A row that is new, or tells more of a known one. @param {RunRow} row */
  addRow(row) {
    if (row.prompt_id === null) return;
    const at = this.runs.findIndex((other) => other.prompt_id === row.prompt_id);
    const rest = this.runs.filter((_, i) => i !== at);
    rest.splice(Math.max(at, 0), 0, row);
    this.reports.delete(row.prompt_id); // a report of it that was read before its end is not whole
    this.setRuns(rest);
  }

  /** @param {Report} report */
  setReport(report) {
    if (report.prompt_id === null) return;
    this.reports.delete(report.prompt_id);
    this.reports.set(report.prompt_id, report);
    for (const oldest of this.reports.keys()) {
      if (this.reports.size <= REPORTS) break;
      this.reports.delete(oldest);
    }
    this.tell("report");
  }
}

/**
 * What was in use where nodes began and ended since the last sample: what torch had, beside what others have. What its
 * cache held is not known there: it is not taken for a dip.
 * @param {Telemetry} telemetry
 * @param {Sample | undefined} last
 * @returns {Sample[]}
 */
function stagesOf({ t, vram, stages }, last) {
  const now = usedOf(vram);
  const floor = last && last.used !== null && now !== null ? Math.min(last.used, now) : 0;
  const { others } = vram;
  return stages
    .flatMap(({ t: at, allocated }) =>
      at === null || allocated === null || others === null || t === null || at > t || at < (last?.t ?? 0)
        ? []
        : [{ t: at, used: Math.max(floor, allocated + others) }],
    )
    .sort((a, b) => a.t - b.t);
}

/** @param {number | null} a @param {number | null} b */
const higher = (a, b) => (a === null ? b : b === null ? a : Math.max(a, b));
