"""Every move and every wait of a run, as marks on the device's time line.

Invariant: a run is a sequence of marks, each naming the category that begins there, so that the categories are
exclusive and add up to the wall time by construction. Nothing here blocks: marks are read back when the device has
passed them (`drain`), and the one `synchronize` of a run is in `close_run`.

A ledger belongs to one thread, the one that drives the device; it takes no lock.
"""

from __future__ import annotations

import datetime as dt
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from types import TracebackType
from typing import Any, Literal

from .backend.base import Backend, Mark
from .record import CATEGORIES, Category, Direction, MarkLog, MoveLog, Reason, RunRecord, StageRow, StepRow, trim

__all__ = ["CATEGORIES", "Category", "Direction", "Ledger", "Reason", "RunRecord"]

_CODE: dict[str, int] = {name: i for i, name in enumerate(CATEGORIES)}
_ONLOAD, _STALL, _OTHER = _CODE["onload"], _CODE["stall"], _CODE["other"]
_DRAIN_EVERY = 256  # marks that may wait before we look whether the device has passed some
_IDLE: AbstractContextManager[None] = nullcontext()


class _Span:
    """Switch the category and put back what it was, if the run is still the same."""

    __slots__ = ("_code", "_ledger", "_previous", "_run")

    def __init__(self, ledger: Ledger, code: int) -> None:
        self._ledger = ledger
        self._code = code

    def __enter__(self) -> None:
        ledger = self._ledger
        self._run = ledger._run
        self._previous = ledger._current
        ledger._switch(self._code)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ledger._run == self._run:
            self._ledger._switch(self._previous)


