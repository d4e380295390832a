"""Invariant: the server that other tests talk to is the real one: it draws, tells what it did, and ends prompts."""

from __future__ import annotations

import pytest

from . import graphs
from .server import HostError, HostServer


def test_the_pack_loads(server: HostServer) -> None:
    assert "balanced_offload" in server.log()
    assert "IMPORT FAILED" not in server.log()
    assert "OffloadPolicy" in server.object_info()


def test_a_stock_prompt_is_the_same_on_either_device(server: HostServer, sim_server: HostServer) -> None:
    prompt = graphs.stock()
    here = server.digests(prompt)
    sim_server.reset_counters()
    there = sim_server.digests(prompt)
    assert len(here) == 2 and here == there
    assert sim_server.counters()["copied"]["h2d_bytes"] > 1 << 20, "the weights went to the simulated device"
    assert server.digests(graphs.stock(seed=6)) != here


def test_opened_model_files_are_seen(server: HostServer) -> None:
    server.free()
    server.run(graphs.changed(graphs.stock(seed=11), "EmptySD3LatentImage", width=72))
    server.free()
    server.opened()
    build = graphs.Builder()
    model = build.add("UNETLoader", unet_name="tiny_wan.safetensors", weight_dtype="default")
    build.add("TestDigest", value=[model, 0])
    server.run(build.graph)
    assert server.opened() == ["tiny_wan.safetensors"]
    assert server.opened() == []


def test_events_and_refusals(server: HostServer) -> None:
    with server.listen() as events:
        prompt_id = server.queue(graphs.stock(seed=12), client=events.client)
        events.wait_for("executing", node=None, prompt_id=prompt_id)
    assert server.wait(prompt_id)["status"]["completed"]
    with pytest.raises(HostError, match="refused"):
        server.queue(graphs.changed(graphs.stock(), "UNETLoader", unet_name="nothing.safetensors"))
