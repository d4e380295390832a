/**
 * Invariant: a hint changes inputs of Offload Policy nodes and nothing else, only what its `action.set` names, only to
 * values that the input can hold, as one undo step; and what was done, or why nothing was, is said in one text.
 *
 * Plain LiteGraph objects, duck-typed: graphs have `nodes`, subgraph nodes have `subgraph`. A value that comes through
 * a link is not ours to set, except where the link ends in an input that a subgraph node shows as its own widget.
 */

const TYPE = "OffloadPolicy";
/** LiteGraph's modes of a node that does not run. */
const MUTED = 2;
const BYPASSED = 4;
/** The id of a subgraph's input node, inside the subgraph. */
const SUBGRAPH_INPUT = -10;
const DEPTH = 32;

/** What people read on the node, in the node's order; for texts about nodes that are not there. */
const LABELS = new Map([
  ["mode", "Mode"],
  ["high", "High mark (VRAM)"],
  ["low", "Low mark (VRAM)"],
  ["never", "Never offload"],
  ["always", "Always offload"],
  ["vae_tiling", "VAE tiling"],
  ["before_decode", "Before decode"],
  ["on_oom", "On out of memory"],
  ["headroom", "Headroom (activations)"],
  ["reserve", "Reserve (other programs)"],
  ["pinned_ram", "Pinned RAM"],
  ["gc_threshold", "GC threshold"],
  ["prefetch", "Prefetch (ring)"],
  ["fit_aware", "Fit-aware"],
  ["use_core_dynamic", "Core dynamic VRAM"],
]);
const LISTS = new Set(["never", "always"]);

/**
 * @typedef {{node: any, path: any[], id: string}} Found a node, the subgraph nodes around it, its execution id
 * @typedef {{widget: any, owner: any}} Place where a value is set
 * @typedef {{done: boolean, text: string}} Outcome
 */

/**
 * Every Offload Policy node that runs, those inside subgraphs once for each instance.
 * @param {any} root @returns {Found[]}
 */
export function policyNodes(root) {
  /** @type {Found[]} */
  const found = [];
  /** @param {any} graph @param {any[]} path */
  const walk = (graph, path) => {
    if (path.length > DEPTH) return;
    for (const node of nodesOf(graph)) {
      if (!node || node.mode === MUTED || node.mode === BYPASSED) continue;
      const id = [...path, node].map((one) => one.id).join(":");
      if ((node.comfyClass ?? node.type) === TYPE) found.push({ node, path, id });
      // A subgraph inside itself cannot be run; here it would never end.
      if (node.subgraph && !path.some((one) => one.subgraph === node.subgraph)) walk(node.subgraph, [...path, node]);
    }
  };
  if (root) walk(root, []);
  return found;
}

/** @param {any} graph @returns {any[]} */
function nodesOf(graph) {
  const nodes = graph?.nodes ?? graph?._nodes;
  return Array.isArray(nodes) ? nodes : [];
}

/**
 * Where an input's value is set: its own widget, or the one that stands for it outside the subgraph; text says which
 * node supplies it by a link; null where there is no such input.
 * @param {Found} found @param {string} field @returns {Place | string | null}
 */
export function placeOf({ node, path }, field) {
  const slot = (node.inputs ?? []).findIndex((/** @type {any} */ input) => nameOf(input) === field);
  const link = slot < 0 ? null : linkTo(node, slot, path);
  if (!link) {
    const widget = (node.widgets ?? []).find((/** @type {any} */ one) => one?.name === field);
    return widget ? { widget, owner: node } : null;
  }
  return throughLink(link, path, node);
}

/** @param {any} link @param {any[]} path @param {any} node where it ends @returns {Place | string} */
function throughLink(link, path, node) {
  if (Number(link.origin_id) !== SUBGRAPH_INPUT || !path.length) return originOf(graphOf(node, path), link);
  const outer = path[path.length - 1];
  const shown = outer.inputs?.[link.origin_slot];
  if (!shown) return `an input of ${titleOf(outer)}`;
  const rest = path.slice(0, -1);
  const further = linkTo(outer, link.origin_slot, rest);
  if (further) return throughLink(further, rest, outer);
  const name = nameOf(shown);
  const widget = shown._widget ?? (outer.widgets ?? []).find((/** @type {any} */ one) => one?.name === name);
  return widget ? { widget, owner: outer } : `the input "${name}" of ${titleOf(outer)}`;
}

