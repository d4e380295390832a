"""Invariant: on a real host every prompt that reports has its record whole in /history, by HTTP and as a file, however
it ended; and what that costs is measured."""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from balanced_offload.offload.report import validate

from . import graphs
from .conftest import HERE, ROOT, Host
from .server import HostServer

Graph = dict[str, Any]


def with_report(graph: Graph, behind: str = "VAEDecode") -> tuple[Graph, str]:
    """A copy with VRAMReport behind the first node of this class -> the graph, the report's node."""
    graph = copy.deepcopy(graph)
    source = next(node for node, described in graph.items() if described["class_type"] == behind)
    node = str(max(map(int, graph)) + 1)
    graph[node] = {"class_type": "VRAMReport", "inputs": {"anything": [source, 0]}}
    return graph, node


def failing(graph: Graph) -> Graph:
    """A copy whose sampler gets conditioning of another model's width: it fails when it samples."""
    graph = copy.deepcopy(graph)
    sampler = next(node for node in graph.values() if node["class_type"] == "KSampler")
    positive = sampler["inputs"]["positive"][0]
    graph[positive] = {"class_type": "TestConditioning", "inputs": {"kind": "sd15", "seed": 1}}
    return graph


def report_of(server: HostServer, prompt_id: str) -> dict[str, Any]:
    """The report by HTTP once it is settled; validated."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if server.status_of(f"/offload/report/{prompt_id}") == 200:
            report: dict[str, Any] = server.get(f"/offload/report/{prompt_id}")
            if report["ended"] and (report["error"] is None or "did not finish" not in report["error"]["message"]):
                validate(report)
                return report
        time.sleep(0.02)
    raise AssertionError(f"no settled report of {prompt_id}\n{server.log()[-2000:]}")


def file_of(server: HostServer, prompt_id: str, ready: Callable[[Any], bool] = lambda report: True) -> dict[str, Any]:
    path = server.base / "output" / f"offload-report_{prompt_id}.json"
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if path.is_file():
            written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if ready(written):
                validate(written)
                return written
        time.sleep(0.02)
    raise AssertionError(f"no such file: {path}")


# ---------------------------------------------------------------------- stock models
def test_a_stock_graph_with_the_node(server: HostServer) -> None:
    graph, node = with_report(graphs.stock(seed=301))
    with server.listen() as events:
        server.get(f"/offload/status?telemetry={events.client}")
        prompt_id = server.queue(graph, client=events.client)
        entry = server.wait(prompt_id)
        record = entry["outputs"][node]["vram_report"][0]
        validate(record)
        assert record["ended"] and record["complete"] and record["world"] == "observe"
        assert record["verdict"] == "resident" and record["totals"]["bytes_h2d"] is None
        told = events.wait_for("offload.report", prompt_id=prompt_id)
    types = {row["type"]: row for row in record["nodes"]}
    assert {"UNETLoader", "KSampler", "VAEDecode", "VRAMReport"} <= set(types)
    assert types["KSampler"]["wall_s"] == pytest.approx(record["totals"]["denoise_s"], abs=0.01)
    assert sum(row["wall_s"] for row in record["nodes"]) <= record["totals"]["wall_s"]
    assert told["verdict"] == "resident" and len(told["text"]) <= 1024
    written = file_of(server, prompt_id)
    assert written["prompt_id"] == prompt_id and written["totals"] == record["totals"]
    assert report_of(server, prompt_id)["totals"] == record["totals"]
    text = server.wait(prompt_id)["outputs"][node]["text"][0]
    assert "stock models only" in text and not text.startswith("So far")


def test_loaders_stay_cached_and_the_report_is_fresh(server: HostServer) -> None:
    graph, node = with_report(graphs.stock(seed=302))
    records = [server.run(graph)[node]["vram_report"][0] for _ in range(3)]
    assert len({record["prompt_id"] for record in records}) == 3 and all(record["ended"] for record in records)
    again = {row["type"]: row["cached"] for row in records[-1]["nodes"]}
    assert again["VRAMReport"] is False and again.get("KSampler", True) is True


def test_a_prompt_without_our_nodes_is_observed(server: HostServer) -> None:
    prompt_id = server.queue(graphs.stock(seed=303, steps=12))
    server.wait(prompt_id)
    report = report_of(server, prompt_id)
    assert report["world"] == "observe" and report["complete"] and report["file"] is None
    assert "KSampler" in {row["type"] for row in report["nodes"]}
    assert not (server.base / "output" / f"offload-report_{prompt_id}.json").exists()


def test_telemetry_only_for_those_that_asked(server: HostServer) -> None:
    with server.listen() as asked, server.listen() as silent:
        server.get(f"/offload/status?telemetry={asked.client}")
        prompt_id = server.queue(graphs.stock(seed=304, steps=240), client=silent.client)
        entry = server.wait(prompt_id)
        assert entry["status"]["completed"]
        asked.wait_for("offload.report", prompt_id=prompt_id)
        silent.wait_for("offload.report", prompt_id=prompt_id)
        samples = [(t, data) for t, kind, data in asked.events if kind == "offload.telemetry"]
        assert silent.of("offload.telemetry") == []
    seconds = samples[-1][0] - samples[0][0]
    assert len(samples) >= 3 and len(samples) - 1 <= 4 * seconds * 1.15 + 1
    stepping = [data for _, data in samples if data["steps"] == 240]
    steps = [data["step"] for data in stepping]
    assert steps and steps == sorted(steps) and any(data["step_ms"] for data in stepping)


# ---------------------------------------------------------------------- our models
def copied_by(server: HostServer, mode: str, seeds: tuple[int, ...]) -> tuple[Graph, dict[str, Any], int]:
    """Prompts that differ in their seed -> the last one's graph and record, and the bytes that went to the device."""
    for seed in seeds:
        server.reset_counters()
        graph, node = with_report(graphs.ours({"mode": mode}, seed=seed))
        record = server.run(graph)[node]["vram_report"][0]
    return graph, record, server.counters()["copied"]["h2d_bytes"]


