"""Invariant: telemetry goes to those that asked, as long as they asked for, ten times a second at most."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.nodes.telemetry import LASTS, MOST, Telemetry


class Desk:
    """A server with open sockets, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sockets: dict[str, Any] = {"a": 1, "b": 2}
        self.sent: list[tuple[str, Any, str]] = []
        self.server: Any = SimpleNamespace(sockets=self.sockets, send_sync=lambda *message: self.sent.append(message))
        self.telemetry = Telemetry(clock=lambda: self.now, server=lambda: self.server)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_nobody_asked_nobody_is_sent(desk: Desk) -> None:
    desk.telemetry.sample({"v": 1})
    assert desk.sent == [] and not desk.telemetry.wanted()


def test_only_those_that_asked(desk: Desk) -> None:
    assert desk.telemetry.ask("b") is None
    desk.telemetry.sample({"v": 1})
    assert desk.sent == [("offload.telemetry", {"v": 1}, "b")]


def test_asking_lasts_and_can_be_repeated(desk: Desk) -> None:
    desk.telemetry.ask("a")
    desk.now += LASTS - 1
    assert desk.telemetry.clients() == {"a": 1.0}
    desk.telemetry.ask("a")
    desk.now += LASTS - 1
    assert desk.telemetry.wanted()
    desk.now += 1
    assert not desk.telemetry.wanted() and desk.telemetry.clients() == {}
    desk.telemetry.sample({})
    assert desk.sent == []


def test_ten_a_second(desk: Desk) -> None:
    desk.telemetry.ask("a")
    for _ in range(1000):  # two seconds, as often as the caller likes
        desk.telemetry.sample({})
        desk.now += 0.002
    assert 18 <= len(desk.sent) <= 23


@pytest.mark.parametrize("given", ["", "../x", "a b", "a" * 200, "ä", "a\n", "c"])
def test_ids_that_are_refused(desk: Desk, given: str) -> None:
    refused = desk.telemetry.ask(given)
    assert refused is not None and refused.startswith("telemetry:")
    assert desk.telemetry.clients() == {}


def test_no_more_than_some(desk: Desk) -> None:
    desk.sockets.update({f"c{number}": 0 for number in range(50)})
    answers = [desk.telemetry.ask(f"c{number}") for number in range(50)]
    assert answers[:MOST] == [None] * MOST and all(answers[MOST:])
    assert desk.telemetry.ask("c0") is None, "who is served already may go on"


def test_without_a_server(desk: Desk) -> None:
    desk.server = None
    assert desk.telemetry.ask("a") is not None
    desk.telemetry.sample({})
    assert desk.sent == []


def test_the_end_of_a_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balanced_offload.nodes.telemetry.text_of", lambda report: "what happened")
    report = {"prompt_id": "p", "verdict": "resident", "client_id": "b"}
    message = {"prompt_id": "p", "verdict": "resident", "text": "what happened"}
    desk.telemetry.closed(report)
    assert desk.sent == [("offload.report", message, "b")], "who queued it is told without asking"
    desk.sent.clear()
    desk.telemetry.ask("a")
    desk.telemetry.closed(report)
    assert [sid for _, _, sid in desk.sent] == ["a", "b"]
    desk.sent.clear()
    desk.telemetry.closed({**report, "client_id": None})
    assert [sid for _, _, sid in desk.sent] == ["a"]
