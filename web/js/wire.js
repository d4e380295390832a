// @ts-check
/**
 * Invariant: what comes from the server has the shape of types.d.ts when it leaves here, or is null. Nothing throws; an
 * unknown field is left out, a number that is none, or negative, or not finite, is null, and lists have an end.
 */

/** @typedef {import("./types").Vram} Vram */

const TEXT = 4096;
const LIST = 4096;
const VRAM = /** @type {const} */ (["weights", "activations", "others", "free", "high", "low", "peak", "total"]);
const TOTALS = /** @type {const} */ ([
  ...["wall_s", "encode_s", "denoise_s", "decode_s", "preview_s", "onload_s", "stall_s", "evict_s", "other_s"],
  ...["overlapped_s", "bytes_h2d", "bytes_d2h", "move_count", "bytes_dropped", "drop_count", "host_s"],
]);
const REPORT_VRAM = ["total", "available", "peak", "peak_device", "peak_torch", "peak_noted", "peak_weights"];
const SUMS = [
  ...["weight_bytes", "resident_bytes", "left_bytes", "moves", "bytes_h2d", "bytes_d2h", "drops", "bytes_dropped"],
  ...["avoidable_bytes", "onload_s", "stall_s", "evict_s", "compute_s", "peak"],
];
const MARKS = ["total", "available", "high", "low"];

/** @param {unknown} value @returns {Record<string, any> | null} */
const record = (value) =>
  typeof value === "object" && value !== null && !Array.isArray(value) ? /** @type {any} */ (value) : null;

/** A number that is one, and not negative; else null. @param {unknown} value @returns {number | null} */
export const number = (value) => (typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : null);

/** @param {unknown} value @returns {number | null} */
const signed = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

/** @param {unknown} value @returns {boolean | null} */
const flag = (value) => (typeof value === "boolean" ? value : null);

/**
 * Text of at most `most` characters, without what a terminal or a layout would take for an order.
 * @param {unknown} value
 * @param {number} [most]
 * @returns {string | null}
 */
export function text(value, most = TEXT) {
  if (typeof value !== "string") return null;
  // eslint-disable-next-line no-control-regex
  return value.slice(0, most).replace(/[\u0000-\u0008\u000b-\u001f\u007f\u202a-\u202e\u2066-\u2069]/g, "");
}

/** An id that a host may write as text or as a number. @param {unknown} value @returns {string | null} */
const id = (value) => (number(value) === null ? text(value, 256) || null : String(value));

/**
 * @template T
 * @param {unknown} value
 * @param {(row: any) => T | null} read
 * @param {number} [most]
 * @returns {T[]}
 */
function list(value, read, most = LIST) {
  if (!Array.isArray(value)) return [];
  /** @type {T[]} */
  const found = [];
  for (const row of value.slice(0, most)) {
    const one = read(row);
    if (one !== null) found.push(one);
  }
  return found;
}

/**
 * The named fields as numbers or null.
 * @param {unknown} value
 * @param {readonly string[]} names
 * @returns {any}
 */
function figures(value, names) {
  const given = record(value) ?? {};
  return Object.fromEntries(names.map((name) => [name, number(given[name])]));
}

/** @param {unknown} value @returns {Vram} */
const readVram = (value) => figures(value, VRAM);

/** @param {unknown} value @returns {import("./types").Point | null} */
function readPoint(value) {
  const given = record(value);
  if (given === null) return null;
  const names = ["t", "step", "steps", "step_ms", "stall_ms", "moved", "weights", "allocated"];
  return { ...figures(given, names), node: id(given.node) };
}

/** @param {unknown} value @returns {import("./types").ComponentBytes | null} */
function readComponent(value) {
  const given = record(value);
  const name = text(given?.name, 256);
  return given === null || name === null ? null : { name, ...figures(given, ["bytes", "total"]) };
}

/** `offload.telemetry`, or null. @param {unknown} value @returns {import("./types").Telemetry | null} */
export function readTelemetry(value) {
  const given = record(value);
  if (given === null || (record(given.vram) === null && number(given.t) === null)) return null;
  return {
    v: number(given.v) ?? 1,
    prompt_id: id(given.prompt_id),
    node: id(given.node),
    type: text(given.type, 256) || null,
    device: text(given.device, 256),
    ...figures(given, ["t", "step", "steps", "step_ms", "stall_ms", "moved"]),
    vram: readVram(given.vram),
    components: Array.isArray(given.components) ? list(given.components, readComponent, 256) : null,
    points: list(given.points, readPoint),
    stages: list(given.stages, readPoint),
    ended: list(given.ended, readNode),
  };
}

