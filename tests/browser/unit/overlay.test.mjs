// What stands above a node is that node's, of the run that is on or the newest; no graph, run or setting makes it throw.
import assert from "node:assert/strict";
import { test } from "node:test";

const style = { getPropertyValue: () => "", backgroundColor: "rgb(32, 32, 32)", fontFamily: "Arial" };
const page = { parentElement: null, isConnected: true, classList: { contains: () => false } };
globalThis.document = {
  ...{ documentElement: page, body: { ...page, append: () => {} }, head: { append: () => {} }, querySelectorAll: () => [] },
  createElement: () => ({ style: {}, getContext: () => null }),
};
globalThis.getComputedStyle = () => style;
globalThis.window = { matchMedia: () => ({ matches: false }) };
const { drawOverlay, liveTexts, planOf, SETTING } = await import("../../../web/js/overlay.js");
const { Store } = await import("../../../web/js/store.js");
const { readRow, readTelemetry } = await import("../../../web/js/wire.js");

const GIB = 2 ** 30;
const AREA = [-1e4, -1e4, 2e4, 2e4];
const VRAM = { weights: 8 * GIB, activations: GIB, others: 0.8 * GIB, free: 6.2 * GIB, high: 12 * GIB, low: 4 * GIB, peak: 11.2 * GIB, total: 16 * GIB };

/** A graph as the front end has it: nodes know theirs, and one that was removed knows none. */
function graphOf(nodes) {
  const graph = {
    _nodes: nodes,
    getNodeById: (id) => graph._nodes.find((node) => node.id === id) ?? null,
    remove: (id) => {
      const node = graph.getNodeById(id);
      node.graph = null;
      graph._nodes = graph._nodes.filter((each) => each !== node);
    },
  };
  for (const node of nodes) node.graph = graph;
  return graph;
}
const nodeOf = (id, type, more = {}) => ({ id, type, comfyClass: type, pos: [100, 200], size: [340, 100], flags: {}, ...more });
const row = (display, type, wall_s, moves_s, more = {}) => ({ id: display, display, type, wall_s, moves_s, stall_s: 0, peak: 9.8 * GIB, cached: false, ...more });
const run = (nodes, more = {}) => readRow({ prompt_id: "p1", complete: true, nodes, ...more });
const telemetry = (more = {}) =>
  readTelemetry({ v: 1, prompt_id: "p1", node: "5", t: 1, step: 3, steps: 20, vram: VRAM, step_ms: 300, stall_ms: 83, moved: 1, ...more });

function hostOf(graph, more = {}) {
  const host = {
    settings: {},
    redraws: 0,
    watched: {},
    setting: (id) => host.settings[id] ?? true,
    onSetting: (id, told) => ((host.watched[id] = told), () => {}),
    rootGraph: () => graph,
    openGraph: () => graph,
    redraw: () => void (host.redraws += 1),
    vue: () => false,
    ...more,
  };
  return host;
}

/** A canvas that only keeps texts, and where in the graph they stand. */
function canvasOf(zoom = 1) {
  const [texts, places, kept] = [[], [], []];
  let at = { x: 0, y: 0, scale: 1 };
  const own = {
    texts,
    places,
    getTransform: () => ({ a: zoom }),
    save: () => void kept.push({ ...at }),
    restore: () => void (at = kept.pop()),
    translate: (x, y) => void ((at.x += x * at.scale), (at.y += y * at.scale)),
    scale: (by) => void (at.scale *= by),
    fillText: (text, x, y) => void (texts.push(text), places.push([at.x + x * at.scale, at.y + y * at.scale])),
    createPattern: () => null,
  };
  return new Proxy(own, { get: (_, name) => own[name] ?? (() => {}), set: () => true });
}
function drawn(host, store, { zoom = 1, area = AREA } = {}) {
  const ctx = canvasOf(zoom);
  drawOverlay(ctx, area, host, store);
  return ctx.texts;
}

test("the node that runs has a strip with VRAM, peak and the last step's moves; no other has", () => {
  const graph = graphOf([nodeOf(5, "KSampler"), nodeOf(6, "VAEDecode")]);
  const [host, store] = [hostOf(graph), new Store()];
  assert.deepEqual(drawn(host, store), []);
  store.setRunning("p1", "5");
  assert.deepEqual(drawn(host, store), [], "nothing is known yet");
  store.setTelemetry(telemetry());
  assert.deepEqual(drawn(host, store), ["VRAM 9.8 GiB, peak 11.2, step moves 83.0 ms"]);
  store.setRunning("p1", "6");
  assert.deepEqual(drawn(host, store), ["VRAM 9.8 GiB, peak 11.2"], "the last step was another node's");
  store.endRun("p1");
  assert.deepEqual(drawn(host, store), []);
});

