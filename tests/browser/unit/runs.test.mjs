// Which run is shown, what the picker says, and how what failed is asked for again.
import assert from "node:assert/strict";
import { mock, test } from "node:test";
import * as picking from "../../../web/js/runs.js";
import { Store } from "../../../web/js/store.js";
import { readRow } from "../../../web/js/wire.js";

const { LIMIT, makeLoader, makeRetry, NOW, optionsOf, pickedOf, runLabel, timeOf, viewOf } = picking;
const GIB = 2 ** 30;
const row = (prompt_id, over = {}) =>
  readRow({
    ...{ prompt_id, created: "2026-01-31T12:00:00Z", mode: "balanced", verdict: "partial", complete: true },
    ...{ totals: { wall_s: 6.43 }, vram: { peak: 14 * GIB } },
    ...over,
  });
const flush = async () => {
  for (let i = 0; i < 20; i += 1) await Promise.resolve();
};

test("follows the run that is on, then its report, then the newest", () => {
  const runs = [row("b"), row("a")];
  const state = { running: null, runs, selected: null, waiting: false };
  assert.deepEqual(viewOf(state), { kind: "run", id: "b" });
  assert.deepEqual(viewOf({ ...state, running: { prompt_id: "c" } }), { kind: "now" });
  assert.deepEqual(viewOf({ ...state, waiting: true }), { kind: "now" });
  assert.deepEqual(viewOf({ ...state, runs: [] }), { kind: "empty" });
  assert.deepEqual(viewOf({ ...state, runs: [row(null), row("a")] }), { kind: "run", id: "a" });
});

test("what the user picked stays, whatever starts or ends", () => {
  const state = { running: { prompt_id: "c" }, runs: [row("b")], selected: "a", waiting: true };
  assert.deepEqual(viewOf(state), { kind: "run", id: "a" });
  assert.deepEqual(viewOf({ ...state, running: null, runs: [] }), { kind: "run", id: "a" });
});

test("a pick of the newest or of Now follows; any other, or one while a run is on, stays", () => {
  const runs = [row("b"), row("a")];
  assert.equal(pickedOf("b", { running: null, runs }), null);
  assert.equal(pickedOf("a", { running: null, runs }), "a");
  assert.equal(pickedOf("b", { running: {}, runs }), "b");
  assert.equal(pickedOf(NOW, { running: {}, runs }), null);
  assert.equal(pickedOf("", { running: null, runs: [] }), null);
});

test("a label says time, mode, wall, peak and verdict, and marks an error", () => {
  const now = new Date("2026-02-01T00:00:00Z");
  assert.match(runLabel(row("a"), now), / · balanced · 6\.43 s · peak 14\.0 GiB · partial$/);
  assert.match(runLabel(row("a", { verdict: "oom_recovered" }), now), /oom recovered$/);
  const bad = runLabel(row("a", { error: { type: "ValueError", message: "no" }, verdict: "partial" }), now);
  assert.match(bad, /^✕ .* · partial · error$/);
  assert.equal(runLabel(readRow({ prompt_id: "x" }), now), "time n/a · mode n/a · n/a · peak n/a · verdict n/a");
});

test("the day is said where it is not today's", () => {
  const at = new Date(2026, 0, 31, 9, 5, 7);
  assert.equal(timeOf(at.toISOString(), new Date(2026, 0, 31, 23)), "09:05:07");
  assert.equal(timeOf(at.toISOString(), new Date(2026, 1, 1)), "2026-01-31 09:05:07");
  assert.equal(timeOf("yesterday", new Date()), "time n/a");
  assert.equal(timeOf(null, new Date()), "time n/a");
});

test("at most 50 runs are offered, each once, rows without an id not at all, Now first", () => {
  const rows = [row(null), row("dup"), row("dup"), ...Array.from({ length: 60 }, (_, i) => row(`r${i}`))];
  const options = optionsOf(rows, true);
  assert.equal(options[0].value, NOW);
  assert.equal(options.length, LIMIT + 1);
  assert.equal(new Set(options.map((option) => option.value)).size, options.length);
  assert.deepEqual(optionsOf([], false), []);
});

