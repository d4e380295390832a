"""Invariant: a thumbnail is a drawing of the graph itself: every node once, every link once, ours in colour.

Needs Pillow and the DejaVu fonts; only `build.py` draws, nothing in the pack does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .catalog import Kind

SIZE, SCALE = 800, 2
"""Pixels of the picture's side, and the factor by which it is drawn larger to smooth the edges."""
PAPER, CARD, EDGE, HEAD = "#14171c", "#23272f", "#3a404b", "#2d323c"
INK, DIM, ACCENT, ACCENT_HEAD = "#eef1f6", "#9aa3b2", "#4cc38a", "#1f5f45"
LINKS = {
    "MODEL": "#b39ddb",
    "CLIP": "#ffd500",
    "VAE": "#ff6e6e",
    "CONDITIONING": "#ffa931",
    "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6",
    "OFFLOAD_POLICY": ACCENT,
    "OFFLOAD_PIPELINE": "#b39ddb",
    "STRING": "#8bc98b",
}
MARGIN, HEADER, FOOTER, GAP, WIDEST = 30, 72, 106, 26, 340
# The template browser lays a label over the top left corner: the words stand below the drawing.
SHOWN = {
    "OffloadPolicy": ("mode", "high"),
    "ModelLoaderWithOffload": ("checkpoint", "diffusion_model", "text_encoder", "text_encoder_2", "vae"),
    "PipelineLoaderWithOffload": ("pipeline_name",),
    "PipelineGenerate": ("prompt", "width", "height", "steps"),
    "FreeVRAMToFit": ("need_gib",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height"),
    "EmptySD3LatentImage": ("width", "height"),
    "KSampler": ("seed", "steps", "denoise"),
    "LatentUpscaleBy": ("scale_by",),
    "FluxGuidance": ("guidance",),
    "SaveImage": ("filename_prefix",),
}
Box = tuple[float, float, float, float]


def font(points: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSansCondensed-Bold.ttf" if bold else "DejaVuSansCondensed.ttf"
    return ImageFont.truetype(name, points * SCALE)


def draw(graph: dict[str, Any], api: dict[str, Any], layout: dict[str, Any], kinds: dict[str, Kind], to: Path) -> None:
    """Write the thumbnail of `graph` to `to`."""
    side = SIZE * SCALE
    picture = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(picture)
    boxes = _boxes(_rows(api), {key: _lines(node) for key, node in api.items()})
    _links(pen, graph, boxes)
    for key, box in boxes.items():
        _card(pen, box, api[key], kinds[api[key]["class_type"]])
    _text(pen, (MARGIN, SIZE - FOOTER + 8), layout["title"], font(30, bold=True), INK, SIZE - 2 * MARGIN)
    _text(pen, (MARGIN, SIZE - FOOTER + 54), layout["caption"], font(21), DIM, SIZE - 2 * MARGIN)
    picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(to, "JPEG", quality=88, optimize=True)


def _rows(api: dict[str, Any]) -> list[list[int]]:
    """Node ids by their longest way from the start; what has no input stands just above the first that uses it."""
    sources = {
        key: [value[0] for value in node["inputs"].values() if isinstance(value, list)] for key, node in api.items()
    }
    depth: dict[str, int] = {}

    def measure(key: str) -> int:
        if key not in depth:
            depth[key] = 1 + max((measure(source) for source in sources[key]), default=-1)
        return depth[key]

    for key in api:
        measure(key)
    for key in api:
        users = [depth[user] for user in api if key in sources[user]]
        if not sources[key] and users:
            depth[key] = min(users) - 1
    return [[int(key) for key in api if depth[key] == row] for row in range(max(depth.values()) + 1)]


def _boxes(rows: list[list[int]], lines: dict[str, list[str]]) -> dict[str, Box]:
    """The graph runs from top to bottom, spread over the whole height."""
    tall = [max(_height(lines[str(number)]) for number in row) for row in rows]
    space = (SIZE - HEADER - FOOTER - sum(tall)) / len(rows)
    found: dict[str, Box] = {}
    top = HEADER + space / 2
    for row, height in zip(rows, tall, strict=True):
        width = min(WIDEST, (SIZE - 2 * MARGIN - GAP * (len(row) - 1)) / len(row))
        left = (SIZE - width * len(row) - GAP * (len(row) - 1)) / 2
        for number in row:
            down = top + (height - _height(lines[str(number)])) / 2
            found[str(number)] = (left, down, left + width, down + _height(lines[str(number)]))
            left += width + GAP
        top += height + space
    return found


def _height(lines: list[str]) -> float:
    return 32.0 + (8 + 19 * len(lines) if lines else 0)


def _links(pen: ImageDraw.ImageDraw, graph: dict[str, Any], boxes: dict[str, Box]) -> None:
    """From below a card to above another one, each link with an end of its own."""
    leaving: dict[str, list[int]] = {}
    arriving: dict[str, list[int]] = {}
    for number, source, _, target, _, _ in graph["links"]:
        leaving.setdefault(str(source), []).append(number)
        arriving.setdefault(str(target), []).append(number)
    for links, other in ((leaving, 3), (arriving, 1)):
        ends = {link[0]: boxes[str(link[other])] for link in graph["links"]}
        for numbers in links.values():
            numbers.sort(key=lambda number, ends=ends: ends[number][0] + ends[number][2])
    for number, source, _, target, _, type_name in graph["links"]:
        x0, y0 = _end(boxes[str(source)], leaving[str(source)], number), boxes[str(source)][3]
        x1, y1 = _end(boxes[str(target)], arriving[str(target)], number), boxes[str(target)][1]
        _curve(pen, (x0, y0), (x1, y1), LINKS.get(type_name, DIM))


def _end(box: Box, numbers: list[int], number: int) -> float:
    return box[0] + (box[2] - box[0]) * (numbers.index(number) + 1) / (len(numbers) + 1)


def _curve(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    (x0, y0), (x1, y1) = start, end
    reach = max(22.0, abs(y1 - y0) * 0.5)
    points = []
    for step in range(41):
        t = step / 40
        u = 1 - t
        across = (u**3 + 3 * u * u * t) * x0 + (3 * u * t * t + t**3) * x1
        down = u**3 * y0 + 3 * u * u * t * (y0 + reach) + 3 * u * t * t * (y1 - reach) + t**3 * y1
        points.append((across * SCALE, down * SCALE))
    pen.line(points, fill=colour, width=int(2.6 * SCALE), joint="curve")
    for x, y in (points[0], points[-1]):
        pen.ellipse((x - 4 * SCALE, y - 4 * SCALE, x + 4 * SCALE, y + 4 * SCALE), fill=colour)


def _card(pen: ImageDraw.ImageDraw, box: Box, node: dict[str, Any], kind: Kind) -> None:
    left, top, right, bottom = (value * SCALE for value in box)
    edge, head = (ACCENT, ACCENT_HEAD) if kind.ours else (EDGE, HEAD)
    round_by = 8 * SCALE
    pen.rounded_rectangle((left, top, right, bottom), round_by, fill=CARD, outline=edge, width=2 * SCALE)
    lines = _lines(node)
    pen.rounded_rectangle((left, top, right, top + 32 * SCALE), round_by, fill=head, outline=edge, width=2 * SCALE)
    width = box[2] - box[0] - 20
    _text(pen, (box[0] + 10, box[1] + 6), node["_meta"]["title"], font(16, bold=True), INK, width)
    for place, line in enumerate(lines):
        _text(pen, (box[0] + 10, box[1] + 36 + 19 * place), line, font(14), DIM, width)


def _lines(node: dict[str, Any]) -> list[str]:
    """What a card says below its title: the values that make this graph what it is."""
    inputs, found = node["inputs"], []
    shown = SHOWN.get(node["class_type"], ())
    if "width" in shown:
        found.append(f"{inputs['width']} x {inputs['height']}")
    for name in shown:
        value = inputs[name]
        if name in ("width", "height") or value in ("none", ""):
            continue
        if name == "denoise" and value == 1.0:
            continue
        plain = name in ("text", "prompt", "ckpt_name", "checkpoint", "pipeline_name") or str(value).endswith(
            ".safetensors"
        )
        found.append(str(value) if plain else f"{name}: {value}")
    return found


def _text(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, face: ImageFont.FreeTypeFont, fill: str, width: float
) -> None:
    while pen.textlength(text, font=face) > width * SCALE and len(text) > 2:
        text = text.removesuffix("…")[:-1].rstrip() + "…"
    pen.text((at[0] * SCALE, at[1] * SCALE), text, font=face, fill=fill)