def test_the_report_equals_the_devices_own_log(sim_server: HostServer) -> None:
    """Latents and conditioning go up as well: they are what is copied where every weight is there already."""
    _, record, inputs = copied_by(sim_server, "none", (305, 306))
    assert record["totals"]["bytes_h2d"] == record["totals"]["move_count"] == 0 and inputs > 0
    graph, record, copied = copied_by(sim_server, "sequential", (307, 308))
    validate(record)
    assert record["world"] == "static" and record["verdict"] == "streamed" and record["rung"] == "simulated"
    assert record["policy"]["mode"] == "sequential" and record["resolved"]["mode"] == "sequential"
    assert record["totals"]["bytes_h2d"] == pytest.approx(copied - inputs, rel=1e-3)
    sampler = next(key for key, described in graph.items() if described["class_type"] == "KSampler")
    assert {step["node"] for step in record["steps"]} == {sampler} and len(record["steps"]) == 3
    parts = ("encode", "denoise", "decode", "preview", "onload", "stall", "evict", "other")
    totals = record["totals"]
    assert sum(totals[f"{part}_s"] for part in parts) == pytest.approx(totals["wall_s"], rel=1e-6)
    rows = [row for row in record["nodes"] if row["onload_s"] is not None]
    assert sum(row["onload_s"] for row in rows) == pytest.approx(totals["onload_s"], rel=1e-6, abs=1e-9)
    assert {component["role"] for component in record["components"]} >= {"denoiser", "text_encoder", "vae"}


def test_switching_the_policy_is_said(sim_server: HostServer) -> None:
    node = ""
    for mode in ("balanced", "none"):
        graph, node = with_report(graphs.ours({"mode": mode}, seed=307))
        record = sim_server.run(graph)[node]["vram_report"][0]
        assert record["policy"]["mode"] == mode and record["resolved"]["mode"] == mode
    assert record["totals"]["bytes_h2d"] == 0 or record["totals"]["move_count"] > 0
    status = sim_server.get("/offload/status")
    assert status["policy"]["written"]["mode"] == "none" and status["components"]
    assert sum(component["device_bytes"] for component in status["components"]) > 1 << 20


# ---------------------------------------------------------------------- ends of other kinds
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_an_error_before_the_node(sim_server: HostServer, kind: str) -> None:
    made = graphs.stock(seed=308) if kind == "stock" else graphs.ours({"mode": "balanced"}, seed=308)
    graph, node = with_report(failing(made))
    prompt_id = sim_server.queue(graph)
    entry = sim_server.wait(prompt_id)
    assert entry["status"]["status_str"] == "error" and node not in entry["outputs"]
    report = report_of(sim_server, prompt_id)
    sampler = next(key for key, described in graph.items() if described["class_type"] == "KSampler")
    assert report["verdict"] == "error" and not report["complete"] and f"node {sampler}" in report["error"]["message"]
    assert file_of(sim_server, prompt_id, lambda written: written["error"] == report["error"])["verdict"] == "error"
    good, node = with_report(made)
    record = sim_server.run(good)[node]["vram_report"][0]
    assert record["error"] is None and record["complete"], "the next prompt is as the first"


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_an_interrupt(sim_server: HostServer, kind: str) -> None:
    made = graphs.stock(seed=309, steps=2000) if kind == "stock" else graphs.ours(seed=309, steps=2000)
    graph = with_report(made)[0]
    with sim_server.listen() as events:
        prompt_id = sim_server.queue(graph, client=events.client)
        events.wait_for("progress")
        running = sim_server.get(f"/offload/report/{prompt_id}")
        validate(running)
        assert running["ended"] is False
        sim_server.interrupt()
        assert sim_server.wait(prompt_id)["status"]["status_str"] == "error"
    report = report_of(sim_server, prompt_id)
    assert report["verdict"] == "error" and report["error"]["type"] == "Interrupted"
    assert file_of(sim_server, prompt_id, lambda written: written["error"] == report["error"])


