"""Invariant: a batch comes through on a real host as on the stub: killed and started again, one row per item."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..cli.conftest import Ended, command
from ..queue.conftest import records, rows
from ..queue.process import start_command
from . import server as server_module
from .conftest import ROOT, Host
from .server import HostServer

WAITING_NODE = '''
"""A node that takes its time, can be interrupted, and fails where it is told to."""
import time

import comfy.model_management


class QueueWait:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "wait", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE",),
                "seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 60.0, "step": 0.01}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 100}),
                "fails_at": ("INT", {"default": -1, "min": -1, "max": 100}),
                "note": ("STRING", {"default": ""}),
            }
        }

    def wait(self, image, seconds, seed, fails_at, note):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.01)
        if seed == fails_at:
            raise RuntimeError(f"told to fail at {seed}")
        return (image * 0 + seed / 100,)


NODE_CLASS_MAPPINGS = {"QueueWait": QueueWait}
'''

WORKFLOW: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}},
    "2": {
        "class_type": "QueueWait",
        "inputs": {"image": ["1", 0], "seconds": 0, "seed": 1, "fails_at": -1, "note": ""},
        "_meta": {"title": "Wait"},
    },
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "batch/queue"}},
    "4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
}


@pytest.fixture(scope="module")
def served(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """A server of this module's own, since it is killed on the way. No models."""
    folder = tmp_path_factory.mktemp("queue")
    pack = folder / "queue_wait"
    for made in (pack, folder / "models", folder / "base"):
        made.mkdir()
    (pack / "__init__.py").write_text(WAITING_NODE)
    server = HostServer(host.path, folder / "base", folder / "models", ROOT, packs=(pack,))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(WORKFLOW))
    return path


@pytest.fixture
def options(served: HostServer, flow: Path, tmp_path: Path) -> list[str]:
    url = f"http://127.0.0.1:{served.port}"
    return ["queue", str(flow), "--host", url, "--output", str(tmp_path / "out.csv"), "--wait", "120"]


@pytest.fixture
def queue(options: list[str]) -> Callable[..., Ended]:
    return lambda *more: command(*options, *more)


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def done(path: Path) -> int:
    return len(rows(path)) if path.exists() else 0


def running_seed(served: HostServer) -> int | None:
    running = served.get("/queue")["queue_running"]
    return int(running[0][2]["2"]["inputs"]["seed"]) if running else None


def kill(served: HostServer) -> None:
    assert served.process is not None
    served.process.kill()
    served.process.wait(10)
    served.process = None


def start_again(served: HostServer, monkeypatch: pytest.MonkeyPatch) -> None:
    port = served.port
    monkeypatch.setattr(server_module, "free_port", lambda: port)
    served.start()


@pytest.mark.parametrize("reported_by", ["node", "route"])
def test_a_batch_with_pictures_and_reports(
    served: HostServer, flow: Path, queue: Callable[..., Ended], tmp_path: Path, reported_by: str
) -> None:
    lines = tmp_path / "out.jsonl"
    if reported_by == "node":
        graph = {**WORKFLOW, "5": {"class_type": "VRAMReport", "inputs": {"anything": ["2", 0]}}}
    else:  # the pack watches, though no node of it is in the graph
        graph = {**WORKFLOW, "2": {**WORKFLOW["2"], "inputs": {**WORKFLOW["2"]["inputs"], "seconds": 0.3}}}
    flow.write_text(json.dumps(graph))
    ended = queue("--set", "Wait.seed=1..4", "--set", '2.note=猫 "quoted"\nline', "--output", str(lines))
    assert ended.code == 0, ended.err
    got = records(lines)
    assert [row["inputs"] for row in got] == [{"2.seed": seed, "2.note": '猫 "quoted"\nline'} for seed in (1, 2, 3, 4)]
    for row in got:
        assert row["status"] == "success" and not row["rerun"]
        saved, preview = sorted(row["images"], key=lambda name: "[temp]" in name)
        assert saved.startswith("batch/queue_") and (served.base / "output" / saved).is_file()
        assert preview.endswith(".png [temp]")
        assert row["prompt_s"] is not None
        assert row["cached"] is False
        assert row["report"]["prompt_id"] == row["prompt_id"]
        assert row["report"]["schema"] == "offload-report/1"
        assert row["verdict"] == row["report"]["verdict"]
    assert len({row["images"][0] for row in got}) == 4


