/**
 * Invariant: arithmetic on colours only (WCAG 2 luminance and contrast); no DOM, and what cannot be read is null.
 */

/** @typedef {[number, number, number, number]} Rgba red, green, blue 0..255, alpha 0..1 */

/**
 * "#abc", "#aabbcc", "#aabbccdd", "rgb(1, 2, 3)", "rgb(1 2 3 / 0.5)", "color(srgb 0.1 0.2 0.3 / 0.5)", "transparent".
 * @param {unknown} text
 * @returns {Rgba | null}
 */
export function parseColor(text) {
  if (typeof text !== "string") return null;
  const value = text.trim().toLowerCase();
  if (value === "transparent") return [0, 0, 0, 0];
  const hex = /^#([0-9a-f]{3,4}|[0-9a-f]{6}|[0-9a-f]{8})$/.exec(value)?.[1];
  if (hex) {
    const full = hex.length < 6 ? [...hex].map((digit) => digit + digit).join("") : hex;
    const part = (/** @type {number} */ i) => parseInt(full.slice(i, i + 2), 16);
    return [part(0), part(2), part(4), full.length === 8 ? part(6) / 255 : 1];
  }
  const call = /^(rgba?|color)\(\s*(srgb\s)?([^)]*)\)$/.exec(value);
  if (!call || (call[1] === "color") !== Boolean(call[2])) return null;
  const parts = call[3].split(/[\s,/]+/).filter(Boolean);
  if (parts.length < 3 || parts.length > 4) return null;
  const whole = call[1] === "color" ? 1 : 255;
  const numbers = parts.map((part, i) => {
    const unit = i === 3 ? 1 : whole;
    return part.endsWith("%") ? (parseFloat(part) / 100) * unit : Number(part);
  });
  if (numbers.some((n) => !Number.isFinite(n))) return null;
  const [red, green, blue] = numbers.slice(0, 3).map((n) => Math.min(255, Math.max(0, (n / whole) * 255)));
  return [red, green, blue, Math.min(1, Math.max(0, numbers[3] ?? 1))];
}

/**
 * @param {Rgba} color
 * @returns {string} "#rrggbb", or with the alpha "rgb(r g b / a)"
 */
export function cssColor([red, green, blue, alpha]) {
  const bytes = [red, green, blue].map((n) => Math.round(n));
  if (alpha < 1) return `rgb(${bytes.join(" ")} / ${Math.round(alpha * 1000) / 1000})`;
  return `#${bytes.map((n) => n.toString(16).padStart(2, "0")).join("")}`;
}

/**
 * WCAG 2 relative luminance, 0 (black) to 1 (white).
 * @param {Rgba} color
 */
export function luminance([red, green, blue]) {
  const [r, g, b] = [red, green, blue].map((n) => {
    const part = n / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/**
 * WCAG 2 contrast, 1 to 21.
 * @param {Rgba} a
 * @param {Rgba} b
 */
export function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

/**
 * @param {Rgba} a
 * @param {Rgba} b
 * @param {number} share how much of b, 0 to 1
 * @returns {Rgba}
 */
export function mix(a, b, share) {
  const at = (/** @type {0 | 1 | 2 | 3} */ i) => a[i] + (b[i] - a[i]) * share;
  return [at(0), at(1), at(2), at(3)];
}

/**
 * What is seen where `top` lies over the opaque `under`.
 * @param {Rgba} top
 * @param {Rgba} under
 * @returns {Rgba}
 */
export function over(top, under) {
  const [red, green, blue] = mix(under, top, top[3]);
  return [red, green, blue, 1];
}

/**
 * `color` itself where it stands out enough from `background`, else the nearest mix with black or white that does.
 * @param {Rgba} color opaque
 * @param {Rgba} background opaque
 * @param {number} ratio 4.5 for text, 3 for graphic edges
 * @returns {Rgba}
 */
export function readable(color, background, ratio) {
  if (contrast(color, background) >= ratio) return color;
  /** @type {Rgba} */
  const white = [255, 255, 255, 1];
  /** @type {Rgba} */
  const black = [0, 0, 0, 1];
  const goal = contrast(white, background) >= contrast(black, background) ? white : black;
  for (let share = 0.05; share < 1; share += 0.05) {
    const [red, green, blue] = mix(color, goal, share).map(Math.round);
    /** @type {Rgba} */
    const tried = [red, green, blue, 1];
    if (contrast(tried, background) >= ratio) return tried;
  }
  return goal;
}