@pytest.fixture
def small_server(servers: Callable[..., HostServer], sim_server: HostServer) -> HostServer:
    """On a device that is too small for the models."""
    environment = {"SIMULATED_VRAM": str(12 << 20), "BALANCED_OFFLOAD_CHECKOUT": str(ROOT)}
    return servers(packs=(HERE / "packs" / "simulated_device",), environment=environment)


def test_out_of_memory(small_server: HostServer) -> None:
    """The report is there for whoever looks after it: with the verdict, the figures, and the file."""
    graph = with_report(graphs.ours({"mode": "none", "on_oom": "stop"}, seed=310, size=256))[0]
    prompt_id = small_server.queue(graph)
    assert small_server.wait(prompt_id)["status"]["status_str"] == "error"
    report = report_of(small_server, prompt_id)
    assert report["verdict"] == "oom" and report["error"]["type"] == "OutOfMemoryError"
    assert report["vram"]["total"] == 12 << 20 and report["world"] == "static"
    assert file_of(small_server, prompt_id, lambda written: written["verdict"] == "oom")["error"] == report["error"]


def test_an_output_folder_that_cannot_be_written(server: HostServer) -> None:
    output, aside = server.base / "output", server.base / "aside"
    output.rename(aside)
    try:
        output.write_text("no folder", encoding="utf-8")
        graph, node = with_report(graphs.stock(seed=311))
        prompt_id = server.queue(graph)
        entry = server.wait(prompt_id)
        assert entry["status"]["completed"], "no prompt fails for its report"
        report = report_of(server, prompt_id)
        until = time.monotonic() + 5
        while "error" not in report["file"] and time.monotonic() < until:
            time.sleep(0.05)
            report = report_of(server, prompt_id)
        assert report["complete"] and "NotADirectory" in report["file"]["error"]
        assert "was not written" in server.wait(prompt_id)["outputs"][node]["text"][0]
    finally:
        output.unlink()
        aside.rename(output)


# ---------------------------------------------------------------------- the routes
def test_the_routes(server: HostServer) -> None:
    for prefix in ("", "/api"):
        assert server.status_of(f"{prefix}/offload/status") == 200
        assert server.status_of(f"{prefix}/offload/runs") == 200
    assert server.status_of("/offload/runs?limit=0") == 400
    assert server.status_of("/offload/report/..%2f..%2fetc%2fpasswd") == 404
    assert server.status_of("/offload/status?telemetry=nobody") == 400
    rows = server.get("/offload/runs?limit=3")["runs"]
    assert 0 < len(rows) <= 3 and all("moves" not in row for row in rows)
    assert server.get("/offload/status")["host"]["version"] is not None


# ---------------------------------------------------------------------- what it costs
def test_calls_times_cost_per_call(server: HostServer) -> None:
    """The record counts its own cost; of twenty prompts the least of both, since the machine is shared."""
    costs, lasted = [], []
    for seed in range(20):
        graph, node = with_report(graphs.stock(seed=400 + seed, steps=20))
        entry = server.wait(server.queue(graph))
        cost = entry["outputs"][node]["vram_report"][0]["overhead_ms"] / 1e3
        assert cost > 0
        costs.append(cost)
        lasted.append(took(entry))
    assert min(costs) <= 0.01 * min(lasted), (
        f"1 % of a prompt of 20 steps; measured {sorted(costs)} of {sorted(lasted)} s"
    )


def took(entry: dict[str, Any]) -> float:
    """Seconds of a prompt on the host's own clock: its messages carry milliseconds."""
    times = {event: data["timestamp"] for event, data in entry["status"]["messages"]}
    return float(times["execution_success"] - times["execution_start"]) / 1e3


@pytest.fixture
def bare(host: Host, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """The same host without the pack."""
    server = HostServer(host.path, tmp_path_factory.mktemp("bare"), models, None)
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_sixty_prompts_with_and_without(
    server: HostServer, bare: HostServer, record_property: Callable[[str, object], None]
) -> None:
    """Sixty pairs in random order; the interval of the relative difference must include 3 % or less."""

    def seconds(one: HostServer, graph: Graph) -> float:
        return took(one.wait(one.queue(graph)))

    random_order = random.Random(7)
    with server.listen() as events:
        for warm in range(3):
            seconds(bare, graphs.stock(seed=500 + warm, steps=10))
            seconds(server, with_report(graphs.stock(seed=500 + warm, steps=10))[0])
        differences = []
        for number in range(60):
            server.get(f"/offload/status?telemetry={events.client}")
            plain = graphs.stock(seed=600 + number, steps=10)
            pair = [("bare", bare, plain), ("ours", server, with_report(plain)[0])]
            random_order.shuffle(pair)
            lasted = {name: seconds(one, graph) for name, one, graph in pair}
            differences.append(lasted["ours"] / lasted["bare"] - 1)
    medians = sorted(statistics.median(random_order.choices(differences, k=60)) for _ in range(2000))
    low, high = medians[50], medians[1949]
    record_property("difference", f"{low:+.2%} to {high:+.2%}")
    print(f"with and without: {statistics.median(differences):+.2%}, 95 % of {low:+.2%} to {high:+.2%}")
    assert low <= 0.03, f"the interval is {low:+.2%} to {high:+.2%}"
