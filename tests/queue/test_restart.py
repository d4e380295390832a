"""Invariant: after any restart of the host or of the command every item has one row, and a re-run is marked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ..cli.conftest import Ended
from .conftest import rows
from .process import start_command
from .stub import Host

Queue = Callable[..., Ended]


def items(path: Path) -> list[int]:
    return [int(row["item"]) for row in rows(path)]


def done(path: Path) -> int:
    return len(rows(path)) if path.exists() else 0


def again(path: Path) -> dict[int, bool]:
    return {int(row["item"]): row["rerun"] == "true" for row in rows(path)}


# ---------------------------------------------------------------------- the host
@pytest.mark.parametrize("away_s", [0.0, 0.6])
def test_the_host_is_restarted_in_the_middle(host: Host, queue: Queue, output: Path, away_s: float) -> None:
    host.seconds = 0.2

    def restart() -> None:
        host.wait_until(lambda: len(host.ran) == 3 and done(output) == 2)
        host.restart(away_s)

    other = threading.Thread(target=restart)
    other.start()
    ended = queue("--set", "3.seed=1..6")
    other.join()
    assert ended.code == 0
    assert sorted(items(output)) == [1, 2, 3, 4, 5, 6]
    # the third was running and the fourth may have been waiting; whatever ran before is not run again
    marked = again(output)
    assert marked[3]
    assert not any(marked[number] for number in (1, 2, 5, 6))
    assert sorted(row["prompt_id"] for row in rows(output)) == sorted({row["prompt_id"] for row in rows(output)})
    assert {row["attempts"] for row in rows(output) if row["rerun"] == "true"} == {"2"}
    if away_s:
        assert "waiting up to 20 s" in ended.err
    assert "sent again" in ended.err


def test_a_host_that_starts_later_is_waited_for(host: Host, queue: Queue, output: Path) -> None:
    host.kill()
    timer = threading.Timer(0.5, host.start)
    timer.start()
    ended = queue("--set", "3.seed=1..2")
    timer.join()
    assert ended.code == 0
    assert "refused" in ended.err
    assert again(output) == {1: False, 2: False}


def test_a_host_that_does_not_come_back(host: Host, queue: Queue, output: Path) -> None:
    host.seconds = 0.1

    def kill() -> None:
        host.wait_until(lambda: len(host.ran) == 2)
        host.kill()

    other = threading.Thread(target=kill)
    other.start()
    ended = queue("--set", "3.seed=1..4", "--wait", "0.7")
    other.join()
    assert ended.code == 3
    assert "not back within 0.7 s" in ended.err
    assert items(output) in ([1], [])
    host.start()
    assert queue("--set", "3.seed=1..4").code == 0
    assert sorted(items(output)) == [1, 2, 3, 4]
    assert again(output)[2] and not again(output)[4]


def test_an_answer_that_was_cut_off_does_not_run_the_prompt_twice(host: Host, queue: Queue, output: Path) -> None:
    host.swallow = lambda count: count == 2
    assert queue("--set", "3.seed=1..4").code == 0
    assert [graph["3"]["inputs"]["seed"] for _, graph in host.taken] == [1, 2, 3, 4]
    assert items(output) == [1, 2, 3, 4]
    assert not any(again(output).values())


def test_an_item_that_takes_the_host_down_every_time(host: Host, queue: Queue, output: Path) -> None:
    host.dies_on = lambda graph: graph["3"]["inputs"]["seed"] == 2
    ended = queue("--set", "3.seed=1..4", "--keep-going", "--ahead", "3")
    assert ended.code == 1
    got = {int(row["item"]): row["status"] for row in rows(output)}
    assert got == {1: "success", 2: "lost", 3: "success", 4: "success"}
    assert sum(graph["3"]["inputs"]["seed"] == 2 for graph in host.ran) == 3
    lost = next(row for row in rows(output) if row["status"] == "lost")
    assert lost["attempts"] == "3"
    assert "forgot it 3 times" in lost["error"]


def test_a_prompt_that_somebody_deleted_is_sent_again(host: Host, queue: Queue, output: Path) -> None:
    host.seconds = 0.3

    def delete() -> None:
        host.wait_until(lambda: host.running is not None and len(host.pending) == 1)
        with host.lock:
            host.pending.clear()

    other = threading.Thread(target=delete)
    other.start()
    assert queue("--set", "3.seed=1..3").code == 0
    other.join()
    assert sorted(items(output)) == [1, 2, 3]
    assert again(output) == {1: False, 2: True, 3: False}


def test_faults_that_pass_are_waited_out(host: Host, queue: Queue, output: Path) -> None:
    count = [0]

    def answer(method: str, path: str) -> Any:
        count[0] += 1
        return (503, {}, b"<html>busy</html>") if 3 <= count[0] <= 6 else None

    host.answer = answer
    ended = queue("--set", "3.seed=1..2")
    assert ended.code == 0
    assert items(output) == [1, 2]
    assert "status 503" in ended.err


def test_a_fault_that_stays_ends_it(host: Host, queue: Queue) -> None:
    host.answer = lambda method, path: (500, {}, b"") if path.startswith("/history/") else None
    ended = queue("--wait", "1")
    assert ended.code == 3
    assert "status 500 from /history/" in ended.err


# ---------------------------------------------------------------------- the command
@pytest.fixture
def start(host: Host, workflow: Path, output: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The command as a process of its own."""
    begun: list[subprocess.Popen[str]] = []

    def start(*more: str) -> subprocess.Popen[str]:
        arguments = ["queue", str(workflow), "--host", host.url, "--output", str(output), *more]
        begun.append(start_command(*arguments))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def test_the_command_is_killed_and_takes_up_what_the_host_did_meanwhile(
    host: Host, queue: Queue, output: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    host.seconds = 0.15
    process = start("--set", "3.seed=1..6")
    host.wait_until(lambda: len(host.ran) == 3)
    process.kill()
    process.wait()
    host.wait_until(lambda: not host.pending and not host.running)  # the host ends what it was given
    before = len(host.taken)
    assert queue("--set", "3.seed=1..6").code == 0
    assert sorted(items(output)) == [1, 2, 3, 4, 5, 6]
    assert not any(again(output).values())
    assert len(host.taken) == 6  # nothing was sent twice
    assert before < 6


def test_the_command_and_the_host_are_killed(
    host: Host, queue: Queue, output: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    host.seconds = 0.3
    process = start("--set", "3.seed=1..5")
    host.wait_until(lambda: len(host.ran) == 3 and done(output) == 2)
    process.kill()
    process.wait()
    host.restart()
    assert queue("--set", "3.seed=1..5").code == 0
    assert sorted(items(output)) == [1, 2, 3, 4, 5]
    marked = again(output)
    assert marked[3] and not marked[1] and not marked[5]


def test_many_kills_at_any_moment(
    host: Host, queue: Queue, output: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    host.seconds = 0.03
    for round_ in range(4):
        process = start("--set", "3.seed=1..24")
        more = len(host.ran) + 3 + round_
        host.wait_until(partial(lambda most, one: len(host.ran) >= most or one.poll() is not None, more, process))
        process.kill()
        process.wait()
        if output.exists():
            with output.open("ab") as file:  # as a crash in the middle of a row would leave it
                file.write(b'7,success,"streamed')
    assert queue("--set", "3.seed=1..24").code == 0
    assert sorted(items(output)) == list(range(1, 25))
    assert len(host.taken) == 24
    # one that was killed just before it sent cannot know that, and says that the item may have run
    told = [json.loads(line) for line in Path(f"{output}.resume").read_text().splitlines()[1:]]
    acknowledged = {event["prompt_id"] for event in told if event["event"] == "queued"}
    lost = [event for event in told if event["event"] == "lost"]
    assert not acknowledged & {event["prompt_id"] for event in lost}
    assert {number for number, marked in again(output).items() if marked} == {event["item"] for event in lost}


def test_ctrl_c_takes_back_only_what_is_ours(
    host: Host, queue: Queue, output: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    host.seconds = 30
    process = start("--set", "3.seed=1..6", "--ahead", "3")
    host.wait_until(lambda: host.running is not None and len(host.pending) == 2)
    with host.lock:
        host.pending.append((99.0, "somebody-elses", host.taken[0][1]))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "3 of our prompts taken back" in err
    interrupted = host.taken[0][0]
    host.wait_until(lambda: interrupted in host.history)
    assert host.stopped == {interrupted}
    host.wait_until(lambda: host.running is not None and host.running[1] == "somebody-elses")
    assert [body for method, path, body in host.asked if path == "/interrupt"] == [{"prompt_id": interrupted}]
    host.stopped.add("somebody-elses")
    host.seconds = 0.02
    assert queue("--set", "3.seed=1..6", "--ahead", "3").code == 0
    assert sorted(items(output)) == list(range(1, 7))
    assert again(output) == {1: True, 2: False, 3: False, 4: False, 5: False, 6: False}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_can_leave_them(
    host: Host, queue: Queue, output: Path, start: Callable[..., subprocess.Popen[str]], sent: signal.Signals
) -> None:
    host.seconds = 0.4
    process = start("--set", "3.seed=1..4", "--on-interrupt", "leave")
    host.wait_until(lambda: host.running is not None and len(host.pending) == 1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "left to the host" in err
    assert not [path for _, path, _ in host.asked if path == "/interrupt"]
    host.wait_until(lambda: len(host.history) == 2)
    assert queue("--set", "3.seed=1..4").code == 0
    assert sorted(items(output)) == [1, 2, 3, 4]
    assert len(host.taken) == 4
    assert not any(again(output).values())


def test_two_commands_do_not_run_one_batch(
    host: Host, queue: Queue, output: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    host.seconds = 1.0
    start("--set", "3.seed=1..3")
    host.wait_until(lambda: host.taken)
    ended = queue("--set", "3.seed=1..3")
    assert ended.code == 2
    assert "in use" in ended.err


# ---------------------------------------------------------------------- the files
def test_rows_that_are_missing_come_back(host: Host, queue: Queue, output: Path) -> None:
    assert queue("--set", "3.seed=1..3").code == 0
    whole = output.read_bytes()
    output.unlink()
    ended = queue("--set", "3.seed=1..3")
    assert ended.code == 0
    assert "3 rows put back" in ended.err
    assert output.read_bytes() == whole
    for cut in range(0, len(whole), 7):
        output.write_bytes(whole[:cut])
        assert queue("--set", "3.seed=1..3").code == 0
        assert output.read_bytes() == whole
    assert len(host.taken) == 3


def test_a_resume_file_that_is_torn_at_any_byte(host: Host, queue: Queue, output: Path) -> None:
    assert queue("--set", "3.seed=1..2").code == 0
    journal = Path(f"{output}.resume")
    whole = journal.read_bytes()
    for cut in range(0, len(whole), 37):
        journal.write_bytes(whole[:cut])
        output.unlink(missing_ok=True)
        assert queue("--set", "3.seed=1..2").code == 0
        assert sorted(items(output)) == [1, 2]


def test_files_of_another_batch_are_refused(host: Host, queue: Queue, output: Path, tmp_path: Path) -> None:
    assert queue("--set", "3.seed=1..3").code == 0
    for more, word in [
        (["--set", "3.seed=1..4"], "3 items, this one has 4"),
        (["--set", "3.seed=2..4"], "another workflow or other values"),
        (["--set", "3.seed=1..3", "--output", str(tmp_path / "b.csv"), "--resume", f"{output}.resume"], "'b.csv'"),
    ]:
        ended = queue(*more)
        assert ended.code == 2
        assert word in ended.err
    Path(f"{output}.resume").unlink()
    ended = queue("--set", "3.seed=1..3")
    assert ended.code == 2
    assert "does not know" in ended.err
    ended = queue("--set", "3.steps=1..3")
    assert ended.code == 2
    assert "other columns" in ended.err
    output.write_text("my notes\n")
    before = output.read_bytes()
    ended = queue()
    assert ended.code == 2
    assert output.read_bytes() == before
    assert len(host.taken) == 3


@pytest.mark.parametrize("text", ["{}\n", "no json\n", '{"schema": "other/1"}\n', "[]\n"])
def test_a_resume_file_that_is_none(host: Host, queue: Queue, output: Path, text: str) -> None:
    Path(f"{output}.resume").write_text(text)
    ended = queue()
    assert ended.code == 2
    assert "--resume" in ended.err
    assert host.taken == []


def test_a_damaged_event(host: Host, queue: Queue, output: Path) -> None:
    assert queue().code == 0
    journal = Path(f"{output}.resume")
    journal.write_text(journal.read_text() + '{"event": "done"}\n')
    ended = queue()
    assert ended.code == 2
    assert "damaged" in ended.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    from balanced_offload.offload.queue.results import append_line

    with pytest.raises(OSError, match="No space"):
        append_line(Path("/dev/full"), b"a row\n")


def test_a_short_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from balanced_offload.offload.queue import results

    path = tmp_path / "rows"
    results.append_line(path, b"first\n")
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    with pytest.raises(OSError, match="only 3 of 7"):
        results.append_line(path, b"second\n")
    assert path.read_bytes() == b"first\n"


def test_an_old_host_that_gives_ids_of_its_own(host: Host, queue: Queue, output: Path) -> None:
    host.own_ids = True
    assert queue("--set", "3.seed=1..3").code == 0
    assert [row["prompt_id"] for row in rows(output)] == [prompt_id for prompt_id, _ in host.taken]
    told = [json.loads(line) for line in Path(f"{output}.resume").read_text().splitlines()[1:]]
    assert {event["event"] for event in told} == {"send", "void", "queued", "done"}