def test_the_same_again_is_cached(queue: Callable[..., Ended], tmp_path: Path) -> None:
    assert queue("--set", "2.seed=50", "--set", "2.seed=50").code == 0
    assert [row["cached"] for row in rows(tmp_path / "out.csv")] == ["false", "true"]


def test_the_host_is_killed_and_started_again(
    served: HostServer, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.csv"
    process = start_command(*options, "--set", "2.seed=1..5", "--set", "2.seconds=1.5")
    until(lambda: done(output) == 2 and running_seed(served) == 3)
    kill(served)
    start_again(served, monkeypatch)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    got = rows(output)
    assert sorted(int(row["item"]) for row in got) == [1, 2, 3, 4, 5]
    marked = {int(row["item"]): row["rerun"] == "true" for row in got}
    assert marked[3] and not (marked[1] or marked[2] or marked[5])
    assert {row["status"] for row in got} == {"success"}
    assert "waiting up to 120 s" in err


def test_the_command_is_killed_and_the_host_goes_on(
    served: HostServer, options: list[str], queue: Callable[..., Ended], tmp_path: Path
) -> None:
    output = tmp_path / "out.csv"
    settings = ("--set", "2.seed=11..15", "--set", "2.seconds=0.8")
    process = start_command(*options, *settings)
    until(lambda: done(output) == 1 and running_seed(served) == 12)
    process.kill()
    process.communicate()
    assert queue(*settings).code == 0
    got = rows(output)
    assert sorted(int(row["item"]) for row in got) == [1, 2, 3, 4, 5]
    assert {row["rerun"] for row in got} == {"false"}
    ids = [row["prompt_id"] for row in got]
    assert len(set(ids)) == 5 and all(served.history(prompt_id) for prompt_id in ids)


def test_ctrl_c_leaves_others_alone(
    served: HostServer, options: list[str], queue: Callable[..., Ended], tmp_path: Path
) -> None:
    output = tmp_path / "out.csv"
    process = start_command(*options, "--set", "2.seed=21..24", "--set", "2.seconds=20")
    until(lambda: running_seed(served) == 21 and len(served.get("/queue")["queue_pending"]) == 1)
    other = served.queue({**WORKFLOW, "2": {**WORKFLOW["2"], "inputs": {**WORKFLOW["2"]["inputs"], "seed": 77}}})
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "2 of our prompts taken back" in err
    assert served.wait(other)["status"]["status_str"] == "success"
    shown = served.get("/queue")
    assert shown["queue_running"] == shown["queue_pending"] == []
    assert done(output) == 0


def test_an_item_that_fails_and_one_that_takes_too_long(queue: Callable[..., Ended], tmp_path: Path) -> None:
    settings = ("--set", "2.seed=31..33", "--set", "2.fails_at=32", "--keep-going")
    ended = queue(*settings)
    assert ended.code == 1
    got = rows(tmp_path / "out.csv")
    assert [row["status"] for row in got] == ["success", "error", "success"]
    assert "node 2 (QueueWait): RuntimeError: told to fail at 32" in got[1]["error"]
    late = tmp_path / "late.csv"
    ended = queue("--set", "2.seconds=30", "--set", "2.seed=40", "--timeout", "1", "--output", str(late))
    assert ended.code == 1
    assert rows(late)[0]["status"] == "timeout"


def test_a_refusal_names_the_node(queue: Callable[..., Ended], tmp_path: Path) -> None:
    ended = queue("--set", "1.width=100000", "--set", "2.seed=101")
    assert ended.code == 1
    assert rows(tmp_path / "out.csv")[0]["status"] == "refused"
    assert "node 1 (EmptyImage)" in ended.err
    assert "node 2 (QueueWait)" in ended.err


def test_a_fraction_for_an_int_is_refused_before_anything_is_sent(
    served: HostServer, queue: Callable[..., Ended], tmp_path: Path
) -> None:
    before = len(served.get("/history"))
    assert queue("--set", "2.seconds=0..0.2:0.1").code == 0  # 0 in the workflow, FLOAT in the node
    ended = queue("--set", "2.seed=1.5", "--output", str(tmp_path / "b.csv"))
    assert ended.code == 2
    assert "2.seed" in ended.err
    assert len(served.get("/history")) == before + 3
