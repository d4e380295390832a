"""The nodes of one prompt on the run's time line. Invariant: a node's times are marks of the ledger, like everything
else in the report, so that a virtual clock stays one clock.

Called on the thread that executes the prompt, which is the ledger's. A node that samples, encodes or decodes gives its
time to that category; what a session measures inside it (onload, stall, evict) takes precedence there.

At any time one node runs at most, so that their times add up to no more than the run's. A host suspends a node where it
expands into others, or asks for an input that it left out (lazy): it is told again that such a node begins (lazy), or
only that it is done (expanded), and of the suspension not at all. So the node that runs is suspended when another one
begins, and goes on when that one is done.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from ..ledger import Category, Ledger, RunRecord
from . import comfyui_host
from . import comfyui_runs_host as host

MOST = 5000  # nodes that are kept; a graph that expands without end must not fill the memory
POINTS = 256  # that wait for the next message; the oldest go first
ENDED = 64  # nodes, likewise

_SAMPLERS = ("KSampler", "SamplerCustom")


def category_of(node_type: str | None) -> Category:
    """What a node's time counts as, by its class name; "other" for everything that runs no model."""
    name = node_type or ""
    if name.startswith(_SAMPLERS):
        return "denoise"
    if name.startswith("VAEDecode"):
        return "decode"
    return "encode" if "TextEncode" in name or name.startswith("VAEEncode") else "other"


@dataclass
class NodeRow:
    """One node. Marks are numbers on the ledger's time line, -1 where there is none."""

    id: str
    type: str | None
    display: str = ""  # the node that the user sees
    shown: str | None = None  # its class
    cached: bool | None = None
    cut: bool = False  # a part of it was marked in another ledger, so its times are not known
    begun: array[int] = field(default_factory=lambda: array("q"))  # where it began or went on
    ended: array[int] = field(default_factory=lambda: array("q"))  # where it was suspended or done; -1 while it runs

    @property
    def first_mark(self) -> int:
        return self.begun[0] if self.begun else -1

    @property
    def last_mark(self) -> int:
        return self.ended[-1] if self.ended else -1

    def spans(self) -> Iterator[tuple[int, int]]:
        """The marks between which it ran."""
        return zip(self.begun, self.ended, strict=False)

    def resume(self, mark: int) -> None:
        """It begins, or goes on; nothing where it runs."""
        if mark >= 0 and not self.cut and not (self.ended and self.ended[-1] < 0):
            self.begun.append(mark)
            self.ended.append(-1)

    def pause(self, mark: int) -> None:
        """It is suspended, or done; nothing where it does not run."""
        if self.ended and self.ended[-1] < 0:
            self.ended[-1] = mark


class Point(NamedTuple):
    """The end of a step, or a node's begin or end (`step` None), with what is known there without asking the device.

    Bytes; seconds, `at` by the host's clock. step_s, stall_s: the mean where the host passed over steps. weights,
    allocated: as the ledger was told last.
    """

    at: float
    node: str | None
    type: str | None
    step: int | None
    steps: int | None
    step_s: float | None
    stall_s: float | None
    moved: int
    weights: int | None
    allocated: int | None


