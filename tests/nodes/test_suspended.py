"""Invariant: one node runs at a time, so that what nodes took adds up, whatever a host expands, suspends or waits for.

Told as real hosts tell it: a node that expands or asks for a lazy input begins, others begin and are done, and then it
is done (expanded), or begins again (lazy). A node that waits for a task of its own (async) begins and is done.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui_runs_nodes as tracked
from balanced_offload.offload.adapters.comfyui_runs_nodes import NodeTrack, place_steps
from balanced_offload.offload.backend import CpuBackend
from balanced_offload.offload.ledger import Ledger, RunRecord

Told = tuple[str, str] | float  # ("start" or "finish", node), or seconds that pass
Rows = dict[str, dict[str, Any]]

EXPANDED: list[Told] = [
    *(("start", "1"), ("finish", "1"), ("start", "7"), 0.01),
    *(("start", "7.0.0.1"), 0.03, ("finish", "7.0.0.1"), ("start", "7.0.0.2"), 0.02, ("finish", "7.0.0.2")),
    *(("finish", "7"), ("start", "8"), 0.01, ("finish", "8")),
]
LAZY: list[Told] = [
    *(("start", "6"), 0.01, ("start", "5"), 0.04, ("finish", "5"), ("start", "6"), 0.02, ("finish", "6")),
]
ASYNC: list[Told] = [
    *(("start", "3"), 0.01, ("start", "4"), 0.02, ("finish", "4"), 0.03, ("finish", "3")),
]


class Clock(CpuBackend):
    """A device whose time passes when a test says so, and by a microsecond from mark to mark."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def told(*sequence: Told) -> tuple[NodeTrack, RunRecord]:
    clock = Clock()
    ledger = Ledger(clock)
    ledger.open_run("p")
    track = NodeTrack("p", ledger)
    for one in sequence:
        if isinstance(one, float):
            clock.now += one
        elif one[0] == "start":
            track.started(one[1], "p")
        else:
            track.finished(one[1])
    return track, ledger.close_run()


def rows_of(track: NodeTrack, record: RunRecord) -> Rows:
    return {row["id"]: row for row in track.table(record, moves_known=True)}


def test_an_expanded_node_is_not_what_it_expanded_into() -> None:
    track, record = told(*EXPANDED)
    rows = rows_of(track, record)
    assert 0.03 <= rows["7.0.0.1"]["wall_s"] < 0.05 and 0.02 <= rows["7.0.0.2"]["wall_s"] < 0.04
    assert 0.01 <= rows["7"]["wall_s"] < 0.03, "its own work, and collecting what the others made"
    assert rows["7"]["t0"] < rows["7.0.0.1"]["t0"] and rows["7.0.0.2"]["t1"] < rows["7"]["t1"], "bounds, to be shown"
    inside = [rows[node]["wall_s"] for node in ("7", "7.0.0.1", "7.0.0.2")]
    assert sum(inside) == pytest.approx(rows["7"]["t1"] - rows["7"]["t0"], abs=1e-9)
    assert sum(row["wall_s"] for row in rows.values()) <= record.wall_s
    assert rows["8"]["wall_s"] == rows["8"]["t1"] - rows["8"]["t0"]


def test_a_lazy_node_does_not_take_what_it_asked_for() -> None:
    rows = rows_of(*told(*LAZY))
    assert 0.04 <= rows["5"]["wall_s"] < 0.06 and 0.03 <= rows["6"]["wall_s"] < 0.05
    assert rows["6"]["wall_s"] + rows["5"]["wall_s"] == pytest.approx(rows["6"]["t1"] - rows["6"]["t0"], abs=1e-9)


def test_a_node_that_waits_for_its_task_goes_on_when_another_is_done() -> None:
    rows = rows_of(*told(*ASYNC))
    assert 0.02 <= rows["4"]["wall_s"] < 0.04 and 0.04 <= rows["3"]["wall_s"] < 0.06


def test_one_of_two_that_wait_is_done_while_the_other_runs() -> None:
    track, record = told(("start", "1"), ("start", "2"), ("finish", "1"), 0.02, ("start", "3"), ("finish", "3"))
    rows = rows_of(track, record)
    assert rows["2"]["wall_s"] >= 0.02 > rows["1"]["wall_s"] and track.unfinished == "2"
    assert rows["2"]["t1"] == record.wall_s, "it ended with the run"


def test_waits_and_peaks_are_of_the_node_that_ran(clock: Clock) -> None:
    ledger = Ledger(clock)
    ledger.open_run("p")
    track = NodeTrack("p", ledger)

    def move(peak: int) -> None:
        ledger.stage_begin("s", "c", need=None, have=None)
        for category in ("onload", "evict"):
            with ledger.span(category):  # type: ignore[arg-type]
                clock.now += 0.005
                ledger.note_vram(peak - 1, 0)
        ledger.step_begin(0)
        with ledger.wait("stall"):
            clock.now += 0.005
        ledger.stage_end(peak)

    track.started("7", "p")
    move(100)
    track.started("7.0", "p")
    move(900)
    track.finished("7.0")
    move(200)
    track.finished("7")
    record = ledger.close_run()
    rows = rows_of(track, record)
    assert (rows["7"]["peak"], rows["7.0"]["peak"]) == (200, 900)
    for name in ("onload", "stall", "evict"):
        whole, inner = (rows[node][f"{name}_s"] for node in ("7", "7.0"))
        assert whole > inner >= 0.005 and whole + inner == pytest.approx(record.seconds[name], abs=1e-12)


