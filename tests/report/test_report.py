"""The report keeps to its schema, names what it does not know, and its capped lists keep their sums."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.record import CATEGORIES, RunRecord
from balanced_offload.offload.report import VERDICTS, build_report, derive_verdict, save_report, schema, validate

GIB = 1 << 30


def nulls(value: Any, path: str = "") -> set[str]:
    if value is None:
        return {path}
    if isinstance(value, dict):
        return set().union(*(nulls(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()), set())
    if isinstance(value, list):
        return set().union(*(nulls(item, f"{path}[]") for item in value), set())
    return set()


def build(record: RunRecord, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    report = build_report(record, **{**given, **more})
    validate(report)
    return report


def test_the_schemas_are_schemas() -> None:
    for name in ("offload-report-1", "offload-demo-1"):
        jsonschema.Draft202012Validator.check_schema(schema(name))


def test_a_good_run(record: RunRecord, given: dict[str, Any]) -> None:
    report = build(record, given)
    totals = report["totals"]
    categories = {name: totals[f"{name}_s"] for name in CATEGORIES}
    assert categories == {
        "encode": 0.75,
        "denoise": 3.5,
        "decode": 0.75,
        "preview": 0.0,
        "onload": 0.25,
        "stall": 0.5,
        "evict": 0.0625,
        "other": 0.125,
    }
    assert totals["wall_s"] == sum(categories.values()) == 5.9375
    assert totals["overlapped_s"] == 2.0
    assert (totals["bytes_h2d"], totals["bytes_d2h"], totals["move_count"]) == (4 * GIB, 0, 3)
    assert (totals["bytes_dropped"], totals["drop_count"]) == (2 * GIB, 1)
    assert (report["complete"], report["verdict"], report["fits"], report["error"]) == (True, "partial", False, None)
    assert [row["name"] for row in report["stages"]] == ["encode", "denoise", "decode"]
    assert [(row["i"], row["compute_s"], row["stall_s"]) for row in report["steps"]] == [
        (0, 1.75, 0.25),
        (1, 1.75, 0.25),
    ]
    assert report["vram"]["peak_noted"] == int(9.8 * GIB)
    assert report["overhead_ms"] > 0
    assert report["policy"] == given["policy_json"]


def test_unknown_is_null_and_named_and_a_meant_null_is_not(record: RunRecord, given: dict[str, Any]) -> None:
    given["vram"] = {"total": 16 * GIB}
    given["host"] = {}
    given["prediction"] = None
    report = build(record, given, output_neutral=None)
    assert report["vram"]["peak_torch"] is None and report["host"]["gpu"] is None
    meant = {"error", "moves[].step", "policy.gc_threshold", "resolved.prefetch", "hint_note", "workload"}
    meant |= {f"by_component[].{name}" for name in ("weight_bytes", "resident_bytes", "left_bytes")}
    assert meant <= nulls(report)
    assert set(report["unknown"]) == nulls(report) - meant
    assert {"vram.peak_torch", "host.gpu", "prediction.bound_s", "steps[].node", "moves[].dur_s"} <= set(
        report["unknown"]
    )


def test_every_group_of_figures_names_its_source(record: RunRecord, given: dict[str, Any]) -> None:
    report = build(record, given, sources={"vram.peak_device": "nvml"})
    assert report["sources"]["vram.peak_device"] == "nvml"
    assert report["sources"]["times"] == "marks on the compute stream (fake, rung cpu)"
    assert {"bytes", "overhead_ms", "vram.peak_torch", "vram.total", "ram.peak_rss"} <= set(report["sources"])


class OutOfMemoryError(RuntimeError):
    """As torch's: recognised by name, so that the report needs no torch."""


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(OutOfMemoryError("no room"), "oom"), (ValueError("bad"), "error"), (KeyboardInterrupt(), "error")],
)
def test_a_run_that_failed(
    clock: Any, ledger: Ledger, given: dict[str, Any], error: BaseException, verdict: str
) -> None:
    ledger.open_run()
    ledger.event("oom", "tried")
    ledger.step_begin(0)
    clock.tick(1)
    report = build(ledger.close_run(error), given)
    assert (report["complete"], report["verdict"]) == (False, verdict)
    assert report["error"] == {"type": type(error).__name__, "message": str(error)}
    assert report["totals"]["wall_s"] == 1.0


