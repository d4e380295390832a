// @ts-check
/**
 * Invariant: a figure reads the same here, in the log and in the report: units and rounding are those of the server's
 * summary. What is not a known number is "n/a", whatever it is instead.
 */

export const UNKNOWN = "n/a";

/** @type {[string, number][]} */
const UNITS = [
  ["TiB", 2 ** 40],
  ["GiB", 2 ** 30],
  ["MiB", 2 ** 20],
  ["KiB", 2 ** 10],
  ["B", 1],
];

/** @param {unknown} value @returns {value is number} */
const known = (value) => typeof value === "number" && Number.isFinite(value);

/**
 * As Python's `f"{value:.{digits}f}"`: a tie goes to the even digit, where toFixed goes up. Only an odd multiple of
 * 1 / 2^(digits + 1) is a tie that a double can hold, and its product with 10^digits is exact.
 * @param {number} value
 * @param {number} digits
 */
export function fixed(value, digits) {
  const scaled = Math.abs(value) * 2 ** (digits + 1);
  if (scaled % 2 !== 1 || scaled > 2 ** 50) return value.toFixed(digits);
  const below = Math.floor(Math.abs(value) * 10 ** digits);
  const even = (below % 2 ? below + 1 : below) / 10 ** digits;
  return (value < 0 ? -even : even).toFixed(digits);
}

/** @param {number} n */
const unitOf = (n) => UNITS.find(([, scale]) => Math.abs(n) >= scale) ?? UNITS[UNITS.length - 1];

/**
 * "9.8 GiB", "12.0 MiB", "512 B"; `unit` fixes the unit.
 * @param {unknown} n
 * @param {string} [unit]
 */
export function bytes(n, unit) {
  if (!known(n)) return UNKNOWN;
  const [name, scale] = UNITS.find(([each]) => each === unit) ?? unitOf(n);
  return scale === 1 ? `${Math.round(n)} B` : `${fixed(n / scale, 1)} ${name}`;
}

/** The unit that `bytes` would choose, so that several figures can share one. @param {unknown} n */
export const unit = (n) => (known(n) ? unitOf(n)[0] : "B");

/**
 * "9.8" of "9.8 GiB", in the unit of another figure.
 * @param {unknown} n
 * @param {string} name
 */
export const bare = (n, name) => bytes(n, name).replace(` ${name}`, "");

/**
 * "9.8 / 16.0 GiB": the first in the unit of the second.
 * @param {unknown} a
 * @param {unknown} b
 */
export function pair(a, b) {
  if (!known(b)) return known(a) ? `${bytes(a)} / ${UNKNOWN}` : UNKNOWN;
  return `${bare(a, unit(b))} / ${bytes(b)}`;
}

/** "5.52 s", "83.1 ms", "12.0 us". @param {unknown} value */
export function seconds(value) {
  if (!known(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size >= 1 || size === 0) return `${fixed(value, 2)} s`;
  return size >= 1e-3 ? `${fixed(value * 1e3, 1)} ms` : `${fixed(value * 1e6, 1)} us`;
}

/** One digit, for a place with little room: "12.4 s", "83.1 ms". @param {unknown} value */
export const brief = (value) => (known(value) && Math.abs(value) >= 1 ? `${fixed(value, 1)} s` : seconds(value));

/** A share of 1: "63 %". @param {unknown} value */
export const percent = (value) => (known(value) ? `${fixed(value * 100, 0)} %` : UNKNOWN);

/** "2,000". @param {unknown} value */
export const count = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : UNKNOWN);

/**
 * A change, with its sign: "+0.31 s" said by `seconds`, or by the function that is given.
 * @param {unknown} value
 * @param {(value: unknown) => string} [say]
 */
export function delta(value, say = seconds) {
  if (!known(value)) return UNKNOWN;
  return value > 0 ? `+${say(value)}` : say(value);
}
