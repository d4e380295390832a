"""What one run left behind, as plain numbers. Invariant: a record holds no event, tensor or exception, only figures.

Rows live in columns of machine numbers (about 60 bytes a move, 25 bytes a mark), so that a sequential run with 100,000
copies can be kept whole: the file has all rows, the served report has the first `cap` and an aggregate of the rest.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Category = Literal["encode", "denoise", "decode", "preview", "onload", "stall", "evict", "other"]
Direction = Literal["h2d", "d2h", "drop"]
Reason = Literal["forward", "stage", "low", "always", "need", "oom", "policy", "lora", "external"]

Kind = tuple[str, Direction, Reason, bool, bool]  # component, direction, reason, avoidable, overlapped

CATEGORIES: tuple[Category, ...] = ("encode", "denoise", "decode", "preview", "onload", "stall", "evict", "other")
COMPUTE = frozenset(range(4))  # codes of the categories in which the device computes
DIRECTIONS: tuple[Direction, ...] = ("h2d", "d2h", "drop")
REASONS: tuple[Reason, ...] = ("forward", "stage", "low", "always", "need", "oom", "policy", "lora", "external")


@dataclass(frozen=True)
class MoveRow:
    """One move, or `count` moves recorded as one. Seconds from the start of the run; None where it was not measured."""

    t: float | None
    dur_s: float | None
    component: str
    dir: Direction
    bytes: int
    reason: Reason
    step: int | None
    avoidable: bool
    overlapped: bool
    count: int


@dataclass
class MoveSum:
    """Moves of one kind, added up as they are recorded. `dur_s`: of `timed_bytes`, those whose copy was measured."""

    kind: Kind
    in_step: bool
    pinned: bool
    nbytes: int = 0
    count: int = 0
    dur_s: float = 0.0
    timed_bytes: int = 0


class MoveLog:
    """All moves of one run, in columns. `t` and `dur` hold NaN until measured.

    A row is there once every column has it: Ctrl+C can come between any two of them, and what it leaves is no row.
    """

    def __init__(self) -> None:
        self.t = array("d")
        self.dur = array("d")
        self.at = array("q")  # number of the mark before the move: its time where no copy was timed
        self.nbytes = array("q")
        self.step = array("q")  # -1 outside a step
        self.count = array("q")
        self.kind = array("q")  # index into `kinds`
        self.kinds: list[Kind] = []
        self.group = array("q")  # index into `sums`
        self.sums: list[MoveSum] = []
        self._groups: dict[tuple[int, bool, bool], int] = {}  # (kind, in a step, from page-locked memory) -> index
        self._codes: dict[Kind, int] = {}
        self._columns: tuple[array[Any], ...] = (
            self.t,
            self.dur,
            self.at,
            self.nbytes,
            self.step,
            self.count,
            self.kind,
            self.group,
        )

    def __len__(self) -> int:
        return min(map(len, self._columns))

    def append(self, kind: Kind, nbytes: int, step: int, count: int, at: int, pinned: bool = True) -> int:
        """Add a row whose times are not known yet; its number."""
        code = self._codes.get(kind)
        if code is None:
            self.kinds.append(kind)  # before its code is known, so that no code is without its kind
            code = self._codes[kind] = len(self.kinds) - 1
        group = self._groups.get((code, step >= 0, pinned))
        if group is None:
            self.sums.append(MoveSum(kind, step >= 0, pinned))
            group = self._groups[code, step >= 0, pinned] = len(self.sums) - 1
        if len(self) != len(self.t):  # the first column to grow, the last to be cut
            trim(self._columns)
        self.t.append(math.nan)
        self.dur.append(math.nan)
        self.at.append(at)
        self.nbytes.append(nbytes)
        self.step.append(step)
        self.count.append(count)
        self.kind.append(code)
        self.group.append(group)
        total = self.sums[group]
        total.nbytes += nbytes
        total.count += count
        return len(self.group) - 1

    def timed(self, row: int, t: float, dur: float) -> None:
        """The row's copy was measured: it began at `t` seconds and took `dur`."""
        self.t[row] = t
        self.dur[row] = dur
        total = self.sums[self.group[row]]
        total.dur_s += dur
        total.timed_bytes += self.nbytes[row]

    def row(self, i: int) -> MoveRow:
        component, direction, reason, avoidable, overlapped = self.kinds[self.kind[i]]
        t, dur, step = self.t[i], self.dur[i], self.step[i]
        return MoveRow(
            None if math.isnan(t) else t,
            None if math.isnan(dur) else dur,
            component,
            direction,
            self.nbytes[i],
            reason,
            None if step < 0 else step,
            avoidable,
            overlapped,
            self.count[i],
        )

    def __iter__(self) -> Iterator[MoveRow]:
        return (self.row(i) for i in range(len(self)))