def test_a_run_before_anything_was_resolved(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    ledger.open_run()
    report = build(ledger.close_run(ValueError("bad policy")), {**given, "resolved_json": {}, "policy_json": {}})
    assert report["resolved"] == {"mode": None, "sources": {}, "sentence": ""}
    assert report["fits"] is None and "fits" in report["unknown"]


def test_an_incomplete_run_is_an_error_in_the_report(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    ledger.open_run()
    clock.tick(1)
    ledger.open_run()
    first = ledger.last_record
    assert first is not None
    report = build(first, given)
    assert (report["complete"], report["verdict"], report["totals"]["wall_s"]) == (False, "error", 1.0)


def test_a_failed_clock_gives_nulls_not_zeros(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    clock.broken = RuntimeError("lost")
    ledger.open_run()
    ledger.stage_begin("encode", "te", need=1, have=1)
    clock.blind = True
    ledger.step_begin(0)
    ledger.move("te", "h2d", 5, "stage", copy_start=clock.at(0.0), copy_end=clock.at(1.0))
    report = build(ledger.close_run(), given)
    assert report["complete"] is False and report["verdict"] == "error"
    assert {report["totals"][f"{name}_s"] for name in (*CATEGORIES, "wall", "overlapped")} == {None}
    assert {"totals.wall_s", "totals.denoise_s", "steps[].compute_s", "moves[].dur_s"} <= set(report["unknown"])
    assert report["totals"]["bytes_h2d"] == 5
    assert report["error"] == {"type": "clock", "message": "RuntimeError: lost"}


def test_verdicts_of_runs_that_ended_well(clock: Any, ledger: Ledger, record: RunRecord) -> None:
    assert derive_verdict(record, {"mode": "sequential"}) == "streamed"
    assert derive_verdict(record, {"mode": "balanced"}) == "partial"
    ledger.open_run()
    ledger.move("unet", "h2d", 1, "stage")
    ledger.step_begin(0)
    ledger.move("te", "drop", 1, "need")
    assert derive_verdict(ledger.close_run(), {"mode": "balanced"}) == "resident"
    ledger.open_run()
    ledger.event("oom", "evicted the text encoder")
    assert derive_verdict(ledger.close_run(), {"mode": "balanced"}) == "oom_recovered"


def test_a_given_verdict_is_checked(record: RunRecord, given: dict[str, Any]) -> None:
    for verdict in VERDICTS[:4]:
        assert build(record, given, verdict=verdict)["verdict"] == verdict
    with pytest.raises(ValueError, match="verdict: got 'fine'"):
        build(record, given, verdict="fine")


def long_run(clock: Any, cap: int, moves: int, components: int) -> RunRecord:
    ledger = Ledger(clock, cap=cap)
    ledger.open_run()
    for i in range(moves):
        ledger.begin("denoise")
        ledger.step_begin(i)
        clock.tick(1 / 8)
        with ledger.wait("stall"):
            clock.tick(1 / 16)
        copy = {"copy_start": clock.at(clock.now - 1 / 8), "copy_end": clock.at(clock.now)}
        ledger.move(f"c{i % components}", "h2d" if i % 3 else "d2h", i, "forward", count=1 + i % 2, **copy)
        ledger.note_vram(i, i // 2)
        ledger.step_end()
        ledger.stage_begin("s", "c", need=i, have=moves - i)
        ledger.stage_end(i)
    return ledger.close_run()


@pytest.mark.parametrize("components", [2, 400])
def test_capped_lists_keep_their_sums_and_the_full_report_all_rows(
    clock: Any, given: dict[str, Any], components: int
) -> None:
    record = long_run(clock, 100, 900, components)
    capped, full = build(record, given), build(record, given, full=True)
    assert len(full["moves"]) == len(full["steps"]) == len(full["stages"]) == 900
    for name in ("moves", "steps", "stages", "segments", "vram_track"):
        assert 50 < len(capped[name]) <= 100, name
    for direction in ("h2d", "d2h"):
        for key in ("bytes", "count", "dur_s"):
            sums = [sum(m[key] for m in r["moves"] if m["dir"] == direction) for r in (capped, full)]
            assert sums[0] == sums[1] > 0
    for key in ("compute_s", "stall_s", "overlapped_s", "bytes_h2d"):
        assert sum(row[key] for row in capped["steps"]) == sum(row[key] for row in full["steps"])
    for category in ("denoise", "stall"):
        sums = [sum(row["by"].get(category, 0.0) for row in r["segments"]) for r in (capped, full)]
        assert sums[0] == sums[1] == capped["totals"][f"{category}_s"] > 0
    assert max(row["allocated"] for row in capped["vram_track"]) == 899
    assert capped["stages"][-1] | {"t0": 0, "t1": 0} == {
        "name": "several",
        "component": "several",
        "t0": 0,
        "t1": 0,
        "need": 899,
        "have": 1,
        "peak": 899,
        "count": 801,
        "aggregated": True,
    }
    assert capped["totals"].items() == full["totals"].items()


def test_segments_follow_one_another_and_cover_the_run(record: RunRecord, given: dict[str, Any]) -> None:
    rows = build(record, given)["segments"]
    assert rows[0]["t"] == 0.0
    for row, after in itertools.pairwise(rows):
        assert row["t"] + row["dur_s"] == after["t"]
        assert set(row["by"]) != set(after["by"])
    assert rows[-1]["t"] + rows[-1]["dur_s"] == 5.9375


def test_what_callers_hand_in_becomes_json(clock: Any, ledger: Ledger, given: dict[str, Any], tmp_path: Path) -> None:
    ledger.open_run("prompt \ud800 \u2603")
    ledger.event("notice", "n", where=tmp_path, odd=math.nan, pair=(1, 2), names={"b", "a"})
    report = build(ledger.close_run(), given)
    (event,) = report["events"]
    assert event["data"] == {"where": str(tmp_path), "odd": None, "pair": [1, 2], "names": ["a", "b"]}
    assert report["prompt_id"] == "prompt ? \u2603"


def test_the_file_is_utf8_and_the_same_report(record: RunRecord, given: dict[str, Any], tmp_path: Path) -> None:
    given["host"]["gpu"] = "Grafikkärtchen"
    report = build(record, given, full=True)
    path = save_report(report, tmp_path / "report.json")
    text = path.read_bytes().decode("utf-8")
    assert "Grafikkärtchen" in text
    assert json.loads(text) == report
    assert sum(line.startswith('  {"t"') for line in text.splitlines()) >= len(report["moves"])  # one row a line
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    record: RunRecord, given: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ValueError):
        save_report({"x": math.nan}, path)
    with pytest.raises(OSError):
        save_report(build(record, given), tmp_path / "missing" / "report.json")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("totals", "wall_s"), None),  # a complete run knows its times
        (("totals", "bytes_d2h"), None),
        (("totals", "stall_s"), -1.0),
        (("moves", 0, "reason"), "because"),
        (("moves", 0, "dir"), "up"),
        (("verdict",), "fine"),
        (("complete",), False),  # and a verdict of success needs a complete run
        (("schema",), "offload-report/2"),
        (("rung",), "guess"),
        (("unknown",), None),
        (("segments", 0, "by"), {"waiting": 1.0}),
    ],
)
def test_the_schema_refuses_what_is_wrong(
    record: RunRecord, given: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    report = build(record, given)
    *parents, last = path
    inner: Any = report
    for key in parents:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(report)


def test_every_named_field_is_required_and_new_ones_are_welcome(record: RunRecord, given: dict[str, Any]) -> None:
    report = build(record, given)
    for key in schema()["required"]:
        with pytest.raises(jsonschema.ValidationError):
            validate({name: value for name, value in report.items() if name != key})
    validate({**report, "later": {"x": None}})


def test_the_demo_schema() -> None:
    mode: dict[str, Any] = {
        "mode": "balanced",
        "resolved": "balanced",
        "equal_to_none": True,
        "equal_on": "simulated",
        "peak_vram": 1,
        "resident_peak": 1,
        "bytes_h2d": 1,
        "bytes_d2h": 0,
        "moves": 1,
        "stall_s": 0.5,
        "time_s": 1.5,
        "hooks_on_resident": 0,
    }
    demo: dict[str, Any] = {"schema": "offload-demo/1", "device": "d", "rung": "simulated", "cap": 5, "modes": [mode]}
    validate(demo, "offload-demo-1")
    validate({**demo, "extra": 1, "modes": [{**mode, "extra": 1}]}, "offload-demo-1")
    validate({**demo, "modes": [dict.fromkeys(mode) | {"mode": "auto"}]}, "offload-demo-1")
    for broken in ({**mode, "moves": 1.5}, {**mode, "mode": "fast"}, {k: mode[k] for k in mode if k != "bytes_d2h"}):
        with pytest.raises(jsonschema.ValidationError):
            validate({**demo, "modes": [broken]}, "offload-demo-1")
