"""Invariant: what a real host tells a page is what the report says, at the rate that was promised, and it tells nobody
who did not ask."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import pytest

from balanced_offload.offload.policy import OffloadPolicy
from balanced_offload.offload.trace import build_trace

from . import graphs
from .server import HostServer, Listener
from .test_report import report_of

Graph = dict[str, Any]
TEXT = 3  # kind of a binary frame: a text for a node
FLAGS = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
TELEMETRY = {
    *("v", "prompt_id", "node", "type", "t", "device", "step", "steps", "vram", "step_ms", "stall_ms", "moved"),
    *("components", "points", "stages", "ended"),
}
VRAM = {"weights", "activations", "others", "free", "high", "low", "peak", "total"}
POINT = {"t", "node", "type", "step", "steps", "step_ms", "stall_ms", "moved", "weights", "allocated"}
ENDED = {"id", "display", "type", "wall_s", "moves_s", "stall_s", "peak", "cached"}


@pytest.fixture(params=["cpu", "simulated"])
def host_server(request: pytest.FixtureRequest) -> HostServer:
    """The host on either device."""
    name = "server" if request.param == "cpu" else "sim_server"
    found: HostServer = request.getfixturevalue(name)
    return found


@contextmanager
def asking(server: HostServer) -> Iterator[Listener]:
    """A page that shows telemetry."""
    with server.listen() as events:
        answer = server.get(f"/offload/status?telemetry={events.client}&page={events.client}")
        assert answer["telemetry"]["clients"] >= 1 and answer["telemetry"]["pages"] >= 1
        yield events


def node_of(graph: Graph, class_type: str) -> str:
    return next(key for key, node in graph.items() if node["class_type"] == class_type)


def messages(events: Listener, kind: str = "offload.telemetry") -> list[tuple[float, dict[str, Any]]]:
    return [(t, data) for t, name, data in list(events.events) if name == kind]


def simulated(server: HostServer) -> bool:
    return "SIMULATED_VRAM" in server.environment


def moving(server: HostServer, seed: int, seconds: float = 2.0) -> Graph:
    """Tiny models under a policy that makes the denoiser stream, for about this long on two free cores."""
    steps = round(seconds * (25 if simulated(server) else 60))
    return graphs.ours({"mode": "sequential"}, seed=seed, steps=steps)


def steps_of(graph: Graph) -> int:
    return int(graph[node_of(graph, "KSampler")]["inputs"]["steps"])


# ---------------------------------------------------------------------- telemetry
@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What one prompt told, by server: it is looked at by several tests."""
    return {}


@pytest.fixture
def run(host_server: HostServer, told: dict[str, Any]) -> dict[str, Any]:
    """A prompt of some seconds -> {graph, prompt_id, report, told: messages, silent: what nobody else was told}."""
    key = str(host_server.base)
    if key not in told:
        graph = moving(host_server, seed=801)
        with asking(host_server) as events, host_server.listen() as silent, host_server.listen() as script:
            prompt_id = host_server.queue(graph, client=script.client)
            assert host_server.wait(prompt_id)["status"]["completed"]
            report = report_of(host_server, prompt_id)
            events.wait_for("offload.report", prompt_id=prompt_id)
            time.sleep(0.5)
        told[key] = {
            **{"graph": graph, "prompt_id": prompt_id, "report": report, "told": messages(events)},
            **{"row": events.of("offload.report")[-1], "silent": silent, "script": script, "asked": events},
        }
    found: dict[str, Any] = told[key]
    return found


def test_the_shape_of_a_message(run: dict[str, Any]) -> None:
    samples = [data for _, data in run["told"]]
    assert len(samples) >= 4
    for data in samples:
        assert set(data) == TELEMETRY and set(data["vram"]) == VRAM and data["v"] == 1
        assert data["prompt_id"] == run["prompt_id"]
        for said in (data, *data["points"], *data["stages"]):
            assert said["type"] == (None if said["node"] is None else run["graph"][said["node"]]["class_type"])
        assert all(set(point) == POINT for point in [*data["points"], *data["stages"]])
        assert all(set(row) == ENDED for row in data["ended"])
        json.dumps(data, allow_nan=False)
    times = [data["t"] for data in samples]
    assert times == sorted(times)


