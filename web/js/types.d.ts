/**
 * Invariant: what the modules below web/js hand to each other, said once. Sizes are bytes, times seconds, unless the
 * name says otherwise; null is "not known" and never 0. Whatever came from the server has been through wire.js and has
 * exactly these shapes: every field is there, no number is NaN, infinite or negative.
 */

/** What a card holds, and its marks. `peak`: the highest use of this prompt so far, or of the run. */
export interface Vram {
  weights: number | null;
  activations: number | null;
  others: number | null;
  free: number | null;
  high: number | null;
  low: number | null;
  peak: number | null;
  total: number | null;
}

/** One component's bytes on the device now, of all that it has. */
export interface ComponentBytes {
  name: string;
  bytes: number | null;
  total: number | null;
}

/** An exact point at a step boundary. `t` in seconds from the start of the prompt. */
export interface Point {
  t: number | null;
  node: string | null;
  step: number | null;
  steps: number | null;
  step_ms: number | null;
  stall_ms: number | null;
  moved: number | null;
  weights: number | null;
  allocated: number | null;
}

/** `offload.telemetry`. */
export interface Telemetry {
  v: number;
  prompt_id: string | null;
  node: string | null;
  /** The type of `node`, as the host that runs it has it. */
  type: string | null;
  t: number | null;
  device: string | null;
  step: number | null;
  steps: number | null;
  vram: Vram;
  step_ms: number | null;
  stall_ms: number | null;
  moved: number | null;
  components: ComponentBytes[] | null;
  points: Point[];
  /** Exact points where nodes began and ended, since the last message. */
  stages: Point[];
  /** Nodes that ended since then. */
  ended: NodeRow[];
}

/** One point of the sparkline: what was in use on the card (everybody's), or null. */
export interface Sample {
  t: number;
  used: number | null;
}

export interface Totals {
  wall_s: number | null;
  encode_s: number | null;
  denoise_s: number | null;
  decode_s: number | null;
  preview_s: number | null;
  onload_s: number | null;
  stall_s: number | null;
  evict_s: number | null;
  other_s: number | null;
  overlapped_s: number | null;
  bytes_h2d: number | null;
  bytes_d2h: number | null;
  move_count: number | null;
  bytes_dropped: number | null;
  drop_count: number | null;
  host_s: number | null;
}

/** The report's figures of the card. `peak` is the one figure that is called peak everywhere. */
export interface ReportVram {
  total: number | null;
  available: number | null;
  peak: number | null;
  peak_device: number | null;
  peak_torch: number | null;
  peak_noted: number | null;
  peak_weights: number | null;
  others_start: number | null;
  high_crossings: number | null;
}

export interface HintAction {
  set: Record<string, string | number | boolean>;
  label: string;
}

export interface Hint {
  code: string;
  sentence: string;
  saving_s: number | null;
  action: HintAction | null;
}

/** A figure of the generation line: what it means and what to turn. */
export interface Timer {
  name: string;
  seconds: number | null;
  /** Of a figure that is a size. */
  bytes: number | null;
  means: string;
  turn: string;
}

export interface Stage {
  name: string;
  component: string;
  t0: number | null;
  t1: number | null;
  need: number | null;
  have: number | null;
  peak: number | null;
}

export interface Step {
  node: string | null;
  i: number;
  t0: number | null;
  t1: number | null;
  compute_s: number | null;
  stall_s: number | null;
  overlapped_s: number | null;
  bytes_h2d: number | null;
  /** How many steps this one stands for, in a capped list; else 1. Its times are their sums. */
  count: number;
}

export interface Move {
  t: number | null;
  dur_s: number | null;
  component: string;
  dir: string;
  bytes: number | null;
  reason: string;
  step: number | null;
  avoidable: boolean;
  overlapped: boolean;
  count: number;
}

/** A row of `by_component` in the report. */
export interface ComponentSums {
  component: string;
  weight_bytes: number | null;
  resident_bytes: number | null;
  left_bytes: number | null;
  moves: number | null;
  bytes_h2d: number | null;
  bytes_d2h: number | null;
  drops: number | null;
  bytes_dropped: number | null;
  avoidable_bytes: number | null;
  onload_s: number | null;
  stall_s: number | null;
  evict_s: number | null;
  compute_s: number | null;
  peak: number | null;
  /** Why it was evicted: reasons with bytes. */
  dropped_for: [string, number][] | null;
}

/** A node of the report, or of a row of /offload/runs: there `moves_s` is given, here it is what can be summed. */
export interface NodeRow {
  id: string;
  /** The id of the node that the user sees: an execution id such as "5" or "3:7". */
  display: string;
  type: string;
  /** From its first mark to its last, in a report; while it was suspended others ran. */
  t0: number | null;
  t1: number | null;
  /** The sum of what it ran itself. */
  wall_s: number | null;
  moves_s: number | null;
  onload_s: number | null;
  stall_s: number | null;
  evict_s: number | null;
  peak: number | null;
  cached: boolean | null;
}

/** A row of /offload/runs, and what `offload.report` brings. */
export interface RunRow {
  prompt_id: string | null;
  created: string | null;
  ended: boolean;
  complete: boolean;
  /** "type: message" of what ended it, or null. */
  error: string | null;
  world: string | null;
  verdict: string | null;
  fits: boolean | null;
  output_neutral: boolean | null;
  mode: string | null;
  totals: Totals;
  vram: ReportVram;
  overhead_ms: number | null;
  text: string;
  line: string | null;
  /** Equal for runs of the same graph with the same sizes and models; null where unknown: comparable with nothing. */
  workload: string | null;
  hints: Hint[];
  hint_note: string | null;
  nodes: NodeRow[];
}

