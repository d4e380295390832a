// @ts-check
/**
 * Invariant: the only file that touches the front end; a part that fails takes neither the others nor the front end
 * with it, and says so once in the console.
 *
 * Every other module is plain: the front end imports them all by itself, so that none may do anything by being
 * imported. Settings are read by the pack on the server from ComfyUI's settings; nothing has to be sent.
 */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

/** @typedef {import("./types").Host} Host */
/** @typedef {import("./types").StoreLike} StoreLike */

const TAB = "balanced-offload";
const TOGGLE = "BalancedOffload.TogglePanel";
const REPORT = "VRAMReport";
const POLICY = "OffloadPolicy";

/** @type {Set<string>} */
const said = new Set();

/**
 * Run one part of ours. What it throws is said once and goes no further.
 * @template T
 * @param {string} part
 * @param {() => T} work
 * @returns {T | undefined}
 */
function safely(part, work) {
  try {
    const done = work();
    if (done instanceof Promise) done.catch((error) => warn(part, error));
    return done;
  } catch (error) {
    warn(part, error);
    return undefined;
  }
}

/**
 * @param {string} part
 * @param {unknown} error
 */
function warn(part, error) {
  if (said.has(part)) return;
  said.add(part);
  console.warn(`Balanced Offload: ${part} is off:`, error);
}

/** A module of ours, or null: one that cannot be loaded costs only what it draws. @type {<T>(p: string, m: Promise<T>) => Promise<T | null>} */
const part = (name, module) => module.catch((error) => (warn(name, error), null));

/** @type {Map<string, Set<(value: any) => void>>} */
const watchers = new Map();

const manager = () => app.extensionManager;
let frame = 0;

/** @type {Host} */
const host = {
  async get(path) {
    const answer = await api.fetchApi(path);
    const body = await answer.json().catch(() => null);
    if (!answer.ok) throw new Error(typeof body?.error === "string" ? body.error : `HTTP ${answer.status}`);
    return body;
  },
  on(event, callback) {
    /** @param {any} message */
    const heard = (message) => safely(`what listens to ${event}`, () => callback(message?.detail));
    api.addEventListener(event, heard);
    return () => api.removeEventListener(event, heard);
  },
  clientId: () => String(api.clientId ?? api.initialClientId ?? ""),
  setting: (id) => manager()?.setting?.get?.(id) ?? app.ui?.settings?.getSettingValue?.(id, DEFAULTS[id]) ?? DEFAULTS[id],
  setSetting(id, value) {
    const kept = manager()?.setting?.set?.(id, value) ?? app.ui?.settings?.setSettingValueAsync?.(id, value);
    safely(`the setting ${id}`, () => kept);
  },
  onSetting(id, callback) {
    const known = watchers.get(id) ?? new Set();
    watchers.set(id, known.add(callback));
    return () => void known.delete(callback);
  },
  rootGraph: () => app.graph?.rootGraph ?? app.graph ?? null,
  openGraph: () => app.canvas?.graph ?? host.rootGraph(),
  redraw() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      app.canvas?.setDirty?.(true, false);
    });
  },
  undoable(change) {
    const tracker = manager()?.workflow?.activeWorkflow?.changeTracker;
    // What was changed before and not yet taken down is a step of its own.
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
    app.canvas?.emitBeforeChange?.();
    try {
      change();
    } finally {
      app.canvas?.emitAfterChange?.();
      app.canvas?.setDirty?.(true, true);
    }
  },
  addWidget(node, name, element, { minHeight, maxHeight }) {
    if (typeof node?.addDOMWidget !== "function") return null;
    const widget = node.addDOMWidget(name, name, element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => minHeight,
      ...(maxHeight === undefined ? {} : { getMaxHeight: () => maxHeight }),
    });
    if (!widget) return null;
    widget.serialize = false; // the option keeps it out of the prompt, this out of the workflow
    const [width, height] = node.computeSize?.() ?? node.size;
    node.setSize?.([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
    return widget;
  },
  openPanel() {
    if (!panelShown()) togglePanel();
  },
  save(filename, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = filename;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  },
  toast(severity, text) {
    const toast = manager()?.toast;
    const verb = severity === "warn" ? "warning" : severity;
    if (typeof toast?.[verb] === "function") toast[verb]("Balanced Offload", { description: text });
    else toast?.add?.({ severity, summary: "Balanced Offload", detail: text, life: 8000 });
  },
  vue: () => /** @type {any} */ (window).LiteGraph?.vueNodesMode === true,
};

