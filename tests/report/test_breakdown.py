"""Invariant tested: rows by component add up to the totals, and the step function is what was on the device."""

from __future__ import annotations

from typing import Any

import pytest

from balanced_offload.offload.breakdown import OUTSIDE, by_component, residency
from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.record import RunRecord
from balanced_offload.offload.report import build_report, validate

TIMES = ("onload_s", "stall_s", "evict_s")
BYTES = ("bytes_h2d", "bytes_d2h", "bytes_dropped")


def rows_of(record: RunRecord, *names: str) -> dict[str, dict[str, Any]]:
    known = [{"name": name, "weight_bytes": 10} for name in names]
    return {row["component"]: row for row in by_component(record, known)}


@pytest.fixture
def run(clock: Any, ledger: Ledger) -> RunRecord:
    """A text encoder and a denoiser of two steps, seconds and bytes by hand."""
    ledger.open_run("p")
    clock.tick(1)  # before any stage
    with ledger.span("onload"):
        clock.tick(0.25)  # outside every stage
    ledger.stage_begin("encode", "te", need=4, have=9)
    with ledger.span("onload"):
        ledger.move("te", "h2d", 4, "stage", copy_start=clock.at(0), copy_end=clock.at(0.5), avoidable=True)
        clock.tick(0.5)
    ledger.note_vram(5, 4, {"te": 4, "unet": 0})
    ledger.begin("encode")
    clock.tick(2)
    ledger.begin("other")
    ledger.stage_end(6)
    ledger.stage_begin("denoise", "unet", need=6, have=9)
    with ledger.span("evict"):
        ledger.move("te", "drop", 4, "low", count=2)
        clock.tick(0.125)
    with ledger.span("onload"):
        ledger.move("unet", "h2d", 3, "stage", copy_start=clock.at(0), copy_end=clock.at(1))
        clock.tick(1)
    ledger.note_vram(5, 3, {"te": 0, "unet": 3})
    ledger.begin("denoise")
    for i in range(2):
        ledger.step_begin(i)
        ledger.move("unet", "h2d", 2, "forward", copy_start=clock.at(0), copy_end=clock.at(0.25), overlapped=True)
        ledger.move("unet", "h2d", 1, "forward", copy_start=clock.at(0), copy_end=clock.at(0.5), pinned=False)
        with ledger.wait("stall"):
            clock.tick(0.5)
        clock.tick(1)
        ledger.step_end()
    ledger.note_vram(8, 7, {"unet": 7})
    ledger.note_vram(8, 7, {"unet": 7})
    ledger.begin("other")
    ledger.stage_end(8)
    clock.tick(1)
    return ledger.close_run()


def test_rows_add_up_to_the_totals(run: RunRecord, given: dict[str, Any]) -> None:
    report = build_report(run, **given, components=[{"name": "unet", "weight_bytes": 10}])
    rows = report["by_component"]
    assert next(row["component"] for row in rows) == "unet", "those that are managed come first"
    for name in TIMES:
        assert sum(row[name] for row in rows) == report["totals"][name] != 0, name
    for name in BYTES:
        assert sum(row[name] for row in rows) == report["totals"][name], name
    assert sum(row["moves"] for row in rows) == report["totals"]["move_count"]
    assert sum(row["drops"] for row in rows) == report["totals"]["drop_count"]
    validate(report)


def test_each_byte_and_second_is_where_it_belongs(run: RunRecord) -> None:
    rows = rows_of(run, "te", "unet")
    te, unet, outside = rows["te"], rows["unet"], rows[OUTSIDE]
    assert (te["onload_s"], te["stall_s"], te["evict_s"], te["compute_s"]) == (0.5, 0, 0, 2)
    assert (unet["onload_s"], unet["stall_s"], unet["evict_s"], unet["compute_s"]) == (1, 1, 0.125, 2)
    assert (outside["onload_s"], outside["weight_bytes"]) == (0.25, None)
    assert (te["bytes_h2d"], te["avoidable_bytes"], te["bytes_dropped"], te["drops"]) == (4, 4, 4, 2)
    assert te["dropped_for"] == {"low": 4} and unet["dropped_for"] == {}
    assert (unet["bytes_h2d"], unet["avoidable_bytes"], unet["moves"]) == (9, 0, 5)
    assert (unet["step_bytes"], unet["step_copy_s"]) == (4, 0.5)
    assert (unet["blocking_bytes"], unet["blocking_copy_s"]) == (2, 1.0)
    assert (te["resident_bytes"], te["left_bytes"], te["peak"]) == (4, 0, 6)
    assert (unet["resident_bytes"], unet["left_bytes"], unet["peak"]) == (7, 7, 8)


def test_a_copy_that_nobody_timed_leaves_its_sum_unknown(clock: Any, ledger: Ledger) -> None:
    ledger.open_run("p")
    ledger.stage_begin("denoise", "unet", need=6, have=9)
    ledger.step_begin(0)
    ledger.move("unet", "h2d", 2, "forward", copy_start=clock.at(0), copy_end=clock.at(0.25))
    ledger.move("unet", "h2d", 2, "forward")
    row = rows_of(ledger.close_run())["unet"]
    assert (row["step_bytes"], row["step_copy_s"]) == (4, None)


def test_without_a_clock_bytes_are_known_and_times_are_not(run: RunRecord) -> None:
    run.clock_error = "lost"
    rows = rows_of(run, "te")
    assert {row[name] for row in rows.values() for name in TIMES} == {None}
    assert rows["te"]["bytes_h2d"] == 4 and rows["unet"]["peak"] == 8


def test_residency_is_a_step_function_of_changes(run: RunRecord) -> None:
    rows = [(row["component"], row["bytes"]) for row in residency(run, None)]
    assert rows == [("te", 4), ("unet", 0), ("te", 0), ("unet", 3), ("unet", 7)]
    times = [row["t"] for row in residency(run, None)]
    assert times == sorted(times)


@pytest.mark.parametrize("cap", [10, 100, 1000])
def test_a_capped_residency_keeps_every_peak(clock: Any, ledger: Ledger, cap: int) -> None:
    ledger.open_run("p")
    sizes = {"a": 0, "b": 0}
    for i in range(3000):
        sizes = {"a": (i * 7919) % 101, "b": (i * 104729) % 997}
        ledger.note_vram(sum(sizes.values()), sum(sizes.values()), sizes)
        clock.tick(0.001)
        ledger.begin("denoise" if i % 2 else "other")
    record = ledger.close_run()
    rows = residency(record, cap)
    assert len(rows) <= cap < len(residency(record, None))
    for name, most in (("a", 100), ("b", 996)):
        mine = [row for row in rows if row["component"] == name]
        assert max(row["bytes"] for row in mine) == most == record.residency.most[name]
        assert mine[-1]["bytes"] == sizes[name], "where it ended is kept"
    assert [row["t"] for row in rows] == sorted(row["t"] for row in rows)


def test_a_report_without_lists_says_the_same_by_component(run: RunRecord, given: dict[str, Any]) -> None:
    whole, short = (build_report(run, **given, lists=lists) for lists in (True, False))
    assert short["by_component"] == whole["by_component"] and short["totals"] == whole["totals"]
    assert all(short[name] == [] for name in ("steps", "moves", "segments", "vram_track", "residency"))
