"""Invariant: a hundred prompts leave a server as ten did, and what goes wrong between two prompts leaves nothing stale.

One server on the simulated accelerator for this file, so that what it holds can be counted.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from . import graphs
from .server import HostServer
from .test_prompts import HALF, in_time, with_report

HERE = Path(__file__).resolve().parent
CAP = 256 << 20
WARM = 20
"""Prompts until caches of the host and of the interpreter have grown to their size."""
PROMPTS = 100
TOO_MUCH: dict[str, Any] = {"size": 512, "batch": 96, "steps": 1}
"""One attention matrix of the smaller half batch alone has 400 MiB."""


@pytest.fixture(scope="module")
def own_server(servers: Callable[..., HostServer], vram: ModuleType, root: Path) -> HostServer:
    """A server that no other file talks to, with 256 MiB."""
    environment = {"SIMULATED_VRAM": str(CAP), "BALANCED_OFFLOAD_CHECKOUT": str(root)}
    # glibc keeps what many small threads freed; with one arena what is counted is what is held.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return servers(packs=(HERE / "packs" / "simulated_device",), environment=environment)


def held(server: HostServer) -> int:
    """Bytes on the device, once no prompt runs."""
    return int(server.counters()["allocated"])


def test_a_hundred_prompts_leave_rss_and_device_flat(own_server: HostServer) -> None:
    """Policies, prompts and LoRA alternate in a cycle of four: after 100 it holds what it held after 20."""
    cycle = itertools.cycle(
        [
            {"fields": {"mode": "auto"}, "prompt": "a cat"},
            {"fields": {"mode": "auto"}, "prompt": "a dog"},
            {"fields": {"mode": "model"}, "prompt": "a cat"},
            {"fields": {"mode": "auto"}, "prompt": "a cat", "lora": "tiny_sd3_a.safetensors"},
        ]
    )
    device: list[int] = []
    rss: list[int] = []
    for number in range(WARM + PROMPTS):
        own_server.run(with_report(graphs.ours(seed=1000 + number, **next(cycle))))
        if number == WARM - 1:
            own_server.opened()
        if number >= WARM - 4 and number % 4 == 3:
            device.append(held(own_server))
            rss.append(own_server.rss())
    assert set(own_server.opened()) <= {"tiny_sd3_a.safetensors"}, "no base file is read again"
    assert max(device) <= 1.01 * device[0], device
    first, last = sum(rss[:3]) / 3, sum(rss[-3:]) / 3
    assert last <= 1.01 * first, [size >> 20 for size in rss]


WRONG = ("free", "interrupt", "oom")


def interrupt_in_between(server: HostServer) -> None:
    """A prompt of many steps, stopped while it samples."""
    with server.listen() as events:
        prompt_id = server.queue(graphs.ours(HALF, seed=int(time.time()), steps=400), client=events.client)
        events.wait_for("progress", prompt_id=prompt_id)
        server.interrupt()
        entry = server.wait(prompt_id)
    assert entry["status"]["status_str"] == "error", "it was stopped"
    assert any(name == "execution_interrupted" for name, _ in entry["status"]["messages"])


def oom_in_between(server: HostServer) -> None:
    """Pictures whose activations cannot fit into 256 MiB, whatever leaves the device."""
    entry = server.wait(server.queue(graphs.ours({"mode": "auto"}, seed=int(time.time()), **TOO_MUCH)))
    assert entry["status"]["status_str"] == "error"
    assert "memory" in server.error_of(entry).lower(), server.error_of(entry)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_goes_wrong_in_between_leaves_nothing_stale(wrong: str, own_server: HostServer) -> None:
    graphs_after = [graphs.ours({"mode": "auto"}, seed=5), graphs.ours(HALF, seed=5), graphs.stock(seed=5)]
    wanted = own_server.digests(graphs.stock(seed=5))
    own_server.free()
    for graph in graphs_after:
        own_server.digests(graph)
    before = held(own_server)
    for _ in range(2):
        if wrong == "free":
            own_server.free()
            assert in_time(lambda: held(own_server) < 1 << 20), "everything left the device"
        elif wrong == "interrupt":
            interrupt_in_between(own_server)
        else:
            oom_in_between(own_server)
        for graph in graphs_after:
            own_server.free(unload_models=False)  # drops cached outputs only, so that it is computed again
            assert own_server.digests(graph) == wanted
    assert held(own_server) <= 1.01 * before
    own_server.free()
    assert in_time(lambda: held(own_server) < 1 << 20), "nothing is held after a free"


def test_an_interrupt_in_a_queue_ends_one_prompt_only(own_server: HostServer) -> None:
    with own_server.listen() as events:
        long = own_server.queue(graphs.ours(HALF, seed=91, steps=400), client=events.client)
        after = own_server.queue(graphs.ours(HALF, seed=92))
        events.wait_for("progress", prompt_id=long)
        own_server.interrupt()
    assert own_server.wait(long)["status"]["status_str"] == "error"
    assert own_server.wait(after)["status"]["status_str"] == "success"


def test_reports_of_failed_prompts_are_there(own_server: HostServer) -> None:
    """The report node never ran: the record is at its route all the same."""
    graph = with_report(graphs.ours({"mode": "auto"}, seed=93, **TOO_MUCH))
    prompt_id = own_server.queue(graph)
    assert own_server.wait(prompt_id)["status"]["status_str"] == "error"
    own_server.run(graphs.ours(seed=94))

    def closed() -> Any:
        report = own_server.get(f"/offload/report/{prompt_id}")
        return report if report["ended"] else None

    report = in_time(closed)
    assert report is not None, "never closed"
    assert report["verdict"] == "oom" and not report["complete"]
    assert report["error"]["type"] == "OutOfMemoryError" and "memory" in report["error"]["message"]


def test_routes_answer_while_prompts_run(own_server: HostServer) -> None:
    """Handlers ask no device: every answer comes, and quickly, whatever the worker does."""
    stop = threading.Event()
    slow: list[float] = []
    wrong: list[Any] = []

    def ask() -> None:
        while not stop.is_set():
            for path in ("/offload/status", "/offload/runs?limit=5"):
                start = time.monotonic()
                try:
                    own_server.get(path)
                except Exception as error:
                    wrong.append((path, error))
                slow.append(time.monotonic() - start)
            time.sleep(0.05)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for seed in range(8):
            own_server.run(graphs.ours(HALF if seed % 2 else {"mode": "auto"}, seed=2000 + seed))
    finally:
        stop.set()
        thread.join()
    assert not wrong and len(slow) > 10
    assert sorted(slow)[len(slow) // 2] < 0.5
