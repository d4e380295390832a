"""Invariant: through the API as in process: stock bits, files read once, refusals that name the remedy, and the queue
goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from . import graphs
from .server import HostError, HostServer

# seeds of their own, so that nothing here is answered from the host's cache of another test
FITS = {"mode": "auto"}
SIZES = {"width": 72}
Build = Callable[..., graphs.Graph]
BUILDS = pytest.mark.parametrize("build", [graphs.ours, graphs.ours_applied], ids=["loader", "applied"])


def loader_of(graph: graphs.Graph) -> str:
    return next(node for node, entry in graph.items() if entry["class_type"] == "ModelLoaderWithOffload")


@BUILDS
def test_the_same_picture_as_by_the_stock_loaders(server: HostServer, build: Build) -> None:
    graph = build({"mode": "balanced", "high": "60%"}, seed=21)
    assert sorted(server.digests(graph)) == sorted(server.digests(graphs.stock(seed=21)))


@BUILDS
def test_another_policy_opens_no_file_and_moves_no_weight_while_it_fits(sim_server: HostServer, build: Build) -> None:
    """Each prompt has a seed of its own, or the host would answer from its cache. What is copied then is noise,
    conditioning and what the model computes on the CPU: as much as with the policy left alone."""

    def run(fields: dict[str, str], seed: int) -> tuple[int, int]:
        """Bytes of weights by the report, and of all copies by the device's log."""
        sim_server.reset_counters()
        prompt_id = sim_server.queue(build(fields, seed=seed))
        assert sim_server.wait(prompt_id)["status"]["status_str"] == "success"
        report = sim_server.get(f"/offload/report/{prompt_id}")
        return report["totals"]["bytes_h2d"], sim_server.counters()["copied"]["h2d_bytes"]

    sim_server.free()
    first, _ = run(FITS, 30)
    assert first > 20 << 20, "all three models went up"
    _, noise = run(FITS, 31)
    sim_server.opened()
    for seed, fields in enumerate(({"mode": "balanced", "high": "90%"}, {"mode": "none"}, FITS), start=32):
        weights, copied = run(fields, seed)
        # Another policy makes the host encode the prompts again, so conditioning comes up once more.
        assert weights == 0 and copied < noise + (8 << 20)
    assert sim_server.opened() == []


def test_notices_stand_at_the_node_in_the_history(sim_server: HostServer) -> None:
    graph = graphs.ours({"mode": "sequential"}, seed=24)
    text = sim_server.run(graph)[loader_of(graph)]["text"]
    assert [line.split(":")[0] for line in text] == ["model", "clip", "vae"]
    assert all("sequential" in line for line in text)


@pytest.mark.parametrize(
    ("inputs", "remedy"),
    [
        ({"diffusion_model": "tiny_sd4.safetensors"}, "near it: tiny_sd3.safetensors"),
        ({"checkpoint": "tiny_checkpoint.safetensors"}, "set the other to 'none'"),
        ({"diffusion_model": "model.ckpt"}, "convert it to .safetensors"),
        ({"vae": "../../secret.safetensors"}, "which is not there"),
    ],
)
def test_a_bad_file_is_refused_and_the_queue_goes_on(server: HostServer, inputs: dict[str, str], remedy: str) -> None:
    good = graphs.ours({}, seed=25)
    with pytest.raises(HostError, match="the prompt was refused") as caught:
        server.queue(graphs.changed(good, "ModelLoaderWithOffload", **inputs))
    assert remedy in str(caught.value)
    assert len(server.digests(good)) == 2


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"mode": "turbo"}, "mode"), ({"high": "120%"}, "high"), ({"low": "60%", "high": "20%"}, "low")],
)
def test_a_policy_that_cannot_hold_is_refused_before_the_run(
    server: HostServer, fields: dict[str, str], word: str
) -> None:
    graph = graphs.ours(fields, seed=26)
    with pytest.raises(HostError, match=rf"{word}: got ") as caught:
        server.queue(graph)
    assert "allowed: " in str(caught.value)


def test_an_output_that_the_files_do_not_hold_says_what_to_choose(server: HostServer) -> None:
    graph = graphs.ours({}, seed=27)
    graph[loader_of(graph)]["inputs"]["vae"] = "from checkpoint"
    entry = server.wait(server.queue(graph))
    assert entry["status"]["status_str"] == "error"
    assert "choose its VAE at 'vae'" in str(entry["status"]["messages"])
    assert len(server.digests(graphs.ours({}, seed=27))) == 2


def test_free_memory_lets_go_of_the_files(server: HostServer) -> None:
    """What the host drops is not kept by us any longer than until it is idle."""
    server.run(graphs.ours({}, seed=28))
    server.free()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        time.sleep(1.5)  # the host answers /free between prompts, and is idle after it
        server.opened()
        server.run(graphs.ours({"mode": "sequential"}, seed=28))
        if "tiny_sd3.safetensors" in server.opened():
            return
        server.free()
    raise AssertionError("the files were never read again: something keeps the models")


def test_free_vram_passes_on_and_reports(sim_server: HostServer) -> None:
    build = graphs.Builder()
    model, clip, vae = graphs.our_loaders(build, {"mode": "auto"})
    graphs.draw(build, model, clip, vae, seed=29)
    sampled = next(node for node, entry in build.graph.items() if entry["class_type"] == "KSampler")
    freed = build.add("FreeVRAMToFit", anything=[sampled, 0], need_gib=0.9)
    for entry in build.graph.values():
        if entry["class_type"] == "VAEDecode":
            entry["inputs"]["samples"] = [freed, 0]
    graph = build.graph
    outputs = sim_server.run(graph)
    (sentence,) = outputs[freed]["text"]
    assert "0.9 GiB" in sentence or "921.6 MiB" in sentence
    pictures = [ui["digest"][0] for ui in outputs.values() if "digest" in ui]
    assert sorted(pictures) == sorted(sim_server.digests(graphs.stock(seed=29)))


def test_object_info_says_it_in_the_order_of_the_design(server: HostServer) -> None:
    info: dict[str, Any] = server.object_info()
    loader = info["ModelLoaderWithOffload"]
    order = loader["input_order"]["required"] + loader["input_order"].get("optional", [])
    assert order == [
        *("policy", "checkpoint", "diffusion_model", "text_encoder", "text_encoder_2", "text_encoder_3"),
        *("clip_type", "vae", "weight_dtype"),
    ]
    assert loader["output"] == ["MODEL", "CLIP", "VAE"] and loader["output_name"] == ["model", "clip", "vae"]
    assert info["ApplyOffloadPolicy"]["output"] == ["MODEL", "CLIP", "VAE"]
    assert info["FreeVRAMToFit"]["output"] == ["*", "STRING"]
    for node in ("ModelLoaderWithOffload", "ApplyOffloadPolicy", "FreeVRAMToFit"):
        inputs = {**info[node]["input"].get("required", {}), **info[node]["input"].get("optional", {})}
        assert all(len(spec) > 1 and spec[1].get("tooltip") for spec in inputs.values()), node
        assert all(info[node]["output_tooltips"]), node