def test_four_a_second_at_most(run: dict[str, Any]) -> None:
    """By when each was put together: a socket may hold one back and give two at once."""
    times = [data["t"] for _, data in run["told"]]
    for i, begin in enumerate(times):
        for j in range(i + 1, len(times)):
            assert j - i <= 4 * (times[j] - begin) + 1.5, "more than four a second"
    assert len(times) >= 2 * (times[-1] - times[0]), "and not far fewer"


def test_a_point_for_each_step_that_the_host_tells(run: dict[str, Any]) -> None:
    """Newer hosts pass over steps that follow within a tenth of a second; a point stands for those as well."""
    points = [point for _, data in run["told"] for point in data["points"]]
    sampler = node_of(run["graph"], "KSampler")
    steps = [point for point in points if point["node"] == sampler]
    said, most = run["script"].of("progress"), steps_of(run["graph"])
    last = max(i for i, (_, data) in enumerate(run["told"]) if data["points"])
    known = [point["step"] for point in steps]
    assert known == [data["value"] for data in said][: len(known)] and {point["steps"] for point in steps} == {most}
    # what comes after the last message is in the report, which is told at once
    assert len(known) == len(said) or run["told"][last][1]["step"] == known[-1]
    assert known[-1] >= 0.7 * most
    assert [point["t"] for point in points] == sorted(point["t"] for point in points)
    assert all(point["step_ms"] > 0 for point in steps[1:])
    between = [(b["step"] - a["step"]) * b["step_ms"] / 1e3 for a, b in itertools.pairwise(steps)]
    assert sum(between) == pytest.approx(steps[-1]["t"] - steps[0]["t"], rel=1e-3)
    assert all(point["moved"] is not None and point["stall_ms"] is not None for point in steps[1:])
    moved = [point["moved"] for point in steps]
    assert moved == sorted(moved) and moved[-1] <= run["report"]["totals"]["bytes_h2d"]
    if run["report"]["rung"] == "simulated":
        by_step = [step["bytes_h2d"] for step in run["report"]["steps"]]
        calls = len(by_step) // most  # of the denoiser in each step
        between_told = sum(by_step[known[0] * calls : known[-1] * calls])
        # a step's end is told before or after what the next one has asked for ahead
        assert moved[-1] - moved[0] == pytest.approx(between_told, abs=2 * max(by_step)) and moved[-1] > moved[0]


def test_figures_of_memory(run: dict[str, Any]) -> None:
    report = run["report"]
    if report["rung"] != "simulated":
        assert all(data["vram"]["free"] is None for _, data in run["told"]), "RAM is no card's memory"
        return
    known = [data for _, data in run["told"] if data["vram"]["weights"] is not None and data["step"]]
    assert known, "weights are known while it steps"
    points = [point for _, data in run["told"] for point in data["points"]]
    looks = [point for point in points if point["allocated"] is not None and point["weights"]]
    assert looks and all(point["allocated"] >= point["weights"] for point in looks)
    assert any(point["allocated"] > point["weights"] for point in looks), "latents at the least"
    for data in known:
        vram = data["vram"]
        assert vram["total"] == report["vram"]["total"]
        parts = vram["weights"] + vram["activations"] + vram["others"] + vram["free"]
        assert parts == vram["total"]
        assert (vram["high"], vram["low"]) == (report["resolved"]["high"], report["resolved"]["low"])
        assert vram["peak"] <= max(filter(None, (report["vram"][k] for k in ("peak_torch", "peak_device"))))
        assert sum(row["bytes"] for row in data["components"]) == vram["weights"]
        assert all(row["bytes"] >= 0 and row["total"] > 0 for row in data["components"])
    names = {row["name"] for row in known[-1]["components"]}
    assert {"denoiser"} <= names <= {component["name"] for component in report["components"]}


def test_nodes_that_ended_are_told_as_the_report_has_them(run: dict[str, Any]) -> None:
    ended = [row for _, data in run["told"] for row in data["ended"]]
    rows = {row["id"]: row for row in run["row"]["nodes"]}
    assert ended, "the text encoder at the latest"
    for row in ended:
        whole = rows[row["id"]]
        assert row["wall_s"] == pytest.approx(whole["wall_s"], abs=1e-6)
        assert row["type"] == whole["type"] and row["display"] == whole["display"]
        if row["moves_s"] is not None:  # before a model was met nobody knew whose moves there would be
            assert row["moves_s"] == pytest.approx(whole["moves_s"], abs=1e-6)
    assert any(row["moves_s"] is not None for row in ended)


