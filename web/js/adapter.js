/**
 * Invariant: the only file that touches the front end. It adds one setting, and shows the text of a VRAM Report on the
 * node, completed when the prompt ends; without it every node works the same.
 *
 * The setting is read by the pack on the server from ComfyUI's settings; nothing has to be sent.
 */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

/** The other nodes of the pack say what they did by the host's own line of progress text. */
const REPORT = "VRAMReport";
const HEIGHT = 72;

/**
 * A read-only box of text at the end of the node, made when there is something to say. It is part of no workflow.
 * @param {any} node
 * @param {string} text
 */
function say(node, text) {
  let widget = node.balancedOffloadText;
  if (!widget) {
    const box = document.createElement("textarea");
    box.readOnly = true;
    box.className = "comfy-multiline-input";
    box.setAttribute("aria-label", `${node.title ?? ""}: where time and VRAM went`);
    widget = node.addDOMWidget?.("balanced_offload_text", "balanced_offload_text", box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
    });
    if (!widget) return;
    widget.serialize = false;
    widget.box = box;
    node.balancedOffloadText = widget;
    const [width, height] = node.computeSize?.() ?? node.size;
    node.setSize?.([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  }
  widget.box.value = text;
  node.setDirtyCanvas?.(true, true);
}

// The node ran before the prompt ended: what it shows is completed now. At the top, or an early event finds nobody.
api.addEventListener("offload.report", ({ detail }) => {
  for (const node of app.graph?._nodes ?? []) {
    if (node.balancedOffloadText && node.balancedOffloadPrompt === detail?.prompt_id) say(node, detail.text);
  }
});

app.registerExtension({
  name: "BalancedOffload",
  settings: [
    {
      id: "BalancedOffload.RestoreStock",
      name: "Restore stock behaviour",
      tooltip:
        "Gives every model back to ComfyUI at once; the graph runs as with stock ComfyUI until this is off again.",
      type: "boolean",
      defaultValue: false,
      category: ["Balanced Offload", "Memory", "RestoreStock"],
    },
  ],
  /** @param {any} node */
  nodeCreated(node) {
    if (node.comfyClass !== REPORT) return;
    const before = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      before?.call(this, output, ...rest);
      const lines = output?.text;
      if (!Array.isArray(lines) || !lines.length) return;
      this.balancedOffloadPrompt = output.vram_report?.[0]?.prompt_id;
      say(this, lines.join("\n"));
    };
  },
});