class Ledger:
    """Watches one device. Without an open run all calls cost next to nothing, and only the totals of bytes are kept."""

    def __init__(self, backend: Backend, *, cap: int = 2000) -> None:
        if cap < 1:
            raise ValueError(f"cap: got {cap}, allowed is 1 or more")
        self._backend = backend
        self._cap = cap
        self.active = False
        self.total_bytes_h2d = 0
        self.total_bytes_d2h = 0
        self.total_moves = 0
        self.overhead_s = 0.0  # host seconds spent in here; the wait for the device in close_run is not ours
        self.last_record: RunRecord | None = None
        self._run = 0  # counts runs, so that a span that outlives its run touches nothing
        self._reset(None)

    def _reset(self, prompt_id: str | None) -> None:
        created = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
        clock = f"marks on the compute stream ({self._backend.kind}, rung {self._backend.rung})"
        self._record = RunRecord(prompt_id, created, clock, self._cap)
        self._marks: MarkLog = self._record.marks
        self._moves: MoveLog = self._record.moves
        self._pending: deque[Mark] = deque()
        self._copies: deque[tuple[int, Mark, Mark]] = deque()
        self._current = _OTHER
        self._step: StepRow | None = None
        self._step_from = 0  # bytes copied to the device before the step
        self._stage: StageRow | None = None
        self._drain_at = _DRAIN_EVERY

    # --- a run

    def open_run(self, prompt_id: str | None = None) -> None:
        """Start a run, in category "other". A run that is still open is closed as incomplete."""
        if self.active:
            self._close(None, complete=False)
        entered = perf_counter()
        self._reset(prompt_id)
        self._run += 1
        self._opened, self._overhead_at_open = entered, self.overhead_s
        self._first: Mark = self._backend.mark()
        self._anchor, self._anchor_t = self._first, 0.0
        self._pending.append(self._first)
        self._marks.code.append(_OTHER)
        self.active = True
        self.overhead_s += perf_counter() - entered

    def close_run(self, error: BaseException | None = None) -> RunRecord:
        """End the run: wait for the device once and read every mark back.

        Raises:
            RuntimeError: no run is open.
        """
        if not self.active:
            raise RuntimeError("close_run: no run is open")
        return self._close(error, complete=error is None)

    def _close(self, error: BaseException | None, *, complete: bool) -> RunRecord:
        record = self._record
        entered = perf_counter()
        waited = 0.0
        self.active = False  # whatever happens below, the next run starts clean
        self._run += 1
        try:
            self._end_step()
            self._end_stage(None)
            last = self._backend.mark()
            self._marks.code.append(_OTHER)
            self._pending.append(last)
            begun = perf_counter()
            self._backend.synchronize()
            waited = perf_counter() - begun
            self._drain()
            if self._pending or self._copies:
                raise RuntimeError(f"{len(self._pending)} marks were not reached after synchronize")
            if not self._marks.whole:
                raise RuntimeError("a mark was cut off while it was taken or read, so times are unknown")
            record.wall_s = self._backend.seconds(self._first, last)
        except Exception as failure:  # a device in error state: say so, never hide the error that brought us here
            record.clock_error = f"{type(failure).__name__}: {failure}"
            complete = False
        if error is not None:
            record.error_type, record.error_text = type(error).__name__, str(error)
            record.oom = any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)
        record.complete = complete
        try:
            record.settle()
        except Exception as failure:  # whatever is half there, the error that brought us here comes first
            record.clock_error = record.clock_error or f"{type(failure).__name__}: {failure}"
            record.seconds, record.overlapped_s = dict.fromkeys(CATEGORIES), None
            record.complete = False
        self._first = self._anchor = None
        self._pending.clear()
        self._copies.clear()
        done = perf_counter()
        self.overhead_s += done - entered - waited
        record.overhead_s = self.overhead_s - self._overhead_at_open
        record.host_s = done - self._opened
        self.last_record = record
        return record

    # --- categories

    def begin(self, category: Category) -> None:
        """From here on the time is `category`'s. Being blocked on a copy is "stall" in a step, "onload" outside one."""
        if self.active:
            self._switch(self._placed(category))

    def span(self, category: Category) -> AbstractContextManager[None]:
        """`category` for the block, then back to what it was, after exceptions too."""
        return _Span(self, self._placed(category)) if self.active else _IDLE

    def wait(self, category: Literal["onload", "stall"]) -> AbstractContextManager[None]:
        """Around `stream.wait_event`: the marks before and after it measure what the compute stream waited."""
        return _Span(self, self._placed(category)) if self.active else _IDLE

    def _placed(self, category: str) -> int:
        code = _CODE[category]
        if code in (_ONLOAD, _STALL):  # one definition, kept in one place: inside a step it is a stall
            return _ONLOAD if self._step is None else _STALL
        return code

    def _switch(self, code: int) -> None:
        if code != self._current:
            entered = perf_counter()
            self._current = code
            self._mark()
            self.overhead_s += perf_counter() - entered

    def _mark(self) -> int:
        """Put a mark of the current category on the time line; its number."""
        mark = self._backend.mark()
        code = self._marks.code
        code.append(self._current)  # first, so that no mark is read back that has no category
        self._pending.append(mark)
        if len(self._pending) >= self._drain_at:
            self._drain()
        return len(code) - 1

    # --- stages and steps

    def stage_begin(self, name: str, component: str, *, need: int | None, have: int | None) -> None:
        """A stage starts (the category stays what it is); one that is open ends here."""
        if self.active:
            entered = perf_counter()
            self._end_stage(None)
            self._stage = StageRow(name, component, need, have, first_mark=self._mark())
            self._record.stages.append(self._stage)
            self.overhead_s += perf_counter() - entered

    def stage_end(self, peak: int | None) -> None:
        """The open stage ends, and a step in it; `peak` is the most bytes allocated in it."""
        if self.active:
            entered = perf_counter()
            self._end_stage(peak)
            self._drain()
            self.overhead_s += perf_counter() - entered

    def _end_stage(self, peak: int | None) -> None:
        self._end_step()
        if self._stage is not None:
            stage, self._stage = self._stage, None
            stage.peak = peak
            stage.last_mark = self._mark()

    def step_begin(self, index: int) -> None:
        """One forward of the denoiser starts; one that is open ends here."""
        if self.active:
            entered = perf_counter()
            self._end_step()
            self._step_from = self._record.bytes_h2d
            self._step = StepRow(index, first_mark=self._mark())
            self._record.steps.append(self._step)
            self.overhead_s += perf_counter() - entered

    def step_end(self) -> None:
        """The open step ends."""
        if self.active:
            entered = perf_counter()
            self._end_step()
            self._drain()
            self.overhead_s += perf_counter() - entered

    def _end_step(self) -> None:
        if self._step is not None:
            step = self._step
            step.bytes_h2d = self._record.bytes_h2d - self._step_from
            step.last_mark = self._mark()
            self._step = None  # last: a step that Ctrl+C left half closed is closed again with the run

    # --- moves, events, memory

    def move(
        self,
        component: str,
        direction: Direction,
        nbytes: int,
        reason: Reason,
        *,
        copy_start: Mark | None = None,
        copy_end: Mark | None = None,
        overlapped: bool = False,
        avoidable: bool = False,
        pinned: bool = True,
        count: int = 1,
    ) -> None:
        """Record `count` copies of `nbytes` bytes in all, or with "drop" an eviction: bytes freed, nothing copied.

        `copy_start` and `copy_end` are marks on the stream that copies; without them the duration stays unknown.
        """
        copied = direction != "drop"
        if copied:
            self.total_moves += count
            if direction == "h2d":
                self.total_bytes_h2d += nbytes
            else:
                self.total_bytes_d2h += nbytes
        if not self.active:
            return
        entered = perf_counter()
        record = self._record
        if copied:
            record.move_count += count
            if direction == "h2d":
                record.bytes_h2d += nbytes
            else:
                record.bytes_d2h += nbytes
        else:
            record.drop_count += count
            record.bytes_dropped += nbytes
        step = -1 if self._step is None else self._step.i
        kind = (component, direction, reason, avoidable, overlapped)
        row = self._moves.append(kind, nbytes, step, count, len(self._marks.code) - 1, pinned)
        if copy_start is not None and copy_end is not None:
            self._copies.append((row, copy_start, copy_end))
            if len(self._copies) >= self._drain_at:
                self._drain()
        self.overhead_s += perf_counter() - entered

    def event(self, kind: str, text: str, **data: Any) -> None:
        """Keep a notice, an OOM step, a step-down, a tiling decision. `data` must be JSON values."""
        if not self.active:
            return
        if len(self._record.events) >= self._cap:
            self._record.events_dropped += 1
            return
        self._record.events.append({"kind": kind, "text": text, "data": data, "mark": len(self._marks.code) - 1})

    def note_vram(self, allocated: int, resident_weights: int, by: Mapping[str, int] | None = None) -> None:
        """Bytes on the device as the caller knows them, without asking it: peaks and the trace's counters.

        by: the bytes of each component; what is left out is as it was.
        """
        if not self.active:
            return
        record = self._record
        if by is not None:
            record.residency.note(by, len(self._marks.code) - 1)
        at, seen_allocated, seen_resident = record.vram_at, record.vram_allocated, record.vram_resident
        if not len(at) == len(seen_allocated) == len(seen_resident):
            trim((seen_allocated, seen_resident, at))
        if seen_allocated and seen_allocated[-1] == allocated and seen_resident[-1] == resident_weights:
            return
        record.peak_allocated = max(allocated, record.peak_allocated or 0)
        record.peak_resident = max(resident_weights, record.peak_resident or 0)
        seen_allocated.append(allocated)
        seen_resident.append(resident_weights)
        at.append(len(self._marks.code) - 1)  # last: what reads the samples counts these

    # --- reading marks back

    def drain(self) -> None:
        """Turn the marks that the device has passed into times, and let their events go. Never blocks."""
        if self.active:
            entered = perf_counter()
            self._drain()
            self.overhead_s += perf_counter() - entered

    def _drain(self) -> None:
        backend, pending, copies, marks = self._backend, self._pending, self._copies, self._marks
        while pending and backend.ready(pending[0]):
            mark = pending.popleft()
            self._anchor_t += backend.seconds(self._anchor, mark)
            self._anchor = mark
            marks.resolve(self._anchor_t)
        moves = self._moves
        while copies and backend.ready(copies[0][2]) and backend.ready(copies[0][1]):
            row, start, end = copies.popleft()
            # from the nearest mark: events count milliseconds in single precision, which is coarse over minutes
            begun = self._anchor_t + backend.seconds(self._anchor, start)
            moves.timed(row, begun, max(0.0, backend.seconds(start, end)))
        self._drain_at = max(len(pending), len(copies)) + _DRAIN_EVERY
