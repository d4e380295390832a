// Invariant: one subscription, renewed while the page is seen and never while it is hidden; news goes to the store.
import assert from "node:assert/strict";
import { test } from "node:test";
import { fetchReport, listen, RENEW_MS, RETRY_MS } from "../../../web/js/listen.js";
import { Store } from "../../../web/js/store.js";

/** A host and a page whose clock and eyes are ours. */
function world({ client = "c 1", answers = {} } = {}) {
  const events = new Map();
  const timers = [];
  const state = { client, hidden: false, asked: [], changed: () => {} };
  const host = {
    clientId: () => state.client,
    get: async (path) => {
      state.asked.push(path);
      const answer = answers[path.split("?")[0]];
      if (answer instanceof Error) throw answer;
      return answer ?? {};
    },
    on(event, callback) {
      events.set(event, callback);
      return () => events.delete(event);
    },
  };
  const page = {
    hidden: () => state.hidden,
    onVisibility(changed) {
      state.changed = changed;
      return () => (state.changed = () => {});
    },
    later(work, ms) {
      const timer = { work, ms };
      timers.push(timer);
      return () => timers.splice(timers.indexOf(timer), timers.includes(timer) ? 1 : 0);
    },
  };
  const settle = () => new Promise((resolve) => setTimeout(resolve, 0));
  return {
    ...{ host, page, state, timers, events, answers, settle, store: new Store() },
    send: (event, detail) => events.get(event)?.(detail),
    /** Lets the one timer of this length run. */
    async pass(ms) {
      const due = timers.filter((timer) => timer.ms === ms);
      assert.equal(due.length, 1, `timers: ${timers.map((timer) => timer.ms)}`);
      timers.splice(timers.indexOf(due[0]), 1);
      due[0].work();
      await settle();
    },
    see(seen) {
      state.hidden = !seen;
      state.changed();
      return settle();
    },
    count: (path) => state.asked.filter((each) => each.startsWith(path)).length,
  };
}
const ASK = "/offload/status?telemetry=c%201";
const PAGE = "/offload/status?page=c%201";
const RUNS = "/offload/runs";
const live = (prompt_id, t) => ({ v: 1, prompt_id, t, node: "3", vram: { total: 9, free: 3 } });

test("asks when the socket is open, then every 20 s; says once that the page is there", async () => {
  const w = world();
  listen(w.host, w.store, w.page);
  assert.deepEqual(w.state.asked, []);
  w.send("status", {});
  await w.settle();
  w.send("status", {});
  await w.settle();
  assert.deepEqual([...w.state.asked].sort(), [RUNS + "?limit=50", PAGE, ASK].sort());
  await w.pass(RENEW_MS);
  await w.pass(RENEW_MS);
  assert.deepEqual([w.count(ASK), w.count(PAGE)], [3, 1]);
});

test("a host that sends no status is asked all the same", async () => {
  const w = world();
  listen(w.host, w.store, w.page);
  await w.pass(RETRY_MS);
  assert.equal(w.count(ASK), 1);
});

test("hidden: no renewal, no frame; seen again: asked at once, and the runs that were missed", async () => {
  const w = world();
  listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  await w.see(false);
  assert.equal(w.timers.filter((timer) => timer.ms === RENEW_MS).length, 0, "nothing is asked while hidden");
  w.send("offload.telemetry", live("p", 1));
  assert.equal(w.store.live, null);
  await w.see(true);
  assert.deepEqual([w.count(ASK), w.count(PAGE), w.count(RUNS)], [2, 1, 2]);
  w.send("offload.telemetry", live("p", 2));
  assert.equal(w.store.live.t, 2);
  assert.equal(w.timers.filter((timer) => timer.ms === RENEW_MS).length, 1, "one loop, however often it was hidden");
});

test("a page that opens hidden asks when it is seen", async () => {
  const w = world();
  w.state.hidden = true;
  listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  assert.deepEqual(w.state.asked, [PAGE], "that it is there is said all the same");
  await w.see(true);
  assert.deepEqual([w.count(ASK), w.count(PAGE)], [1, 1]);
});

test("a new socket is told again that the page is there", async () => {
  const w = world();
  listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  w.send("reconnected", {});
  await w.settle();
  assert.deepEqual([w.count(ASK), w.count(PAGE)], [2, 2]);
});

test("a server that refuses is asked again, ever more slowly, and nothing throws", async () => {
  const w = world({ answers: { "/offload/status": new Error("400"), "/offload/runs": new Error("404") } });
  listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  w.timers.splice(0, 1); // the timer for hosts without a status
  for (const wait of [1, 2, 3, 4]) await w.pass(RETRY_MS * wait);
  await w.pass(RENEW_MS);
  assert.equal(w.count(ASK), 6);
  assert.deepEqual(w.store.runs, []);
});

test("what the server says of now is shown until a prompt runs", async () => {
  const answers = { "/offload/status": { live: live(null, null) } };
  const w = world({ answers });
  listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  assert.equal(w.store.live.vram.total, 9);
  w.send("execution_start", { prompt_id: "p" });
  w.send("offload.telemetry", live("p", 1));
  answers["/offload/status"] = { live: live("p", 0.5) };
  await w.pass(RENEW_MS);
  assert.equal(w.store.live.t, 1);
});

