// Invariant: in every palette text keeps 4.5:1 and graphic edges 3:1, and no two parts are told apart by colour alone.
import assert from "node:assert/strict";
import { test } from "node:test";
import { contrast, cssColor, luminance, mix, over, parseColor, readable } from "../../../web/js/color.js";
import { componentLook, partColor, PARTS, themeOn } from "../../../web/js/look.js";

// The host's own palettes (dark, nord, light, github, arc, solarized) and what could be worse than any of them.
const PALETTES = [
  ["#171718", { text: "#ddd", muted: "#999", border: "#4e4e4e", raised: "#222" }],
  ["#353535", { text: "#ddd", muted: "#999", border: "#4e4e4e", raised: "#222" }],
  ["#242730", { text: "#ddd", muted: "#b2b7bd", border: "#6e7581", raised: "#2b2f38" }],
  ["#ffffff", { text: "#222", muted: "#444", border: "#888", raised: "#C9C9C9" }],
  ["#dddddd", { text: "#222", muted: "#444", border: "#888", raised: "#C9C9C9" }],
  ["#13171d", { text: "#bcc2c8", muted: "#999", border: "#30363d", raised: "#161b22" }],
  ["#073642", { text: "#93a1a1", muted: "#586e75", border: "#657b83", raised: "#002b36" }],
  ["#808080", { text: "#777", muted: "#888", border: "#808080" }],
  ["#ff0000", { text: "#00ff00", muted: "#0000ff", border: "#ff0000" }],
];
const at = (color) => parseColor(color);

test("the contrast is that of WCAG 2", () => {
  assert.equal(contrast(at("#000"), at("#fff")), 21);
  assert.equal(contrast(at("#fff"), at("#fff")), 1);
  assert.equal(contrast(at("#777777"), at("#ffffff")).toFixed(2), "4.48");
  // The figures measured for the palette: sky blue and vermillion on #202020 and white.
  assert.deepEqual(["#56b4e9", "#d55e00"].map((one) => contrast(at(one), at("#202020")).toFixed(1)), ["7.1", "4.2"]);
  assert.deepEqual(["#0072b2", "#d55e00"].map((one) => contrast(at(one), at("#ffffff")).toFixed(1)), ["5.2", "3.9"]);
});

test("text and edges can be read in every palette", () => {
  for (const [background, host] of PALETTES) {
    const theme = themeOn(background, host);
    const bg = at(theme.bg);
    for (const key of ["text", "muted", "alarm", "focus"]) {
      assert.ok(contrast(at(theme[key]), bg) >= 4.5, `${key} ${theme[key]} on ${background}`);
    }
    const edges = [theme.border, theme.focus, ...Object.keys(PARTS).map((key) => partColor(key, theme)), ...theme.components];
    for (const color of edges) assert.ok(contrast(at(color), bg) >= 3, `${color} on ${background}`);
  }
});

test("a button's text can be read on the button", () => {
  for (const [background, host] of PALETTES) {
    const theme = themeOn(background, host);
    for (const key of ["raised", "band"]) {
      for (const ink of ["text", "muted"]) {
        assert.ok(contrast(at(theme[ink]), at(theme[key])) >= 4.5, `${ink} ${theme[ink]} on ${key} ${theme[key]} of ${background}`);
      }
    }
  }
});

test("dark or light is measured, not believed", () => {
  assert.equal(themeOn("#171718").dark, true);
  assert.equal(themeOn("#ffffff").dark, false);
  assert.equal(themeOn("rgb(221 221 221)").dark, false);
  assert.equal(themeOn("#073642").dark, true);
  // Half transparent over what is taken for granted.
  assert.equal(themeOn("rgb(255 255 255 / 0.05)").dark, true);
});

test("a host that says nothing or nonsense gets our own colours", () => {
  for (const odd of [undefined, "", "nonsense", "var(--x)", "oklch(0.5 0.1 200)"]) {
    const theme = themeOn(odd, { text: odd, muted: odd, border: odd, raised: odd });
    assert.equal(theme.bg, "#202020");
    assert.equal(theme.text, "#dddddd");
    assert.equal(theme.weights, "#56b4e9");
  }
});

test("colours that are readable stay what they are", () => {
  const theme = themeOn("#171718", { text: "#dddddd" });
  assert.equal(theme.text, "#dddddd");
  assert.equal(theme.weights, "#56b4e9");
  assert.equal(theme.activations, "#e69f00");
  assert.equal(themeOn("#ffffff").weights, "#0072b2");
  assert.equal(themeOn("#ffffff").activations, "#d55e00");
  assert.ok(contrast(readable(at("#202020"), at("#202020"), 4.5), at("#202020")) >= 4.5);
});

