// @ts-check
/**
 * Invariant: an execution id ("5", or "3:7" for node 7 inside the subgraph node 3) leads to the node that it means and
 * back, in any graph that is open; what leads nowhere (a node that was deleted) is null and no error.
 *
 * Graphs are LiteGraph's or look like it: `_nodes`, `getNodeById`, a subgraph node's `subgraph`. One subgraph may be
 * used by several nodes, so that a node inside it has several execution ids.
 */

/** @typedef {import("./types").NodeRow} NodeRow */

const DEPTH = 32; // subgraphs inside subgraphs; a graph that holds itself ends here

/** @param {any} graph @param {string} id */
function nodeOf(graph, id) {
  if (!graph) return null;
  const numeric = /^\d+$/.test(id) ? Number(id) : id;
  const known = graph.getNodeById?.(numeric) ?? graph.getNodeById?.(id);
  return known ?? nodesOf(graph).find((node) => String(node.id) === id) ?? null;
}

/** @param {any} graph @returns {any[]} */
const nodesOf = (graph) => graph?._nodes ?? graph?.nodes ?? [];

/**
 * The node of an execution id, or null.
 * @param {any} root the root graph
 * @param {string | null} executionId
 * @returns {any | null}
 */
export function find(root, executionId) {
  if (typeof executionId !== "string" || executionId === "") return null;
  let graph = root;
  let node = null;
  for (const part of executionId.split(":")) {
    node = nodeOf(graph, part);
    if (node === null) return null;
    graph = node.subgraph;
  }
  return node;
}

/**
 * What an execution id begins with for a node of this graph: [""] for the root, ["3:", "4:"] for a subgraph that the
 * nodes 3 and 4 use, [] for one that is used nowhere.
 * @param {any} root
 * @param {any} graph
 * @returns {string[]}
 */
export function prefixes(root, graph) {
  /** @type {string[]} */
  const found = [];
  /** @param {any} here @param {string} prefix @param {number} depth */
  const walk = (here, prefix, depth) => {
    if (here === graph) found.push(prefix);
    if (depth >= DEPTH) return;
    for (const node of nodesOf(here)) if (node.subgraph) walk(node.subgraph, `${prefix}${node.id}:`, depth + 1);
  };
  if (root && graph) walk(root, "", 0);
  return found;
}

/**
 * All execution ids of a node of this graph.
 * @param {any} root
 * @param {any} graph
 * @param {any} node
 */
export const executionIds = (root, graph, node) => prefixes(root, graph).map((prefix) => `${prefix}${node?.id}`);

/**
 * The id, in this graph, of the node in which an execution id lies: itself, or the subgraph node around it. Null where
 * it lies elsewhere.
 * @param {string[]} starts what `prefixes` said of the graph
 * @param {string | null} executionId
 */
export function localId(starts, executionId) {
  if (typeof executionId !== "string" || executionId === "") return null;
  const start = starts.find((prefix) => executionId.startsWith(prefix));
  return start === undefined ? null : executionId.slice(start.length).split(":", 1)[0] || null;
}

/**
 * The rows of a run, summed by the node of this graph in which they lie; a subgraph node is the sum of all inside it.
 * @param {string[]} starts what `prefixes` said of the graph
 * @param {readonly NodeRow[]} rows
 * @returns {Map<string, NodeRow>} by the node's id in this graph
 */
export function rowsByNode(starts, rows) {
  /** @type {Map<string, NodeRow>} */
  const found = new Map();
  for (const row of rows) {
    const id = localId(starts, row.display);
    if (id === null) continue;
    const known = found.get(id);
    found.set(id, known ? add(known, row) : row);
  }
  return found;
}

/** @param {NodeRow} a @param {NodeRow} b @returns {NodeRow} */
function add(a, b) {
  /**
   * A cached node cost nothing; any other that is not known leaves the sum unknown.
   * @param {"wall_s" | "moves_s" | "onload_s" | "stall_s" | "evict_s"} key
   */
  const sum = (key) => {
    const [one, two] = [a, b].map((row) => (row.cached === true ? (row[key] ?? 0) : row[key]));
    return one === null || two === null ? null : one + two;
  };
  const peaks = [a.peak, b.peak].filter((peak) => peak !== null);
  return {
    ...a,
    wall_s: sum("wall_s"),
    moves_s: sum("moves_s"),
    onload_s: sum("onload_s"),
    stall_s: sum("stall_s"),
    evict_s: sum("evict_s"),
    peak: peaks.length ? Math.max(...peaks) : null,
    cached: a.cached === true && b.cached === true,
  };
}

/**
 * Whether the node that runs is the one that this page has under its id: by its type, and where that was not told, as
 * this page queued the prompt.
 * @param {any} root
 * @param {Pick<import("./types.d.ts").StoreLike, "running" | "live" | "mine">} store
 * @returns {boolean}
 */
export function isHere(root, { running, live, mine }) {
  if (running === null) return false;
  const type = live && live.prompt_id === running.prompt_id && live.node === running.node ? live.type : null;
  if (type === null) return running.prompt_id === null || running.prompt_id === mine;
  const node = find(root, running.node);
  return node !== null && (node.comfyClass ?? node.type) === type;
}