/** @type {Record<string, unknown>} */
const DEFAULTS = {
  "BalancedOffload.RestoreStock": false,
  "BalancedOffload.Overlay": true,
  "BalancedOffload.Chip": true,
  "BalancedOffload.Hints": true,
  "BalancedOffload.HiddenHints": "",
};

const panelShown = () => {
  const bottom = manager()?.bottomPanel;
  return bottom?.bottomPanelVisible === true && bottom.activeBottomPanelTabId === TAB;
};

function togglePanel() {
  const bottom = manager()?.bottomPanel;
  if (typeof bottom?.toggleBottomPanelTab === "function") bottom.toggleBottomPanelTab(TAB);
  else safely("the panel", () => manager()?.command?.execute?.(`Workspace.ToggleBottomPanelTab.${TAB}`));
}

/**
 * @param {string} key
 * @param {string} name
 * @param {string} tooltip
 * @param {string} group
 * @param {"boolean" | "text"} [type]
 */
const setting = (key, name, tooltip, group, type = "boolean") => ({
  id: `BalancedOffload.${key}`,
  name,
  tooltip,
  type,
  defaultValue: DEFAULTS[`BalancedOffload.${key}`],
  category: ["Balanced Offload", group, key],
  /** @param {unknown} value */
  onChange: (value) => {
    // The front end calls this before it keeps the value.
    for (const told of watchers.get(`BalancedOffload.${key}`) ?? []) safely(`the setting ${key}`, () => told(value));
  },
});

// Until the widgets that draw are there: the text of a VRAM Report, completed when the prompt ends.
/**
 * @param {any} node
 * @param {string} text
 */
function say(node, text) {
  if (!node.balancedOffloadText) {
    const box = document.createElement("textarea");
    box.readOnly = true;
    box.className = "comfy-multiline-input";
    box.setAttribute("aria-label", `${node.title ?? ""}: where time and VRAM went`);
    const widget = host.addWidget(node, "balanced_offload_text", box, { minHeight: 72 });
    if (!widget) return;
    widget.box = box;
    node.balancedOffloadText = widget;
  }
  node.balancedOffloadText.box.value = text;
  node.setDirtyCanvas?.(true, true);
}

host.on("offload.report", (detail) => {
  for (const node of host.rootGraph()?._nodes ?? []) {
    if (node.balancedOffloadText && node.balancedOffloadPrompt === detail?.prompt_id) say(node, detail.text);
  }
});

app.registerExtension({
  name: "BalancedOffload",
  settings: [
    setting(
      "RestoreStock",
      "Restore stock behaviour",
      "Gives every model back to ComfyUI at once; the graph runs as with stock ComfyUI until this is off again.",
      "Memory",
    ),
  ],
  /** @param {any} node */
  nodeCreated(node) {
    if (node.comfyClass !== REPORT) return;
    const before = node.onExecuted;
    node.onExecuted = /** @this {any} @param {any} output @param {any[]} rest */ function (output, ...rest) {
      before?.call(this, output, ...rest);
      const lines = output?.text;
      if (!Array.isArray(lines) || !lines.length) return;
      this.balancedOffloadPrompt = output.vram_report?.[0]?.prompt_id;
      say(this, lines.join("\n"));
    };
  },
});
