// @ts-check
/**
 * Invariant: the only file that touches the front end; a part that fails takes neither the others nor the front end
 * with it, and says so once in the console. What a front end does not have is left out.
 *
 * Every other module is plain: the front end imports them all by itself, so that none may do anything by being
 * imported. Settings are read by the pack on the server from ComfyUI's settings; nothing has to be sent.
 */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

/** @typedef {import("./types").Host} Host */

const TAB = "balanced-offload";
const TOGGLE = "BalancedOffload.TogglePanel";
const ANCHOR = "bo-chip-anchor";
const REPORT = "VRAMReport";
const POLICY = "OffloadPolicy";
const PATIENCE_MS = 1500;

/** @type {Record<string, {name: string, tooltip: string, group: string, type: string, value: unknown}>} */
const SETTINGS = {
  "BalancedOffload.RestoreStock": {
    name: "Restore stock behaviour",
    tooltip: "Gives every model back to ComfyUI at once; the graph runs as with stock ComfyUI until this is off again.",
    group: "Memory",
    type: "boolean",
    value: false,
  },
  "BalancedOffload.Overlay": {
    name: "Show VRAM above nodes",
    tooltip: "A strip above the node that runs, and a short text above nodes whose moves took time.",
    group: "Display",
    type: "boolean",
    value: true,
  },
  "BalancedOffload.Chip": {
    name: "Show the VRAM chip",
    tooltip: "VRAM now, the peak and the time of moves, beside the Run button; a press opens the Offload panel.",
    group: "Display",
    type: "boolean",
    value: true,
  },
  "BalancedOffload.Hints": {
    name: "Show hints",
    tooltip: "At most one sentence a run, where two runs prove what a changed policy saves.",
    group: "Hints",
    type: "boolean",
    value: true,
  },
  "BalancedOffload.HiddenHints": {
    name: "Hints not to show again",
    tooltip: "Codes of hints with commas between them; the button of a hint adds its own. Empty shows all again.",
    group: "Hints",
    type: "text",
    value: "",
  },
};

/** Parts that failed: each is said once. @type {Set<string>} */
const said = new Set();

/** @param {string} part @param {unknown} error */
function warn(part, error) {
  if (said.has(part)) return;
  said.add(part);
  console.warn(`Balanced Offload: a part failed, everything else works: ${part}:`, error);
}

/**
 * Run one part of ours; what it throws goes no further.
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

/** @param {EventTarget | null | undefined} element @returns {element is HTMLElement} */
const focusable = (element) => element instanceof HTMLElement && element.isConnected && element !== document.body;

