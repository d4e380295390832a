"""Invariant tested: an example opens in the front end as it was laid out: nothing lies on anything else.

The pictures beside the workflows are taken here: BALANCED_OFFLOAD_RENEW=1 writes them anew (needs Pillow).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from . import places
from .pages import ROOT, load_workflow, queue

NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
USUAL = ("02-fit-aware-hires", "05-batch-report")  # with the most nodes; the rest where they are asked for
WIDTH = 1280
"""Pixels of a picture's width."""
BOXES = """() => app.rootGraph.nodes.map(n => ({id: n.id, type: n.type,
  box: [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]}))"""
SHOW = """([left, top]) => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [-left, -top];
  app.canvas.setDirty(true, true); }"""
SENTENCE = "A run that fits stays whole; of a larger one up to the high mark stays, the rest is streamed."
MARGIN = 40
SIDE = 100
"""Pixels that the front end's own bars take."""


def options(node: dict[str, Any], name: str) -> list[Any] | None:
    """What a choice of a node in object_info may be; None for another kind of input."""
    for inputs in node["input"].values():
        spec = inputs.get(name)
        if spec is not None and len(spec) > 1 and isinstance(spec[1].get("options"), list):
            found: list[Any] = spec[1]["options"]
            return found
    return None


def have_the_models(known: dict[str, Any]) -> None:
    """The host has what the examples name: else the front end marks it as missing."""
    for path in (ROOT / "workflows" / "api").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            for name, value in node["inputs"].items():
                choices = options(known[node["class_type"]], name)
                if choices is not None and value not in choices:
                    choices.append(value)


@pytest.fixture(scope="module")
def example(browser: Any) -> Any:
    """One page of the newest front end for all examples."""
    reason = places.why_not(places.NEWEST)
    if reason is not None:
        pytest.skip(reason)
    from . import canned, nodes_info
    from .pages import Pages
    from .stub import Stub

    known = nodes_info.object_info()
    have_the_models(known)
    marks = canned.marks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes_info, "object_info", lambda: known)
        patch.setattr(canned, "marks", lambda **query: {**marks(**query), "sentence": SENTENCE})
        stub = Stub(places.frontend(places.NEWEST)).start()
        pages = Pages(browser, stub)
        page = pages(size={"width": 3100, "height": 1500}, settings={"Comfy.Minimap.Visible": False})
        yield pages, page, stub
        pages.close()
        pages.watch.check()
        stub.stop()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in NAMES]
)
def test_nothing_lies_on_anything_else(name: str, example: Any, shot: Callable[..., Any]) -> None:
    """As it is opened, and after a run, when nodes have grown with what they show."""
    pages, page, stub = example
    stub.reset()  # nothing of the example before
    pages.load(page)
    load_workflow(page, name)
    page.wait_for_timeout(700)
    boxes = apart(page)
    edges = list(zip(*(each["box"] for each in boxes), strict=True))
    left, top = min(edges[0]) - MARGIN, min(edges[1]) - MARGIN
    width, height = max(edges[2]) + MARGIN - left, max(edges[3]) + MARGIN - top
    page.evaluate(SHOW, [left - SIDE, top - SIDE])
    page.wait_for_timeout(700)
    path = shot(page, f"example-{name}", clip={"x": SIDE, "y": SIDE, "width": width, "height": height})
    assert path.stat().st_size > 20_000, "a graph is on it"
    if os.environ.get("BALANCED_OFFLOAD_RENEW"):
        _renew(path.read_bytes(), name)
    queue(page)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.bo-node-report [data-figure=wall][data-value]')]"
        ".some(e => e.offsetParent)",
        timeout=60_000,
    )
    page.wait_for_timeout(500)
    apart(page)


def apart(page: Any) -> list[dict[str, Any]]:
    """The boxes of all nodes, none of which lies on another."""
    boxes: list[dict[str, Any]] = page.evaluate(BOXES)
    over = [
        (one["type"], other["type"])
        for i, one in enumerate(boxes)
        for other in boxes[:i]
        if min(one["box"][2], other["box"][2]) > max(one["box"][0], other["box"][0])
        and min(one["box"][3], other["box"][3]) > max(one["box"][1], other["box"][1])
    ]
    assert over == [], {each["type"]: [round(edge) for edge in each["box"]] for each in boxes}
    return boxes


def _renew(picture: bytes, name: str) -> None:
    image = pytest.importorskip("PIL.Image")
    with image.open(io.BytesIO(picture)) as whole:
        small = whole.convert("RGB").resize(
            (WIDTH, round(whole.height * WIDTH / whole.width)), image.Resampling.LANCZOS
        )
    small.save(ROOT / "workflows" / f"{name}.jpg", quality=85, optimize=True)