def test_nobody_is_told_who_did_not_ask(run: dict[str, Any]) -> None:
    assert [name for _, name, _ in run["silent"].events if name.startswith("offload")] == []
    assert {name for _, name, _ in run["script"].events if name.startswith("offload")} == {"offload.report"}
    sampler = node_of(run["graph"], "KSampler")
    for events in (run["silent"], run["script"], run["asked"]):  # scripts, and a page that shows it by itself
        assert texts_of(events, sampler) == []


def test_who_stops_asking_is_told_no_more(server: HostServer) -> None:
    with server.listen() as events:
        server.get(f"/offload/status?telemetry={events.client}")
    with server.listen() as other:
        prompt_id = server.queue(graphs.stock(seed=811, steps=40), client=other.client)
        server.wait(prompt_id)
        assert server.get("/offload/status")["telemetry"]["pages"] == 0
        assert other.of("offload.telemetry") == []


# ---------------------------------------------------------------------- the end of a run
def test_the_events_row_is_the_lists_row(host_server: HostServer, run: dict[str, Any]) -> None:
    rows = host_server.get("/offload/runs?limit=64")["runs"]
    [mine] = [row for row in rows if row["prompt_id"] == run["prompt_id"]]
    assert mine == run["row"]
    report = run["report"]
    for key in ("verdict", "totals", "vram", "line", "workload", "hints", "hint_note", "complete", "created"):
        assert mine[key] == report.get(key), key
    for row, entry in zip(mine["nodes"], report["nodes"], strict=True):
        assert row["id"] == entry["id"] and row["peak"] == entry["peak"] and row["cached"] == entry["cached"]
        assert row["wall_s"] == entry["wall_s"]
        if entry["t0"] is not None:  # none of them is suspended, so the bounds of each are those of its time
            assert row["wall_s"] == entry["t1"] - entry["t0"]