def test_whatever_happens_each_moment_is_one_nodes() -> None:
    """Random nesting, and a walk over all marks with the node that a stack says."""
    chance = random.Random(3)
    for _ in range(20):
        sequence: list[Told] = []
        owner: list[str | None] = []  # of the time after each event
        stack: list[str] = []
        number = 0
        for _ in range(60):
            kind = chance.random()
            if kind < 0.5 or not stack:
                number += 1
                stack.append(str(number))
                sequence.append(("start", stack[-1]))
            elif kind < 0.9:
                sequence.append(("finish", stack.pop()))
            else:  # one that was suspended goes on
                stack.append(stack.pop(chance.randrange(len(stack))))
                sequence.append(("start", stack[-1]))
            owner.append(stack[-1] if stack else None)
        track, record = told(*sequence)
        times = list(record.marks.t)[1:]  # the first is the run's begin; each event puts one
        assert len(times) == len(owner) + 1
        took: dict[str, float] = {}
        for i, node in enumerate(owner):
            if node is not None:
                took[node] = took.get(node, 0.0) + times[i + 1] - times[i]
        rows = rows_of(track, record)
        assert {node: row["wall_s"] for node, row in rows.items()} == pytest.approx(took, abs=1e-9)
        assert sum(row["wall_s"] for row in rows.values()) <= record.wall_s + 1e-9


def test_a_node_that_goes_on_is_where_the_prompt_is() -> None:
    ledger = Ledger(CpuBackend())
    ledger.open_run("p")
    track = NodeTrack("p", ledger)
    seen = []
    for kind, node in (one for one in LAZY if isinstance(one, tuple)):
        track.started(node, "p") if kind == "start" else track.finished(node)
        seen.append(track.node)
    assert seen == ["6", "5", "6", "6", None]


def test_what_failed_is_what_ran() -> None:
    track, _ = told(("start", "7"), ("start", "7.0"))
    assert track.unfinished == "7.0"


def test_a_node_of_two_ledgers_has_no_times() -> None:
    first, second = Ledger(CpuBackend()), Ledger(CpuBackend())
    first.open_run("p")
    track = NodeTrack("p", first)
    track.started("1", "p")
    track.finished("1")
    track.started("7", "p")
    second.open_run("p")
    track.follow(second)
    track.started("7.0", "p")
    track.finished("7.0")
    track.finished("7")
    rows = rows_of(track, second.close_run())
    known = [rows[node][key] for node in ("1", "7") for key in ("t0", "t1", "wall_s", "onload_s", "peak")]
    assert known == [None] * 10
    assert rows["7.0"]["wall_s"] > 0


def test_nodes_that_were_suspended_before_anybody_watched(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host says "running" of those as well."""
    states = {"5": "running", "6": "finished", "7": "running", "8": "pending"}
    monkeypatch.setattr(tracked.host, "node_states", lambda prompt_id: states)
    monkeypatch.setattr(tracked.comfyui_host, "executing", lambda: SimpleNamespace(prompt_id="p", node_id="5"))
    ledger = Ledger(clock)
    ledger.open_run("p")
    track = NodeTrack("p", ledger)
    track.met_before()
    assert track.node == "5"
    clock.now += 0.01
    track.finished("5")
    track.finished("7")
    record = ledger.close_run()
    rows = rows_of(track, record)
    assert set(rows) == {"5", "6", "7"} and rows["6"]["wall_s"] is None and rows["6"]["cached"] is None
    assert rows["5"]["wall_s"] >= 0.01 > rows["7"]["wall_s"]


# ---------------------------------------------------------------------- the steps
def node(name: str, t0: float | None, t1: float | None, cached: bool = False) -> dict[str, Any]:
    return {"id": name, "t0": t0, "t1": t1, "cached": cached}


def placed(nodes: list[dict[str, Any]], *times: float | None) -> list[str | None]:
    steps: list[dict[str, Any]] = [{"t0": t, "node": None} for t in times]
    known = place_steps(steps, nodes)
    assert known == all(step["node"] is not None for step in steps)
    return [step["node"] for step in steps]


def test_a_step_is_in_the_innermost_node() -> None:
    nodes = [node("7", 1, 9), node("7.1", 2, 4), node("7.2", 5, 8), node("7.2.1", 6, 7), node("8", 9, 10)]
    times = (0.5, 1, 2, 3, 4, 4.5, 5.5, 6.5, 7.5, 8.5, 9, 11)
    inner = [None, "7", "7.1", "7.1", "7.1", "7", "7.2", "7.2.1", "7.2", "7", "8", None]
    assert placed(nodes, *times) == inner
    assert placed(nodes[::-1], *times[::-1]) == inner[::-1], "in whatever order"
    assert placed([*nodes, node("9", None, None)], None, 3) == [None, "7.1"]


def test_nodes_that_begin_at_one_tick_of_the_clock() -> None:
    assert placed([node("a", 1, 9), node("b", 1, 5)], 1, 5, 6) == ["b", "b", "a"]
    assert placed([node("a", 1, 9), node("c", 1, 1, cached=True)], 1) == ["a"], "a cached node runs nothing"