/** What is called peak where the server does not say: the highest that anybody saw. @param {any} vram */
function withPeak(vram) {
  const seen = [vram.peak_device, vram.peak_torch, vram.peak_noted].filter((each) => each !== null);
  return vram.peak === null && seen.length ? { ...vram, peak: Math.max(...seen) } : vram;
}

/** @param {unknown} value @returns {string | null} */
function readError(value) {
  const given = record(value);
  if (given === null) return text(value);
  return [text(given.type, 256), text(given.message)].filter(Boolean).join(": ") || "error";
}

/** @param {unknown} value @returns {import("./types").Hint | null} */
function readHint(value) {
  const given = record(value);
  const code = text(given?.code, 64);
  const sentence = text(given?.sentence);
  if (given === null || !code || !sentence) return null;
  return { code, sentence, saving_s: number(given.saving_s), action: readAction(given.action) };
}

/** @param {unknown} value @returns {import("./types").HintAction | null} */
function readAction(value) {
  const given = record(value);
  const set = record(given?.set);
  if (given === null || set === null) return null;
  /** @type {Record<string, string | number | boolean>} */
  const fields = {};
  for (const [name, wanted] of Object.entries(set)) {
    if (!/^[a-z][a-z_0-9]{0,63}$/.test(name)) return null; // half of an action is another action
    const usable = text(wanted) ?? flag(wanted) ?? signed(wanted);
    if (usable === null) return null;
    fields[name] = usable;
  }
  const names = Object.keys(fields);
  return names.length ? { set: fields, label: text(given.label, 256) || `Set ${names.join(", ")}` } : null;
}

/** @param {unknown} value @returns {import("./types").NodeRow | null} */
function readNode(value) {
  const given = record(value);
  const name = id(given?.id) ?? id(given?.display);
  if (given === null || name === null) return null;
  const row = figures(given, ["wall_s", "moves_s", "onload_s", "stall_s", "evict_s", "peak", "t0", "t1"]);
  const { t0, t1 } = row;
  const moves = [row.onload_s, row.stall_s, row.evict_s];
  return {
    ...row,
    id: name,
    display: id(given.display) ?? name,
    type: text(given.type, 256) ?? "",
    wall_s: row.wall_s ?? (t0 === null || t1 === null || t1 < t0 ? null : t1 - t0),
    moves_s: row.moves_s ?? (moves.includes(null) ? null : moves.reduce((sum, each) => sum + each, 0)),
    cached: flag(given.cached),
  };
}

/**
 * A row of /offload/runs, or what `offload.report` brings.
 * @param {unknown} value
 * @returns {import("./types").RunRow | null}
 */
export function readRow(value) {
  const given = record(value);
  if (given === null) return null;
  return {
    prompt_id: id(given.prompt_id),
    created: text(given.created, 64),
    ended: given.ended !== false,
    complete: given.complete === true,
    error: readError(given.error),
    world: text(given.world, 64),
    verdict: text(given.verdict, 64),
    fits: flag(given.fits),
    output_neutral: flag(given.output_neutral),
    mode: text(given.mode, 64) ?? text(record(given.resolved)?.mode, 64),
    totals: figures(given.totals, TOTALS),
    vram: withPeak(figures(given.vram, [...REPORT_VRAM, "others_start", "high_crossings"])),
    overhead_ms: number(given.overhead_ms),
    text: text(given.text, 16384) ?? "",
    line: text(given.line),
    workload: text(given.workload) || null,
    hints: list(given.hints, readHint, 1),
    hint_note: text(given.hint_note) || null,
    nodes: list(given.nodes, readNode),
  };
}

/** The rows of an answer of /offload/runs, newest first. @param {unknown} value */
export const readRows = (value) => list(record(value)?.runs, readRow, 64);

/** @param {unknown} value @returns {import("./types").Stage | null} */
function readStage(value) {
  const given = record(value);
  if (given === null) return null;
  const named = { name: text(given.name, 256) ?? "", component: text(given.component, 256) ?? "" };
  return { ...named, ...figures(given, ["t0", "t1", "need", "have", "peak"]) };
}

/** @param {unknown} value @returns {import("./types").Step | null} */
function readStep(value) {
  const given = record(value);
  const i = number(given?.i);
  if (given === null || i === null) return null;
  const names = ["t0", "t1", "compute_s", "stall_s", "overlapped_s", "bytes_h2d"];
  return { ...figures(given, names), i, node: id(given.node), count: number(given.count) || 1 };
}