def trim(columns: Sequence[array[Any]]) -> None:
    """Cut columns back to the rows that all of them have, the first column last."""
    rows = min(map(len, columns))
    for column in reversed(columns):
        del column[rows:]


class MarkLog:
    """The compute stream's time line: mark i begins category `code[i]`, which lasts until mark i + 1.

    `busy[i]`, `stalled[i]`, `onloaded[i]` and `evicted[i]` are the seconds of computing, stall, onload and evict before
    mark i: they make any interval's share a subtraction instead of a walk.
    """

    def __init__(self) -> None:
        self.code = array("b")
        self.t = array("d")  # grows as the device passes the marks; may be shorter than `code`
        self.busy = array("d")
        self.stalled = array("d")
        self.onloaded = array("d")
        self.evicted = array("d")
        self.seconds = [0.0] * len(CATEGORIES)

    def resolve(self, t: float) -> None:
        """The next mark was passed at `t` seconds."""
        times, busy, stalled, onloaded, evicted = self.t, self.busy, self.stalled, self.onloaded, self.evicted
        if not times:
            for column in (busy, stalled, onloaded, evicted, times):
                column.append(t if column is times else 0.0)
            return
        before = times[-1]
        if t < before:  # marks taken on two streams can cross; a duration is never negative
            t = before
        code, dur = self.code[len(times) - 1], t - before
        self.seconds[code] += dur
        busy.append(busy[-1] + dur if code in COMPUTE else busy[-1])
        stalled.append(stalled[-1] + dur if code == STALL else stalled[-1])
        onloaded.append(onloaded[-1] + dur if code == ONLOAD else onloaded[-1])
        evicted.append(evicted[-1] + dur if code == EVICT else evicted[-1])
        times.append(t)  # last, so that no time is without its sums when Ctrl+C comes

    @property
    def whole(self) -> bool:
        """Every mark has been passed, and none was cut off by Ctrl+C."""
        sums = (self.busy, self.stalled, self.onloaded, self.evicted)
        return len(self.code) == len(self.t) and all(len(column) == len(self.t) for column in sums)

    def busy_until(self, t: float) -> float:
        """Seconds of computing before `t`; `t` is clipped to the run."""
        last = len(self.t) - 1
        if last < 0 or t <= self.t[0]:
            return 0.0
        i = bisect_right(self.t, t) - 1
        if i >= last:
            return self.busy[last]
        return self.busy[i] + (t - self.t[i] if self.code[i] in COMPUTE else 0.0)

    def segments(self) -> Iterator[tuple[float, float, Category]]:
        """(start, seconds, category), neighbours of one category joined, empty ones left out."""
        start, code = 0.0, -1
        for i in range(len(self.t)):
            if i == len(self.t) - 1 or self.code[i] != code:
                if code >= 0 and self.t[i] > start:
                    yield start, self.t[i] - start, CATEGORIES[code]
                start, code = self.t[i], self.code[i]


ONLOAD, STALL, EVICT = (CATEGORIES.index(name) for name in ("onload", "stall", "evict"))


class ResidencyLog:
    """Bytes of each component on the device, as a step function: a row wherever one's have changed."""

    def __init__(self) -> None:
        self.at = array("q")  # mark number
        self.code = array("q")  # index into `names`
        self.nbytes = array("q")
        self.names: list[str] = []
        self.last: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def __len__(self) -> int:
        return min(len(self.at), len(self.code), len(self.nbytes))

    def note(self, sizes: Mapping[str, int], at: int) -> None:
        """What is on the device now, by component; at mark number `at`."""
        for name, nbytes in sizes.items():
            before = self.last.get(name)
            if before == nbytes:
                continue
            if before is None:
                self.names.append(name)
            if not len(self.at) == len(self.code) == len(self.nbytes):
                trim((self.nbytes, self.code, self.at))
            self.last[name] = nbytes
            self.most[name] = max(nbytes, self.most.get(name, 0))
            self.nbytes.append(nbytes)
            self.code.append(self.names.index(name))
            self.at.append(at)  # last: what reads the rows counts these


@dataclass
class StageRow:
    """One stage. Bytes; seconds from the start of the run, None where the clock failed."""

    name: str
    component: str
    need: int | None
    have: int | None
    peak: int | None = None
    t0: float | None = None
    t1: float | None = None
    first_mark: int = -1
    last_mark: int = -1


