"""Invariant: progress texts reach pages without our script, and no script and no other client ever."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.nodes.progress import PERIOD, ProgressText, live_text, short_text
from balanced_offload.offload.adapters import comfyui_runs
from balanced_offload.offload.adapters.comfyui_runs import PromptRuns

from .report_prompts import Node, Prompts

GIB = 1 << 30
BROWSER = {"feature_flags": {"supports_preview_metadata": True, "supports_manager_v4_ui": True}}


class Desk:
    """A server that runs a prompt of client "a", and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now, self.known = 10.0, set[str]()
        self.sent: list[tuple[str, str, str]] = []
        self.server: Any = SimpleNamespace(
            client_id="a",
            sockets={"a": 1, "b": 2},
            sockets_metadata={"a": BROWSER, "b": BROWSER},
            send_progress_text=self._send,
        )
        self.text = ProgressText(
            lambda client: client in self.known, clock=lambda: self.now, server=lambda: self.server
        )

    def _send(self, text: str, node_id: str, sid: str | None = None) -> None:
        assert sid is not None, "without it every client gets the frame"
        self.sent.append((node_id, text, sid))


@pytest.fixture
def desk() -> Desk:
    return Desk()


def figures(**over: Any) -> dict[str, Any]:
    vram = {"free": 6 * GIB + GIB // 5, "total": 16 * GIB, "peak": round(11.2 * GIB)}
    made = {"prompt_id": "p", "node": "5", "step": 3, "steps": 20, "step_ms": 1480.0, "stall_ms": 120.0, "vram": vram}
    return {**made, **over}


def row(node: str = "5", wall: float = 12.4, moves: float | None = 1.5, peak: int | None = round(9.8 * GIB)) -> Any:
    made = {"id": node, "display": node, "type": "KSampler", "wall_s": wall, "moves_s": moves, "stall_s": moves}
    return {**made, "peak": peak, "cached": False}


def entry(node: str = "5", wall: float = 12.4, moves: float | None = 1.5, **over: Any) -> dict[str, Any]:
    """A row of the report's `nodes`."""
    made = {"id": node, "display": node, "type": "KSampler", "t0": 1.0, "t1": 9.0 + wall, "wall_s": wall}
    made |= {"peak": None, "cached": False}
    return {**made, "onload_s": moves, "stall_s": moves and 0.0, "evict_s": moves and 0.0, **over}


# ---------------------------------------------------------------------- to whom
def test_the_page_that_queued_it(desk: Desk) -> None:
    assert desk.text.wanted()
    desk.text.sample(figures())
    [(node, text, client)] = desk.sent
    assert (node, client) == ("5", "a")
    assert text == "VRAM 9.8 / 16.0 GiB, peak 11.2, step 3/20 1.48 s, moves 120.0 ms"


def no_flags(desk: Desk) -> None:
    """A script: it opens a socket, and sends nothing."""
    desk.server.sockets_metadata["a"] = {"feature_flags": {}}


def other_flags(desk: Desk) -> None:
    desk.server.sockets_metadata["a"] = {"feature_flags": {"supports_preview_metadata": "yes"}}


def strange_flags(desk: Desk) -> None:
    desk.server.sockets_metadata["a"] = {"feature_flags": ["supports_preview_metadata"]}


def no_metadata(desk: Desk) -> None:
    del desk.server.sockets_metadata


def closed_socket(desk: Desk) -> None:
    del desk.server.sockets["a"]


def our_page(desk: Desk) -> None:
    desk.known.add("a")


def no_client(desk: Desk) -> None:
    desk.server.client_id = None


def no_text(desk: Desk) -> None:
    """A host of the time before progress texts."""
    del desk.server.send_progress_text


def to_everybody(desk: Desk) -> None:
    """One that cannot say to whom."""
    desk.server.send_progress_text = lambda text, node_id: desk.sent.append((node_id, text, "everybody"))


def no_server(desk: Desk) -> None:
    desk.server = None


@pytest.mark.parametrize(
    "change",
    [
        *(no_flags, other_flags, strange_flags, no_metadata, closed_socket, our_page),
        *(no_client, no_text, to_everybody, no_server),
    ],
)
def test_nobody_else(desk: Desk, change: Any) -> None:
    change(desk)
    assert not desk.text.wanted()
    desk.text.sample(figures(ended=[row()]))
    client = None if change is no_client else "a"
    desk.text.closed({"prompt_id": "p", "client_id": client, "nodes": [entry()]})
    assert desk.sent == []


def test_a_newer_host_wants_the_prompt_as_well(desk: Desk) -> None:
    told: list[Any] = []

    def send(text: str, node_id: str, prompt_id: str | None = None, sid: str | None = None) -> None:
        told.append((node_id, prompt_id, sid))

    desk.server.send_progress_text = send
    desk.text.sample(figures())
    assert told == [("5", "p", "a")]


# ---------------------------------------------------------------------- how often, and what
def test_once_a_second(desk: Desk) -> None:
    for step in range(100):
        desk.text.sample(figures(step=step))
        desk.now += 0.1
    assert len(desk.sent) == 10 and PERIOD == 1.0


def test_only_while_a_node_has_steps(desk: Desk) -> None:
    desk.text.sample(figures(step=None, steps=None))
    desk.text.sample(figures(node=None))
    desk.text.sample(figures(prompt_id=None))
    assert desk.sent == []


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ({"step_ms": None, "stall_ms": None}, "VRAM 9.8 / 16.0 GiB, peak 11.2, step 3/20"),
        ({"stall_ms": 0.0}, "VRAM 9.8 / 16.0 GiB, peak 11.2, step 3/20 1.48 s"),
        ({"vram": {"free": None, "total": None, "peak": None}}, "step 3/20 1.48 s, moves 120.0 ms"),
        (
            {"vram": {"free": None, "total": 16 * GIB, "peak": 9 * GIB}},
            "VRAM peak 9.0 / 16.0 GiB, step 3/20 1.48 s, moves 120.0 ms",
        ),
        (
            {"vram": {"free": 2 * GIB, "total": 16 * GIB, "peak": None}},
            "VRAM 14.0 / 16.0 GiB, step 3/20 1.48 s, moves 120.0 ms",
        ),
    ],
)
def test_what_is_not_known_is_left_out(over: dict[str, Any], text: str) -> None:
    assert live_text(figures(**over)) == text


