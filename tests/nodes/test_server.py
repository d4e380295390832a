"""Invariant: the routes only read; what cannot be served is said, and everything else goes on working."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from balanced_offload.nodes import marks, rows
from balanced_offload.nodes import server as routes
from balanced_offload.nodes.telemetry import Telemetry
from balanced_offload.offload.adapters import comfyui_runs
from balanced_offload.offload.adapters.comfyui_runs import PromptRuns
from balanced_offload.offload.policy import Machine
from balanced_offload.offload.trace import build_trace

from .report_prompts import Node, Prompts

web = pytest.importorskip("aiohttp.web", reason="aiohttp is the host's; without it there is no server to test")


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    made = Prompts(tmp_path, monkeypatch)
    made.server.routes = web.RouteTableDef()  # type: ignore[attr-defined]
    made.server.app = web.Application()  # type: ignore[attr-defined]
    return made


@pytest.fixture
def runs(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> PromptRuns:
    made = PromptRuns(session=lambda: None)
    monkeypatch.setattr(comfyui_runs, "_runs", made)
    monkeypatch.setattr(routes, "device_session", lambda: None)
    monkeypatch.setattr(routes, "_registered", [])
    monkeypatch.setattr(routes, "_off", {})
    return made


@pytest.fixture
def get(prompts: Prompts, runs: PromptRuns) -> Callable[[str], tuple[int, Any]]:
    """GET over a real socket on loopback -> (status, JSON)."""
    assert routes.register_routes() == {}

    async def fetch(path: str) -> tuple[int, Any]:
        from aiohttp.test_utils import TestClient, TestServer

        application = web.Application()
        application.add_routes(prompts.server.routes)  # type: ignore[attr-defined]
        async with TestClient(TestServer(application, host="127.0.0.1")) as client:
            answer = await client.get(path)
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    return lambda path: asyncio.run(fetch(path))


def test_status(prompts: Prompts, runs: PromptRuns, get: Callable[[str], tuple[int, Any]]) -> None:
    code, status = get("/offload/status")
    assert code == 200
    assert status["live"]["prompt_id"] is None and status["components"] == [] and status["policy"] is None
    assert set(status["worlds"]) == {"static", "dynamic", "pipeline", "observe"}
    assert status["telemetry"]["clients"] == 0 and status["off"] == {} and status["stock"]["wanted"] is False


def test_telemetry_by_status(prompts: Prompts, get: Callable[[str], tuple[int, Any]]) -> None:
    code, answer = get("/offload/status?telemetry=browser")
    assert code == 400 and "no websocket" in answer["error"]
    prompts.server.sockets["browser"] = object()
    code, answer = get("/offload/status?telemetry=browser")
    assert code == 200 and answer["telemetry"]["clients"] == 1


def test_telemetry_and_the_end_of_a_run_reach_the_client(
    prompts: Prompts, runs: PromptRuns, get: Callable[[str], tuple[int, Any]]
) -> None:
    import time

    prompts.server.sockets["browser"] = object()
    get("/offload/status?telemetry=browser")
    prompts.run(
        Node("1", "KSampler", lambda: (runs.touch("observe"), time.sleep(0.5))), prompt_id="p", client="browser"
    )
    end = time.monotonic() + 5
    while not prompts.server.sent_of("offload.report"):
        assert time.monotonic() < end
        time.sleep(0.01)
    samples = prompts.server.sent_of("offload.telemetry")
    assert 2 <= len(samples) <= 4 and {sid for _, sid in samples} == {"browser"}
    assert set(samples[-1][0]) == {
        *("v", "prompt_id", "node", "type", "t", "device", "step", "steps", "vram", "step_ms", "stall_ms", "moved"),
        *("components", "points", "stages", "ended"),
    }
    assert set(samples[-1][0]["vram"]) == {
        *("weights", "activations", "others", "free", "high", "low", "peak", "total")
    }
    assert {data["prompt_id"] for data, _ in samples} == {"p"}
    nodes = {(data["node"], data["type"]) for data, _ in samples}
    assert ("1", "KSampler") in nodes and nodes <= {("1", "KSampler"), (None, None)}  # none: it has ended
    [(message, sid)] = prompts.server.sent_of("offload.report")
    assert sid == "browser" and message["prompt_id"] == "p" and message["verdict"] == "resident" and message["text"]
    assert get("/offload/runs")[1]["runs"] == [message], "the event's row is the list's row"


ROW = {
    *("prompt_id", "created", "ended", "complete", "error", "world", "verdict", "fits", "output_neutral", "mode"),
    *("totals", "vram", "overhead_ms", "text", "line", "workload", "hints", "hint_note", "nodes"),
}


def test_a_row(prompts: Prompts, runs: PromptRuns, get: Callable[[str], tuple[int, Any]]) -> None:
    prompts.run(Node("2", "KSampler", lambda: runs.touch("observe")), Node("1", "Loader", None), prompt_id="p")
    [row] = get("/offload/runs")[1]["runs"]
    assert set(row) == ROW
    assert [set(node) for node in row["nodes"]] == [
        {"id", "display", "type", "wall_s", "moves_s", "stall_s", "peak", "cached"}
    ] * 2
    assert [(node["id"], node["display"], node["type"], node["cached"]) for node in row["nodes"]] == [
        ("2", "2", "KSampler", False),
        ("1", "1", "Loader", True),
    ]
    report = get("/offload/report/p")[1]
    sampler = report["nodes"][0]
    assert (
        row["nodes"][0]["wall_s"] == sampler["wall_s"] == sampler["t1"] - sampler["t0"]
        and row["nodes"][0]["moves_s"] is None
    )


def test_a_row_of_a_report_that_says_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "text_of", lambda report: "what happened")
    node = {"id": "3.0.1", "display": "3", "type": "A", "t0": 1.0, "t1": 9.5, "peak": 7, "cached": False}
    node |= {"wall_s": 2.5, "onload_s": 0.5, "stall_s": 0.25, "evict_s": 0.125}
    hint = {"code": "FITS_BUT_MOVED", "sentence": "s", "saving_s": 1.0, "action": None}
    report = {"resolved": {"mode": "none"}, "nodes": [node], "line": "l", "workload": "w", "hints": [hint]}
    row = rows.row_of({**report, "hint_note": "n"})
    assert (row["line"], row["workload"], row["hints"], row["hint_note"]) == ("l", "w", [hint], "n")
    assert row["nodes"] == [
        {
            **{"id": "3.0.1", "display": "3", "type": "A", "wall_s": 2.5, "moves_s": 0.875, "stall_s": 0.25},
            **{"peak": 7, "cached": False},
        }
    ]
    many = [{**node, "id": str(i), "wall_s": float(i % 7)} for i in range(1000)]
    short = rows.row_of({**report, "nodes": many})["nodes"]
    assert len(short) == rows.NODES and min(n["wall_s"] for n in short) >= 5, "those that took longest"
    assert [int(n["id"]) for n in short] == sorted(int(n["id"]) for n in short), "in their order"


def test_the_rows_of_the_last_prompts_alone_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "text_of", lambda report: "")
    kept = rows.Rows()
    for number in range(rows.KEEP + 3):
        kept.keep({"prompt_id": str(number), "resolved": {}})
    assert kept.get("2") is None and kept.get("3") is not None and kept.get(str(rows.KEEP + 2)) is not None


def test_a_row_is_put_together_once(
    prompts: Prompts, runs: PromptRuns, get: Callable[[str], tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        prompts.run(Node("1", "KSampler", lambda: runs.touch("observe")), prompt_id=f"p{number}")
    settle(runs)
    before = get("/offload/runs")[1]
    monkeypatch.setattr(runs, "report", lambda prompt_id: pytest.fail("a report is built for a row that is kept"))
    assert get("/offload/runs")[1] == before and len(before["runs"]) == 3


def settle(runs: PromptRuns) -> None:
    import time

    end = time.monotonic() + 5
    while runs._unsettled or runs._run is not None:
        assert time.monotonic() < end
        time.sleep(0.005)
    time.sleep(0.05)  # who wants to know is told after that


def test_the_trace_of_a_prompt(prompts: Prompts, runs: PromptRuns, get: Callable[[str], tuple[int, Any]]) -> None:
    prompts.run(Node("1", "KSampler", lambda: runs.touch("observe")), prompt_id="p")
    code, trace = get("/offload/trace/p")
    assert code == 200 and trace == json.loads(json.dumps(build_trace(get("/offload/report/p")[1])))
    assert {"traceEvents", "displayTimeUnit", "otherData"} == set(trace) and trace["traceEvents"]
    assert get("/offload/trace/p9")[0] == 404
    assert get("/offload/trace/..%2f..%2fetc%2fpasswd")[0] == 404


def test_a_page_says_that_it_is_there(prompts: Prompts, get: Callable[[str], tuple[int, Any]]) -> None:
    code, answer = get("/offload/status?page=browser")
    assert code == 400 and "no websocket" in answer["error"]
    prompts.server.sockets["browser"] = object()
    code, answer = get("/offload/status?page=browser")
    assert code == 200 and answer["telemetry"]["pages"] == 1 and answer["telemetry"]["clients"] == 0


def test_marks_by_http(
    prompts: Prompts, get: Callable[[str], tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "known_machine", lambda: Machine("Card", "cuda", 16 << 30, others=0))
    code, answer = get("/offload/marks?mode=balanced&high=50%25&low=2GiB&fit_aware=false")
    assert code == 200 and answer["error"] is None
    assert (answer["total"], answer["high"], answer["low"], answer["mode"]) == (16 << 30, 8 << 30, 2 << 30, "balanced")
    code, answer = get("/offload/marks?high=lots")
    assert code == 200 and answer["error"].startswith("high: got 'lots'")
    code, answer = get("/offload/marks?never=" + "x" * 2000)
    assert code == 400 and "2000 characters" in answer["error"]


def test_runs_and_reports(prompts: Prompts, runs: PromptRuns, get: Callable[[str], tuple[int, Any]]) -> None:
    for number in range(3):
        prompts.run(Node("1", "KSampler", lambda: runs.touch("observe")), prompt_id=f"p{number}")
    code, answer = get("/offload/runs?limit=2")
    assert code == 200 and [row["prompt_id"] for row in answer["runs"]] == ["p2", "p1"]
    assert answer["runs"][0]["verdict"] == "resident" and "moves" not in answer["runs"][0]
    code, report = get("/offload/report/p1")
    assert code == 200 and report["schema"] == "offload-report/1" and report["prompt_id"] == "p1"
    assert get("/offload/report/p9")[0] == 404
    assert get("/offload/report/..%2f..%2fetc%2fpasswd")[0] == 404


@pytest.mark.parametrize("limit", ["0", "65", "-1", "1e3", "x", "", "9" * 40, "../a", "٣"])
def test_limits_that_are_refused(get: Callable[[str], tuple[int, Any]], limit: str) -> None:
    code, answer = get(f"/offload/runs?limit={limit}")
    assert code == 400 and "allowed is a whole number from 1 to 64" in answer["error"]


def test_routes_only_read(prompts: Prompts, get: Callable[[str], tuple[int, Any]]) -> None:
    ours = list(prompts.server.routes)  # type: ignore[attr-defined]
    assert {route.path for route in ours} == {
        *("/offload/status", "/offload/runs", "/offload/marks"),
        *("/offload/report/{prompt_id}", "/offload/trace/{prompt_id}"),
    }
    assert {route.method for route in ours} == {"GET"}


def test_registered_once(prompts: Prompts, get: Callable[[str], tuple[int, Any]]) -> None:
    assert routes.register_routes() == {} and routes.register_routes() == {}
    assert len(list(prompts.server.routes)) == 5 and len(prompts.server.on_prompt_handlers) == 1  # type: ignore[attr-defined]


def test_the_prompt_handler_passes_the_prompt_on(prompts: Prompts, get: Callable[[str], tuple[int, Any]]) -> None:
    document = {"prompt": {"1": {}}}
    assert prompts.server.on_prompt_handlers[0](document) is document


def test_another_pack_has_a_route(prompts: Prompts, runs: PromptRuns, caplog: pytest.LogCaptureFixture) -> None:
    async def theirs(request: Any) -> Any:
        return web.json_response({"theirs": True})

    prompts.server.routes.get("/offload/report/{id}")(theirs)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        off = routes.register_routes()
    assert list(off) == ["/offload/report/{prompt_id}"]
    assert "/offload/report/{prompt_id} is off: another pack has this route" in caplog.text
    mine = [route.path for route in prompts.server.routes if route.handler is not theirs]  # type: ignore[attr-defined]
    assert mine == ["/offload/status", "/offload/runs", "/offload/trace/{prompt_id}", "/offload/marks"]
    assert routes.status(runs, Telemetry())["off"] == off


def test_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_off", {})
    monkeypatch.setattr(routes.comfyui_host, "server", lambda: None)
    assert routes.register_routes() == {}


def test_a_server_without_routes(prompts: Prompts, runs: PromptRuns, caplog: pytest.LogCaptureFixture) -> None:
    del prompts.server.routes  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        assert "/offload" in routes.register_routes()
    assert "takes no routes" in caplog.text


def test_a_host_that_announces_no_prompts(prompts: Prompts, runs: PromptRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(prompts.server), "add_on_prompt_handler", None)
    assert list(routes.register_routes()) == ["observe"]


def test_no_handler_asks_a_device(
    prompts: Prompts, runs: PromptRuns, get: Callable[[str], tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device in the middle of a run is asked by the thread that drives it, and by no other."""
    import threading

    asked: list[str] = []
    answers: list[Any] = []

    def work() -> None:
        runs.touch("observe")
        run = runs._run
        assert run is not None
        worker = threading.current_thread()
        for name in ("memory", "peak_allocated", "synchronize", "mark"):
            real = getattr(run.backend, name)

            def watched(*given: Any, real: Any = real, name: str = name) -> Any:
                if threading.current_thread() is not worker:
                    asked.append(name)
                return real(*given)

            monkeypatch.setattr(run.backend, name, watched)
        other = threading.Thread(
            target=lambda: answers.extend(
                [get(f"/offload/{path}") for path in ("status", "report/p", "runs", "trace/p", "marks")]
            )
        )
        other.start()
        other.join()

    prompts.run(Node("1", "KSampler", work), prompt_id="p")
    assert [code for code, _ in answers] == [200] * 5 and answers[1][1]["ended"] is False
    assert asked == []