const manager = () => app.extensionManager;
/** What our settings were changed to, which is told before the front end keeps it. @type {Map<string, unknown>} */
const changed = new Map();
/** @type {Map<string, Set<(value: any) => void>>} */
const watchers = new Map();
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
    const heard = (message) => void safely(`what listens to ${event}`, () => callback(message?.detail));
    api.addEventListener(event, heard);
    return () => api.removeEventListener(event, heard);
  },
  clientId: () => String(api.clientId ?? api.initialClientId ?? ""),
  setting(id) {
    if (changed.has(id)) return changed.get(id);
    const usual = SETTINGS[id]?.value;
    return manager()?.setting?.get?.(id) ?? app.ui?.settings?.getSettingValue?.(id, usual) ?? usual;
  },
  setSetting(id, value) {
    const settings = manager()?.setting;
    safely(`the setting ${id}`, () =>
      settings?.set ? settings.set(id, value) : app.ui?.settings?.setSettingValue?.(id, value),
    );
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
    // What was changed before and is not noted yet stays a step of its own.
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

/**
 * A module of ours, or null: one that cannot be loaded costs only what it draws.
 * @template T
 * @param {string} part
 * @param {Promise<T>} module
 * @returns {Promise<T | null>}
 */
const load = (part, module) => module.catch((error) => (warn(part, error), null));

const [stores, listening, chips, panels, overlays, reports, policies] = await Promise.all([
  load("what the page knows", import("./store.js")),
  load("what listens", import("./listen.js")),
  load("the status chip", import("./chip.js")),
  load("the panel", import("./panel.js")),
  load("the strips above nodes", import("./overlay.js")),
  load("the widget of VRAM Report", import("./reportwidget.js")),
  load("the widget of Offload Policy", import("./policywidget.js")),
]);
const store = stores && new stores.Store();

// At the top, and not in a hook: an event that comes early finds its listener.
if (store && listening) safely("what listens", () => listening.listen(host, store));

// ---------------------------------------------------------------- the panel
/** @type {{place: HTMLElement, unmount: () => void} | null} */
let mounted = null;
/** Who had the focus before the panel was opened. @type {Element | null} */
let from = null;

function unmountPanel() {
  const { unmount } = mounted ?? {};
  mounted = null;
  if (unmount) safely("the panel", unmount);
}

/** Called by the front end whenever it likes, also for a place that is filled. @param {HTMLElement} place */
function renderPanel(place) {
  if (!panels || !store || mounted?.place === place) return;
  unmountPanel();
  safely("the panel", () => {
    mounted = { place, unmount: panels.mountPanel(place, host, store) };
  });
}

function panelShown() {
  const bottom = manager()?.bottomPanel;
  return bottom?.bottomPanelVisible === true && bottom.activeBottomPanelTabId === TAB;
}

/** Opens or closes the panel; the focus goes into it and, at the end, back to where it was. */
function togglePanel() {
  const opens = !panelShown();
  if (opens) from = document.activeElement;
  const inside = mounted?.place.contains(document.activeElement) ?? false;
  const bottom = manager()?.bottomPanel;
  if (typeof bottom?.toggleBottomPanelTab === "function") bottom.toggleBottomPanelTab(TAB);
  else safely("the panel", () => manager()?.command?.execute?.(`Workspace.ToggleBottomPanelTab.${TAB}`));
  if (opens) focusPanel(performance.now() + PATIENCE_MS);
  else if (inside && focusable(from)) from.focus();
}

/**
 * The front end builds the panel when it likes. The focus goes to the panel itself: what is in it comes and goes.
 * @param {number} until
 */
function focusPanel(until) {
  requestAnimationFrame(() => {
    const panel = mounted?.place.isConnected ? mounted.place.firstElementChild : null;
    if (panel instanceof HTMLElement && panel.offsetParent) {
      panel.tabIndex = -1;
      panel.focus({ preventScroll: true });
    } else if (performance.now() < until) focusPanel(until);
    else if (panelShown()) {
      manager()?.bottomPanel?.toggleBottomPanelTab?.(TAB);
      host.toast("info", "This menu has no bottom panel for Offload. Settings, Use new menu: Top brings it back.");
    }
  });
}

// ---------------------------------------------------------------- above nodes, and the chip
/** In graph coordinates, after whatever was drawn there before us; works in both ways of drawing nodes. */
function drawOverNodes() {
  const canvas = app.canvas;
  if (!canvas || !overlays || !store) return;
  const before = canvas.onDrawForeground;
  /** @this {any} @param {any} ctx @param {any} area @param {any[]} rest */
  canvas.onDrawForeground = function (ctx, area, ...rest) {
    before?.call(this, ctx, area, ...rest);
    ctx.save();
    safely("the strips above nodes", () => overlays.drawOverlay(ctx, area, host, store));
    ctx.restore();
  };
  // Before the first strip nobody else asks for a frame.
  for (const kind of /** @type {const} */ (["live", "run", "runs"])) {
    store.on(kind, () => {
      if (host.setting("BalancedOffload.Overlay") !== false) host.redraw();
    });
  }
}

/** The chip stands in the action bar where there is one, else in a corner of the canvas. */
function showChip() {
  if (!chips || !store) return;
  /** @type {ReturnType<typeof chips.makeChip> | null} */
  let chip = null;
  let looked = 0;
  const place = () => {
    if (!chip) return;
    const { element } = chip;
    const anchor = document.querySelector(`.${ANCHOR}`);
    const corner = app.canvasContainer ?? app.canvas?.canvas?.parentElement;
    const was = element.parentElement;
    if (anchor && anchor.nextElementSibling !== element) anchor.after(element);
    else if (!anchor && looked > 2 && corner && element.parentElement !== corner) corner.append(element);
    element.classList.toggle("bo-chip-floating", !anchor);
    if (element.parentElement !== was) chip.refresh(); // its colours are those of the place
  };
  /** @param {unknown} wanted */
  const turn = (wanted) => {
    if (wanted === false) chip?.off();
    if (wanted === false) chip = null;
    else chip ??= chips.makeChip(host, store, { open: togglePanel, heard: () => !panelShown() });
    safely("the status chip", place);
  };
  host.onSetting("BalancedOffload.Chip", turn);
  turn(host.setting("BalancedOffload.Chip"));
  // The front end builds its bars after us, and again when its menu is changed.
  const look = () => {
    looked += 1;
    safely("the status chip", place);
    setTimeout(look, looked < 10 ? 300 : 3000);
  };
  look();
}

// ---------------------------------------------------------------- what the front end is given
/** @param {[string, (typeof SETTINGS)[string]]} entry */
const setting = ([id, { name, tooltip, group, type, value }]) => ({
  id,
  name,
  tooltip,
  type,
  defaultValue: value,
  category: ["Balanced Offload", group, id.split(".")[1]],
  /** @param {unknown} now */
  onChange(now) {
    changed.set(id, now ?? value);
    for (const told of watchers.get(id) ?? []) safely(`the setting ${name}`, () => told(now ?? value));
  },
});

app.registerExtension({
  name: "BalancedOffload",
  settings: Object.entries(SETTINGS).map(setting),
  commands: [{ id: TOGGLE, label: "Toggle Offload Panel", icon: "pi pi-chart-bar", function: togglePanel }],
  keybindings: [{ combo: { key: "o", alt: true, shift: true }, commandId: TOGGLE }],
  menuCommands: [{ path: ["View"], commands: [TOGGLE] }],
  bottomPanelTabs: panels
    ? [{ id: TAB, title: "Offload", type: "custom", render: renderPanel, destroy: unmountPanel }]
    : [],
  actionBarButtons: [
    {
      icon: "pi pi-chart-bar",
      label: "Offload",
      tooltip: "VRAM and moves: open the Offload panel",
      class: ANCHOR,
      onClick: togglePanel,
    },
  ],
  setup() {
    safely("the strips above nodes", drawOverNodes);
    safely("the status chip", showChip);
  },
  /** @param {any} node */
  nodeCreated(node) {
    if (!store) return;
    const kind = node.comfyClass;
    if (kind === REPORT) safely("the widget of VRAM Report", () => reports?.attachReport(node, host, store));
    if (kind === POLICY) safely("the widget of Offload Policy", () => policies?.attachPolicy(node, host, store));
  },
});