def test_the_trace(host_server: HostServer, run: dict[str, Any]) -> None:
    trace = host_server.get(f"/offload/trace/{run['prompt_id']}")
    assert trace == json.loads(json.dumps(build_trace(run["report"])))
    lanes: dict[int, list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        assert {"ph", "pid", "name", "ts"} <= set(event) and event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            lanes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    names = [event["name"] for event in trace["traceEvents"]]
    assert sum(name.startswith("step ") for name in names) == len(run["report"]["steps"])
    assert len(run["report"]["steps"]) == (steps_of(run["graph"]) if simulated(host_server) else 0)
    for slices in lanes.values():
        ends: list[float] = []
        for begin, end in sorted(slices, key=lambda pair: (pair[0], -pair[1])):
            while ends and ends[-1] <= begin + 1e-3:
                ends.pop()
            assert not ends or end <= ends[-1] + 1e-3, "slices contain or follow one another"
            ends.append(end)
    assert host_server.status_of("/offload/trace/nothing") == 404


# ---------------------------------------------------------------------- the marks
def query_of(policy: dict[str, Any]) -> str:
    """A policy as written, as a page spells it."""
    values = {}
    for name, value in policy.items():
        if name != "schema":
            text = ", ".join(value) if isinstance(value, list) else value
            values[name] = str(text).lower() if isinstance(text, bool) else str(text)
    return urlencode(values)


@pytest.mark.parametrize(
    "fields", [{"mode": "sequential"}, {"mode": "balanced", "high": "2MiB"}, {}, {"low": "0"}], ids=str
)
def test_marks_are_what_the_run_resolved(host_server: HostServer, fields: dict[str, str]) -> None:
    host_server.run(graphs.ours(fields, seed=821, steps=2))
    policy = host_server.get("/offload/status")["policy"]
    answer = host_server.get(f"/offload/marks?{query_of(policy['written'])}")
    resolved = policy["resolved"]
    assert answer["error"] is None
    assert (answer["mode"], answer["high"]) == (resolved["mode"], resolved["high"])
    if not simulated(host_server):
        assert answer["total"] is None, "RAM is no card's memory"
    else:
        for key in ("low", "low_always", "available", "fits", "sources", "sentence"):
            assert answer[key] == resolved[key], key
        assert answer["total"] == 1 << 30 and answer["components"]


def test_marks_of_what_is_wrong(host_server: HostServer) -> None:
    for query, field in (({"mode": "turbo"}, "mode"), ({"high": "101%"}, "high"), ({"colour": "red"}, "'colour'")):
        answer = host_server.get(f"/offload/marks?{urlencode(query)}")
        assert answer["error"].startswith(field) and answer["high"] is None
    with pytest.raises(ValueError, match="high") as caught:
        OffloadPolicy(high="101%")
    assert host_server.get(f"/offload/marks?{urlencode({'high': '101%'})}")["error"] == str(caught.value)
    assert host_server.status_of("/offload/marks?never=" + "x" * 3000) == 400
    assert host_server.status_of("/api/offload/marks") == 200


# ---------------------------------------------------------------------- pages without our script
def texts_of(events: Listener, node: str) -> list[tuple[float, str]]:
    """(seconds, text) for this node among the binary frames, as a front end reads them."""
    found = []
    for t, frame in events.frames:
        kind, length = struct.unpack(">II", frame[:8])
        if kind == TEXT and frame[8 : 8 + length].decode() == node:
            found.append((t, frame[8 + length :].decode()))
    return found


@pytest.fixture
def page(host_server: HostServer) -> Iterator[Callable[[bool], Listener]]:
    """Opens a socket as a front end does, that is told apart from a script by what it sends first."""
    opened = []

    def open(flags: bool = True) -> Listener:
        events = host_server.listen().__enter__()
        opened.append(events)
        if flags:
            events.send(FLAGS)
            events.wait_for("feature_flags")
        return events

    yield open
    for events in opened:
        events.__exit__(None, None, None)


def test_a_page_without_our_script_is_told_by_texts(host_server: HostServer, page: Callable[..., Listener]) -> None:
    graph = moving(host_server, seed=841, seconds=3.0)
    sampler = node_of(graph, "KSampler")
    browser, script, other = page(), page(flags=False), page()
    prompt_id = host_server.queue(graph, client=browser.client)
    assert host_server.wait(prompt_id)["status"]["completed"]
    report = report_of(host_server, prompt_id)
    browser.wait_for("offload.report", prompt_id=prompt_id)
    time.sleep(0.5)
    said = [text for _, text in texts_of(browser, sampler)]
    live = [text for text in said if "step " in text]
    times = [t for t, text in texts_of(browser, sampler) if "step " in text]
    wall = next(node["wall_s"] for node in report["nodes"] if node["id"] == sampler)
    assert len(live) >= 2 and len(live) - 1 <= (times[-1] - times[0]) * 1.1 + 0.1, "once a second"
    assert f"/{steps_of(graph)}" in live[0] and ("VRAM" in live[0]) == (report["rung"] == "simulated")
    assert "step" not in said[-1], "what the node came to stays"
    moves = next(n["onload_s"] + n["stall_s"] + n["evict_s"] for n in report["nodes"] if n["id"] == sampler)
    assert ("moves" in said[-1]) == (moves >= 0.25 or moves >= 0.05 * wall)
    assert texts_of(script, sampler) == [] and texts_of(other, sampler) == []


def test_a_page_with_our_script_is_told_by_none(host_server: HostServer, page: Callable[..., Listener]) -> None:
    browser = page()
    assert host_server.status_of(f"/offload/status?page={browser.client}") == 200
    graph = moving(host_server, seed=842, seconds=1.5)
    prompt_id = host_server.queue(graph, client=browser.client)
    assert host_server.wait(prompt_id)["status"]["completed"]
    browser.wait_for("offload.report", prompt_id=prompt_id)
    time.sleep(0.3)
    assert texts_of(browser, node_of(graph, "KSampler")) == [] and browser.of("offload.telemetry") == []


def test_a_script_is_sent_no_text(host_server: HostServer, page: Callable[..., Listener]) -> None:
    script = page(flags=False)
    graph = moving(host_server, seed=843, seconds=1.5)
    prompt_id = host_server.queue(graph, client=script.client)
    assert host_server.wait(prompt_id)["status"]["completed"]
    script.wait_for("offload.report", prompt_id=prompt_id)
    time.sleep(0.3)
    assert texts_of(script, node_of(graph, "KSampler")) == []