class NodeTrack:
    """Watches one prompt. `node`, `display`, `type` (the class of `display`), `step` and `steps` say where it is now;
    reading them takes no lock.

    `points` and `ended` are filled by the thread that executes and emptied by the one that watches: a deque's `append`
    and `popleft` need no lock, and what nobody takes away makes room for what is newer.
    """

    def __init__(self, prompt_id: str, ledger: Ledger, tick: Callable[[], None] | None = None) -> None:
        self.prompt_id = prompt_id
        self._tick = tick  # called whenever something is told
        self.closely = False  # somebody watches: keep points
        self.points: deque[Point] = deque(maxlen=POINTS)
        self.ended: deque[NodeRow] = deque(maxlen=ENDED)
        self.node: str | None = None
        self.display: str | None = None
        self.type: str | None = None
        self.step: int | None = None
        self.steps: int | None = None
        self.step_s: float | None = None
        self.stall_s: float | None = None
        self.overhead_s = 0.0  # host seconds spent in here, the ledger's own not among them
        self.calls = 0
        self.rows: dict[str, NodeRow] = {}
        self._open: dict[str, NodeRow] = {}  # began and are not done; the last one runs, the others are suspended
        self._stepped: float | None = None
        self._stalled = 0.0
        self.follow(ledger)

    def follow(self, ledger: Ledger) -> None:
        """Put marks on this ledger's open run from now on; what was marked in another is not known there."""
        self._ledger, self._run = ledger, ledger._run
        for row in self.rows.values():
            del row.begun[:], row.ended[:]
        for row in self._open.values():
            del row.begun[:], row.ended[:]
            row.cut = True

    def met_before(self) -> None:
        """Take over the nodes that the prompt met before it was watched: when they ran is not known."""
        running = []
        for node_id, state in host.node_states(self.prompt_id).items():
            if state != "pending" and node_id not in self.rows:
                row = self._row(node_id)
                if state == "running":
                    running.append(row)
        now = comfyui_host.executing().node_id
        for row in sorted(running, key=lambda row: row.id == now):  # those that are suspended are told as running too
            row.cached = False
            self._open[row.id] = row
        if running and (top := self._top()) is not None:
            self._at(top)
            top.resume(self._stamp(category_of(top.type)))

    # ------------------------------------------------------------------ told by the host
    def started(self, node_id: str, prompt_id: str) -> None:
        """A node begins, or goes on after it was suspended; the one that ran is suspended."""
        entered, ledgers = perf_counter(), self._ledger.overhead_s
        row = self._open.pop(node_id, None) or self._row(node_id)
        row.cached = False
        mark = self._stamp(category_of(row.type))
        if (other := self._top()) is not None:
            other.pause(mark)
        self._open[node_id] = row
        row.resume(mark)
        self._at(row)
        if self.closely:
            self._ledger.drain()  # so that the times of what ended are there to be told
            self._point(entered, row.display, row.shown)
        self._account(entered, ledgers)

    def progressed(self, node_id: str, value: float, most: float) -> None:
        """A node says how far it is; for samplers these are steps."""
        entered = perf_counter()
        if node_id != self.node:  # several run at once: its last step is not this one's
            self._at(self._row(node_id))
        marks = self._ledger._record.marks
        stalled = marks.stalled[-1] if len(marks.stalled) else 0.0
        if self._stepped is not None and self.step is not None and value > self.step:
            self.step_s = (entered - self._stepped) / (value - self.step)
            self.stall_s = max(0.0, stalled - self._stalled) / (value - self.step)
        self.step, self.steps = int(value), int(most)
        self._stepped, self._stalled = entered, stalled
        if self.closely:
            self._point(entered, self.display, self.type, step=True)
        self._account(entered, self._ledger.overhead_s)

    def finished(self, node_id: str) -> None:
        """A node is done; one that never began was cached."""
        entered, ledgers = perf_counter(), self._ledger.overhead_s
        row = self._open.pop(node_id, None)
        top = self._top()
        if row is not None:
            mark = self._stamp("other")
            row.pause(mark)
            if top is not None:
                top.resume(mark)
        else:
            row = self._row(node_id)
            if row.cached is None and not row.begun:
                row.cached = True
                mark = self._stamp("other")
                row.resume(mark)
                row.pause(mark)
        if self.closely and not row.cached:
            self._ledger.drain()
            self._point(entered, row.display, row.shown)
            self.ended.append(row)
        if self.node == node_id:
            self._at(top)
        self._account(entered, ledgers)

    def _top(self) -> NodeRow | None:
        """The node that runs."""
        return next(reversed(self._open.values()), None)

    def _at(self, row: NodeRow | None) -> None:
        """This node is the one that runs now, at no step yet."""
        self.node, self.display, self.type = (None,) * 3 if row is None else (row.id, row.display, row.shown)
        self.step = self.steps = self.step_s = self.stall_s = self._stepped = None

    def _point(self, at: float, node: str | None, node_type: str | None, *, step: bool = False) -> None:
        record = self._ledger._record
        last = len(record.vram_at) - 1  # the last of its columns to grow
        weights, allocated = (record.vram_resident[last], record.vram_allocated[last]) if last >= 0 else (None, None)
        steps = (self.step, self.steps, self.step_s, self.stall_s) if step else (None, None, None, None)
        self.points.append(Point(at, node, node_type, *steps, record.bytes_h2d, weights, allocated))

    def _account(self, entered: float, ledgers: float) -> None:
        self.calls += 1
        if self._tick is not None:
            self._tick()
        self.overhead_s += perf_counter() - entered - (self._ledger.overhead_s - ledgers)

    def _row(self, node_id: str) -> NodeRow:
        row = self.rows.get(node_id)
        if row is None:
            display = host.display_node(self.prompt_id, node_id)
            kind = host.node_type(self.prompt_id, node_id)
            shown = kind if display == node_id else host.node_type(self.prompt_id, display)
            row = NodeRow(node_id, kind, display, shown)
            if len(self.rows) < MOST:
                self.rows[node_id] = row
        return row

    def _stamp(self, category: Category) -> int:
        """Begin `category` with a mark of its own; its number, -1 where the run is not the one that we follow."""
        ledger = self._ledger
        if not ledger.active or ledger._run != self._run:
            return -1
        before = len(ledger._marks.code)
        ledger.begin(category)
        return before if len(ledger._marks.code) > before else ledger._mark()

    # ------------------------------------------------------------------ for the report
    @property
    def unfinished(self) -> str | None:
        """The node in which the prompt is, or in which it ended: one that began and did not finish."""
        return next((node_id for node_id in reversed(self._open) if node_id in self.rows), None)

    def table(self, record: RunRecord, *, moves_known: bool) -> list[dict[str, Any]]:
        """The report's `nodes`. moves_known: the session's moves are all there were."""
        return [self.entry(row, record, moves_known=moves_known) for row in self.rows.values()]

    def entry(self, row: NodeRow, record: RunRecord, *, moves_known: bool) -> dict[str, Any]:
        """One row of the report's `nodes`; of a record that is still written, once its last mark has been passed.

        t0 and t1 are its first begin and its last end; everything else is of the time in which it ran.
        """
        t0, t1 = record.time_of(row.first_mark), record.time_of(row.last_mark)
        if t1 is None and t0 is not None:
            t1 = record.wall_s  # it ended with the run
        seconds: tuple[float | None, ...] = (None, None, None)
        if moves_known and t0 is not None and record.clock_error is None:
            spans = [_moved(record, first, last) for first, last in row.spans()]
            seconds = tuple(map(sum, zip(*spans, strict=True)))
        return {
            "id": row.id,
            "display": row.display or row.id,
            "type": row.type or "?",
            "t0": t0,
            "t1": t1,
            "wall_s": _wall(record, row),
            "peak": None if t0 is None or t1 is None or row.cached else _peak(record, row),
            "onload_s": seconds[0],
            "stall_s": seconds[1],
            "evict_s": seconds[2],
            "cached": row.cached,
        }