/** @param {any} node @param {any[]} path */
const graphOf = (node, path) => (path.length ? path[path.length - 1].subgraph : node.graph);

/**
 * The link that ends in this input, or null. Looked for among the graph's links: a subgraph node answers getInputLink
 * for its outputs, and inputs may not be asked for their link on newer front ends.
 * @param {any} node @param {number} slot @param {any[]} path
 */
function linkTo(node, slot, path) {
  const links = graphOf(node, path)?._links ?? graphOf(node, path)?.links;
  const all = typeof links?.values === "function" ? [...links.values()] : Object.values(links ?? {});
  return all.find((link) => String(link?.target_id) === String(node.id) && Number(link.target_slot) === slot) ?? null;
}

/** @param {any} graph @param {any} link @returns {string} */
function originOf(graph, link) {
  const origin = nodesOf(graph).find((node) => String(node.id) === String(link.origin_id));
  return origin ? titleOf(origin) : "another node";
}

/** @param {any} input @returns {string} */
const nameOf = (input) => String(input?.widget?.name ?? input?.name ?? "");

/** @param {any} node @param {string} [id] its execution id @returns {string} */
const titleOf = (node, id = node.id) => `"${String(node.title ?? node.type ?? "node").slice(0, 60)}" (#${id})`;

/**
 * Whether the widgets of a node spell this policy; inputs that links supply are not known and say nothing.
 * @param {Found} found @param {Record<string, any>} policy
 */
export function spells(found, policy) {
  let seen = 0;
  for (const [field, value] of Object.entries(policy)) {
    const place = placeOf(found, field);
    if (!place || typeof place === "string") continue;
    if (normal(field, place.widget.value) !== normal(field, value)) return false;
    seen += 1;
  }
  return seen > 0;
}

/** One text for what the server reads as one value: lists as it splits them, numbers and text alike, any case. */
function normal(/** @type {string} */ field, /** @type {unknown} */ value) {
  if (LISTS.has(field)) {
    const entries = Array.isArray(value) ? value : String(value ?? "").split(/[,;\s]+/);
    return entries
      .map((entry) => String(entry).trim())
      .filter(Boolean)
      .join(",");
  }
  const text = String(value).trim().toLowerCase();
  return field === "gc_threshold" && ["null", "auto", "profile"].includes(text) ? "profile" : text;
}

/**
 * Which nodes a hint about this policy means: those that spell it, or, as the button was pressed before, what the hint
 * makes of it; else the only one there is.
 * @param {Found[]} all @param {any} policy @param {Record<string, any>} [set]
 * @returns {{nodes: Found[], changed: boolean}}
 */
export function meant(all, policy, set = {}) {
  for (const each of isRecord(policy) ? [policy, { ...policy, ...set }] : []) {
    const equal = all.filter((found) => spells(found, each));
    if (equal.length) return { nodes: equal, changed: false };
  }
  return { nodes: all.length === 1 ? all : [], changed: isRecord(policy) };
}

/** @param {unknown} value @returns {value is Record<string, any>} */
const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/**
 * The value as the widget holds it, undefined where it can't: text boxes hold text, switches booleans, choices one of
 * their options.
 * @param {any} widget @param {any} value
 */
export function asWidget(widget, value) {
  const options = typeof widget.options?.values === "function" ? widget.options.values() : widget.options?.values;
  if (Array.isArray(options)) return options.find((option) => String(option) === String(value));
  if (typeof widget.value === "boolean") return typeof value === "boolean" ? value : undefined;
  if (Array.isArray(value)) return value.every((entry) => typeof entry === "string") ? value.join(", ") : undefined;
  if (typeof widget.value === "number") return typeof value === "number" && Number.isFinite(value) ? value : undefined;
  const written = typeof value === "string" || (typeof value === "number" && Number.isFinite(value));
  return written ? String(value) : undefined;
}