/** @param {unknown} value @returns {import("./types").Move | null} */
function readMove(value) {
  const given = record(value);
  const dir = text(given?.dir, 16);
  if (given === null || dir === null) return null;
  return {
    ...figures(given, ["t", "dur_s", "bytes", "step"]),
    dir,
    component: text(given.component, 256) ?? "",
    reason: text(given.reason, 64) ?? "",
    avoidable: given.avoidable === true,
    overlapped: given.overlapped === true,
    count: number(given.count) || 1,
  };
}

/** @param {unknown} value @returns {import("./types").ComponentSums | null} */
function readSums(value) {
  const given = record(value);
  const component = text(given?.component, 256);
  if (given === null || component === null) return null;
  return { ...figures(given, SUMS), component, dropped_for: readReasons(given.dropped_for) };
}

/** Bytes by reason. @param {unknown} value @returns {[string, number][] | null} */
function readReasons(value) {
  const given = record(value);
  if (given === null) return null;
  return Object.entries(given)
    .slice(0, 64)
    .flatMap(([name, bytes]) => {
      const reason = text(name, 64);
      const known = number(bytes);
      return reason && known ? [/** @type {[string, number]} */ ([reason, known])] : [];
    });
}

/** @param {unknown} value */
function readResidency(value) {
  const given = record(value);
  const component = text(given?.component, 256);
  const { t, bytes } = figures(given, ["t", "bytes"]);
  return component === null || t === null || bytes === null ? null : { t, component, bytes };
}

/** @param {unknown} value */
function readTrack(value) {
  const { t, allocated, resident } = figures(value, ["t", "allocated", "resident"]);
  return t === null ? null : { t, allocated, resident };
}

/** @param {unknown} value */
function readEvent(value) {
  const given = record(value);
  const kind = text(given?.kind, 64);
  return given === null || kind === null ? null : { t: number(given.t), kind, text: text(given.text) ?? "" };
}

/** @param {unknown} value @returns {import("./types").Timer | null} */
function readTimer(value) {
  const given = record(value);
  const name = text(given?.name, 64);
  if (given === null || !name) return null;
  const words = { means: text(given.means) ?? "", turn: text(given.turn) ?? "" };
  return { name, seconds: number(given.seconds), bytes: number(given.bytes), ...words };
}

/** @param {unknown} value */
function readFile(value) {
  const given = record(value);
  const filename = text(given?.filename, 1024);
  if (given === null || !filename) return null;
  return { filename, subfolder: text(given.subfolder, 1024) ?? "", type: text(given.type, 64) ?? "" };
}

/** @param {unknown} value @returns {Record<string, unknown>} */
function readPolicy(value) {
  /** @type {Record<string, unknown>} */
  const fields = {};
  for (const [name, given] of Object.entries(record(value) ?? {}).slice(0, 64)) {
    if (name === "__proto__") continue;
    const one = Array.isArray(given) ? list(given, (each) => text(each, 256), 256) : null;
    fields[name] = one ?? text(given) ?? flag(given) ?? signed(given);
  }
  return fields;
}

/** A whole report, or null. @param {unknown} value @returns {import("./types").Report | null} */
export function readReport(value) {
  const given = record(value);
  const row = readRow(value);
  const schema = text(given?.schema, 64);
  if (given === null || row === null || schema === null || !schema.startsWith("offload-report/")) return null;
  const resolved = record(given.resolved);
  return {
    ...row,
    schema,
    rung: text(given.rung, 64),
    gpu: text(record(given.host)?.gpu, 256),
    policy: readPolicy(given.policy),
    resolved: {
      mode: text(resolved?.mode, 64),
      sentence: text(resolved?.sentence),
      ...figures(resolved, ["high", "low"]),
    },
    stages: list(given.stages, readStage),
    steps: list(given.steps, readStep),
    moves: list(given.moves, readMove),
    by_component: Array.isArray(given.by_component) ? list(given.by_component, readSums, 256) : null,
    residency: list(given.residency, readResidency),
    vram_track: list(given.vram_track, readTrack),
    events: list(given.events, readEvent),
    timers: list(given.timers, readTimer, 64),
    unknown: list(given.unknown, (each) => text(each, 256), 256),
    file: readFile(given.file),
  };
}

/** An answer of /offload/marks, or null. @param {unknown} value @returns {import("./types").Marks | null} */
export function readMarks(value) {
  const given = record(value);
  if (given === null) return null;
  /** @type {Record<string, string>} */
  const sources = {};
  for (const [name, source] of Object.entries(record(given.sources) ?? {}).slice(0, 64)) {
    const said = text(source, 64);
    if (said !== null && name !== "__proto__") sources[name] = said;
  }
  return {
    ...figures(given, MARKS),
    mode: text(given.mode, 64),
    sources,
    sentence: text(given.sentence),
    error: text(given.error) || null,
  };
}
