// @ts-check
/**
 * Invariant: exactly one of the tabs that are offered is selected, one Tab stop leads to them and the arrow keys from
 * one to the next; a section that is no tab at the moment is always seen.
 */
import { el, setAttr } from "./dom.js";

/** @typedef {{id: string, title: string, element: HTMLElement}} Section */

/** Which tab the keys lead to; null: the key is none of ours.
 * @param {string} key @param {readonly string[]} ids @param {string} active @returns {string | null} */
export function nextTab(key, ids, active) {
  const at = ids.indexOf(active);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1 + ids.length, Home: 0, End: ids.length - 1 }[key];
  return to === undefined || !ids.length ? null : ids[to % ids.length];
}

/**
 * @param {string} label of the list of tabs
 * @param {Section[]} sections in order
 * @param {string} prefix of the elements' ids, its own for each list
 * @param {() => void} changed another one is selected
 */
export function makeTabs(label, sections, prefix, changed) {
  const list = el("div", "bo-tabs");
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", label);
  const tabs = new Map(sections.map((section) => [section.id, tabOf(section, prefix)]));
  list.append(...tabs.values());
  let offered = sections.map(({ id }) => id);
  let active = offered[0];
  /** What was picked last: it comes back when it is offered again. */
  let wished = active;

  const draw = () => {
    if (!offered.includes(active)) active = offered[0];
    for (const { id, element } of sections) {
      const tab = /** @type {HTMLElement} */ (tabs.get(id));
      const isTab = offered.includes(id);
      tab.hidden = !isTab;
      tab.tabIndex = id === active ? 0 : -1;
      setAttr(tab, "aria-selected", String(id === active));
      setAttr(element, "role", isTab ? "tabpanel" : "region");
      element.hidden = isTab && id !== active;
    }
  };
  /** @param {string} id */
  const pick = (id) => {
    active = wished = id;
    draw();
    changed();
  };
  for (const [id, tab] of tabs) tab.addEventListener("click", () => pick(id));
  list.addEventListener("keydown", (event) => {
    const to = nextTab(event.key, offered, active);
    if (to === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    pick(to);
    tabs.get(to)?.focus();
  });
  draw();
  return {
    element: list,
    /** Which sections share the one place; the others are seen beside it. @param {string[]} ids */
    offer(ids) {
      if (ids.join() === offered.join()) return;
      offered = ids;
      active = ids.includes(wished) ? wished : ids[0];
      draw();
    },
    active: () => active,
    pick,
  };
}

/** @param {Section} section @param {string} prefix */
function tabOf({ id, title, element }, prefix) {
  const tab = el("button", "bo-tab", title);
  tab.type = "button";
  tab.id = `${prefix}-tab-${id}`;
  element.id = `${prefix}-section-${id}`;
  tab.setAttribute("role", "tab");
  tab.setAttribute("aria-controls", element.id);
  element.setAttribute("aria-labelledby", tab.id);
  return tab;
}
