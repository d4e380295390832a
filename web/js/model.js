// @ts-check
/**
 * Invariant: pure; what is drawn is computed here from what the server said, and adds nothing to it: a figure that
 * cannot be known from it is null, and a change is against a comparable run or null.
 */
import { bare, brief, bytes, pair, percent, seconds, unit, UNKNOWN } from "./format.js";
import { usedOf } from "./store.js";

/** @typedef {import("./types").Report} Report */
/** @typedef {import("./types").RunRow} RunRow */
/** @typedef {import("./types").NodeRow} NodeRow */
/** @typedef {import("./types").Vram} Vram */

export { usedOf };

/** What is worth a word on a node: moves of so many seconds, or of such a share of its time. */
export const WORTH_S = 0.25;
export const WORTH_SHARE = 0.05;

/** @param {(number | null | undefined)[]} parts @returns {number | null} null where a part is not known */
function sum(parts) {
  let total = 0;
  for (const part of parts) {
    if (part === null || part === undefined) return null;
    total += part;
  }
  return total;
}

/** @param {number | null | undefined} now @param {number | null | undefined} then @returns {number | null} */
const change = (now, then) =>
  now === null || now === undefined || then === null || then === undefined ? null : now - then;

/** Seconds that a run waited for moves. @param {{totals: import("./types").Totals}} run */
export const movesOf = (run) => sum([run.totals.onload_s, run.totals.stall_s, run.totals.evict_s]);

/**
 * The card as the now-bar shows it: of telemetry what is there now, of a report what was left at its end.
 * @param {import("./types").Telemetry | Report | RunRow | null} from
 * @returns {Vram}
 */
export function vramOf(from) {
  const marks = { high: null, low: null, peak: null, total: null };
  const none = { weights: null, activations: null, others: null, free: null, ...marks };
  if (from === null) return none;
  if (!("totals" in from)) return from.vram;
  const { total, peak, others_start: others } = from.vram;
  const report = "by_component" in from ? from : null;
  const rows = report?.by_component?.filter((row) => row.component);
  const weights = rows ? sum(rows.map((row) => row.left_bytes)) : null;
  const { high = null, low = null } = report?.resolved ?? {};
  return { ...none, weights, others, high, low, peak, total };
}

/** The steps as the bars take them. @param {Report} report */
export const stepsOf = (report) => report.steps;

/**
 * The newest older whole run of the same workload; null: with none can it be compared.
 * @param {readonly RunRow[]} rows newest first
 * @param {RunRow | null} row
 * @returns {RunRow | null}
 */
export function comparable(rows, row) {
  if (row === null || row.workload === null) return null;
  const at = rows.findIndex((other) => other.prompt_id === row.prompt_id);
  const { created } = row;
  /** @param {RunRow} other */
  const before = (other) => created !== null && other.created !== null && other.created < created;
  const older = at >= 0 ? rows.slice(at + 1) : rows.filter(before);
  return older.find((other) => other.complete && other.workload === row.workload) ?? null;
}

/**
 * @param {Report} report
 * @param {Report | null} [before] a comparable run
 * @returns {import("./types").ComponentTableRow[]}
 */
export function componentRows(report, before = null) {
  return (report.by_component ?? []).map(({ dropped_for, ...row }) => {
    const moves = sum([row.onload_s, row.stall_s, row.evict_s]);
    const then = before?.by_component?.find((other) => other.component === row.component);
    return {
      ...row,
      resident: shareOf(row),
      moves_s: moves,
      evicted: dropped_for && reasonsText(dropped_for),
      change_s: then ? change(moves, sum([then.onload_s, then.stall_s, then.evict_s])) : null,
    };
  });
}

/** @param {Pick<import("./types").ComponentSums, "weight_bytes" | "resident_bytes">} row */
const shareOf = ({ weight_bytes, resident_bytes }) =>
  !weight_bytes || resident_bytes === null ? null : Math.min(1, resident_bytes / weight_bytes);

