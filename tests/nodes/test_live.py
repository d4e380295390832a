"""Invariant: a message holds each step and each node that ended once, with the figures of the report; nothing is put
together while nobody asks, and no device is asked for it."""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.nodes.telemetry import Telemetry
from balanced_offload.offload.adapters import comfyui_runs_live
from balanced_offload.offload.adapters.comfyui_run import Run
from balanced_offload.offload.adapters.comfyui_runs import PromptRuns
from balanced_offload.offload.adapters.comfyui_runs_live import ONCE, Live, Totals, snapshot
from balanced_offload.offload.adapters.comfyui_runs_nodes import POINTS, NodeTrack
from balanced_offload.offload.backend import CpuBackend
from balanced_offload.offload.backend.base import DeviceMemory
from balanced_offload.offload.ledger import CATEGORIES, Ledger

from .report_prompts import Node, Prompts


def test_points_at_every_step_and_at_a_nodes_ends(prompts: Prompts, runs: PromptRuns) -> None:
    told: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    runs.on_sample(lambda figures: told.append(figures), lambda: True)

    def sample() -> None:
        runs.touch("observe")
        for step in range(1, 41):
            time.sleep(0.02)
            prompts.step("5", step, 40)
            asked.append(runs.live())
        time.sleep(0.3)

    prompts.run(Node("5", "KSampler", sample), Node("6", "VAEDecode", lambda: time.sleep(0.3)), prompt_id="p")
    points = [point for message in told for point in message["points"]]
    assert set(points[0]) == {
        *("t", "node", "type", "step", "steps", "step_ms", "stall_ms"),
        *("moved", "weights", "allocated"),
    }
    assert [point["step"] for point in points] == list(range(1, 41)), "each once, whatever the rate of messages"
    assert {(point["node"], point["steps"]) for point in points} == {("5", 40)}
    assert {point["type"] for point in points} == {"KSampler"}
    assert points[0]["step_ms"] is None and all(19 < point["step_ms"] < 500 for point in points[1:])
    times = [point["t"] for point in points]
    assert times == sorted(times) and times[0] >= 0
    taken = [b["t"] - a["t"] for a, b in itertools.pairwise(points)]
    assert taken == pytest.approx([point["step_ms"] / 1e3 for point in points[1:]], abs=1e-6)
    stages = [point for message in told for point in message["stages"]]
    assert [(point["node"], point["step"]) for point in stages] == [("5", None), ("6", None)], "where one ends"
    assert {len(figures[name]) for figures in asked for name in ONCE} == {0}, "who asks once takes nothing away"
    assert set(stages[0]) == set(points[0]) and stages[0]["t"] > times[-1]
    ended = [row for message in told for row in message["ended"]]
    assert [row["id"] for row in ended] == ["5"] and ended[0]["wall_s"] >= 1.0 and ended[0]["display"] == "5"


def test_an_expanded_node_is_told_as_the_one_that_the_user_sees(prompts: Prompts, runs: PromptRuns) -> None:
    seen: list[Any] = []

    def sample() -> None:
        runs.touch("observe")
        registry = prompts.progress.global_progress_registry
        registry.display["3.0.0.1"] = "3"
        registry.tell("start_handler", "3.0.0.1", "running")
        prompts.step("3.0.0.1", 1, 2)
        seen.append(runs.live())
        registry.tell("finish_handler", "3.0.0.1", "finished")

    prompts.run(Node("3", "Loop", sample), prompt_id="p")
    assert seen[0]["node"] == "3" and seen[0]["type"] == "Loop" and seen[0]["step"] == 1
    report = runs.report("p")
    assert report is not None
    assert [(row["id"], row["display"]) for row in report["nodes"]] == [("3", "3"), ("3.0.0.1", "3")]


