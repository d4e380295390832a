"""Invariant: a node inside another is told as the one that the user sees, and no moment is counted for two nodes."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from . import graphs
from .server import HostServer
from .test_report import report_of
from .test_seen import Graph, asking, messages, moving, node_of, simulated


def adds_up(report: dict[str, Any]) -> dict[str, float]:
    """Seconds by the node that the user sees: all of them are no more than the run, and those that wait likewise."""
    taken: dict[str, float] = {}
    rows = [entry for entry in report["nodes"] if entry["wall_s"] is not None]
    for entry in rows:
        taken[entry["display"]] = taken.get(entry["display"], 0.0) + entry["wall_s"]
        assert entry["wall_s"] <= entry["t1"] - entry["t0"] + 1e-9
    totals = report["totals"]
    assert sum(taken.values()) <= totals["wall_s"] + 1e-9
    for name in ("onload_s", "stall_s", "evict_s"):
        known = [entry[name] for entry in rows if entry[name] is not None]
        assert sum(known) <= (totals[name] or 0.0) + 1e-9
    return taken


def test_an_expanded_node_is_told_as_the_one_that_the_user_sees(server: HostServer) -> None:
    graph = graphs.stock(seed=831, steps=60)
    node = node_of(graph, "KSampler")
    graph[node]["class_type"] = "TestExpandedSampler"
    with asking(server) as events:
        prompt_id = server.queue(graph, client=events.client)
        assert server.wait(prompt_id)["status"]["completed"]
        row = events.wait_for("offload.report", prompt_id=prompt_id)
    [inner] = [entry for entry in row["nodes"] if entry["type"] == "KSampler"]
    assert inner["id"] != node and inner["display"] == node
    [outer] = [entry for entry in row["nodes"] if entry["id"] == node]
    assert inner["wall_s"] > 5 * outer["wall_s"] > 0, "it only made it, and collected what it made"
    taken = adds_up(report_of(server, prompt_id))
    assert taken[node] == pytest.approx(inner["wall_s"] + outer["wall_s"], abs=1e-9)
    told = {data["type"] for _, data in messages(events) if data["step"]}
    assert told == {"TestExpandedSampler"}, "the class of the node that the user sees"
    steps = [point for _, data in messages(events) for point in data["points"]]
    assert {point["node"] for point in steps} == {node} and {point["steps"] for point in steps} == {60}
    assert steps[-1]["step"] >= 0.7 * 60, "what comes after the last message is in the report"


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_lazy_node_does_not_take_what_it_asked_for(device: str, request: pytest.FixtureRequest) -> None:
    """A switch begins, asks for the picture that it switches to, and begins again when that is there."""
    host_server: HostServer = request.getfixturevalue("server" if device == "cpu" else "sim_server")
    switch = "ComfySwitchNode"
    if switch not in host_server.object_info(switch):
        pytest.skip("this host has no node of its own that asks for its inputs later")
    graph = moving(host_server, seed=833, seconds=1.0)
    sampler, decode = node_of(graph, "KSampler"), node_of(graph, "VAEDecode")
    inputs = {"switch": False, "on_false": [sampler, 0], "on_true": graph[sampler]["inputs"]["latent_image"]}
    graph["70"] = {"class_type": switch, "inputs": inputs}
    graph[decode]["inputs"]["samples"] = ["70", 0]
    del graph[node_of(graph, "TestDigest")]  # of the latent: for it the sampler would run without being asked
    prompt_id = host_server.queue(graph)
    assert host_server.wait(prompt_id)["status"]["completed"]
    report = report_of(host_server, prompt_id)
    rows = {entry["id"]: entry for entry in report["nodes"]}
    assert rows["70"]["t0"] <= rows[sampler]["t0"] < rows[sampler]["t1"] <= rows["70"]["t1"], "it was suspended"
    assert rows["70"]["wall_s"] < 0.2 * rows[sampler]["wall_s"] == 0.2 * adds_up(report)[sampler]
    if simulated(host_server):
        assert {step["node"] for step in report["steps"]} == {sampler}
        assert (rows["70"]["stall_s"], rows[sampler]["stall_s"]) == (0.0, pytest.approx(report["totals"]["stall_s"]))


def test_a_node_in_a_subgraph_has_the_path_to_it(server: HostServer) -> None:
    """As a front end flattens one: node 7 of subgraph 3 is "3:7"."""
    flat = graphs.stock(seed=832, steps=4)

    def moved(value: Any) -> Any:
        return [f"40:{value[0]}", value[1]] if isinstance(value, list) else value

    graph: Graph = {}
    for key, described in copy.deepcopy(flat).items():
        inputs = {name: moved(value) for name, value in described["inputs"].items()}
        graph[f"40:{key}"] = {**described, "inputs": inputs}
    prompt_id = server.queue(graph)
    assert server.wait(prompt_id)["status"]["completed"]
    nodes = report_of(server, prompt_id)["nodes"]
    assert {entry["type"] for entry in nodes} >= {"KSampler", "VAEDecode"}
    for entry in nodes:  # a loader that was cached before anybody watched is in no list
        assert entry["id"] == entry["display"] and entry["id"] in graph and entry["id"].startswith("40:")