/** "low 4.8 GiB, need 1.0 GiB": the most first. @param {[string, number][]} reasons */
function reasonsText(reasons) {
  const sorted = [...reasons].sort((a, b) => b[1] - a[1]);
  return sorted.map(([reason, held]) => `${reason.replaceAll("_", " ")} ${bytes(held)}`).join(", ") || "nothing";
}

/**
 * The components of the stages that began while a node ran, each with what was on the device of it at most in this run.
 * A node that is made by another lies inside it: a stage is of the one that began last.
 * @param {Report | RunRow} report
 * @returns {Map<NodeRow, string>}
 */
function residentByNode(report) {
  /** @type {Map<NodeRow, Set<string>>} */
  const used = new Map();
  if (!("stages" in report)) return new Map();
  for (const { component, t0 } of report.stages) {
    const inside = report.nodes.filter((row) => t0 !== null && row.t0 !== null && row.t0 <= t0 && t0 < (row.t1 ?? 0));
    const node = inside.reduce((/** @type {NodeRow | null} */ a, b) => (a && (a.t0 ?? 0) > (b.t0 ?? 0) ? a : b), null);
    if (!node) continue;
    const names = used.get(node) ?? new Set();
    for (const name of component.split("+")) if (name) names.add(name);
    used.set(node, names);
  }
  /** @param {string} name */
  const said = (name) => {
    const sums = report.by_component?.find((row) => row.component === name);
    return sums ? `${name} ${percent(shareOf(sums))}, ${bytes(sums.resident_bytes)}` : `${name} ${UNKNOWN}`;
  };
  return new Map([...used].map(([node, names]) => [node, [...names].map(said).join("; ")]));
}

/**
 * The nodes that ran, in their order.
 * @param {Report | RunRow} report
 * @param {Report | RunRow | null} [before] a comparable run
 * @returns {import("./types").NodeTableRow[]}
 */
export function nodeRows(report, before = null) {
  const resident = residentByNode(report);
  return report.nodes
    .filter((row) => row.cached !== true)
    .map((row) => {
      const { display, type, wall_s, moves_s, onload_s, stall_s, peak, id } = row;
      const then = before?.nodes.find((other) => other.id === id && other.type === type && other.cached !== true);
      const change_s = then ? change(wall_s, then.wall_s) : null;
      return { display, type, wall_s, moves_s, onload_s, stall_s, peak, change_s, resident: resident.get(row) || null };
    });
}

/**
 * "12.4 s, moves 1.5 s, peak 9.8 GiB"; empty where moves are not worth a word.
 * @param {Pick<NodeRow, "wall_s" | "moves_s" | "peak">} row
 */
export function nodeText({ wall_s, moves_s, peak }) {
  if (moves_s === null || moves_s <= 0) return "";
  if (moves_s < WORTH_S && (wall_s === null || moves_s < WORTH_SHARE * wall_s)) return "";
  const parts = [`moves ${brief(moves_s)}`];
  if (wall_s !== null) parts.unshift(brief(wall_s));
  if (peak !== null) parts.push(`peak ${bytes(peak)}`);
  return parts.join(", ");
}

/**
 * What the chip says. While a prompt runs its moves are said in bytes, as the seconds are known at its end.
 * @param {Pick<import("./types").StoreLike, "live" | "running" | "runs">} store
 */
export function chipFigures({ live, running, runs }) {
  const last = running === null ? (runs[0] ?? null) : null;
  const vram = vramOf(live);
  return {
    used: usedOf(vram),
    total: vram.total ?? last?.vram.total ?? null,
    peak: last ? last.vram.peak : vram.peak,
    moved_s: last ? movesOf(last) : null,
    moved_bytes: last ? null : (live?.moved ?? null),
    running: running !== null,
  };
}

/**
 * The chip's text, figure by figure, each with its exact number. An empty text: nothing is known of it.
 * @param {ReturnType<typeof chipFigures>} figures
 * @returns {Record<"used" | "peak" | "moves", {text: string, value: number | null, unit: string | null}>}
 */
