"""Each figure of a run has a meaning and a knob, and the exclusive ones add up to the wall time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from balanced_offload.offload.adapters import comfyui_run
from balanced_offload.offload.policy import OffloadPolicy
from balanced_offload.offload.record import CATEGORIES, RunRecord
from balanced_offload.offload.report import build_report
from balanced_offload.offload.summary import line
from balanced_offload.offload.timers import EXCLUSIVE, TIMERS, peak_of, timers

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "web" / "docs" / "PerformanceTimers.md"
SEEING = (ROOT / "docs" / "seeing.md").read_text(encoding="utf-8")


def test_the_exclusive_ones_are_the_categories_in_the_report_s_order() -> None:
    assert EXCLUSIVE == CATEGORIES
    names = [timer.name for timer in TIMERS]
    assert names == [*CATEGORIES, "overlapped", "VRAM peak", "RAM"]
    assert [timer.kind for timer in TIMERS[len(CATEGORIES) :]] == ["beside", "figure", "figure"]


def test_they_add_up_to_the_wall_time(record: RunRecord, given: dict[str, Any]) -> None:
    report = build_report(record, **given)
    rows = {row["name"]: row for row in timers(report)}
    assert sum(rows[name]["seconds"] for name in EXCLUSIVE) == report["totals"]["wall_s"] == 5.9375
    assert rows["onload"]["seconds"] == 0.25 and rows["stall"]["seconds"] == 0.5
    assert rows["overlapped"]["seconds"] == 2.0, "in no sum"


def test_what_is_bytes_has_no_seconds(record: RunRecord, given: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in timers(build_report(record, **given))}
    assert rows["VRAM peak"] | {"means": "", "turn": ""} == {
        "name": "VRAM peak",
        "seconds": None,
        "means": "",
        "turn": "",
        "bytes": 11 * GIB,
    }
    assert rows["RAM"]["bytes"] == int(15.7 * GIB) and rows["RAM"]["seconds"] is None
    assert {name for name, row in rows.items() if "bytes" in row} == {"VRAM peak", "RAM"}


def test_the_peak_is_the_report_s_own_where_it_has_one() -> None:
    assert peak_of({"vram": {"peak": 5, "peak_torch": 9, "peak_device": 11}}) == 5
    assert peak_of({"vram": {"peak": None, "peak_torch": 9, "peak_device": 11}}) == 9
    assert peak_of({"vram": {"peak_device": 11, "peak_noted": 3}}) == 11
    assert peak_of({"vram": {"peak_noted": 0}}) == 0
    assert peak_of({"vram": {}}) is None and peak_of({}) is None


@settings(deadline=None)  # others share the machine
@drawn(
    st.dictionaries(
        st.sampled_from(["totals", "vram", "ram"]),
        st.dictionaries(
            st.sampled_from(["encode_s", "stall_s", "peak", "peak_rss"]),
            st.none() | st.floats() | st.integers() | st.text(max_size=3) | st.booleans(),
        )
        | st.none()
        | st.integers(),
    )
)
def test_what_is_no_figure_is_not_known(report: dict[str, Any]) -> None:
    rows = timers(report)
    assert [row["name"] for row in rows] == [timer.name for timer in TIMERS]
    for row in rows:
        for key in ("seconds", "bytes"):
            assert row.get(key) is None or 0 <= row[key] < float("inf")


def test_words_that_people_can_use() -> None:
    for timer in TIMERS:
        assert timer.means.endswith(".") and timer.turn.endswith("."), timer.name
        assert len(timer.means) <= 160 and len(timer.turn) <= 260, timer.name
        assert "watermark" not in timer.means + timer.turn


@pytest.mark.parametrize("timer", TIMERS, ids=lambda timer: timer.name)
def test_the_page_explains_each(timer: Any) -> None:
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^### {re.escape(timer.name)}\n(.+?)(?=^##)", text, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    assert "**What to turn:**" in section[1]


def test_the_page_names_only_fields_of_a_policy_and_values_that_they_take() -> None:
    written = re.findall(r"`(\w+)` = `([^`]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(written) >= 6
    for field, value in written:
        OffloadPolicy(**{field: {"true": True, "false": False}.get(value, value)})


def test_the_example_of_the_page_is_a_line_of_ours() -> None:
    """Every figure in its place: the report that it would be of gives the same line, and its seconds add up."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"^    (Time .+)$", text, flags=re.MULTILINE)
    assert found is not None
    seconds = {name: float(figure) for name, figure in re.findall(r"([A-Za-z]+) (\d+\.\d\d)\b", found[1])}
    wall = seconds.pop("Time")
    assert sum(seconds.values()) == pytest.approx(wall)
    report = {
        "totals": {"wall_s": wall, **{f"{name}_s": took for name, took in seconds.items()}},
        "vram": {"total": 24 * GIB, "peak": 11 * GIB},
        "ram": {"peak_rss": int(15.7 * GIB)},
        "host": {"ram_total": 64 * GIB},
        "resolved": {"high": int(19.2 * GIB)},
    }
    assert line(report) == found[1]
    for figure in re.findall(r"\d+\.\d+", found[1]):
        assert figure in text.split("In this case:")[1].split("The seconds are exclusive")[0], figure
    moved = seconds["onload"] + seconds["stall"] + seconds["evict"]
    assert f"= {moved:.2f} s, {100 * moved / wall:.0f} % of the run" in text


# --- what the pages claim


def test_it_is_said_which_peak_is_meant() -> None:
    """The run's is the card's, other programs included; a node's is what this process held."""
    (peak,) = (timer for timer in TIMERS if timer.name == "VRAM peak")
    assert "other programs included" in peak.means
    section = PAGE.read_text(encoding="utf-8").split("### VRAM peak\n")[1].split("###")[0]
    assert "other programs included" in section and "what this process held" in section
    told = SEEING.split("**Which peak?**")[1].split("## One picture")[0]
    assert "other programs included" in told and "what this process held" in told
    report = (ROOT / "web" / "docs" / "VRAMReport.md").read_text(encoding="utf-8")
    assert "the tick the run's peak: the card's, other programs included" in report


def test_what_it_costs_is_what_the_run_does() -> None:
    told = SEEING.split("## What it costs\n")[1]
    assert "is asked by the thread that drives the device" in told
    assert (comfyui_run.SAMPLE_S, comfyui_run.SELDOM_S) == (0.25, 1.0)
    assert "at most four times a second while a page watches, else at most once a second" in told
    assert "What the second thread does beside it" in told


def test_a_hidden_page_is_not_said_to_cost_nothing() -> None:
    lasts = re.search(r"^LASTS = (\d+)", (ROOT / "nodes" / "telemetry.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert lasts is not None and f"is sent for up to {lasts[1]} s and dropped by the page" in SEEING
    for page in (SEEING, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert not re.search(r"hidden (costs|is sent) nothing", page)


def test_the_column_that_says_why_is_there() -> None:
    panel = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "web" / "js").glob("*.js"))
    for page in (SEEING, PAGE.read_text(encoding="utf-8")):
        (column,) = set(re.findall(r"column \*(.+?)\*", page))
        assert f'title: "{column}"' in panel


def test_what_is_to_be_typed_needs_no_file_that_is_not_there() -> None:
    told = (ROOT / "web" / "js" / "README.md").read_text(encoding="utf-8")
    assert "npm install" in told
    assert "npm ci" not in told or (ROOT / "tests" / "browser" / "package-lock.json").is_file()
