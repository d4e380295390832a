"""Invariant: one row per item with what the host and the report say, one prompt per item, and the exit code fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..cli.conftest import Ended, command
from .conftest import records, rows
from .process import start_command
from .stub import Host, a_report

Queue = Callable[..., Ended]


def seeds(host: Host) -> list[Any]:
    return [graph["3"]["inputs"]["seed"] for _, graph in host.taken]


@pytest.mark.parametrize("shape", ["new", "old"])
def test_a_range_runs_once_per_value(host: Host, queue: Queue, output: Path, shape: str) -> None:
    host.shape = shape
    ended = queue("--set", "3.seed=1..5")
    assert ended.code == 0
    assert ended.out == ""
    assert seeds(host) == [1, 2, 3, 4, 5]
    got = rows(output)
    assert [row["item"] for row in got] == ["1", "2", "3", "4", "5"]
    assert [row["3.seed"] for row in got] == ["1", "2", "3", "4", "5"]
    assert [row["prompt_id"] for row in got] == [prompt_id for prompt_id, _ in host.taken]
    assert [row["images"] for row in got] == [f"out_{number:05}_.png" for number in range(1, 6)]
    assert {row["status"] for row in got} == {"success"}
    assert {row["rerun"] for row in got} == {"false"}
    assert {row["attempts"] for row in got} == {"1"}
    assert all(abs(float(row["prompt_s"]) - host.seconds) < 0.01 for row in got)
    assert "5 of 5 items done, 0 not fine, 0 run again" in ended.err
    assert ended.err.count("success") == 5  # a line each, since it is no terminal


def test_the_workflow_as_it_is(host: Host, queue: Queue, output: Path) -> None:
    assert queue().code == 0
    assert seeds(host) == [7]
    assert len(rows(output)) == 1


def test_the_figures_of_the_report(host: Host, queue: Queue, output: Path, tmp_path: Path) -> None:
    host.pack = True
    host.end = lambda prompt_id, graph: {"outputs": {"20": {"vram_report": [a_report(prompt_id)], "text": ["x"]}}}
    assert queue("--set", "3.seed=1..2").code == 0
    for row in rows(output):
        assert row["verdict"] == "streamed"
        assert row["mode"] == "balanced"
        assert float(row["wall_s"]) == 1.25
        assert int(row["peak_vram"]) == 3 << 30
        assert int(row["moved_bytes"]) == 5_000
        assert row["hints"] == "raise-high"
        assert row["fits"] == "false"
    lines = tmp_path / "results.jsonl"
    ended = queue("--set", "3.seed=1..2", "--output", str(lines))
    assert ended.code == 0
    for record in records(lines):
        assert record["report"] == a_report(record["prompt_id"])
        assert record["inputs"] == {"3.seed": record["item"]}
        assert record["images"] and isinstance(record["images"], list)
        assert record["fits"] is False


@pytest.mark.parametrize("form", ["object", "text"])
def test_a_report_in_another_form(host: Host, queue: Queue, output: Path, form: str) -> None:
    def end(prompt_id: str, graph: Any) -> dict[str, Any]:
        report = a_report(prompt_id)
        return {"outputs": {"20": {"vram_report": report if form == "object" else [json.dumps(report)]}}}

    host.end = end
    assert queue().code == 0
    assert rows(output)[0]["verdict"] == "streamed"


def test_the_report_comes_from_the_route_where_the_graph_has_none(host: Host, queue: Queue, output: Path) -> None:
    host.pack = True
    host.end = lambda prompt_id, graph: {"report": a_report(prompt_id, "partial")}
    assert queue().code == 0
    assert rows(output)[0]["verdict"] == "partial"


def test_a_report_that_is_finished_after_the_prompt(host: Host, queue: Queue, output: Path) -> None:
    host.pack = True
    asked = []

    def answer(method: str, path: str) -> Any:
        if not path.startswith("/offload/report/"):
            return None
        asked.append(path)
        report = a_report(path.rpartition("/")[2], "resident", ended=len(asked) > 3)
        return 200, {}, json.dumps(report).encode()

    host.answer = answer
    host.end = lambda prompt_id, graph: {
        "outputs": {"20": {"vram_report": [a_report(prompt_id, "resident", ended=False)]}}
    }
    assert queue().code == 0
    assert len(asked) == 4
    assert rows(output)[0]["verdict"] == "resident"


def test_a_cached_report_of_an_earlier_prompt_is_not_taken(host: Host, queue: Queue, output: Path) -> None:
    host.pack = True
    first: list[str] = []

    def end(prompt_id: str, graph: Any) -> dict[str, Any]:
        first.append(prompt_id)
        return {"outputs": {"20": {"vram_report": [a_report(first[0])]}}}

    host.end = end
    assert queue("--set", "3.seed=1", "--set", "3.seed=1").code == 0
    assert [row["verdict"] for row in rows(output)] == ["streamed", ""]


def test_images_that_were_cached_are_said_to_be(host: Host, queue: Queue, output: Path) -> None:
    host.end = lambda prompt_id, graph: {
        "status": {
            "status_str": "success",
            "completed": True,
            "messages": [["execution_cached", {"nodes": ["3", "4", "9"], "prompt_id": prompt_id, "timestamp": 1}]],
        }
    }
    assert queue().code == 0
    assert rows(output)[0]["cached"] == "true"


def test_names_of_every_kind_of_file(host: Host, queue: Queue, output: Path) -> None:
    def file(name: str, kind: str, folder: str = "") -> dict[str, str]:
        return {"filename": name, "subfolder": folder, "type": kind}

    host.end = lambda prompt_id, graph: {
        "outputs": {
            "9": {"images": [file("a.png", "output", "2026\\07"), file("b.png", "temp")], "animated": [False]},
            "10": {"video": [file("c.mp4", "output")], "text": ["no file"], "odd": None},
            "11": ["not an object"],
        }
    }
    assert queue().code == 0
    assert rows(output)[0]["images"] == "2026/07/a.png; b.png [temp]; c.mp4"


def test_without_the_pack_nothing_is_waited_for(host: Host, queue: Queue, output: Path) -> None:
    assert queue("--set", "3.seed=1..3").code == 0
    assert {row["verdict"] for row in rows(output)} == {""}
    assert sum(path == "/offload/status" for _, path, _ in host.asked) == 1
    assert not [path for _, path, _ in host.asked if path.startswith("/offload/report")]


def failing(kind: str, text: str, at: int = 2) -> Callable[[str, Any], dict[str, Any]]:
    def end(prompt_id: str, graph: Any) -> dict[str, Any]:
        if graph["3"]["inputs"]["seed"] != at:
            return {}
        told = {"prompt_id": prompt_id, "node_id": "3", "node_type": "KSampler", "exception_type": kind}
        told |= {"exception_message": text, "traceback": [], "timestamp": 5}
        messages = [["execution_start", {"timestamp": 1}], ["execution_error", told]]
        return {"outputs": {}, "status": {"status_str": "error", "completed": False, "messages": messages}}

    return end


@pytest.mark.parametrize(
    ("kind", "status"),
    [("RuntimeError", "error"), ("torch.OutOfMemoryError", "oom"), ("torch.cuda.OutOfMemoryError", "oom")],
)
def test_a_failed_item_stops_the_batch_and_is_told(
    host: Host, queue: Queue, output: Path, kind: str, status: str
) -> None:
    host.end = failing(kind, "it broke\nbadly\n")
    ended = queue("--set", "3.seed=1..9", "--ahead", "3")
    assert ended.code == 1
    got = rows(output)
    assert [row["status"] for row in got if row["3.seed"] == "2"] == [status]
    assert f"node 3 (KSampler): {kind}: it broke\nbadly" in got[1]["error"]
    assert len(got) < 5  # what ran at that moment got its row, what waited was taken back
    assert host.pending == []
    assert "--keep-going" in ended.err
    # and the same command goes on with the rest, each item once
    assert queue("--set", "3.seed=1..9", "--ahead", "3").code == 1
    assert sorted(int(row["item"]) for row in rows(output)) == list(range(1, 10))
    assert {row["rerun"] for row in rows(output)} == {"false"}


def test_keep_going(host: Host, queue: Queue, output: Path) -> None:
    host.end = failing("RuntimeError", "it broke")
    ended = queue("--set", "3.seed=1..4", "--keep-going")
    assert ended.code == 1
    assert [row["status"] for row in rows(output)] == ["success", "error", "success", "success"]
    assert "1 not fine" in ended.err
    assert queue("--set", "3.seed=1..4", "--keep-going").code == 1  # still said of a batch that is done


@pytest.mark.parametrize(("verdict", "code"), [("oom", 1), ("error", 1), ("oom_recovered", 0), ("resident", 0)])
def test_the_exit_code_is_the_verdicts(host: Host, queue: Queue, verdict: str, code: int) -> None:
    host.pack = True
    host.end = lambda prompt_id, graph: {"outputs": {"20": {"vram_report": [a_report(prompt_id, verdict)]}}}
    assert queue().code == code


def test_an_error_that_the_report_knows_as_oom(host: Host, queue: Queue, output: Path) -> None:
    host.pack = True
    broken = failing("SomeWrapped", "no room", at=7)

    def end(prompt_id: str, graph: Any) -> dict[str, Any]:
        return {**broken(prompt_id, graph), "report": a_report(prompt_id, "oom")}

    host.end = end
    assert queue().code == 1
    assert (rows(output)[0]["status"], rows(output)[0]["verdict"]) == ("oom", "oom")


def test_values_of_every_script_arrive_and_come_back(host: Host, queue: Queue, output: Path, tmp_path: Path) -> None:
    texts = ['猫, "quoted"\nüber Ω', "emoji 🐈\u200d⬛", "=1+1", "line\u2028sep\rreturn", "  spaces  ", "a\tb"]
    path = tmp_path / "prompts.csv"
    path.write_bytes(
        ("6.text\n" + "".join('"' + text.replace('"', '""') + '"\n' for text in texts)).encode().replace(b"\r", b"")
    )
    texts[3] = "line\u2028sepreturn"
    lines = tmp_path / "r.jsonl"
    assert queue("--set", str(path)).code == 0
    assert queue("--set", str(path), "--output", str(lines)).code == 0
    assert [graph["6"]["inputs"]["text"] for _, graph in host.taken] == texts * 2
    assert [row["6.text"] for row in rows(output)] == texts
    assert [record["inputs"]["6.text"] for record in records(lines)] == texts
    # and both are whole for a resume, which runs nothing
    assert queue("--set", str(path)).code == queue("--set", str(path), "--output", str(lines)).code == 0
    assert len(host.taken) == 2 * len(texts)


def test_dry_run_asks_nobody(host: Host, queue: Queue, output: Path) -> None:
    ended = queue("--dry-run", "--set", "3.seed=1..3", "--set", "6.text=a\nb")
    assert ended.code == 0
    assert ended.out.splitlines() == [f'{n}/3  3.seed={n}  6.text="a\\nb"' for n in (1, 2, 3)]
    assert "3 items: 3.seed (3) x 6.text (1)" in ended.err
    assert host.asked == []
    assert not output.exists()


def test_limit_runs_a_part_and_the_next_call_the_next(host: Host, queue: Queue, output: Path) -> None:
    for done in (2, 4, 5):
        assert queue("--set", "3.seed=1..5", "--limit", "2").code == 0
        assert [int(row["item"]) for row in rows(output)] == list(range(1, done + 1))
    assert len(host.taken) == 5
    ended = queue("--set", "3.seed=1..5", "--limit", "2")
    assert ended.code == 0
    assert "5 of 5 were done before" in ended.err
    assert len(host.taken) == 5


def test_no_more_than_ahead_are_with_the_host(host: Host, queue: Queue) -> None:
    most = [0]

    def refuse(graph: Any) -> None:
        most[0] = max(most[0], len(host.pending) + (host.running is not None) + 1)

    host.refuse, host.seconds = refuse, 0.1
    assert queue("--set", "3.seed=1..8", "--ahead", "3").code == 0
    assert most[0] == 3


def test_a_fraction_for_a_whole_number_is_asked_for_first(host: Host, queue: Queue, output: Path) -> None:
    ended = queue("--set", "3.denoise=0.5..1:0.5")  # a FLOAT that the workflow writes as 1
    assert ended.code == 0
    assert [graph["3"]["inputs"]["denoise"] for _, graph in host.taken] == [0.5, 1]
    ended = queue("--set", "3.steps=10.5", "--output", str(output.with_name("other.csv")))
    assert ended.code == 2
    assert "--set 3.steps: got 10.5, allowed: whole numbers (the workflow has 20)" in ended.err
    assert len(host.taken) == 2
    assert not output.with_name("other.csv.resume").exists()  # put right, the same command begins
    assert queue("--set", "3.steps=10", "--output", str(output.with_name("other.csv"))).code == 0


def test_only_the_documented_paths_and_nothing_about_us_are_sent(host: Host, queue: Queue) -> None:
    assert queue("--set", "3.seed=1..2").code == 0
    for method, path, body in host.asked:
        if method == "POST":
            assert path == "/prompt"
            assert set(body) == {"prompt", "prompt_id"}
        else:
            assert path in ("/queue", "/offload/status") or path.startswith(("/history/", "/offload/report/"))


def test_an_item_that_takes_too_long_is_stopped(host: Host, queue: Queue, output: Path) -> None:
    host.seconds = 60
    ended = queue("--set", "3.seed=1..2", "--timeout", "0.3", "--keep-going")
    assert ended.code == 1
    assert [row["status"] for row in rows(output)] == ["timeout", "timeout"]
    assert "--timeout 0.3 s" in rows(output)[0]["error"]


def test_torch_is_not_imported(workflow: Path) -> None:
    after = "assert not {'torch', 'comfy', 'aiohttp'} & set(sys.modules), sorted(sys.modules)"
    process = start_command("queue", str(workflow), "--dry-run", after=after)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_the_default_host_is_the_hosts_own() -> None:
    assert "http://127.0.0.1:8188" in command("queue", "--help").out