def test_a_report_does_not_hold_up_the_server_while_a_run_waits_for_the_device(
    prompts: Prompts, runs: PromptRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end a run waits for the device, with its lock: other requests are answered meanwhile."""
    import threading
    import time

    from aiohttp.test_utils import TestClient, TestServer

    monkeypatch.setattr(routes, "WAIT_S", 0.4)
    routes.register_routes()
    waits, go_on = threading.Event(), threading.Event()

    def work() -> None:
        runs.touch("observe")
        run = runs._run
        assert run is not None
        real = run.backend.synchronize

        def synchronize() -> None:
            waits.set()
            assert go_on.wait(10)
            real()

        monkeypatch.setattr(run.backend, "synchronize", synchronize)

    async def ask() -> tuple[int, str, list[float], int]:
        loop = asyncio.get_running_loop()
        application = web.Application()
        application.add_routes(prompts.server.routes)  # type: ignore[attr-defined]
        async with TestClient(TestServer(application, host="127.0.0.1")) as client:
            assert await loop.run_in_executor(None, waits.wait, 10)
            asked = asyncio.ensure_future(client.get("/offload/report/p"))
            took = []
            while not asked.done():
                begun = time.perf_counter()
                assert (await client.get("/offload/status")).status == 200
                took.append(time.perf_counter() - begun)
            refused = await asked
            text = (await refused.json())["error"]
            asked = asyncio.ensure_future(client.get("/offload/report/p"))
            await asyncio.sleep(0.05)
            go_on.set()
            return refused.status, text, took, (await asked).status

    worker = threading.Thread(target=lambda: prompts.run(Node("1", "KSampler", work), prompt_id="p"))
    worker.start()
    try:
        code, text, took, then = asyncio.run(asyncio.wait_for(ask(), 10))
    finally:
        go_on.set()
        worker.join()
    assert code == 503 and "ask again" in text and then == 200, "and one that waits a moment has it"
    assert len(took) >= 5 and min(took) < 0.2
