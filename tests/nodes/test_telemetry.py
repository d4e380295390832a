"""Invariant: telemetry goes to those that asked, as long as they asked for, four times a second at most, and nothing
is put together while nobody asked."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.nodes.telemetry import LASTS, MOST, PAGES, PERIOD, POINTS, Telemetry
from balanced_offload.offload.adapters import comfyui_runs, comfyui_runs_live
from balanced_offload.offload.adapters.comfyui_run import Run
from balanced_offload.offload.adapters.comfyui_runs import PromptRuns
from balanced_offload.offload.adapters.comfyui_runs_live import ONCE, Live, snapshot
from balanced_offload.offload.adapters.comfyui_runs_nodes import POINTS as RING
from balanced_offload.offload.adapters.comfyui_runs_nodes import NodeTrack
from balanced_offload.offload.backend import CpuBackend
from balanced_offload.offload.ledger import CATEGORIES, Ledger

from .report_prompts import Node, Prompts

EMPTY: dict[str, Any] = {"points": [], "stages": [], "ended": []}


class Desk:
    """A server with open sockets, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sockets: dict[str, Any] = {"a": 1, "b": 2}
        self.sent: list[tuple[str, Any, str]] = []
        self.server: Any = SimpleNamespace(sockets=self.sockets, send_sync=lambda *message: self.sent.append(message))
        self.telemetry = Telemetry(clock=lambda: self.now, server=lambda: self.server)


@pytest.fixture
def desk() -> Desk:
    return Desk()


# ---------------------------------------------------------------------- who asked
def test_nobody_asked_nobody_is_sent(desk: Desk) -> None:
    desk.telemetry.sample({"v": 1})
    assert desk.sent == [] and not desk.telemetry.wanted()


def test_only_those_that_asked(desk: Desk) -> None:
    assert desk.telemetry.ask("b") is None
    desk.telemetry.sample({"v": 1})
    assert desk.sent == [("offload.telemetry", {"v": 1, **EMPTY}, "b")]


def test_asking_lasts_and_can_be_repeated(desk: Desk) -> None:
    desk.telemetry.ask("a")
    desk.now += LASTS - 1
    assert desk.telemetry.clients() == {"a": 1.0}
    desk.telemetry.ask("a")
    desk.now += LASTS - 1
    assert desk.telemetry.wanted()
    desk.now += 1
    assert not desk.telemetry.wanted() and desk.telemetry.clients() == {}
    desk.telemetry.sample({})
    assert desk.sent == []


def test_a_client_whose_socket_is_closed_is_not_served(desk: Desk) -> None:
    desk.telemetry.ask("a")
    del desk.sockets["a"]
    assert not desk.telemetry.wanted() and desk.telemetry.clients() == {}
    desk.telemetry.sample({"v": 1})
    assert desk.sent == []
    desk.sockets["a"] = 3  # the page has connected again, within the time for which it asked
    assert desk.telemetry.wanted()


@pytest.mark.parametrize("given", ["", "../x", "a b", "a" * 200, "ä", "a\n", "c"])
@pytest.mark.parametrize("what", ["telemetry", "page"])
def test_ids_that_are_refused(desk: Desk, given: str, what: str) -> None:
    ask = desk.telemetry.ask if what == "telemetry" else desk.telemetry.meet
    refused = ask(given)
    assert refused is not None and refused.startswith(f"{what}:")
    assert desk.telemetry.clients() == {} and desk.telemetry.pages() == 0


def test_no_more_than_some(desk: Desk) -> None:
    desk.sockets.update({f"c{number}": 0 for number in range(50)})
    answers = [desk.telemetry.ask(f"c{number}") for number in range(50)]
    assert answers[:MOST] == [None] * MOST and all(answers[MOST:])
    assert desk.telemetry.ask("c0") is None, "who is served already may go on"
    del desk.sockets["c1"]
    assert desk.telemetry.ask("c49") is None, "one that has gone makes room"


def test_pages(desk: Desk) -> None:
    assert not desk.telemetry.knows("a")
    assert desk.telemetry.meet("a") is None and desk.telemetry.meet("a") is None
    assert desk.telemetry.knows("a") and desk.telemetry.pages() == 1 and not desk.telemetry.wanted()
    desk.telemetry.sample({"v": 1})
    assert desk.sent == [], "to be there is not to ask"
    desk.now += 10 * LASTS
    assert desk.telemetry.knows("a"), "for as long as its socket is open"
    del desk.sockets["a"]
    assert desk.telemetry.pages() == 0
    desk.telemetry.meet("b")
    assert not desk.telemetry.knows("a")


def test_a_client_that_asks_is_known_while_it_asks(desk: Desk) -> None:
    desk.telemetry.ask("a")
    assert desk.telemetry.knows("a")
    desk.now += LASTS
    assert not desk.telemetry.knows("a")


def test_no_more_pages_than_some(desk: Desk) -> None:
    desk.sockets.update({f"c{number}": 0 for number in range(PAGES + 5)})
    answers = [desk.telemetry.meet(f"c{number}") for number in range(PAGES + 5)]
    assert answers[:PAGES] == [None] * PAGES and all(answers[PAGES:])


