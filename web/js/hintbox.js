// @ts-check
/**
 * Invariant: at most one hint is seen, never one that the user hid, and nothing is changed before its button is
 * pressed. What the button did, or why it did nothing, stands beside it.
 *
 * A hint's words come from the server and are text, whatever is in them.
 */
import { applyHint, whatToSet } from "./apply.js";
import { button, el, setText } from "./dom.js";
import { count, percent, seconds } from "./format.js";

/** @typedef {import("./types").Hint} Hint */
/** @typedef {import("./types").Host} Host */
/** @typedef {import("./types").Report} Report */
/** @typedef {import("./types").RunRow} RunRow */

export const HINTS = "BalancedOffload.Hints";
export const HIDDEN = "BalancedOffload.HiddenHints";

/** Why a hint is given at all: the rule behind it, in words. */
const WHY = new Map([
  [
    "FITS_BUT_MOVED",
    "All weights of the run and its largest activations fit on the card, and still something was evicted and loaded " +
      "again. The seconds are what the run waited for copies and evictions that it could have been spared.",
  ],
  [
    "NO_OFFLOAD_FASTER",
    "Everything fits, but the mode or the high mark of this policy moves weights. In mode auto the same run loads " +
      "once and then moves nothing.",
  ],
  [
    "DECODE_PEAK",
    "The decode ran out of memory, stepped down and was begun again. The seconds are those of the tries that failed.",
  ],
  [
    "HIGH_MARK_TOO_LOW",
    "The high mark splits a component of which more would fit beside the activations, so that less of it would " +
      "stream in every step.",
  ],
  [
    "RAM_PRESSURE",
    "Copies from RAM that is not page-locked are slower, and nothing hides them. Both rates were measured in this run.",
  ],
  [
    "CORE_DEFAULT_BEST",
    "The same work ran faster by the default: compared are the fastest of two runs with this policy and the slowest " +
      "by the default, of which one run is enough.",
  ],
]);
const EVIDENCE = "Hints are given only where the ledger proves the saving over two comparable runs.";

/** The codes that the user does not want to see. @param {unknown} setting @returns {string[]} */
export function hiddenCodes(setting) {
  if (typeof setting !== "string") return [];
  return [...new Set(setting.split(/[,;\s]+/).filter(Boolean))];
}

/**
 * What is to be seen of a run's hints.
 * @param {RunRow | null} run @param {unknown} on @param {unknown} hidden the two settings
 * @returns {{hint: Hint | null, note: string | null}}
 */
export function hintOf(run, on, hidden) {
  if (!run || on === false) return { hint: null, note: null };
  const codes = hiddenCodes(hidden);
  const hint = run.hints.find((one) => !codes.includes(one.code)) ?? null;
  return { hint, note: hint ? null : run.hint_note };
}

/** Rows of "Why?": what is known, in figures. @param {Hint} hint @param {RunRow} run @returns {[string, string][]} */
export function whyOf(hint, run) {
  /** @type {[string, string][]} */
  const rows = [];
  const wall = run.totals.wall_s;
  const share = hint.saving_s !== null && wall ? `, ${percent(hint.saving_s / wall)} of this run` : "";
  rows.push(["Proven saving", `${seconds(hint.saving_s)}${share}`]);
  if (run.totals.move_count !== null) rows.push(["Moves in this run", count(run.totals.move_count)]);
  if (hint.action) rows.push(["The button sets", `${whatToSet(hint.action.set)}, in the Offload Policy node`]);
  rows.push(["Code", hint.code]);
  return rows;
}

/** @param {Host} host @param {{say: (text: string) => void, changed: () => void, leave: () => void}} panel */
export function makeHintBox(host, { say, changed, leave }) {
  const element = el("section", "bo-hint");
  element.hidden = true;
  element.setAttribute("aria-label", "Hint");
  const note = el("p", "bo-hint-note");
  const sentence = el("p", "bo-hint-text");
  const act = button("", "", () => run && hint && done(applyHint(host, hint, run).text));
  const hide = button("Do not show again", "Do not show again", () => hint && hideCode(hint.code));
  act.classList.add("bo-hint-act");
  hide.classList.add("bo-hint-hide");
  const why = el("details", "bo-hint-why");
  const said = el("p", "bo-hint-said");
  const facts = el("dl", "bo-hint-facts");
  const rule = el("p", "bo-hint-rule");
  const help = helpLink("Hints", "All hints and when they are given");
  why.append(el("summary", "bo-hint-summary", "Why?"), rule, facts, help);
  const mark = el("span", "bo-hint-mark", "▶ Hint");
  element.append(mark, sentence, act, hide, why, said, note);
  /** @type {Hint | null} */
  let hint = null;
  /** @type {RunRow | Report | null} */
  let run = null;
  let drawn = "";

  /** @param {string} text */
  function done(text) {
    said.textContent = text;
    say(text);
  }

  /** @param {string} code */
  function hideCode(code) {
    host.setSetting(HIDDEN, [...hiddenCodes(host.setting(HIDDEN)), code].join(","));
    say(`Hint hidden. To see it again take ${code} out of the setting "Hints not to show again".`);
    changed();
    leave(); // the button that had the focus is gone
  }

  return {
    element,
    /** @param {RunRow | Report | null} shown @param {unknown} [on] the settings @param {unknown} [hidden] */
    update(shown, on = host.setting(HINTS), hidden = host.setting(HIDDEN)) {
      run = shown;
      const now = hintOf(shown, on, hidden);
      hint = now.hint;
      const key = JSON.stringify([shown?.prompt_id, now, shown?.totals.wall_s]);
      if (key === drawn) return;
      drawn = key;
      element.hidden = !now.hint && !now.note;
      element.dataset.code = hint?.code ?? "";
      for (const part of [mark, sentence, act, hide, why, said]) part.hidden = !hint;
      note.hidden = !now.note;
      note.textContent = now.note ? `No hint: ${now.note}` : "";
      said.textContent = "";
      if (!hint || !shown) return;
      setText(sentence, hint.sentence);
      act.hidden = !hint.action;
      setText(act, hint.action?.label ?? "");
      why.open = false;
      rule.textContent = `${WHY.get(hint.code) ?? ""} ${EVIDENCE}`.trim();
      facts.replaceChildren(...whyOf(hint, shown).flatMap(factOf));
    },
  };
}

/** @param {[string, string]} fact */
const factOf = ([key, value]) => [el("dt", "bo-hint-key", key), el("dd", "bo-hint-value", value)];

/**
 * A help page of the pack, which lie beside the scripts.
 * @param {string} page @param {string} text
 */
export function helpLink(page, text) {
  const link = el("a", "bo-link", text);
  link.href = new URL(`../docs/${page}.md`, import.meta.url).href;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}