test("a node that ended has its text before the report, and until there is one", () => {
  const graph = graphOf([nodeOf(5, "KSampler"), nodeOf(6, "VAEDecode"), nodeOf(7, "LoadImage")]);
  const [host, store] = [hostOf(graph), new Store()];
  store.setRuns([run([row("6", "VAEDecode", 9, 9)], { prompt_id: "p0" })]);
  store.setRunning("p1", "6");
  const ended = [row("5", "KSampler", 12.4, 1.5), row("7", "KSampler", 9, 9), row("6", "VAEDecode", 1, 1)];
  store.setTelemetry(telemetry({ node: "6", step: null, ended }));
  assert.deepEqual(drawn(host, store).sort(), ["12.4 s, moves 1.5 s, peak 9.8 GiB", "VRAM 9.8 GiB, peak 11.2"]);
  store.endRun("p1");
  assert.deepEqual(drawn(host, store).sort(), ["1.0 s, moves 1.0 s, peak 9.8 GiB", "12.4 s, moves 1.5 s, peak 9.8 GiB"]);
  store.addRow(run([row("5", "KSampler", 13, 2)]));
  assert.deepEqual(drawn(host, store), ["13.0 s, moves 2.0 s, peak 9.8 GiB"]);
});

test("another page's run is drawn where the types agree, this page's own also where no type was told", () => {
  const graph = graphOf([nodeOf(5, "KSampler")]);
  const [host, other, ours] = [hostOf(graph), new Store(), new Store()];
  const seenWith = (store, type) => {
    store.setTelemetry(telemetry({ type }));
    return drawn(host, store).length;
  };
  assert.deepEqual(["KSampler", "LoadImage", null].map((type) => seenWith(other, type)), [1, 0, 0]);
  ours.setRunning("p1", "5");
  assert.deepEqual(["KSampler", "LoadImage", null].map((type) => seenWith(ours, type)), [1, 0, 1]);
});

test("the marks are written where there is room for them", () => {
  const graph = graphOf([nodeOf(5, "KSampler", { size: [700, 100] })]);
  const [host, store] = [hostOf(graph), new Store()];
  store.setRunning("p1", "5");
  store.setTelemetry(telemetry());
  assert.deepEqual(drawn(host, store)[1], "▼ high 12.0 GiB  ▲ low 4.0 GiB");
  store.setTelemetry(telemetry({ vram: { ...VRAM, high: null } }));
  assert.deepEqual(drawn(host, store)[1], "▲ low 4.0 GiB");
  store.setTelemetry(telemetry({ vram: { ...VRAM, high: null, low: null } }));
  assert.equal(drawn(host, store).length, 1);
});

test("figures of another prompt are not drawn at this one's node", () => {
  const store = new Store();
  store.setTelemetry(telemetry({ prompt_id: "p0" }));
  store.setRunning("p1", "5");
  assert.deepEqual(planOf(graphOf([nodeOf(5, "KSampler")]), graphOf([nodeOf(5, "KSampler")]), store), []);
});

test("unknown figures are n/a, never NaN", () => {
  assert.deepEqual(liveTexts(null, null, { ms: null })[0], "VRAM n/a, peak n/a, step moves n/a");
  assert.deepEqual(liveTexts(null, 2 * GIB, null), ["VRAM n/a, peak 2.0 GiB", "n/a, peak 2.0 GiB", "n/a"]);
  for (const text of liveTexts(9.8 * GIB, 512, { ms: 0 })) assert.doesNotMatch(text, /NaN|undefined|null/);
});

test("after a run only nodes whose moves are worth it have a text, from the newest run", () => {
  const graph = graphOf([nodeOf(5, "KSampler"), nodeOf(6, "VAEDecode"), nodeOf(7, "SaveImage")]);
  const [host, store] = [hostOf(graph), new Store()];
  store.setRuns([
    run([row("5", "KSampler", 12.4, 1.5), row("6", "VAEDecode", 10, 0.2), row("7", "SaveImage", 1, 0.06)]),
    run([row("6", "VAEDecode", 10, 9)], { prompt_id: "p0" }),
  ]);
  assert.deepEqual(drawn(host, store), ["12.4 s, moves 1.5 s, peak 9.8 GiB", "1.0 s, moves 60.0 ms, peak 9.8 GiB"]);
});

test("a subgraph node is the sum of its nodes; the inner graph shows its own", () => {
  const inner = graphOf([nodeOf(7, "KSampler"), nodeOf(8, "VAEDecode")]);
  const root = graphOf([nodeOf(3, "uuid", { subgraph: inner }), nodeOf(5, "KSampler")]);
  const [host, store] = [hostOf(root), new Store()];
  store.setRuns([run([row("3:7", "KSampler", 8, 1, { peak: 9 * GIB }), row("3:8", "VAEDecode", 2, 0.5, { peak: 11 * GIB })])]);
  assert.deepEqual(drawn(host, store), ["10.0 s, moves 1.5 s, peak 11.0 GiB"]);
  host.openGraph = () => inner;
  assert.deepEqual(drawn(host, store), ["8.0 s, moves 1.0 s, peak 9.0 GiB", "2.0 s, moves 500.0 ms, peak 11.0 GiB"]);
  store.setRunning("p2", "3:8");
  store.setTelemetry(telemetry({ prompt_id: "p2", node: "3:8" }));
  const [item] = planOf(root, inner, store);
  assert.equal(item.node.id, 8);
  assert.equal(planOf(root, root, store)[0].node.id, 3, "outside it is the subgraph node that runs");
});