@pytest.mark.parametrize(
    ("wall", "moves", "peak", "text"),
    [
        (12.4, 1.5, round(9.8 * GIB), "12.40 s, moves 1.50 s, peak 9.8 GiB"),
        (12.4, 1.5, None, "12.40 s, moves 1.50 s"),
        (12.4, 0.25, None, "12.40 s, moves 250.0 ms"),
        (12.4, 0.2, None, ""),
        (2.0, 0.1, None, "2.00 s, moves 100.0 ms"),
        (2.0, 0.09, None, ""),
        (0.0, 0.0, None, ""),
        (12.4, None, GIB, ""),
        (None, 1.0, GIB, ""),
    ],
)
def test_the_short_text_where_moves_count(wall: Any, moves: Any, peak: Any, text: str) -> None:
    assert short_text(wall, moves, peak) == text


def test_at_a_nodes_end(desk: Desk) -> None:
    desk.text.sample(figures())
    desk.text.sample(figures(node="6", ended=[row()]))
    assert desk.sent[1] == ("5", "12.40 s, moves 1.50 s, peak 9.8 GiB", "a")
    desk.text.closed({"prompt_id": "p", "client_id": "a", "nodes": [entry(peak=round(9.8 * GIB))]})
    assert len(desk.sent) == 2, "what was said is not said again"


def test_a_text_of_a_moment_ago_does_not_stay(desk: Desk) -> None:
    desk.text.sample(figures())
    desk.text.sample(figures(node="6", steps=None, ended=[row(moves=0.0), row("4", moves=0.0)]))
    assert desk.sent[1:] == [("5", "12.40 s, peak 9.8 GiB", "a")], "only where one was shown"


