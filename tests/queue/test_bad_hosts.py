"""Invariant: a host's no is told per node, and whatever else answers is named, followed nowhere, and sent nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from balanced_offload.offload.queue.progress import Progress, duration
from balanced_offload.offload.queue.server import Server
from balanced_offload.offload.queue.workflow import Asked

from ..cli.conftest import Ended, command
from .conftest import rows
from .stub import Host

Queue = Callable[..., Ended]

REFUSAL = {
    "error": {
        "type": "prompt_outputs_failed_validation",
        "message": "Prompt outputs failed validation",
        "details": "Value not in list: ckpt_name: 'a.safetensors' not in []",
        "extra_info": {},
    },
    "node_errors": {
        "4": {
            "errors": [
                {
                    "type": "value_not_in_list",
                    "message": "Value not in list",
                    "details": "ckpt_name: 'a.safetensors' not in []",
                    "extra_info": {"input_name": "ckpt_name"},
                }
            ],
            "dependent_outputs": ["9"],
            "class_type": "Loader",
        },
        "3": {
            "errors": [{"type": "value_bigger_than_max", "message": "Value 99 bigger than max of 20", "details": "x"}],
            "dependent_outputs": ["9"],
            "class_type": "KSampler",
        },
    },
}


def test_a_refusal_is_told_per_node(host: Host, queue: Queue, output: Path) -> None:
    host.refuse = lambda graph: (400, REFUSAL) if graph["3"]["inputs"]["seed"] == 2 else None
    ended = queue("--set", "3.seed=1..3")
    assert ended.code == 1
    assert "node 4 (Loader): Value not in list: ckpt_name: 'a.safetensors' not in []" in ended.err
    assert "node 3 (KSampler): Value 99 bigger than max of 20: x" in ended.err
    refused = next(row for row in rows(output) if row["status"] == "refused")
    assert refused["item"] == "2"
    assert refused["error"].startswith("Prompt outputs failed validation; node 4 (Loader)")
    assert len(host.taken) < 3
    assert queue("--set", "3.seed=1..3").code == 1
    assert sorted(row["item"] for row in rows(output)) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (400, {"error": {"type": "no_prompt", "message": "No prompt provided", "details": ""}}, ["No prompt provided"]),
        (400, {"error": "in old words", "node_errors": []}, ["in old words"]),
        (400, {"error": {}, "node_errors": {"4": {"errors": []}}}, ["status 400", "node 4 (?): no reason given"]),
        (400, {"error": {}, "node_errors": {"4": "odd"}}, ["node 4 (?): odd"]),
        (403, None, ["status 403"]),
        (413, None, ["status 413"]),
        (500, None, ["status 500", "log"]),
        (200, {"odd": 1}, ["status 200"]),
    ],
)
def test_other_refusals(host: Host, queue: Queue, output: Path, status: int, answer: Any, words: list[str]) -> None:
    host.refuse = lambda graph: (status, answer)
    assert queue().code == 1
    row = rows(output)[0]
    assert row["status"] == "refused"
    for word in words:
        assert word in row["error"]


def test_outputs_that_the_host_leaves_out_are_told_once(host: Host, queue: Queue) -> None:
    host.left_out = REFUSAL["node_errors"]
    ended = queue("--set", "3.seed=1..3")
    assert ended.code == 0
    assert ended.err.count("left out by the host: node 4 (Loader)") == 1


def test_a_redirect_is_not_followed(host: Host, queue: Queue, output: Path) -> None:
    other = Host()
    try:
        host.answer = lambda method, path: (307, {"Location": other.url + path}, b"")
        ended = queue()
        assert ended.code == 3
        assert f"redirects to {other.url}/queue" in ended.err
        assert "give that as --host" in ended.err
        assert other.asked == []
        host.answer = lambda method, path: (
            (307, {"Location": other.url + path}, b"") if (method, path) == ("POST", "/prompt") else None
        )
        ended = queue()
        assert ended.code == 3
        assert other.asked == []
        assert rows(output) == []
    finally:
        other.close()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b"", ["status 404"]),
        (200, b"<html>hello</html>", ["no JSON"]),
        (200, b"{}", ["queue_running"]),
        (200, b'{"queue_running": 1, "queue_pending": 2}', ["queue_running"]),
        (401, b"{}", ["status 401"]),
        (200, b"[" * 100_000, ["no JSON"]),
    ],
)
def test_something_else_that_answers(host: Host, queue: Queue, status: int, body: bytes, words: list[str]) -> None:
    host.answer = lambda method, path: (status, {}, body)
    ended = queue()
    assert ended.code == 3
    for word in [host.url, *words]:
        assert word in ended.err
    assert {method for method, _, _ in host.asked} == {"GET"}


def test_one_id_for_two_prompts(host: Host, queue: Queue, output: Path) -> None:
    host.seconds = 1
    told: list[str] = []

    def answer(method: str, path: str) -> Any:
        if (method, path) != ("POST", "/prompt"):
            return None
        told.append(path)
        return 200, {}, json.dumps({"prompt_id": "always-this", "number": 1, "node_errors": {}}).encode()

    host.answer = answer
    ended = queue("--set", "3.seed=1..2")
    assert ended.code == 3
    assert "always-this, to two prompts" in ended.err
    assert len(told) == 2


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("box", "http://box"),
        ("https://box/comfy/", "https://box/comfy"),
        ("http://[::1]:8188/", "http://[::1]:8188"),
        ("https://bücher.example/ä", "https://bücher.example/%C3%A4"),
    ],
)
def test_urls(url: str, shown: str) -> None:
    assert Server(url).url == shown


@pytest.mark.parametrize(
    "url",
    [
        "ftp://box",
        "file:///etc",
        "http://",
        "http://u:p@box",
        "http://box?x=1",
        "http://box:no",
        "http://b\nx",
        "http://a b",
        "http://" + "x" * 70,
    ],
)
def test_urls_that_are_refused(url: str, workflow: Path, tmp_path: Path) -> None:
    with pytest.raises(Asked):
        Server(url)
    ended = command("queue", str(workflow), "--host", url, "--output", str(tmp_path / "r.csv"))
    assert ended.code == 2
    assert "--host" in ended.err
    assert not (tmp_path / "r.csv").exists()


def test_https_where_there_is_none(host: Host, queue: Queue) -> None:
    ended = queue("--host", host.url.replace("http:", "https:"))
    assert ended.code == 3
    assert "speaks no https" in ended.err


def test_a_path_before_the_api_is_kept(host: Host, queue: Queue) -> None:
    host.answer = lambda method, path: (404, {}, b"") if not path.startswith("/behind/proxy/") else None
    ended = queue("--host", f"{host.url}/behind/proxy/")
    assert ended.code == 3  # the stub knows no such path; what counts is what it was asked
    assert {path for _, path, _ in host.asked} == {"/behind/proxy/queue"}


def test_a_proxy_of_the_environment_is_not_used(host: Host, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert queue().code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], ["--limit", "1 or more"]),
        (["--ahead", "0"], ["--ahead", "1 or more"]),
        (["--timeout", "-1"], ["--timeout", "above zero"]),
        (["--timeout", "nan"], ["--timeout", "above zero"]),
        (["--wait", "inf"], ["--wait", "above zero"]),
        (["--combine", "all"], ["--combine", "product, zip"]),
        (["--on-interrupt", "panic"], ["--on-interrupt", "cancel, leave"]),
        (["--output", "results.xlsx"], ["--output", ".csv or .jsonl"]),
        (["--set", "3.model=x"], ["linked"]),
    ],
)
def test_bad_options(host: Host, queue: Queue, arguments: list[str], words: list[str]) -> None:
    ended = queue(*arguments)
    assert ended.code == 2
    for word in words:
        assert word in ended.err
    assert host.asked == []


def test_the_output_and_the_resume_file_are_two(host: Host, queue: Queue, output: Path) -> None:
    ended = queue("--resume", str(output))
    assert ended.code == 2
    assert "is the output" in ended.err


# ---------------------------------------------------------------------- what people see
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_speed_and_time_left() -> None:
    now = [0.0]
    terminal = Terminal()
    progress = Progress(10, 2, terminal, clock=lambda: now[0])
    now[0] = 4.0
    progress.item_done("item 3")
    progress.item_done("item 4")
    progress.show("item 5  step 3/20")
    assert progress.line() == "[#########...............] 4/10  0.5 it/s  ETA 0:12  item 5  step 3/20"
    assert "\r\033[K[3/10] item 3\n" in terminal.getvalue()
    progress.close()
    assert terminal.getvalue().endswith("\r\033[K")


def test_a_prompt_cannot_break_the_terminal() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    progress = Progress(1, 0, stream)
    progress.item_done("a\033[2J\r\nb 猫 \ud800 \x07")
    stream.seek(0)
    assert stream.read() == "[1/1] a\\x1b[2J\\r b \\u732b \\ud800 \\x07\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (10931, "3:02:11")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