test("another workflow's node under the same id, or a node that is gone, shows nothing", () => {
  const store = new Store();
  store.setRuns([run([row("5", "KSampler", 12.4, 1.5), row("99", "KSampler", 12.4, 1.5), row("3:7", "KSampler", 9, 9)])]);
  assert.deepEqual(drawn(hostOf(graphOf([nodeOf(5, "LoadImage"), nodeOf(3, "Note")])), store), []);
  const graph = graphOf([nodeOf(5, "KSampler"), nodeOf(6, "KSampler")]);
  const host = hostOf(graph);
  assert.equal(drawn(host, store).length, 1);
  graph.remove(5);
  assert.deepEqual(drawn(host, store), [], "deleted");
});

test("a node made while the prompt ran is shown at the node that the user sees", () => {
  const store = new Store();
  store.setRuns([run([row("5", "Inner", 2, 1, { id: "5.0.0.1" })])]);
  assert.equal(drawn(hostOf(graphOf([nodeOf(5, "Loop")])), store).length, 1);
});

test("a node deleted while it runs, an unknown id and no graph at all draw nothing and throw nothing", () => {
  const graph = graphOf([nodeOf(5, "KSampler")]);
  const [host, store] = [hostOf(graph), new Store()];
  store.setRunning("p1", "5");
  store.setTelemetry(telemetry());
  assert.equal(drawn(host, store).length, 1);
  graph.remove(5);
  assert.deepEqual(drawn(host, store), []);
  for (const node of ["5", "404", "3:7", "", "::", "__proto__", null]) {
    store.setRunning("p1", node);
    assert.deepEqual(drawn(host, store), [], String(node));
  }
  host.rootGraph = host.openGraph = () => null;
  assert.deepEqual(drawn(host, store), []);
});

test("a node without a place is left out, one without a title bar is not pushed up by one", () => {
  const graph = graphOf([nodeOf(5, "KSampler", { pos: undefined }), nodeOf(6, "KSampler", { pos: [Number.NaN, 1] })]);
  const store = new Store();
  store.setRuns([run([row("5", "KSampler", 2, 1), row("6", "KSampler", 2, 1)])]);
  assert.deepEqual(drawn(hostOf(graph), store), []);
  const places = [0, 1].map((title_mode) => {
    const ctx = canvasOf();
    drawOverlay(ctx, AREA, hostOf(graphOf([nodeOf(5, "KSampler", { title_mode })])), store);
    return ctx.places[0][1];
  });
  assert.equal(places[1] - places[0], 30);
});

test("outside the node's box in both modes, above the badges in the canvas", () => {
  const store = new Store();
  store.setRuns([run([row("5", "KSampler", 2, 1)])]);
  const [canvas, vue] = [false, true].map((mode) => {
    const ctx = canvasOf();
    drawOverlay(ctx, AREA, hostOf(graphOf([nodeOf(5, "KSampler")]), { vue: () => mode }), store);
    return ctx.places[0][1];
  });
  assert.ok(vue < 200 - 30 - 8, "above the title");
  assert.equal(vue - canvas, 17, "a row of badges higher");
});

test("off by the setting, below a zoom of 0.4, and where nothing of it is seen", () => {
  const graph = graphOf([nodeOf(5, "KSampler")]);
  const [host, store] = [hostOf(graph), new Store()];
  store.setRuns([run([row("5", "KSampler", 12.4, 1.5)])]);
  assert.equal(drawn(host, store, { zoom: 0.4 }).length, 1);
  assert.equal(drawn(host, store, { zoom: 0.3999999 }).length, 1, "1.1 to a whole power is never exact");
  assert.deepEqual(drawn(host, store, { zoom: 0.36 }), []);
  assert.deepEqual(drawn(host, store, { area: [1000, 1000, 10, 10] }), []);
  host.settings[SETTING] = false;
  assert.deepEqual(drawn(host, store), []);
  const before = host.redraws;
  store.setTelemetry(telemetry());
  assert.equal(host.redraws, before, "nothing to redraw for");
  host.settings[SETTING] = true;
  host.watched[SETTING](true);
  assert.equal(host.redraws, before + 1, "seen at once when it is switched on");
});

test("a change asks for a redraw, and a frame without one works out nothing", () => {
  const graph = graphOf([nodeOf(5, "KSampler")]);
  const [host, store] = [hostOf(graph), new Store()];
  drawn(host, store);
  store.setRuns([run([row("5", "KSampler", 12.4, 1.5)])]);
  assert.equal(host.redraws, 1);
  let asked = 0;
  const { rootGraph } = host;
  host.rootGraph = () => ((asked += 1), rootGraph());
  for (let i = 0; i < 20; i += 1) drawn(host, store);
  assert.equal(asked, 1, "one plan for 20 frames");
});