def test_at_the_prompts_end(desk: Desk) -> None:
    """The nodes of which no sample told, those of one expanded node together."""
    nodes = [entry("1", cached=True), entry("2", moves=0.0), entry("3"), entry("4", moves=None)]
    nodes += [entry("9.0", display="9", wall=1.0, moves=0.5), entry("9.1", display="9", wall=2.0, moves=0.25)]
    desk.text.closed({"prompt_id": "p", "client_id": "a", "nodes": nodes})
    assert desk.sent == [("3", "12.40 s, moves 1.50 s", "a"), ("9", "3.00 s, moves 750.0 ms", "a")]


def test_an_expanded_node_is_said_as_the_sum_of_its_nodes(desk: Desk) -> None:
    """Those it expanded into are done first; what it did itself is not all that it came to."""
    inner, own = {**row("7.1", wall=2.0, moves=0.5), "display": "7"}, row("7", wall=0.25, moves=0.0, peak=None)
    desk.text.sample(figures(node="7", ended=[inner]))
    desk.now += PERIOD
    desk.text.sample(figures(node="8", steps=None, ended=[{**inner, "id": "7.2", "wall_s": 1.0}, own]))
    said = [text for node, text, _ in desk.sent if node == "7" and "step" not in text]
    assert said == ["2.00 s, moves 500.0 ms, peak 9.8 GiB", "3.25 s, moves 1.00 s, peak 9.8 GiB"]
    nodes = [entry("7", wall=0.25, moves=0.0), entry("7.1", display="7", wall=2.0, moves=0.5, peak=round(9.8 * GIB))]
    nodes.append(entry("7.2", display="7", wall=1.0, moves=0.5))
    desk.text.closed({"prompt_id": "p", "client_id": "a", "nodes": nodes})
    assert desk.sent[-1][1] == said[-1], "and nothing is counted twice at the end"
    desk.text.sample(figures(prompt_id="q", node="8", steps=None, ended=[inner]))
    assert desk.sent[-1][1] == said[0], "nor from one prompt to the next"


def test_the_next_prompt_starts_anew(desk: Desk) -> None:
    desk.text.sample(figures())
    desk.text.sample(figures(prompt_id="q"))
    assert len(desk.sent) == 2


# ---------------------------------------------------------------------- with a host's prompts
def test_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts(tmp_path, monkeypatch)
    runs = PromptRuns(session=lambda: None)
    monkeypatch.setattr(comfyui_runs, "_runs", runs)
    monkeypatch.setattr(runs, "_soon", lambda prompt_id: None)
    sent: list[tuple[str, str, str]] = []
    prompts.server.sockets |= {"browser": 1, "script": 2}
    prompts.server.sockets_metadata["browser"] = BROWSER
    prompts.server.send_progress_text = lambda text, node, sid=None: sent.append((node, text, sid))  # type: ignore[attr-defined]
    text = ProgressText(lambda client: False)
    runs.on_sample(text.sample, text.wanted)
    runs.on_close(text.closed)

    def sample() -> None:
        runs.touch("observe")
        for step in range(1, 16):
            time.sleep(0.1)
            prompts.step("5", step, 15)

    def ended(prompt_id: str) -> None:
        end = time.monotonic() + 5
        while runs._unsettled or runs._run is not None:
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(0.05)

    prompts.run(Node("5", "KSampler", sample), Node("6", "B", lambda: None), prompt_id="p", client="script")
    ended("p")
    assert sent == []
    prompts.run(Node("5", "KSampler", sample), Node("6", "B", lambda: None), prompt_id="q", client="browser")
    ended("q")
    assert {(node, client) for node, _, client in sent} == {("5", "browser")}
    assert 2 <= len(sent) <= 4 and "step " in sent[0][1] and "/15" in sent[0][1]
    assert "step" not in sent[-1][1] and sent[-1][1].startswith("1."), "what it came to stays"
