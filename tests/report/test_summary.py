"""The line, the table and the text for people."""

from __future__ import annotations

import re
from typing import Any

import pytest

from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.record import RunRecord
from balanced_offload.offload.report import build_report
from balanced_offload.offload.summary import hint_lines, line, percent, report_text, seconds, size, table

GIB = 1 << 30


def test_the_line(record: RunRecord, given: dict[str, Any]) -> None:
    assert line(build_report(record, **given)) == (
        "Time 5.94 s | encode 0.75 denoise 3.50 decode 0.75 | onload 0.25 stall 0.50 evict 0.06 other 0.12"
        " | VRAM peak 11.0 of 16.0 GiB 69%, high 12.8 | RAM 15.7 GiB 25%"
    )


def test_what_the_line_prints_adds_up(record: RunRecord, given: dict[str, Any]) -> None:
    text = line(build_report(record, **given))
    wall, *parts = (float(figure) for figure in re.findall(r" (\d+\.\d\d)\b", text))
    assert sum(parts) == pytest.approx(wall, abs=0.005 * len(parts))


def test_the_line_of_a_short_run_is_in_milliseconds(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    ledger.open_run()
    ledger.begin("preview")
    clock.tick(0.0625)
    given["vram"] = {"total": 12 << 20, "peak_torch": 9 << 20}
    given["resolved_json"] = {"mode": "none", "high": None}
    given["ram"] = {"peak_rss": 512 << 10}
    assert line(build_report(ledger.close_run(), **given)) == (
        "Time 62.5 ms | encode 0.0 denoise 0.0 decode 0.0 preview 62.5 | onload 0.0 stall 0.0 evict 0.0"
        " | VRAM peak 9.0 of 12.0 MiB 75%, high none | RAM 512.0 KiB <1%"
    )


def test_the_line_says_na_for_what_is_not_known(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    clock.broken = RuntimeError("lost")
    ledger.open_run()
    record = ledger.close_run()
    given |= {"vram": {}, "ram": {}, "resolved_json": {}}
    assert line(build_report(record, **given)) == (
        "Time n/a | encode n/a denoise n/a decode n/a | onload n/a stall n/a evict n/a"
        " | VRAM peak n/a of n/a, high n/a | RAM n/a"
    )
    given["vram"] = {"peak_device": 3 * GIB}
    assert "VRAM peak 3.0 GiB of n/a" in line(build_report(record, **given))


def test_the_line_stays_within_its_length(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    ledger.open_run()
    for category in ("encode", "denoise", "decode", "preview", "evict", "onload", "other"):
        ledger.begin(category)  # type: ignore[arg-type]
        clock.tick(123456.0)
    ledger.step_begin(0)
    with ledger.wait("stall"):
        clock.tick(123456.0)
    assert len(line(build_report(ledger.close_run(), **given))) <= 200


def test_sizes_and_times() -> None:
    assert [size(n) for n in (None, 0, 1023, 1024, 5 << 20, 3 << 29, 5 << 40)] == [
        "n/a",
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "1.5 GiB",
        "5.0 TiB",
    ]
    assert size(1 << 20, "GiB") == "0.0 GiB"
    assert [seconds(t) for t in (None, 0.0, 5.5, 0.25, 0.0000125)] == ["n/a", "0.00 s", "5.50 s", "250.0 ms", "12.5 us"]


def test_a_table_is_aligned() -> None:
    rows: list[dict[str, object]] = [
        {"mode": "none", "peak": "9.8 GiB", "moves": 4, "equal": True},
        {"mode": "sequential", "peak": None, "moves": 12345, "equal": None, "note": "two\nlines"},
    ]
    assert table(rows).splitlines() == [
        "mode           peak  moves  equal  note",
        "----------  -------  -----  -----  ---------",
        "none        9.8 GiB      4  yes    n/a",
        "sequential      n/a  12345  n/a    two lines",
    ]
    assert table([]) == ""


def test_the_text_tells_verdict_moves_and_what_is_not_known(record: RunRecord, given: dict[str, Any]) -> None:
    text = report_text(build_report(record, **given))
    lines = text.splitlines()
    assert lines[0] == "A part was resident, the rest streamed. Mode balanced, simulated."
    assert lines[1].startswith("Time 5.94 s | ")
    assert "Moved: 3 copies, 4.0 GiB up, 0 B down, 2.00 s of it behind compute" in lines
    assert "  text_encoder evict (need): 2.0 GiB in 1, 2.0 GiB avoidable" in lines
    assert "  unet onload (forward): 2.0 GiB in 2" in lines
    assert lines[-1].startswith("Not known: env.comfyui")


def test_the_text_is_at_most_1024_characters(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    ledger.open_run()
    for i in range(50):
        ledger.move("component " * 20 + str(i), "h2d", i, "stage", avoidable=True)
        ledger.event("oom", "step down " * 50)
    given["resolved_json"]["sentence"] = "because " * 100
    text = report_text(build_report(ledger.close_run(ValueError("x" * 5000)), **given))
    assert len(text) <= 1024
    assert text.startswith("Ended by an error.") and "ValueError: xxx" in text


def test_the_hint_is_told_behind_the_line(record: RunRecord, given: dict[str, Any]) -> None:
    label = {"set": {"fit_aware": True}, "label": "Turn Fit-aware on"}
    hint = {
        "code": "FITS_BUT_MOVED",
        "sentence": "It fits, but was moved: 3.00 s a run.",
        "saving_s": 3.0,
        "action": label,
    }
    report = build_report(record, **given)
    lines = report_text({**report, "hints": [hint, hint]}).splitlines()
    assert lines[1].startswith("Time ")
    assert lines[2] == "Hint: It fits, but was moved: 3.00 s a run. Turn Fit-aware on."
    assert sum("Hint:" in text or "Note:" in text for text in lines) == 1
    assert hint_lines({"hints": [{**hint, "action": None}]}) == ["Hint: It fits, but was moved: 3.00 s a run."]


def test_a_note_is_told_beside_a_hint(record: RunRecord, given: dict[str, Any]) -> None:
    hint = {"code": "RAM_PRESSURE", "sentence": "It streamed.", "saving_s": 3.0, "action": None}
    text = report_text({**build_report(record, **given), "hints": [hint], "hint_note": "The decode needed the room."})
    assert text.splitlines()[2:4] == ["Hint: It streamed.", "Note: The decode needed the room."]


def test_a_note_says_why_there_is_no_hint(record: RunRecord, given: dict[str, Any]) -> None:
    text = report_text({**build_report(record, **given), "hint_note": "The decode needed the room."})
    assert text.splitlines()[2] == "Note: The decode needed the room."
    for silent in ({}, {"hints": [], "hint_note": None}, {"hints": None}):
        assert hint_lines(silent) == []


def test_a_long_hint_does_not_crowd_the_rest_out(record: RunRecord, given: dict[str, Any]) -> None:
    hint = {"code": "X", "sentence": "y" * 2000, "saving_s": 1.0, "action": None}
    text = report_text({**build_report(record, **given), "hints": [hint]})
    assert len(text) <= 1024 and "Moved: 3 copies" in text


def test_shares_of_the_card_and_of_ram() -> None:
    assert [percent(part, whole) for part, whole in ((46, 100), (0, 100), (1, 1000), (5, 1000), (3, 2))] == [
        "46%",
        "0%",
        "<1%",
        "<1%",
        "150%",
    ]
    assert percent(None, 5) == percent(5, None) == percent(5, 0) == ""


def test_shares_give_way_where_the_line_is_long(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    ledger.open_run()
    for category in ("encode", "denoise", "decode", "preview", "onload", "evict", "other"):
        ledger.begin(category)  # type: ignore[arg-type]
        clock.tick(12345.0)
    report = build_report(ledger.close_run(), **given)
    assert len(line(report)) <= 200 and "%" not in line(report)
    assert line(report).endswith("of 16.0 GiB, high 12.8 | RAM 15.7 GiB")
