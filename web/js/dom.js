/**
 * Invariant: text from the server becomes a text node and nothing else; classes begin with bo-.
 */

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {string} [classes]
 * @param {string} [text]
 * @returns {HTMLElementTagNameMap[K]}
 */
export function el(tag, classes, text) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== undefined) element.textContent = text;
  return element;
}

/**
 * Writes only what has changed: a node that is read aloud or selected is left alone.
 * @param {Node} node
 * @param {string} text
 */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * The exact number behind a shown text; none where it is not known.
 * @param {HTMLElement} element
 * @param {number | null} value
 */
export function setValue(element, value) {
  if (value === null) element.removeAttribute("data-value");
  else if (element.getAttribute("data-value") !== String(value)) element.setAttribute("data-value", String(value));
}

/**
 * @param {Element} element
 * @param {string} name
 * @param {string | null} value null takes it away
 */
export function setAttr(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/**
 * A button that says what it does.
 * @param {string} text shown
 * @param {string} label read aloud, and the tooltip
 * @param {() => void} act
 */
export function button(text, label, act) {
  const element = el("button", "bo-button", text);
  element.type = "button";
  if (label !== text) {
    element.setAttribute("aria-label", label);
    element.title = label;
  }
  element.addEventListener("click", act);
  return element;
}