/** "on", "none", "clip-l, t5": a value as it looks on the node. @param {unknown} value */
function shown(value) {
  if (typeof value === "boolean") return value ? "on" : "off";
  if (value === "") return "empty";
  return Array.isArray(value) ? value.join(", ") : String(value);
}

/** "Fit-aware to on, Mode to none". @param {Record<string, any>} set @param {string} [to] */
export function whatToSet(set, to = "to ") {
  return Object.entries(set)
    .map(([field, value]) => `${LABELS.get(field) ?? field} ${to}${shown(value)}`)
    .join(", ");
}

/**
 * Sets what the hint names.
 * @param {import("./types.d.ts").Host} host @param {any} hint @param {any} report of the run that the hint is about
 * @returns {Outcome}
 */
export function applyHint(host, hint, report) {
  const set = hint?.action?.set;
  if (!isRecord(set) || !Object.keys(set).length) return no("This hint names nothing to set.");
  const all = policyNodes(host.rootGraph());
  const { nodes, changed } = meant(all, report?.policy, set);
  if (!nodes.length) return no(nobody(all.length, set));
  const { changes, refused } = plan(nodes, set);
  const where = nodes.map(({ node, id }) => titleOf(node, id)).join(", ");
  if (refused.length) return no(`Nothing was changed: ${refused.join("; ")}. Set ${whatToSet(set)} there.`);
  const open = changes.filter(({ place, value }) => place.widget.value !== value);
  if (!open.length) return no(`${where} already has ${whatToSet(set, "")}. The next run uses it.`);
  host.undoable(() => open.forEach(({ place, value }) => write(place, value)));
  host.redraw();
  const kept = open.filter(({ place, value }) => place.widget.value === value);
  if (kept.length < open.length) return no(`The node did not take it: set ${whatToSet(set)} in ${where}.`);
  const note = changed ? " Its inputs were not those of this run." : "";
  return { done: true, text: `Set ${whatToSet(set)} in ${where}.${note} The next run uses it; undo with Ctrl+Z.` };
}

/** @param {number} count @param {Record<string, any>} set */
function nobody(count, set) {
  const what = whatToSet(set);
  if (count) return `None of the ${count} Offload Policy nodes has the policy of this run. Set ${what} in yours.`;
  return (
    "This workflow has no Offload Policy node. Add one (category Offload), connect its policy to the node that loads " +
    `or samples the model, and set ${what}.`
  );
}

/**
 * All changes or none: half of a hint would be another policy.
 * @param {Found[]} nodes @param {Record<string, any>} set
 */
function plan(nodes, set) {
  /** @type {Map<any, {place: Place, value: any}>} by widget: instances of one subgraph share theirs */
  const changes = new Map();
  /** @type {string[]} */
  const refused = [];
  for (const found of nodes) {
    for (const [field, wanted] of Object.entries(set)) {
      const name = `${LABELS.get(field) ?? field} of ${titleOf(found.node, found.id)}`;
      const place = placeOf(found, field);
      if (!place) refused.push(`there is no ${name}`);
      else if (typeof place === "string") refused.push(`${name} comes from ${place}`);
      else {
        const value = asWidget(place.widget, wanted);
        if (value === undefined) refused.push(`${name} cannot be ${shown(wanted)}`);
        else changes.set(place.widget, { place, value });
      }
    }
  }
  return { changes: [...changes.values()], refused };
}

/** As the front end does when a person changes a widget. @param {Place} place @param {any} value */
function write({ widget, owner }, value) {
  const before = widget.value;
  widget.value = value;
  widget.callback?.(value, undefined, owner);
  owner.onWidgetChanged?.(widget.name, value, before, widget);
  owner.setDirtyCanvas?.(true, true);
}

/** @param {string} text @returns {Outcome} */
const no = (text) => ({ done: false, text });
