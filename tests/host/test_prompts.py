"""Invariant: through nodes and the API, on either device, a graph of ours gives the bits of the stock graph.

Switching what does not touch files or residency touches none: no model file opened, no weight moved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from . import graphs
from .server import HostServer

LORA = {"a": "tiny_sd3_a.safetensors", "b": "tiny_sd3_b.safetensors"}
HALF = {"mode": "balanced", "high": "4MiB"}
MODES: list[dict[str, Any]] = [{"mode": mode} for mode in graphs.MODES] + [HALF]
CASES: dict[str, dict[str, Any]] = {
    "txt2img": {},
    "img2img": {"image": "start.png"},
    "lora": {"lora": LORA["a"]},
    "img2img_lora": {"image": "start.png", "lora": LORA["b"]},
}


def name_of(fields: dict[str, Any]) -> str:
    return "-".join(str(value) for value in fields.values())


def put_picture(server: HostServer) -> None:
    """An input picture of 64 x 64 that compresses without loss."""
    from PIL import Image

    path = server.base / "input" / "start.png"
    if not path.exists():
        Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(path)


@pytest.fixture(scope="module", params=["cpu", "simulated"])
def where(request: pytest.FixtureRequest, server: HostServer) -> HostServer:
    """The server on the CPU, and the one on the simulated accelerator."""
    found = server if request.param == "cpu" else request.getfixturevalue("sim_server")
    put_picture(found)
    return found


@pytest.fixture(scope="module")
def wanted(server: HostServer) -> dict[str, list[str]]:
    """Digests of latent and picture by the stock graph, on the CPU."""
    put_picture(server)
    return {case: server.digests(graphs.stock(**options)) for case, options in CASES.items()}


def test_the_cases_differ(wanted: dict[str, list[str]]) -> None:
    assert len({tuple(found) for found in wanted.values()}) == len(CASES)


@pytest.mark.parametrize("fields", MODES, ids=name_of)
@pytest.mark.parametrize("make", [graphs.ours, graphs.ours_applied], ids=["loader", "apply"])
def test_a_graph_of_ours_gives_stock_bits(
    make: Callable[..., graphs.Graph], fields: dict[str, Any], where: HostServer, wanted: dict[str, list[str]]
) -> None:
    for case, options in CASES.items():
        assert where.digests(make(fields, **options)) == wanted[case], case


def test_a_stock_graph_in_between_is_as_before(where: HostServer, wanted: dict[str, list[str]]) -> None:
    where.digests(graphs.ours_applied(HALF))
    assert where.digests(graphs.stock(lora=LORA["a"])) == wanted["lora"]
    assert where.digests(graphs.ours_applied(HALF, lora=LORA["a"])) == wanted["lora"]
    assert where.digests(graphs.stock()) == wanted["txt2img"]


# Another policy, prompt or seed: (first, then) as arguments of graphs.ours.
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "policy": ({"fields": {"mode": "auto"}}, {"fields": {"mode": "model", "low": "10%"}}),
    "mode": ({"fields": {"mode": "auto"}}, {"fields": {"mode": "none"}}),
    "prompt": ({"prompt": "a cat"}, {"prompt": "a dog"}),
    "seed": ({"seed": 31}, {"seed": 32}),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_opens_no_model_file(switch: str, where: HostServer) -> None:
    first, then = SWITCHES[switch]
    for options in (first, then, first):  # both known, so that no cached output is what is counted
        where.run(graphs.ours(**options))
    where.opened()
    for options in (then | {"seed": 41}, first | {"seed": 42}, then | {"seed": 43}):
        where.run(graphs.ours(**options))
    assert where.opened() == []


@pytest.mark.parametrize("switch", ["mode", "prompt", "seed"])
def test_a_switch_moves_no_weight_where_all_fits(switch: str, sim_server: HostServer) -> None:
    """What goes to the device beside weights is the same as the stock graph's second prompt: noise, text, picture."""
    sim_server.free()
    for seed in (51, 52):
        sim_server.run(graphs.stock(seed=seed))
    sim_server.reset_counters()
    sim_server.run(graphs.stock(seed=53, prompt="a dog"))
    beside = sim_server.counters()["copied"]["h2d_bytes"]
    first, then = SWITCHES[switch]
    sim_server.free()
    for options in (first, then, first):
        sim_server.run(graphs.ours(**options))
    for number, options in enumerate((then, first, then)):
        sim_server.reset_counters()
        sim_server.run(graphs.ours(**(options | {"seed": 61 + number})))
        copied = sim_server.counters()["copied"]
        assert copied["h2d_bytes"] <= beside + 64 * 1024, "no weights, which are 8 MiB"


def test_a_lora_switch_opens_only_the_lora(where: HostServer) -> None:
    for lora in (None, LORA["a"]):
        where.run(graphs.ours(lora=lora))
    where.opened()
    where.run(graphs.ours(lora=LORA["b"], seed=71))
    assert set(where.opened()) <= {LORA["b"]}
    where.run(graphs.ours(lora=None, seed=72))
    assert where.opened() == []


def test_without_a_lora_no_trace_of_one_is_left(where: HostServer, wanted: dict[str, list[str]]) -> None:
    for case in ("lora", "txt2img", "img2img_lora", "txt2img", "lora"):
        assert where.digests(graphs.ours(HALF, **CASES[case])) == wanted[case], case


def with_report(graph: graphs.Graph) -> graphs.Graph:
    """The graph with a VRAMReport, id 90, behind the decode."""
    last = next(node for node, entry in graph.items() if entry["class_type"] == "VAEDecode")
    return {**graph, "90": {"class_type": "VRAMReport", "inputs": {"anything": [last, 0]}}}


def in_time(look: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What `look` answers once it is true, or at the end: reports are closed beside the host's own loop."""
    until = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def files_of(server: HostServer, prompt_id: str) -> list[dict[str, Any]]:
    """Reports in the output folder that are about this prompt."""
    found = [json.loads(path.read_text()) for path in (server.base / "output").rglob("*.json")]
    return [report for report in found if report.get("prompt_id") == prompt_id]


def test_the_report_comes_back_with_the_prompt(where: HostServer) -> None:
    prompt_id = where.queue(with_report(graphs.ours({"mode": "auto"}, seed=81)))
    entry = where.wait(prompt_id)
    assert entry["status"]["status_str"] == "success", where.log()[-2000:]
    assert in_time(lambda: files_of(where, prompt_id)), f"no file below {where.base / 'output'}"
    report = where.get(f"/offload/report/{prompt_id}")
    assert report["schema"] == "offload-report/1" and report["prompt_id"] == prompt_id and report["complete"]
    record = where.history(prompt_id)["outputs"]["90"]
    assert "vram_report" in record and 0 < len("".join(record["text"])) <= 1024