// Machado, Oliveira and Fernandes 2009, severity 1, in linear sRGB.
const SIGHT = {
  protan: [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998],
  deutan: [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.01182, 0.04294, 0.968881],
  tritan: [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.3039],
  usual: [1, 0, 0, 0, 1, 0, 0, 0, 1],
};
const linear = (n) => (n <= 10.31475 ? n / 255 / 12.92 : ((n / 255 + 0.055) / 1.055) ** 2.4);

function lab(color, matrix) {
  const rgb = at(color).slice(0, 3).map(linear);
  const [r, g, b] = [0, 3, 6].map((row) => Math.min(1, Math.max(0, rgb.reduce((sum, n, i) => sum + n * matrix[row + i], 0))));
  const xyz = [
    (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
    0.2126 * r + 0.7152 * g + 0.0722 * b,
    (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
  ];
  const [x, y, z] = xyz.map((n) => (n > 0.008856 ? Math.cbrt(n) : 7.787 * n + 16 / 116));
  return [116 * y - 16, 500 * (x - y), 200 * (y - z)];
}
const distance = (a, b, matrix) => Math.hypot(...lab(a, matrix).map((n, i) => n - lab(b, matrix)[i]));

test("neighbours in the bar stay apart for colour-blind people", () => {
  for (const background of ["#171718", "#ffffff"]) {
    const { weights, activations, others, alarm, compute } = themeOn(background);
    for (const [name, matrix] of Object.entries(SIGHT)) {
      for (const [a, b] of [[weights, activations], [activations, others], [weights, others], [weights, alarm]]) {
        assert.ok(distance(a, b, matrix) >= 25, `${a} ${b} ${name}: ${distance(a, b, matrix).toFixed(0)}`);
      }
      assert.ok(distance(weights, activations, matrix) >= 70, `${name} ${background}`);
      assert.ok(compute);
    }
  }
});

test("colour is never the only cue: the parts of one picture have patterns of their own", () => {
  const fills = (keys) => new Set(keys.map((key) => PARTS[key].fill)).size;
  assert.equal(fills(["weights", "activations", "others", "free", "unknown"]), 5);
  assert.equal(fills(["compute", "stall", "overlapped"]), 3);
  for (const background of ["#171718", "#ffffff"]) {
    const theme = themeOn(background);
    const looks = Array.from({ length: 16 }, (_, i) => componentLook(i, theme));
    assert.equal(new Set(looks.map(({ color, fill }) => `${color} ${fill}`)).size, 16);
    // Four that lie on each other differ in both, and none is taken for the activations on top.
    for (let i = 0; i + 4 <= 4; i += 1) assert.equal(new Set(looks.slice(i, i + 4).map(({ fill }) => fill)).size, 4);
    for (const { color, fill } of looks) assert.ok(fill !== PARTS.activations.fill && color !== theme.activations);
  }
});

test("colours are read in the notations that a browser computes", () => {
  assert.deepEqual(at("#abc"), [170, 187, 204, 1]);
  assert.deepEqual(at("#11223380").map((n) => Math.round(n * 100) / 100), [17, 34, 51, 0.5]);
  assert.deepEqual(at("rgb(1, 2, 3)"), [1, 2, 3, 1]);
  assert.deepEqual(at("rgba(1, 2, 3, 0.5)"), [1, 2, 3, 0.5]);
  assert.deepEqual(at("rgb(10% 20% 30% / 50%)"), [25.5, 51, 76.5, 0.5]);
  assert.deepEqual(at("color(srgb 1 0.5 0 / 0.5)"), [255, 127.5, 0, 0.5]);
  assert.deepEqual(at(" Transparent "), [0, 0, 0, 0]);
  for (const odd of ["", "red", "#12", "#12345", "rgb(1 2)", "rgb(a b c)", "color(display-p3 1 0 0)", "hsl(1 2% 3%)", null, 7, {}]) {
    assert.equal(at(odd), null, String(odd));
  }
  assert.equal(cssColor([255, 127.6, 0, 1]), "#ff8000");
  assert.equal(cssColor([1, 2, 3, 0.5]), "rgb(1 2 3 / 0.5)");
  assert.deepEqual(over([255, 255, 255, 0.5], [0, 0, 0, 1]), [127.5, 127.5, 127.5, 1]);
  assert.deepEqual(mix([0, 0, 0, 1], [100, 50, 10, 1], 0.5), [50, 25, 5, 1]);
  assert.equal(luminance([255, 255, 255, 1]), 1);
});