/** A whole report, offload-report/1. */
export interface Report extends RunRow {
  schema: string;
  rung: string | null;
  gpu: string | null;
  /** As written by the user: the fields of OffloadPolicy. */
  policy: Record<string, unknown>;
  resolved: { mode: string | null; high: number | null; low: number | null; sentence: string | null };
  stages: Stage[];
  steps: Step[];
  moves: Move[];
  by_component: ComponentSums[] | null;
  residency: { t: number; component: string; bytes: number }[];
  vram_track: { t: number; allocated: number | null; resident: number | null }[];
  events: { t: number | null; kind: string; text: string }[];
  timers: Timer[];
  unknown: string[];
  /** Where the host wrote it: filename, subfolder, type. */
  file: { filename: string; subfolder: string; type: string } | null;
}

/** `GET /offload/marks`: what an Offload Policy node means on this card. */
export interface Marks {
  total: number | null;
  available: number | null;
  high: number | null;
  low: number | null;
  mode: string | null;
  sources: Record<string, string>;
  sentence: string | null;
  error: string | null;
}

/** What makeTimeline(...).update takes; times from the start of the run. */
export interface TimelineModel {
  end_s: number;
  total: number | null;
  high: number | null;
  low: number | null;
  components: { name: string; points: [number, number][] }[];
  allocated: [number, number][];
  stages: { name: string; component: string; t0: number; t1: number }[];
  evictions: { t: number; component: string; bytes: number; reason: string }[];
  ooms: { t: number; text: string }[];
}

/** A row of the panel's table by component; `change_s`: moves now less moves then, null without a comparable run. */
export interface ComponentTableRow {
  [key: string]: string | number | null;
  component: string;
  weight_bytes: number | null;
  resident_bytes: number | null;
  /** Share of its weights that was on the device at most, 0..1. */
  resident: number | null;
  moves: number | null;
  bytes_h2d: number | null;
  bytes_dropped: number | null;
  avoidable_bytes: number | null;
  onload_s: number | null;
  stall_s: number | null;
  evict_s: number | null;
  moves_s: number | null;
  compute_s: number | null;
  peak: number | null;
  change_s: number | null;
  /** "low 4.8 GiB, need 1.0 GiB"; null: not known. */
  evicted: string | null;
}

/** A row of the panel's table by node; `change_s`: time now less time then. */
export interface NodeTableRow {
  [key: string]: string | number | null;
  display: string;
  type: string;
  wall_s: number | null;
  moves_s: number | null;
  onload_s: number | null;
  stall_s: number | null;
  peak: number | null;
  change_s: number | null;
  /** "denoiser 71 %, 8.0 GiB": of the components that it used, in a whole report. */
  resident: string | null;
}

export type StoreEvent = "live" | "run" | "runs" | "report" | "selected";

/** What is known now. `live` fires for telemetry, `run` when a prompt starts, ends or goes to the next node. */
export interface StoreLike {
  readonly live: Telemetry | null;
  readonly running: { prompt_id: string | null; node: string | null } | null;
  /** The last prompt that this page queued: only of those does the host itself tell a page. */
  readonly mine: string | null;
  /** Whose samples, points and ended nodes are kept. */
  readonly sampled: string | null;
  /** Nodes of that prompt that ended, as far as they were told. */
  readonly ended: readonly NodeRow[];
  readonly samples: readonly Sample[];
  readonly points: readonly Point[];
  /** Newest first. */
  readonly runs: readonly RunRow[];
  /** The prompt that the panel shows; null: the newest. */
  readonly selected: string | null;
  report(promptId: string): Report | null;
  row(promptId: string): RunRow | null;
  on(kind: StoreEvent, callback: () => void): () => void;
  select(promptId: string | null): void;
  setTelemetry(telemetry: Telemetry): void;
  setRunning(promptId: string | null, node: string | null): void;
  endRun(promptId: string | null): void;
  /** What runs is not known any more; unlike an end, it may be told again. */
  forgetRun(): void;
  setRuns(rows: RunRow[]): void;
  addRow(row: RunRow): void;
  setReport(report: Report): void;
}

/** Everything that a module may ask of the front end. Built in adapter.js; nothing else touches the front end. */
export interface Host {
  /** GET of a path such as "/offload/runs?limit=50": the JSON; rejects on an HTTP error. */
  get(path: string): Promise<any>;
  /** The front end's event; the callback is handed its detail. Returns how to stop listening. */
  on(event: string, callback: (detail: any) => void): () => void;
  clientId(): string;
  setting(id: string): any;
  setSetting(id: string, value: unknown): void;
  /** Called after one of our settings changed. */
  onSetting(id: string, callback: (value: any) => void): () => void;
  rootGraph(): any;
  /** The graph that is open in the canvas: a subgraph, or the root. */
  openGraph(): any;
  /** One redraw of the canvas in the next animation frame. */
  redraw(): void;
  /** One undo step for whatever `change` does. */
  undoable(change: () => void): void;
  /** A DOM widget in neither the workflow nor the prompt; null where this front end has none. */
  addWidget(
    node: any,
    name: string,
    element: HTMLElement,
    sizes: { minHeight: number; maxHeight?: number },
  ): any | null;
  openPanel(): void;
  save(filename: string, text: string): void;
  toast(severity: "info" | "success" | "warn" | "error", text: string): void;
  /** Whether the nodes are drawn as DOM (Nodes 2.0). */
  vue(): boolean;
}
