"""The picture shows the shares that the report holds: read back from its pixels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.record import CATEGORIES, RunRecord
from balanced_offload.offload.report import build_report
from balanced_offload.offload.timeline import COLOURS, _paint, timeline_png


def test_every_category_has_a_colour_of_its_own() -> None:
    assert tuple(COLOURS) == CATEGORIES
    assert len(set(COLOURS.values())) == len(CATEGORIES)


def test_a_lane_paints_time_by_length_and_crowded_pixels_by_share() -> None:
    from matplotlib.colors import to_rgba

    rows: list[tuple[float, float, dict[str, float]]] = [(0.0, 1.0, {"encode": 1.0})]
    rows += [(1 + i / 512, 1 / 512, {"stall" if i % 4 == 0 else "denoise": 1 / 512}) for i in range(512)]
    rows += [(2.0, 2.0, {"denoise": 0.5, "stall": 1.5})]
    image = _paint(rows, COLOURS, 5.0, 100)

    def share(column: int, name: str) -> float:
        return float((abs(image[:, column] - to_rgba(COLOURS[name])).max(axis=1) < 1e-9).mean())

    assert [share(column, "encode") for column in (0, 19, 20)] == [1.0, 1.0, 0.0]
    assert share(30, "denoise") == pytest.approx(0.75, abs=0.03) and share(30, "stall") == pytest.approx(0.25, abs=0.03)
    assert (share(60, "denoise"), share(60, "stall")) == (0.25, 0.75)
    assert image[:, 90].max() == 0.0  # nothing is known there: transparent


def test_the_picture_is_a_png_with_the_colours_of_what_happened(
    record: RunRecord, given: dict[str, Any], tmp_path: Path
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    report = build_report(record, **given)
    path = timeline_png([("balanced", report), ("again", report)], tmp_path / "timeline.png")
    picture = imread(path)
    counts = {
        name: int((abs(picture[..., :3] - to_rgb(colour)).max(axis=2) < 0.01).sum()) for name, colour in COLOURS.items()
    }
    assert counts["preview"] == 0
    assert min(counts[name] for name in CATEGORIES if name != "preview") > 50
    assert counts["denoise"] > 3 * counts["encode"] > counts["stall"]


def test_pyplot_is_not_needed_and_an_empty_run_can_be_drawn(
    clock: Any, ledger: Ledger, given: dict[str, Any], tmp_path: Path
) -> None:
    sys.modules.pop("matplotlib.pyplot", None)
    clock.broken = RuntimeError("lost")
    ledger.open_run()
    path = timeline_png([("lost", build_report(ledger.close_run(), **given))], tmp_path / "t.png")
    assert path.stat().st_size > 1000
    assert "matplotlib.pyplot" not in sys.modules


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records"):
        timeline_png([], tmp_path / "t.png")