export function chipParts({ used, total, peak, moved_s, moved_bytes }) {
  const now = used === null && total === null ? UNKNOWN : pair(used, total);
  const top = peak === null ? "" : `, peak ${total === null ? bytes(peak) : bare(peak, unit(total))}`;
  const moved = moved_s !== null ? seconds(moved_s) : moved_bytes !== null ? bytes(moved_bytes) : null;
  return {
    used: { text: `VRAM ${now}`, value: used, unit: used === null ? null : "bytes" },
    peak: { text: top, value: peak, unit: peak === null ? null : "bytes" },
    moves: {
      text: moved === null ? "" : `, moved ${moved}`,
      value: moved_s ?? moved_bytes,
      unit: moved === null ? null : moved_s !== null ? "seconds" : "bytes",
    },
  };
}

/** "VRAM 9.8 / 16.0 GiB, peak 11.2, moved 1.48 s". @param {ReturnType<typeof chipFigures>} figures */
export function chipText(figures) {
  const { used, peak, moves } = chipParts(figures);
  return used.text + peak.text + moves.text;
}

/**
 * The run over its time, for the timeline. Where the server does not say what each component held, the sum of all
 * stands for them.
 * @param {Report} report
 * @returns {import("./types").TimelineModel}
 */
export function timelineOf(report) {
  const track = [...report.vram_track].sort((a, b) => a.t - b.t);
  /** @type {import("./types").TimelineModel["stages"]} */
  const stages = [];
  for (const { name, component, t0, t1 } of report.stages) {
    if (t0 !== null && t1 !== null && t1 >= t0) stages.push({ name, component, t0, t1 });
  }
  const components = residencyOf(report, track);
  const ends = [report.totals.wall_s ?? 0, ...stages.map((stage) => stage.t1), ...track.map((row) => row.t)];
  for (const { points } of components) ends.push(points[points.length - 1][0]);
  const end_s = ends.reduce((a, b) => Math.max(a, b), 0);
  return {
    end_s,
    total: report.vram.total,
    high: report.resolved.high,
    low: report.resolved.low,
    components,
    allocated: points(track, "allocated"),
    stages,
    evictions: evictionsOf(report, end_s),
    ooms: report.events.flatMap(({ t, kind, text }) =>
      t !== null && /^oom|^step_down/.test(kind) ? [{ t, text }] : [],
    ),
  };
}

/**
 * @param {Report} report
 * @param {Report["vram_track"]} track
 * @returns {import("./types").TimelineModel["components"]}
 */
function residencyOf(report, track) {
  /** @type {Map<string, [number, number][]>} */
  const found = new Map();
  for (const { t, component, bytes: held } of [...report.residency].sort((a, b) => a.t - b.t)) {
    const known = found.get(component);
    if (known) known.push([t, held]);
    else found.set(component, [[t, held]]);
  }
  if (!found.size) {
    const all = points(track, "resident");
    return all.length ? [{ name: "weights", points: all }] : [];
  }
  return [...found].map(([name, each]) => ({ name, points: each }));
}

/** @param {Report["vram_track"]} track @param {"allocated" | "resident"} key @returns {[number, number][]} */
function points(track, key) {
  return track.flatMap((row) => {
    const held = row[key];
    return held === null ? [] : [/** @type {[number, number]} */ ([row.t, held])];
  });
}

/**
 * Evictions of one component for one reason that lie together are one: its layers leave one by one.
 * @param {Report} report
 * @param {number} end_s
 */
function evictionsOf(report, end_s) {
  const near = end_s / 200;
  /** @type {import("./types").TimelineModel["evictions"]} */
  const found = [];
  /** @type {Map<string, import("./types").TimelineModel["evictions"][number]>} */
  const last = new Map();
  for (const { dir, t, component, bytes: size, reason } of [...report.moves].sort((a, b) => (a.t ?? 0) - (b.t ?? 0))) {
    if (dir !== "drop" || t === null || size === null) continue;
    const key = JSON.stringify([component, reason]);
    const known = last.get(key);
    if (known && t - known.t <= near) {
      known.bytes += size;
      continue;
    }
    const one = { t, component, bytes: size, reason };
    last.set(key, one);
    found.push(one);
  }
  return found;
}