test("what fails is tried again at growing intervals until it works, and each turn is told", async () => {
  mock.timers.enable({ apis: ["setTimeout"] });
  let calls = 0;
  let told = 0;
  const retry = makeRetry(
    async () => {
      calls += 1;
      if (calls < 3) throw new Error("HTTP 500");
    },
    () => (told += 1),
  );
  retry.now();
  await flush();
  assert.deepEqual([calls, retry.error(), retry.busy(), told], [1, "HTTP 500", false, 1]);
  mock.timers.tick(1999);
  await flush();
  assert.equal(calls, 1);
  mock.timers.tick(1);
  await flush();
  assert.equal(calls, 2);
  mock.timers.tick(3999);
  await flush();
  assert.equal(calls, 2, "the second wait is twice the first");
  mock.timers.tick(1);
  await flush();
  assert.deepEqual([calls, retry.error(), told], [3, null, 3]);
  mock.timers.tick(120000);
  await flush();
  assert.equal(calls, 3);
  mock.timers.reset();
});

test("after stop nothing is tried or told", async () => {
  mock.timers.enable({ apis: ["setTimeout"] });
  let calls = 0;
  let told = 0;
  const retry = makeRetry(
    async () => {
      calls += 1;
      throw new Error("no");
    },
    () => (told += 1),
  );
  retry.now();
  await flush();
  retry.stop();
  mock.timers.tick(120000);
  await flush();
  assert.deepEqual([calls, told, retry.error()], [1, 1, null]);
  mock.timers.reset();
});

const whole = (prompt_id, over = {}) => ({ schema: "offload-report/1", prompt_id, ended: true, ...over });

function loaderOf(answers) {
  const store = new Store();
  const asked = [];
  const host = {
    get: async (path) => {
      asked.push(path);
      const answer = answers[path.split("?")[0]];
      if (answer instanceof Error) throw answer;
      return typeof answer === "function" ? answer() : answer;
    },
  };
  return { store, asked, loader: makeLoader(host, store, () => {}) };
}

test("the list fills the store; an answer that is none is said", async () => {
  const { store, loader, asked } = loaderOf({ "/offload/runs": { runs: [{ prompt_id: "b" }, 7, { prompt_id: "a" }] } });
  loader.refresh();
  assert.equal(loader.loading(), true);
  await flush();
  assert.deepEqual([store.runs.map((one) => one.prompt_id), loader.loading()], [["b", "a"], false]);
  assert.deepEqual(asked, [`/offload/runs?limit=${LIMIT}`]);
  const bad = loaderOf({ "/offload/runs": { runs: "none" } });
  bad.loader.refresh();
  await flush();
  assert.match(bad.loader.problem(null).runs, /no list of runs/);
  bad.loader.stop();
});

test("a report is asked for once, its id is quoted, and a whole one is not asked for again", async () => {
  const { store, loader, asked } = loaderOf({ "/offload/report/a%2Fb%3Fc": whole("a/b?c") });
  loader.want(["a/b?c", null]);
  loader.want(["a/b?c", null]);
  await flush();
  loader.want(["a/b?c"]);
  await flush();
  assert.deepEqual(asked, ["/offload/report/a%2Fb%3Fc"]);
  assert.equal(store.report("a/b?c").prompt_id, "a/b?c");
});

test("a report that was read before its end is read again when its row says more, not before", async () => {
  let ended = false;
  const { store, loader, asked } = loaderOf({ "/offload/report/a": () => whole("a", { ended }) });
  for (let i = 0; i < 3; i += 1) {
    loader.want(["a"]);
    await flush();
  }
  assert.equal(asked.length, 1);
  ended = true;
  store.addRow(row("a"));
  loader.want(["a"]);
  await flush();
  assert.deepEqual([asked.length, store.report("a").ended], [2, true]);
});

test("another run's report is not shown under this run's name; one without an id is this one", async () => {
  const { store, loader } = loaderOf({ "/offload/report/a": whole("z"), "/offload/report/b": whole(undefined) });
  loader.want(["a", "b"]);
  await flush();
  assert.match(loader.problem("a").report, /another run/);
  assert.equal(store.report("a"), null);
  assert.equal(store.report("b").prompt_id, "b");
  loader.stop();
});

test("what is not wanted any more is neither asked for again nor kept", async () => {
  mock.timers.enable({ apis: ["setTimeout"] });
  const { loader, asked } = loaderOf({ "/offload/report/a": new Error("HTTP 404"), "/offload/report/b": whole("b") });
  loader.want(["a"]);
  await flush();
  assert.equal(loader.problem("a").report, "HTTP 404");
  loader.want(["b"]);
  await flush();
  mock.timers.tick(120000);
  await flush();
  assert.deepEqual(asked, ["/offload/report/a", "/offload/report/b"]);
  assert.equal(loader.problem("a").report, null);
  mock.timers.reset();
});
