"""The ledger's promise: categories are exclusive and add up, whatever happens. All expected times are exact."""

from __future__ import annotations

import gc
import sys
import weakref
from types import FrameType
from typing import Any

import pytest

from balanced_offload.offload import ledger as ledger_module
from balanced_offload.offload import record as record_module
from balanced_offload.offload.ledger import CATEGORIES, Ledger
from balanced_offload.offload.record import RunRecord
from balanced_offload.offload.report import build_report, validate

from .conftest import HandClock


def total(record: RunRecord) -> float:
    values = [record.seconds[category] for category in CATEGORIES]
    assert None not in values
    return sum(value for value in values if value is not None)


def spent(record: RunRecord) -> dict[str, float | None]:
    """The categories that took time."""
    return {name: value for name, value in record.seconds.items() if value != 0.0}


def test_every_category_gets_its_own_time_and_the_sum_is_the_wall(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    expected: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    for i in range(400):
        category = CATEGORIES[(i * 5) % 8]
        ledger.begin(category)
        inside = {"stall": "onload"}.get(category, category)  # no step is open
        clock.tick(i / 64)
        expected[inside] += i / 64
    record = ledger.close_run()
    assert record.seconds == expected
    assert record.wall_s == total(record) == sum(range(400)) / 64
    assert record.complete


def test_time_before_the_first_category_is_other(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    clock.tick(0.5)
    ledger.begin("encode")
    clock.tick(0.25)
    assert spent(ledger.close_run()) == {"other": 0.5, "encode": 0.25}


def test_nested_spans_do_not_count_twice(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    with ledger.span("decode"):
        clock.tick(1)
        with ledger.span("evict"):
            clock.tick(2)
            with ledger.span("onload"):
                clock.tick(4)
            clock.tick(8)
        clock.tick(16)
    clock.tick(32)
    record = ledger.close_run()
    assert spent(record) == {"decode": 17, "evict": 10, "onload": 4, "other": 32}
    assert record.wall_s == 63


def test_a_span_restores_after_an_exception_and_after_begin_inside(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    ledger.begin("denoise")
    with pytest.raises(KeyboardInterrupt), ledger.span("onload"):
        ledger.begin("evict")
        clock.tick(1)
        raise KeyboardInterrupt
    clock.tick(2)
    assert spent(ledger.close_run()) == {"evict": 1, "denoise": 2}


def test_beginning_the_current_category_takes_no_mark(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    ledger.begin("denoise")
    before = clock.marks
    ledger.begin("denoise")
    with ledger.span("denoise"):
        clock.tick(1)
    assert clock.marks == before
    assert spent(ledger.close_run()) == {"denoise": 1}


@pytest.mark.parametrize("named", ["onload", "stall"])
def test_blocked_on_a_copy_is_stall_inside_a_step_and_onload_outside(clock: Any, ledger: Ledger, named: Any) -> None:
    ledger.open_run()
    with ledger.wait(named):
        clock.tick(1)
    ledger.step_begin(0)
    ledger.begin("denoise")
    with ledger.wait(named):
        clock.tick(2)
    with ledger.span(named):
        clock.tick(4)
    ledger.step_end()
    with ledger.span(named):
        clock.tick(8)
    assert spent(ledger.close_run()) == {"onload": 9, "stall": 6}


def test_a_wait_takes_two_marks_and_no_sync(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    ledger.begin("denoise")
    before = clock.marks
    with ledger.wait("stall"):
        pass
    assert clock.marks - before == 2
    ledger.step_begin(0)
    ledger.step_end()
    ledger.stage_begin("denoise", "unet", need=None, have=None)
    ledger.stage_end(None)
    assert clock.syncs == 0
    ledger.close_run()
    assert clock.syncs == 1


def test_a_step_counts_what_happened_within_it(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    ledger.begin("denoise")
    ledger.move("unet", "h2d", 1000, "stage")
    clock.tick(1)  # before the step: none of it is the step's
    ledger.step_begin(7)
    clock.tick(2)
    with ledger.wait("stall"):
        clock.tick(0.5)
    ledger.move("unet", "h2d", 30, "forward", copy_start=clock.at(1.0), copy_end=clock.at(3.5), overlapped=True)
    ledger.move("unet", "drop", 99, "forward")
    clock.tick(4)
    ledger.move("unet", "h2d", 12, "forward", count=3)
    ledger.step_end()
    clock.tick(8)
    ledger.move("vae", "h2d", 500, "stage")
    record = ledger.close_run()
    (step,) = record.steps
    assert (step.i, step.t0, step.t1) == (7, 1.0, 7.5)
    assert (step.compute_s, step.stall_s, step.bytes_h2d) == (6.0, 0.5, 42)
    assert step.overlapped_s == 2.0  # the copy ran from 1.0 to 3.5, of which 3.0 to 3.5 was waited for
    assert [move.step for move in record.moves] == [None, 7, 7, 7, None]


def test_a_copy_across_the_step_boundary_is_shared_by_both_steps(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    ledger.begin("denoise")
    ledger.step_begin(0)
    clock.tick(2)
    ledger.move("unet", "h2d", 8, "forward", copy_start=clock.at(1.5), copy_end=clock.at(3.0), overlapped=True)
    ledger.step_end()
    ledger.step_begin(1)
    clock.tick(2)
    ledger.step_end()
    record = ledger.close_run()
    assert [step.overlapped_s for step in record.steps] == [0.5, 1.0]
    assert record.overlapped_s == 1.5
    assert [step.bytes_h2d for step in record.steps] == [8, 0]  # by when the copy was issued


def test_two_copies_at_once_overlap_compute_once_and_idle_time_hides_nothing(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    clock.tick(1)  # other: nothing computes, so the copy from 0 to 2 is hidden for one second only
    ledger.begin("encode")
    clock.tick(4)
    for start, end in ((0.0, 2.0), (1.5, 3.0), (1.75, 2.25)):
        ledger.move("unet", "h2d", 1, "stage", copy_start=clock.at(start), copy_end=clock.at(end), overlapped=True)
    record = ledger.close_run()
    assert record.overlapped_s == 2.0
    assert [move.dur_s for move in record.moves] == [2.0, 1.5, 0.5]


def test_a_copy_that_the_compute_stream_waits_for_entirely_is_not_overlapped(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    with ledger.span("onload"):
        clock.tick(3)
    ledger.move("vae", "h2d", 1, "stage", copy_start=clock.at(0.0), copy_end=clock.at(3.0))
    record = ledger.close_run()
    assert (record.overlapped_s, record.seconds["onload"]) == (0.0, 3.0)


def test_bytes_and_counts_by_direction(clock: Any, ledger: Ledger) -> None:
    ledger.move("unet", "h2d", 1, "stage")  # outside a run: lost to no total
    ledger.move("unet", "drop", 2, "need")
    ledger.open_run()
    ledger.move("unet", "h2d", 4, "stage", count=5)
    ledger.move("unet", "d2h", 8, "lora", count=2)
    ledger.move("unet", "drop", 16, "need", count=3)
    record = ledger.close_run()
    ledger.move("unet", "d2h", 32, "external")
    assert (record.bytes_h2d, record.bytes_d2h, record.bytes_dropped) == (4, 8, 16)
    assert (record.move_count, record.drop_count) == (7, 3)
    assert (ledger.total_bytes_h2d, ledger.total_bytes_d2h, ledger.total_moves) == (5, 40, 9)


def test_an_untimed_move_has_a_place_but_no_duration(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    clock.tick(2)
    ledger.begin("onload")
    clock.tick(1)
    ledger.move("vae", "h2d", 1, "stage")
    (move,) = ledger.close_run().moves
    assert (move.t, move.dur_s) == (2.0, None)


def test_stages_close_one_another_and_their_steps(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    ledger.stage_begin("denoise", "unet", need=10, have=5)
    ledger.step_begin(0)
    clock.tick(1)
    ledger.stage_begin("decode", "vae", need=None, have=None)
    clock.tick(2)
    ledger.stage_end(77)
    ledger.stage_end(78)  # nothing is open
    clock.tick(4)
    record = ledger.close_run()
    rows = [(row.name, row.component, row.t0, row.t1, row.need, row.have, row.peak) for row in record.stages]
    assert rows == [("denoise", "unet", 0.0, 1.0, 10, 5, None), ("decode", "vae", 1.0, 3.0, None, None, 77)]
    assert [(step.t0, step.t1) for step in record.steps] == [(0.0, 1.0)]


def test_without_a_run_nothing_is_marked_or_kept(clock: Any, ledger: Ledger) -> None:
    ledger.begin("denoise")
    with ledger.span("onload"), ledger.wait("stall"):
        ledger.step_begin(0)
        ledger.stage_begin("a", "b", need=1, have=1)
        ledger.note_vram(1, 1)
        ledger.event("oom", "x")
    ledger.step_end()
    ledger.stage_end(None)
    ledger.drain()
    assert clock.marks == 0
    assert not ledger.active
    with pytest.raises(RuntimeError, match="no run is open"):
        ledger.close_run()


def test_the_error_that_ended_the_run_is_kept_as_text_only(clock: Any, ledger: Ledger) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    error = OutOfMemoryError("tried to allocate 2 GiB")
    alive = weakref.ref(error)
    ledger.open_run("p")
    ledger.step_begin(0)
    clock.tick(1)
    record = ledger.close_run(error)
    del error
    gc.collect()
    assert alive() is None  # a kept traceback would keep the frames' tensors
    assert (record.complete, record.oom, record.error_type) == (False, True, "OutOfMemoryError")
    assert record.error_text == "tried to allocate 2 GiB"
    assert record.wall_s == total(record) == 1.0


def test_opening_a_run_closes_the_open_one_as_incomplete_and_its_spans_stay_out_of_the_next(
    clock: Any, ledger: Ledger
) -> None:
    ledger.open_run("first")
    with ledger.span("encode"):
        clock.tick(1)
        ledger.open_run("second")
        first = ledger.last_record
        ledger.begin("decode")
        clock.tick(2)
    clock.tick(4)
    second = ledger.close_run()
    assert first is not None
    assert (first.prompt_id, first.complete, spent(first)) == ("first", False, {"encode": 1})
    assert (second.prompt_id, second.complete, spent(second)) == ("second", True, {"decode": 6})
    assert ledger.last_record is second


def test_a_device_in_error_state_leaves_times_unknown_and_the_next_run_clean(clock: Any, ledger: Ledger) -> None:
    clock.broken = RuntimeError("device-side assert")
    ledger.open_run()
    ledger.begin("denoise")
    ledger.step_begin(0)
    ledger.move("unet", "h2d", 64, "forward")
    clock.blind = True
    clock.tick(1)
    record = ledger.close_run(ValueError("the user's own"))
    assert record.clock_error == "RuntimeError: device-side assert"
    assert (record.error_type, record.complete, record.wall_s) == ("ValueError", False, None)
    assert set(record.seconds) == set(CATEGORIES) and set(record.seconds.values()) == {None}
    assert record.steps[0].compute_s is None
    assert record.bytes_h2d == record.steps[0].bytes_h2d == 64  # counted on the host
    clock.broken = None
    clock.blind = False
    ledger.open_run()
    clock.tick(3)
    assert spent(ledger.close_run()) == {"other": 3}


def test_a_hundred_thousand_marks_hold_no_events_and_little_memory(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    ledger.begin("denoise")
    for step in range(50):
        ledger.step_begin(step)
        for _ in range(1000):
            clock.tick(1 / 1024)
            with ledger.wait("stall"):
                clock.tick(1 / 2048)
            copy = {"copy_start": clock.at(clock.now - 1 / 1024), "copy_end": clock.at(clock.now)}
            ledger.move("unet", "h2d", 3, "forward", overlapped=True, **copy)
            assert len(ledger._pending) <= 512 and len(ledger._copies) <= 512
        ledger.step_end()
        assert not ledger._pending and not ledger._copies
    record = ledger.close_run()
    assert clock.marks > 100_000
    assert spent(record) == {"denoise": 50_000 / 1024, "stall": 50_000 / 2048}
    assert record.overlapped_s == 50_000 / 2048
    assert sum(step.bytes_h2d for step in record.steps) == record.bytes_h2d == 150_000
    marks, moves = record.marks, record.moves
    held = sum(map(sys.getsizeof, (marks.code, marks.t, marks.busy, marks.stalled)))
    assert held <= 40 * len(marks.code)  # arrays grow by an eighth
    held = sum(map(sys.getsizeof, (moves.t, moves.dur, moves.at, moves.nbytes, moves.step, moves.count, moves.kind)))
    assert held <= 80 * len(moves)


def test_a_device_that_lags_behind_is_not_asked_about_every_mark(clock: Any, ledger: Ledger) -> None:
    asked = 0
    ready = clock.ready

    def counting(mark: Any) -> bool:
        nonlocal asked
        asked += 1
        return bool(ready(mark))

    clock.ready = counting
    clock.blind = True
    ledger.open_run()
    for i in range(5000):
        clock.tick(1 / 64)
        ledger.begin("denoise" if i % 2 else "encode")
    assert asked <= 5000 // 256 + 1
    clock.ready = ready
    record = ledger.close_run()
    assert record.wall_s == total(record) == 5000 / 64


def test_marks_of_two_streams_that_cross_never_give_negative_time(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    clock.tick(2)
    ledger.begin("encode")
    clock.now = 1.5  # a mark on another stream, which is behind
    ledger.begin("denoise")
    clock.now = 4.0
    record = ledger.close_run()
    assert spent(record) == {"other": 2, "denoise": 2}
    assert record.wall_s == total(record)


def test_overhead_is_counted_and_the_wait_for_the_device_is_not(clock: Any, ledger: Ledger) -> None:
    import time

    def slow_sync() -> None:
        time.sleep(0.2)

    clock.synchronize = slow_sync
    ledger.open_run()
    before = ledger.overhead_s
    for _ in range(200):
        with ledger.wait("stall"):
            pass
    assert ledger.overhead_s > before > 0.0
    record = ledger.close_run()
    assert 0.0 < record.overhead_s < 0.2 <= record.host_s
    assert record.overhead_s == pytest.approx(ledger.overhead_s)


def test_a_wait_costs_less_than_ten_microseconds(clock: Any) -> None:
    import time

    clock.mark = lambda: (0.0,)
    ledger = Ledger(clock)
    best = float("inf")
    for number in range(500):  # the least of many: on a busy machine it takes more of them to get there
        if number >= 5 and best < 10e-6:
            break
        ledger.open_run()
        begun = time.perf_counter()
        for _ in range(2000):
            with ledger.wait("stall"):
                pass
        best = min(best, (time.perf_counter() - begun) / 2000)
    assert best < 10e-6


def test_peaks_and_samples_of_memory(clock: Any, ledger: Ledger) -> None:
    ledger.open_run()
    for allocated, resident in ((10, 5), (10, 5), (30, 7), (20, 9)):
        ledger.note_vram(allocated, resident)
        clock.tick(1)
        ledger.begin("encode" if allocated == 10 else "decode")
    record = ledger.close_run()
    assert (record.peak_allocated, record.peak_resident) == (30, 9)
    assert list(record.vram_allocated) == [10, 30, 20]  # the same again is no news


def test_events_keep_their_time_and_are_capped(clock: Any) -> None:
    ledger = Ledger(clock, cap=2)
    ledger.open_run()
    clock.tick(1)
    ledger.begin("decode")
    ledger.event("oom", "evicted the text encoder", nbytes=5)
    ledger.event("notice", "b")
    ledger.event("notice", "c")
    record = ledger.close_run()
    assert record.events[0] == {"kind": "oom", "text": "evicted the text encoder", "data": {"nbytes": 5}, "t": 1.0}
    assert (len(record.events), record.events_dropped) == (2, 1)


def test_a_cap_below_one_is_refused(clock: Any) -> None:
    with pytest.raises(ValueError, match="cap: got 0"):
        Ledger(clock, cap=0)


def columns(record: RunRecord) -> list[Any]:
    """The columns of a row of moves, in the order in which they are written."""
    moves = record.moves
    return [moves.t, moves.dur, moves.at, moves.nbytes, moves.step, moves.count, moves.kind, moves.group]


@pytest.mark.parametrize("written", range(9))
def test_half_a_row_of_moves_is_no_row(clock: Any, ledger: Ledger, given: dict[str, Any], written: int) -> None:
    """Ctrl+C between two columns, then the run goes on and ends by that error, which close_run must not hide."""
    ledger.open_run()
    ledger.begin("denoise")
    for nbytes in (1, 2):
        clock.tick(1)
        ledger.begin("onload" if nbytes == 2 else "stall")
        ledger.move("unet", "h2d", nbytes, "stage")
    for column in columns(ledger._record)[written:]:
        del column[-1]
    kept = [1, 2] if written == 8 else [1]
    assert [move.bytes for move in ledger._record.moves] == kept
    clock.tick(1)
    ledger.move("vae", "d2h", 3, "lora", count=4, copy_start=clock.at(2.5), copy_end=clock.at(3.0))
    record = ledger.close_run(KeyboardInterrupt())
    assert (record.error_type, record.clock_error, record.complete) == ("KeyboardInterrupt", None, False)
    assert {len(column) for column in columns(record)} == {len(kept) + 1}
    assert [(move.component, move.dir, move.bytes, move.count) for move in record.moves] == [
        *(("unet", "h2d", nbytes, 1) for nbytes in kept),
        ("vae", "d2h", 3, 4),
    ]
    assert [(move.t, move.dur_s) for move in record.moves][-1] == (2.5, 0.5)
    validate(build_report(record, **given))


@pytest.mark.parametrize("column", range(8))
def test_a_run_closes_over_half_a_row_at_its_end(
    clock: Any, ledger: Ledger, given: dict[str, Any], column: int
) -> None:
    ledger.open_run()
    ledger.move("unet", "h2d", 1, "stage")
    ledger.move("unet", "h2d", 2, "stage")
    del columns(ledger._record)[column][-1]
    record = ledger.close_run(KeyboardInterrupt())
    assert (record.error_type, record.clock_error) == ("KeyboardInterrupt", None)
    assert [move.bytes for move in record.moves] == [1]
    assert [move["bytes"] for move in build_report(record, **given)["moves"]] == [1]


def test_a_record_that_cannot_be_settled_hides_no_error(clock: Any, ledger: Ledger, given: dict[str, Any]) -> None:
    ledger.open_run()
    ledger.event("notice", "a")
    ledger.step_begin(0)
    clock.tick(1)
    ledger._record.steps[0].first_mark = 99
    record = ledger.close_run(KeyboardInterrupt())
    assert record.error_type == "KeyboardInterrupt" and record.clock_error is not None
    assert set(record.seconds.values()) == {None} and record.overlapped_s is None
    validate(build_report(record, **given))
    ledger.open_run()
    clock.tick(2)
    assert spent(ledger.close_run()) == {"other": 2}


def test_an_interrupt_at_any_line_leaves_a_run_that_goes_on_and_closes(given: dict[str, Any]) -> None:
    """Raised from a trace function before line n of the ledger, for every n that a small run comes to."""
    files = (ledger_module.__file__, record_module.__file__)
    outcomes: set[bool] = set()
    for number in range(1, 10_000):
        left = number

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        clock = HandClock()
        ledger = Ledger(clock)  # type: ignore[arg-type]
        ledger.open_run()
        before = sys.gettrace()
        interrupted = False
        try:
            sys.settrace(trace)
            run_a_little(clock, ledger)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        run_a_little(clock, ledger)  # as where a caller catches it
        record = ledger.close_run(KeyboardInterrupt())
        assert record.error_type == "KeyboardInterrupt"
        assert len({len(column) for column in columns(record)}) == 1
        assert record.moves.row(len(record.moves) - 1).bytes == 7
        if record.clock_error is None:
            assert record.wall_s == total(record) == clock.now
        else:
            assert "cut off" in record.clock_error
        outcomes.add(record.clock_error is None)
        validate(build_report(record, **given))
        if not interrupted:
            break
    assert not interrupted and number > 100
    assert outcomes == {True, False}


def run_a_little(clock: Any, ledger: Ledger) -> None:
    """Every kind of call once, the last of them a move of 7 bytes."""
    ledger.stage_begin("denoise", "unet", need=1, have=None)
    ledger.step_begin(0)
    ledger.begin("denoise")
    clock.tick(1)
    ledger.note_vram(int(clock.now) * 10, 5)
    with ledger.wait("stall"):
        clock.tick(0.5)
    ledger.move("unet", "h2d", 3, "forward", copy_start=clock.at(clock.now - 0.25), copy_end=clock.at(clock.now))
    ledger.event("notice", "a")
    ledger.step_end()
    ledger.stage_end(2)
    ledger.drain()
    ledger.move(f"vae {clock.now}", "drop", 7, "need")
