"""The trace loads, and its lanes nest properly, so that a viewer draws what happened."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.record import RunRecord
from balanced_offload.offload.report import build_report
from balanced_offload.offload.trace import build_trace, save_trace


def slices(trace: dict[str, Any]) -> dict[int, list[tuple[float, float, str]]]:
    lanes = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            lanes[event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    return dict(lanes)


def check(trace: dict[str, Any]) -> None:
    named = {e["tid"] for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    for event in trace["traceEvents"]:
        assert event["ph"] in "XMCi" and event["name"] and isinstance(event["pid"], int)
        assert event["ts"] >= 0 and isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["tid"] in named
    for lane in slices(trace).values():
        open_until: list[float] = []
        for start, end, name in sorted(lane, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= start + 1e-6:  # a millionth of a microsecond: float addition
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-6, name
            open_until.append(end)


def test_a_run_as_a_trace(record: RunRecord, given: dict[str, Any], tmp_path: Path) -> None:
    path = save_trace(build_report(record, **given), tmp_path / "trace.json")
    trace = json.loads(path.read_text(encoding="utf-8"))
    check(trace)
    lanes = slices(trace)
    assert [name for _, _, name in lanes[1]] == ["encode: text_encoder", "denoise: unet", "decode: vae"]
    assert [(start, end) for start, end, _ in lanes[2]] == [(1_125_000.0, 3_125_000.0), (3_125_000.0, 5_125_000.0)]
    assert sum(end - start for start, end, _ in lanes[3]) == 5_937_500.0
    assert lanes[10] == [(1_625_000.0, 2_875_000.0, "onload unet"), (3_625_000.0, 4_875_000.0, "onload unet")]
    instants = [event["name"] for event in trace["traceEvents"] if event["ph"] == "i"]
    assert instants == ["onload text_encoder", "evict text_encoder", "notice: the picture was decoded whole"]
    copy = next(e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == 10)
    assert copy["args"] == {"bytes": 1 << 30, "reason": "forward", "step": 0, "avoidable": False}
    weights = [event["args"]["weights"] >> 30 for event in trace["traceEvents"] if event["ph"] == "C"]
    assert weights == [0, 2, 6, 7]


def test_copies_at_the_same_time_get_lanes_of_their_own(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    ledger.open_run()
    clock.tick(10)
    ledger.begin("encode")
    for start, end in ((-1.0, 1.0), (0.5, 3.0), (2.0, 4.0), (0.75, 0.875), (3.0, 5.0)):
        ledger.move("unet", "h2d", 1, "stage", copy_start=clock.at(start), copy_end=clock.at(end))
    trace = build_trace(build_report(ledger.close_run(), **given))
    check(trace)
    assert {tid: len(lane) for tid, lane in slices(trace).items() if tid >= 10} == {10: 2, 11: 2, 12: 1}
    assert min(event["ts"] for event in trace["traceEvents"]) == 0


def test_times_that_do_not_add_up_in_floats_still_nest(clock: Any, given: dict[str, Any]) -> None:
    ledger = Ledger(clock)
    ledger.open_run()
    for i in range(300):
        ledger.step_begin(i)
        ledger.begin("denoise")
        start = clock.now
        clock.tick(0.1 / 3)
        copy = {"copy_start": clock.at(start), "copy_end": clock.at(clock.now)}
        ledger.move("unet", "h2d", 1, "forward", **copy)
        with ledger.wait("stall"):
            clock.tick(1e-7 / 3)
        ledger.step_end()
    trace = build_trace(build_report(ledger.close_run(), **given))
    check(trace)
    assert set(slices(trace)) == {2, 3, 10}
    assert len(slices(trace)[10]) == 300


def test_capped_and_broken_reports_make_a_trace_too(clock: Any, given: dict[str, Any]) -> None:
    ledger = Ledger(clock, cap=20)
    ledger.open_run()
    for i in range(200):
        ledger.step_begin(i)
        ledger.begin("denoise")
        clock.tick(0.5)
        ledger.move("unet", "h2d", 1, "forward", copy_start=clock.at(clock.now - 0.25), copy_end=clock.at(clock.now))
        with ledger.wait("stall"):
            clock.tick(0.25)
        ledger.step_end()
    trace = build_trace(build_report(ledger.close_run(), **given))
    check(trace)
    lanes = slices(trace)
    assert {name for _, _, name in lanes[3]} == {"denoise + stall"}
    assert sum(end - start for start, end, _ in lanes[3]) == 150e6
    assert len(lanes[2]) == len(lanes[10]) == 19  # aggregates have no place in time
    clock.broken = RuntimeError("lost")
    ledger.open_run()
    ledger.step_begin(0)
    check(build_trace(build_report(ledger.close_run(), **given)))