class Opener:
    """Stands in for a track until the first node is told, on the worker's thread: `open` gives the track then."""

    def __init__(self, prompt_id: str, open: Callable[[str], NodeTrack | None]) -> None:
        self._prompt_id, self._open = prompt_id, open

    def started(self, node_id: str, prompt_id: str) -> None:
        if (track := self._open(self._prompt_id)) is not None:
            track.started(node_id, prompt_id)

    def progressed(self, node_id: str, value: float, most: float) -> None:
        if (track := self._open(self._prompt_id)) is not None:
            track.progressed(node_id, value, most)

    def finished(self, node_id: str) -> None:
        if (track := self._open(self._prompt_id)) is not None:
            track.finished(node_id)


def in_short(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the report's `nodes` as the list of runs has it: seconds that it took, and that it was kept waiting."""
    waits = [entry.get(name) for name in ("onload_s", "stall_s", "evict_s")]
    return {
        "id": entry["id"],
        "display": entry.get("display", entry["id"]),
        "type": entry["type"],
        "wall_s": entry["wall_s"],
        "moves_s": None if None in waits else sum(waits),
        "stall_s": entry.get("stall_s"),
        "peak": entry["peak"],
        "cached": entry["cached"],
    }


def _wall(record: RunRecord, row: NodeRow) -> float | None:
    """Seconds for which the node ran; one that was not done ran until the run's end."""
    seconds = []
    for first, last in row.spans():
        t0, t1 = record.time_of(first), record.time_of(last)
        t1 = record.wall_s if t1 is None else t1
        if t0 is None or t1 is None:
            return None
        seconds.append(t1 - t0)
    return sum(seconds) if seconds else None


def _moved(record: RunRecord, first: int, last: int) -> tuple[float, ...]:
    """Seconds of onload, stall and evict from one mark to another; -1 stands for the last that was passed."""
    marks = record.marks
    end = len(marks.t) - 1
    last = end if last < 0 else min(last, end)
    first = min(first, last)
    return tuple(sums[last] - sums[first] for sums in (marks.onloaded, marks.stalled, marks.evicted))


def _peak(record: RunRecord, row: NodeRow) -> int | None:
    """The most bytes seen while the node ran: at moves, and by the allocator over the stages that began within it."""
    at, end = record.vram_at, len(record.marks.code)
    seen: list[int] = []
    for first, last in row.spans():  # what was noted at the last mark came after it
        seen += record.vram_allocated[bisect_left(at, first) : bisect_left(at, last if last >= 0 else end)]
    for stage in record.stages:
        i = bisect_right(row.begun, stage.first_mark) - 1
        if stage.peak is not None and i >= 0 and (row.ended[i] < 0 or stage.first_mark < row.ended[i]):
            seen.append(stage.peak)
    return max(seen, default=None)


def place_steps(steps: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> bool:
    """Say of each step in which node it was; whether that is known of all of them.

    Of several, the one that began last: a node that began earlier and is not done is suspended.
    """
    timed = sorted(
        (
            (node["t0"], -node["t1"], node["id"])
            for node in nodes
            if None not in (node["t0"], node["t1"]) and not node["cached"]
        ),
        reverse=True,
    )
    running: list[tuple[float, float, str]] = []
    for step in sorted((step for step in steps if step.get("t0") is not None), key=lambda step: float(step["t0"])):
        while timed and timed[-1][0] <= step["t0"]:
            running.append(timed.pop())
        while running and -running[-1][1] < step["t0"]:
            running.pop()
        if running:
            step["node"] = running[-1][2]
    return all(step["node"] is not None for step in steps)