@dataclass
class StepRow:
    """One forward of the denoiser: what was computed, waited and copied within it."""

    i: int
    bytes_h2d: int = 0
    t0: float | None = None
    t1: float | None = None
    compute_s: float | None = None
    stall_s: float | None = None
    overlapped_s: float | None = None
    first_mark: int = -1
    last_mark: int = -1


@dataclass
class RunRecord:
    """One run as measured. Times are seconds on the device's clock, `host_s` and `overhead_s` on the host's."""

    prompt_id: str | None
    created: str  # ISO 8601, UTC
    clock: str  # where the times come from, for people
    cap: int
    complete: bool = False
    error_type: str | None = None
    error_text: str | None = None
    oom: bool = False  # ended by an out-of-memory error
    clock_error: str | None = None  # why times are unknown
    wall_s: float | None = None  # first mark to last mark, in one measurement
    host_s: float = 0.0
    overhead_s: float = 0.0
    seconds: dict[Category, float | None] = field(default_factory=dict)
    overlapped_s: float | None = None
    bytes_h2d: int = 0
    bytes_d2h: int = 0
    bytes_dropped: int = 0
    move_count: int = 0
    drop_count: int = 0
    stages: list[StageRow] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    moves: MoveLog = field(default_factory=MoveLog)
    marks: MarkLog = field(default_factory=MarkLog)
    events: list[dict[str, Any]] = field(default_factory=list)
    events_dropped: int = 0
    peak_allocated: int | None = None
    peak_resident: int | None = None
    vram_at: array[int] = field(default_factory=lambda: array("q"))  # mark number of each sample
    vram_allocated: array[int] = field(default_factory=lambda: array("q"))
    vram_resident: array[int] = field(default_factory=lambda: array("q"))
    residency: ResidencyLog = field(default_factory=ResidencyLog)

    def time_of(self, mark: int) -> float | None:
        """Seconds from the start of the run to mark number `mark`, None where the clock never got there."""
        return self.marks.t[mark] if 0 <= mark < len(self.marks.t) else None

    def settle(self) -> None:
        """Turn mark numbers into times and attribute copies to what ran meanwhile. Called once, by the ledger."""
        for stage in self.stages:
            stage.t0, stage.t1 = self.time_of(stage.first_mark), self.time_of(stage.last_mark)
        moves = self.moves
        for i in range(len(moves)):
            if math.isnan(moves.t[i]):
                at = self.time_of(moves.at[i])
                moves.t[i] = math.nan if at is None else at
        for event in self.events:
            event["t"] = self.time_of(event.pop("mark", -1))
        if self.clock_error is not None:  # a partial sum is not a total
            self.seconds = dict.fromkeys(CATEGORIES)
            return
        self.seconds = dict(zip(CATEGORIES, self.marks.seconds, strict=True))
        hidden = _Hidden(self.marks, moves)
        self.overlapped_s = hidden.total
        for step in self.steps:
            a, b = step.first_mark, step.last_mark
            step.t0, step.t1 = self.marks.t[a], self.marks.t[b]
            step.compute_s = self.marks.busy[b] - self.marks.busy[a]
            step.stall_s = self.marks.stalled[b] - self.marks.stalled[a]
            step.overlapped_s = max(0.0, hidden.until(step.t1) - hidden.until(step.t0))


class _Hidden:
    """Copy time that lay behind compute: the union of the timed copies, cut with the compute categories.

    Measured by intersection, not as copy minus wait: two copies at once count once, and a copy that nobody waited for
    while nothing computed counts for nothing.
    """

    def __init__(self, marks: MarkLog, moves: MoveLog) -> None:
        self._marks = marks
        self._start, self._end, self._before = array("d"), array("d"), array("d")
        timed = (i for i in range(len(moves)) if not math.isnan(moves.dur[i]))
        self.total = 0.0
        reached = -math.inf
        for i in sorted(timed, key=moves.t.__getitem__):
            start, end = max(moves.t[i], reached), moves.t[i] + moves.dur[i]
            if end <= start:
                continue
            reached = end
            self._start.append(start)
            self._end.append(end)
            self._before.append(self.total)
            self.total += max(0.0, marks.busy_until(end) - marks.busy_until(start))

    def until(self, t: float) -> float:
        """Overlapped seconds before `t`."""
        i = bisect_right(self._start, t) - 1
        if i < 0:
            return 0.0
        upto = min(t, self._end[i])
        return self._before[i] + max(0.0, self._marks.busy_until(upto) - self._marks.busy_until(self._start[i]))
