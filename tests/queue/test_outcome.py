"""Invariant: whatever JSON a host or another pack puts into a record, a row comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_offload.offload.queue.items import Item
from balanced_offload.offload.queue.outcome import figures, is_final, live_step, read_entry, with_report
from balanced_offload.offload.queue.results import Results, line_of, make_row

from .stub import a_report

WORDS = (
    *("outputs", "status", "messages", "images", "filename", "type", "subfolder", "vram_report", "prompt_id", "nodes"),
    *(
        "totals",
        "wall_s",
        "bytes_h2d",
        "vram",
        "peak_torch",
        "hints",
        "code",
        "verdict",
        "resolved",
        "mode",
        "timestamp",
    ),
    *("execution_cached", "execution_error", "execution_interrupted", "status_str", "step", "steps", "id"),
)
words = st.sampled_from(WORDS)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=25,
)
objects = st.dictionaries(words, anything, max_size=6)


@settings(max_examples=300, deadline=None)
@given(objects, objects)
def test_a_row_comes_of_any_record(tmp_path_factory: Any, entry: dict[str, Any], report: dict[str, Any]) -> None:
    outcome = read_entry(entry, "id")
    is_final(report, outcome.status)
    live_step(report, "id")
    row = make_row(Item(1, {}), with_report(outcome, report), "id", 1, "now")
    assert json.loads(json.dumps(row)) == row
    assert line_of(Item(1, {}), row).startswith("item 1, ")
    folder: Path = tmp_path_factory.mktemp("rows")
    for ending in ("csv", "jsonl"):
        results = Results(folder / f"r.{ending}", [])
        results.repair({1: row})
        assert results.repair({1: row}) == 0


def test_unknown_figures_are_null_and_zero_is_zero() -> None:
    assert {name for name, value in figures(None).items() if value is not None} == {"hints"}
    told = figures(a_report("x", totals={"bytes_h2d": 0, "bytes_d2h": 0, "wall_s": 0.0}, vram={"peak_torch": None}))
    assert told["moved_bytes"] == 0
    assert told["wall_s"] == 0.0
    assert told["peak_vram"] is None
    assert told["onload_s"] is None


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ({"live": {"prompt_id": "x", "step": 3, "steps": 20}}, "step 3/20"),
        ({"prompt_id": "x", "step": 0, "steps": 4}, "step 0/4"),
        ({"live": {"prompt_id": "y", "step": 3, "steps": 20}}, ""),
        ({"live": {"prompt_id": "x", "step": None, "steps": None}}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_the_step_that_runs(status: dict[str, Any] | None, text: str) -> None:
    assert live_step(status, "x") == text


def test_a_report_is_final_once_it_has_ended_and_tells_of_a_bad_end() -> None:
    assert is_final(a_report("x"), "success")
    assert not is_final(a_report("x", ended=False), "success")
    assert not is_final(a_report("x"), "error")
    assert is_final(a_report("x", "oom"), "error")
    assert not is_final(None, "success")
    old = a_report("x")
    del old["ended"]
    assert is_final(old, "success")