def test_nothing_is_put_together_while_nobody_asks(
    prompts: Prompts, runs: PromptRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(name: str, real: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return real(*given, **named)

        return call

    for name in ("_points", "_point", "_vram", "_components", "in_short"):
        monkeypatch.setattr(comfyui_runs_live, name, counted(name, getattr(comfyui_runs_live, name)))
    monkeypatch.setattr(NodeTrack, "_point", counted("point", NodeTrack._point))
    wanted = [False]
    told: list[Any] = []
    runs.on_sample(told.append, lambda: wanted[0])

    def sample() -> None:
        runs.touch("observe")
        for step in range(1, 21):
            time.sleep(0.05)
            prompts.step("5", step, 20)

    prompts.run(Node("5", "KSampler", sample), prompt_id="silent")
    assert calls == [] and told == []
    wanted[0] = True
    prompts.run(Node("5", "KSampler", sample), prompt_id="watched")
    assert calls.count("point") >= 21 and calls.count("_vram") >= 3 and told


def test_the_watcher_asks_no_device(prompts: Prompts, runs: PromptRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    asked: list[str] = []
    runs.on_sample(lambda figures: None, lambda: True)

    def sample() -> None:
        runs.touch("observe")
        run, worker = runs._run, threading.current_thread()
        assert run is not None
        for name in ("memory", "peak_allocated", "synchronize", "mark", "ready", "seconds"):
            real = getattr(run.backend, name)

            def watched(*given: Any, real: Any = real, name: str = name) -> Any:
                if threading.current_thread() is not worker:
                    asked.append(name)
                return real(*given)

            monkeypatch.setattr(run.backend, name, watched)
        for step in range(1, 21):
            time.sleep(0.03)
            prompts.step("5", step, 20)

    prompts.run(Node("5", "KSampler", sample), prompt_id="p")
    assert asked == []


def test_without_a_run_there_is_no_prompt() -> None:
    live = Live()
    assert live.now(None) == snapshot(None) and live.figures["prompt_id"] is None
    live.take(None)
    assert live.figures["points"] == [] and live.figures["vram"]["total"] is None


def test_a_nodes_figures_are_the_sums_over_its_marks() -> None:
    """Against a walk over every mark; three prompts of random nodes, waits and moves."""
    chance = random.Random(11)
    for _ in range(3):
        ledger = Ledger(CpuBackend())
        ledger.open_run("p")
        track = NodeTrack("p", ledger)
        for number in range(12):
            track.started(str(number), "p")
            for _ in range(chance.randrange(8)):
                with ledger.span(chance.choice(["onload", "evict", "other"])):
                    ledger.note_vram(chance.randrange(1 << 30), 0)
                with chance.choice([ledger.span("denoise"), ledger.wait("stall")]):
                    ledger.stage_begin("s", "c", need=None, have=None)
                    ledger.stage_end(chance.randrange(1 << 30))
            track.finished(str(number))
        record = ledger.close_run()
        marks, row_of = record.marks, {row.id: row for row in track.rows.values()}
        for entry in track.table(record, moves_known=True):
            row = row_of[entry["id"]]
            assert row.last_mark > row.first_mark
            spans = [(i, marks.t[i + 1] - marks.t[i]) for i in range(row.first_mark, row.last_mark)]
            for name in ("onload", "stall", "evict"):
                walked = sum(seconds for i, seconds in spans if CATEGORIES[marks.code[i]] == name)
                assert entry[f"{name}_s"] == pytest.approx(walked, abs=1e-12)
            noted = zip(record.vram_at, record.vram_allocated, strict=True)
            seen = [nbytes for at, nbytes in noted if row.first_mark <= at < row.last_mark]
            within = [stage for stage in record.stages if row.first_mark <= stage.first_mark <= row.last_mark]
            assert entry["peak"] == max([*seen, *(stage.peak for stage in within)], default=None)
        assert sum(e["onload_s"] for e in track.table(record, moves_known=True)) > 0


def components(*names: str) -> dict[str, Any]:
    return {name: SimpleNamespace(component=SimpleNamespace(device_bytes=len(name))) for name in names}


def test_two_that_look_at_once_get_their_own_table() -> None:
    """The watcher and the server: while one adds up, the other lets go of what is gone."""
    totals, few = Totals(), components("a")

    class Slow:
        """A component whose bytes are added up while somebody else looks."""

        @property
        def device_bytes(self) -> int:
            assert totals.of(few) == {"a": 1}
            return 7

    both = components("a", "bb") | {"slow": SimpleNamespace(component=Slow())}
    assert totals.of(components("a", "bb")) == {"a": 1, "bb": 2}
    assert totals.of(both) == {"a": 1, "bb": 2, "slow": 7}
    assert totals.of(few) == {"a": 1}


def test_watcher_and_server_look_at_a_table_that_changes() -> None:
    """What one of them lets go of, the other one is just reading."""
    import threading

    live, failed = Live(), list[BaseException]()
    table = {
        name: SimpleNamespace(**vars(managed), engine=SimpleNamespace(device_bytes=1))
        for name, managed in components(*(str(number) for number in range(40))).items()
    }
    session: Any = SimpleNamespace(components=dict(table))
    run: Any = SimpleNamespace(session=session)
    end = time.monotonic() + 1.0

    def look() -> None:
        try:
            while time.monotonic() < end:
                comfyui_runs_live._components(run, live._totals)
        except BaseException as error:
            failed.append(error)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for one in lookers:
            one.start()
        while time.monotonic() < end:
            for name in list(table):
                session.components.pop(name)
            session.components.update(table)
    finally:
        sys.setswitchinterval(interval)
        for one in lookers:
            one.join()
    assert failed == []


def test_what_came_since_the_last_look_was_free_before() -> None:
    session = SimpleNamespace(
        resolved=SimpleNamespace(high=80, low=10),
        machine=SimpleNamespace(vram_total=100),
        stages=SimpleNamespace(peak_allocated=50),
    )
    for weights, activations, free in ((20, 20, 45), (40, 0, 45), (60, 0, 25), (99, 0, 0)):
        run: Any = SimpleNamespace(session=session, _ours=True, peak_device=None)
        run.ledger = SimpleNamespace(_record=SimpleNamespace(peak_allocated=None))
        run.memory = DeviceMemory(free=45, total=100, allocated=30, reserved=40)
        vram = comfyui_runs_live._vram(run, [{"name": "a", "bytes": weights, "total": 100}])
        assert (vram["weights"], vram["activations"], vram["others"], vram["free"]) == (weights, activations, 15, free)


# ---------------------------------------------------------------------- what it costs
BUDGET = 0.01
STEPS_A_SECOND = 20  # faster ones have no weights to speak of


def best(call: Any, number: int, rounds: int = 7) -> float:
    """Seconds of one call, the best of several rounds: a noisy machine only ever adds."""
    found = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(number):
            call()
        found = min(found, (time.perf_counter() - begun) / number)
    return found


def test_calls_times_cost_are_within_a_hundredth(prompts: Prompts, record_property: Any) -> None:
    """What telemetry adds to a run of a second: a point at each step on the executing thread, and four messages."""
    ledger = Ledger(CpuBackend())
    ledger.open_run("p")
    track = NodeTrack("p", ledger)
    track.started("5", "p")
    for _ in range(1000):
        ledger.note_vram(random.randrange(1 << 34), random.randrange(1 << 34))
    step = iter(range(10**9))

    def progressed() -> None:
        track.progressed("5", next(step), 10**9)

    without = best(progressed, 2000)
    track.closely = True
    point = max(0.0, best(progressed, 2000) - without)

    run = Run("p", None)
    run.closely = True

    def send(event: str, data: Any, client: str) -> None:
        json.dumps({"type": event, "data": data})  # as the host does

    live, server = Live(), SimpleNamespace(sockets={"a": 1}, send_sync=send)
    telemetry = Telemetry(server=lambda: server)
    assert telemetry.ask("a") is None

    def message() -> None:
        for number in range(STEPS_A_SECOND // 4):
            run.track.progressed("5", number, 20)
        live.take(run, wanted=True)
        telemetry._due = 0.0
        telemetry.sample(live.figures)

    run.track.closely = True
    sample = best(message, 200)
    share = STEPS_A_SECOND * point + 4 * sample
    record_property("point_us", point * 1e6)
    record_property("message_us", sample * 1e6)
    print(f"point {point * 1e6:.2f} us, message {sample * 1e6:.1f} us, share of a second {share:.2%}")
    assert share <= BUDGET
    assert len(track.points) == POINTS