def test_without_a_server(desk: Desk) -> None:
    desk.server = None
    assert desk.telemetry.ask("a") is not None and desk.telemetry.meet("a") is not None
    desk.telemetry.sample({})
    assert desk.sent == []


# ---------------------------------------------------------------------- how often
def test_four_a_second(desk: Desk) -> None:
    desk.telemetry.ask("a")
    for _ in range(1001):  # two seconds, as often as the caller likes
        desk.telemetry.sample({})
        desk.now += 0.002
    assert len(desk.sent) == 9


def test_a_timer_that_jitters_loses_no_message_and_gains_none(desk: Desk) -> None:
    desk.telemetry.ask("a")
    chance = random.Random(5)
    for _ in range(100):
        desk.telemetry.sample({})
        desk.now += 0.25 + chance.uniform(-0.002, 0.002)
        desk.telemetry.ask("a")
    assert 96 <= len(desk.sent) <= 100


def test_points_wait_for_a_message_to_take_them_along(desk: Desk) -> None:
    desk.telemetry.ask("a")
    for number in range(60):
        desk.telemetry.sample({"prompt_id": "p", "points": [number], "ended": [str(number)]})
        desk.now += 0.1
    told = [point for _, message, _ in desk.sent for point in message["points"]]
    assert told == list(range(len(told))) and len(told) >= 57, "each once, in order"
    assert [row for _, message, _ in desk.sent for row in message["ended"]] == [str(number) for number in told]


def test_points_of_an_older_prompt_are_not_told_with_the_next(desk: Desk) -> None:
    desk.telemetry.ask("a")
    desk.telemetry.sample({"prompt_id": "p", "points": [1], "ended": []})
    desk.telemetry.sample({"prompt_id": "p", "points": [2], "ended": []})
    desk.now += PERIOD
    desk.telemetry.sample({"prompt_id": "q", "points": [3], "ended": []})
    assert [message["points"] for _, message, _ in desk.sent] == [[1], [3]]


def test_points_that_wait_have_a_bound(desk: Desk) -> None:
    desk.telemetry.ask("a")
    desk.telemetry.sample({"prompt_id": "p"})
    for number in range(100):
        desk.telemetry.sample({"prompt_id": "p", "points": [number] * RING})
    desk.now += PERIOD
    desk.telemetry.sample({"prompt_id": "p"})
    assert desk.sent[-1][1]["points"] == [98] * (POINTS - RING) + [99] * RING


def test_the_end_of_a_run(desk: Desk) -> None:
    row = {"prompt_id": "p", "verdict": "resident", "text": "what happened"}
    desk.telemetry.closed(row, "b")
    assert desk.sent == [("offload.report", row, "b")], "who queued it is told without asking"
    desk.sent.clear()
    desk.telemetry.ask("a")
    desk.telemetry.closed(row, "b")
    assert [sid for _, _, sid in desk.sent] == ["a", "b"]
    desk.sent.clear()
    desk.telemetry.closed(row, None)
    assert [sid for _, _, sid in desk.sent] == ["a"]


# ---------------------------------------------------------------------- what is in it
@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    return Prompts(tmp_path, monkeypatch)


@pytest.fixture
def runs(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> PromptRuns:
    made = PromptRuns(session=lambda: None)
    monkeypatch.setattr(comfyui_runs, "_runs", made)
    monkeypatch.setattr(made, "_soon", lambda prompt_id: None)
    return made


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
        *("t", "node", "step", "steps", "step_ms", "stall_ms"),
        *("moved", "weights", "allocated"),
    }
    assert [point["step"] for point in points] == list(range(1, 41)), "each once, whatever the rate of messages"
    assert {(point["node"], point["steps"]) for point in points} == {("5", 40)}
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
    assert seen[0]["node"] == "3" and seen[0]["step"] == 1
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
            spans = [(i, marks.t[i + 1] - marks.t[i]) for i in range(row.first_mark, row.last_mark)]
            for name in ("onload", "stall", "evict"):
                walked = sum(seconds for i, seconds in spans if CATEGORIES[marks.code[i]] == name)
                assert entry[f"{name}_s"] == pytest.approx(walked, abs=1e-12)
            noted = zip(record.vram_at, record.vram_allocated, strict=True)
            seen = [nbytes for at, nbytes in noted if row.first_mark <= at <= row.last_mark]
            within = [stage for stage in record.stages if row.first_mark <= stage.first_mark <= row.last_mark]
            assert entry["peak"] == max([*seen, *(stage.peak for stage in within)], default=None)
        assert sum(e["onload_s"] for e in track.table(record, moves_known=True)) > 0


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
    live, desk = Live(), Desk()
    desk.server.send_sync = lambda event, data, client: json.dumps({"type": event, "data": data})  # as the host does
    telemetry = Telemetry(server=lambda: desk.server)
    telemetry.ask("a")

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
    assert len(track.points) == RING