test("a prompt's events lead from its start to its row", async () => {
  const w = world();
  listen(w.host, w.store, w.page);
  w.send("execution_start", { prompt_id: "p" });
  assert.deepEqual(w.store.running, { prompt_id: "p", node: null });
  w.send("executing", "3:7");
  assert.deepEqual(w.store.running, { prompt_id: "p", node: "3:7" });
  w.send("executing", { node: "8", display_node: "3", prompt_id: "p" });
  assert.equal(w.store.running.node, "3");
  w.send("executing", null);
  assert.equal(w.store.running, null);
  w.send("offload.report", { prompt_id: "p", verdict: "resident", text: "t" });
  assert.equal(w.store.runs[0].verdict, "resident");
});

test("each way in which a prompt ends ends it", () => {
  for (const event of ["execution_success", "execution_error", "execution_interrupted", "offload.report"]) {
    const w = world();
    listen(w.host, w.store, w.page);
    w.send("execution_start", { prompt_id: "p" });
    w.send(event, { prompt_id: "p" });
    assert.equal(w.store.running, null, event);
  }
});

test("garbage in any event changes nothing and throws nothing", () => {
  const w = world();
  listen(w.host, w.store, w.page);
  for (const event of w.events.keys()) {
    if (event.startsWith("execut")) continue;
    for (const junk of [null, undefined, 3, "x", [], {}, { prompt_id: {} }, NaN]) w.send(event, junk);
  }
  assert.deepEqual([w.store.live, w.store.runs, w.store.running], [null, [], null]);
  for (const junk of [null, undefined, {}, [], NaN]) for (const event of ["execution_start", "executing", "execution_error"]) w.send(event, junk);
});

test("a page whose telemetry is refused says all the same that it is there, and again where that failed", async () => {
  const w = world();
  const { get } = w.host;
  let away = false;
  w.host.get = (path) => (path.includes("telemetry=") || away ? (get(path), Promise.reject(new Error("503"))) : get(path));
  listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  assert.equal(w.state.asked[0], PAGE);
  away = true;
  w.send("reconnected", {});
  await w.settle();
  away = false;
  w.state.hidden = true;
  w.send("status", {});
  await w.settle();
  w.send("status", {});
  await w.settle();
  assert.equal(w.count(PAGE), 3);
});

test("a run that ended while nobody looked is over as soon as the server is asked", async () => {
  const answers = { "/offload/status": { live: live("p", 1) } };
  const w = world({ answers });
  listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  assert.equal(w.store.running.prompt_id, "p", "told by the server");
  answers["/offload/status"] = { live: live(null, null) };
  await w.pass(RENEW_MS);
  assert.equal(w.store.running, null);
  answers["/offload/status"] = { live: live("q", 1) };
  await w.pass(RENEW_MS);
  assert.equal(w.store.running.prompt_id, "q");
  answers["/offload/status"] = { live: live("r", 1) };
  await w.pass(RENEW_MS);
  assert.equal(w.store.running.prompt_id, "r", "another one is on by now");
});

test("a run that the server never told of is not ended by its silence, nor one that began after the question", async () => {
  const w = world({ answers: { "/offload/status": { live: live(null, null) } } });
  listen(w.host, w.store, w.page);
  w.send("execution_start", { prompt_id: "p" });
  w.send("status", {});
  await w.settle();
  assert.equal(w.store.running.prompt_id, "p");
  w.send("offload.telemetry", live("p", 1));
  const asked = w.pass(RENEW_MS);
  w.send("execution_start", { prompt_id: "q" });
  w.send("offload.telemetry", live("q", 1));
  await asked;
  assert.equal(w.store.running.prompt_id, "q");
});

test("a row that ended ends the run that is thought to be on; one that has not ended does not", async () => {
  const answers = { "/offload/runs": { runs: [{ prompt_id: "p", ended: false }] } };
  const w = world({ answers });
  listen(w.host, w.store, w.page);
  w.send("offload.telemetry", live("p", 1));
  w.send("status", {});
  await w.settle();
  assert.equal(w.store.running.prompt_id, "p");
  answers["/offload/runs"] = { runs: [{ prompt_id: "p", ended: true }] };
  await w.see(false);
  await w.see(true);
  assert.equal(w.store.running, null);
});

test("a new socket: what ran is asked for again, and goes on where it still runs", async () => {
  const answers = {};
  const w = world({ answers });
  listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  w.send("execution_start", { prompt_id: "p" });
  w.send("reconnected", {});
  assert.equal(w.store.running, null);
  answers["/offload/status"] = { live: live("p", 2) };
  w.send("reconnected", {});
  await w.settle();
  assert.equal(w.store.running.prompt_id, "p");
});

test("stop ends it", async () => {
  const w = world();
  const stop = listen(w.host, w.store, w.page);
  w.send("status", {});
  await w.settle();
  stop();
  assert.equal(w.events.size, 0);
  assert.deepEqual(w.timers, []);
  w.state.changed();
  await w.settle();
  assert.equal(w.count(ASK), 1);
});

test("a report is asked for once, kept, and asked again while its prompt runs", async () => {
  const w = world({ answers: { "/offload/report/a%2Fb": { schema: "offload-report/1", prompt_id: "a/b", ended: false } } });
  const [one, two] = await Promise.all([fetchReport(w.host, w.store, "a/b"), fetchReport(w.host, w.store, "a/b")]);
  assert.equal(one, two);
  assert.equal(w.state.asked.length, 1);
  w.answers["/offload/report/a%2Fb"].ended = true;
  await fetchReport(w.host, w.store, "a/b");
  assert.equal((await fetchReport(w.host, w.store, "a/b")).ended, true);
  assert.equal(w.state.asked.length, 2);
  w.answers["/offload/report/c"] = new Error("404");
  assert.equal(await fetchReport(w.host, w.store, "c"), null);
});
