"""Invariant: telemetry goes to those that asked, as long as they asked for, four times a second at most."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from balanced_offload.nodes.telemetry import LASTS, MOST, PAGES, PERIOD, POINTS, Telemetry
from balanced_offload.offload.adapters.comfyui_runs_nodes import POINTS as RING

EMPTY: dict[str, Any] = {"points": [], "stages": [], "ended": []}


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


# ---------------------------------------------------------------------- who asked
def test_nobody_asked_nobody_is_sent(desk: Desk) -> None:
    desk.telemetry.sample({"v": 1})
    assert desk.sent == [] and not desk.telemetry.wanted()


def test_only_those_that_asked(desk: Desk) -> None:
    assert desk.telemetry.ask("b") is None
    desk.telemetry.sample({"v": 1})
    assert desk.sent == [("offload.telemetry", {"v": 1, **EMPTY}, "b")]


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


def test_a_client_whose_socket_is_closed_is_not_served(desk: Desk) -> None:
    desk.telemetry.ask("a")
    del desk.sockets["a"]
    assert not desk.telemetry.wanted() and desk.telemetry.clients() == {}
    desk.telemetry.sample({"v": 1})
    assert desk.sent == []
    desk.sockets["a"] = 3  # the page has connected again, within the time for which it asked
    assert desk.telemetry.wanted()


@pytest.mark.parametrize("given", ["", "../x", "a b", "a" * 200, "ä", "a\n", "c"])
@pytest.mark.parametrize("what", ["telemetry", "page"])
def test_ids_that_are_refused(desk: Desk, given: str, what: str) -> None:
    ask = desk.telemetry.ask if what == "telemetry" else desk.telemetry.meet
    refused = ask(given)
    assert refused is not None and refused.startswith(f"{what}:")
    assert desk.telemetry.clients() == {} and desk.telemetry.pages() == 0


def test_no_more_than_some(desk: Desk) -> None:
    desk.sockets.update({f"c{number}": 0 for number in range(50)})
    answers = [desk.telemetry.ask(f"c{number}") for number in range(50)]
    assert answers[:MOST] == [None] * MOST and all(answers[MOST:])
    assert desk.telemetry.ask("c0") is None, "who is served already may go on"
    del desk.sockets["c1"]
    assert desk.telemetry.ask("c49") is None, "one that has gone makes room"


def test_pages(desk: Desk) -> None:
    assert not desk.telemetry.knows("a")
    assert desk.telemetry.meet("a") is None and desk.telemetry.meet("a") is None
    assert desk.telemetry.knows("a") and desk.telemetry.pages() == 1 and not desk.telemetry.wanted()
    desk.telemetry.sample({"v": 1})
    assert desk.sent == [], "to be there is not to ask"
    desk.now += 10 * LASTS
    assert desk.telemetry.knows("a"), "for as long as its socket is open"
    del desk.sockets["a"]
    assert desk.telemetry.pages() == 0
    desk.telemetry.meet("b")
    assert not desk.telemetry.knows("a")


def test_a_client_that_asks_is_known_while_it_asks(desk: Desk) -> None:
    desk.telemetry.ask("a")
    assert desk.telemetry.knows("a")
    desk.now += LASTS
    assert not desk.telemetry.knows("a")


def test_no_more_pages_than_some(desk: Desk) -> None:
    desk.sockets.update({f"c{number}": 0 for number in range(PAGES + 5)})
    answers = [desk.telemetry.meet(f"c{number}") for number in range(PAGES + 5)]
    assert answers[:PAGES] == [None] * PAGES and all(answers[PAGES:])


def test_without_a_server(desk: Desk) -> None:
    desk.server = None
    assert desk.telemetry.ask("a") is not None and desk.telemetry.meet("a") is not None
    desk.telemetry.sample({})
    assert desk.sent == []


# ---------------------------------------------------------------------- how often
def test_four_a_second(desk: Desk) -> None:
    desk.telemetry.ask("a")
    for _ in range(1001):  # two seconds, as often as the caller likes
        desk.telemetry.sample({})
        desk.now += 0.002
    assert len(desk.sent) == 9


def test_a_timer_that_jitters_loses_no_message_and_gains_none(desk: Desk) -> None:
    desk.telemetry.ask("a")
    chance = random.Random(5)
    for _ in range(100):
        desk.telemetry.sample({})
        desk.now += 0.25 + chance.uniform(-0.002, 0.002)
        desk.telemetry.ask("a")
    assert 96 <= len(desk.sent) <= 100


def test_points_wait_for_a_message_to_take_them_along(desk: Desk) -> None:
    desk.telemetry.ask("a")
    for number in range(60):
        desk.telemetry.sample({"prompt_id": "p", "points": [number], "ended": [str(number)]})
        desk.now += 0.1
    told = [point for _, message, _ in desk.sent for point in message["points"]]
    assert told == list(range(len(told))) and len(told) >= 57, "each once, in order"
    assert [row for _, message, _ in desk.sent for row in message["ended"]] == [str(number) for number in told]


def test_points_of_an_older_prompt_are_not_told_with_the_next(desk: Desk) -> None:
    desk.telemetry.ask("a")
    desk.telemetry.sample({"prompt_id": "p", "points": [1], "ended": []})
    desk.telemetry.sample({"prompt_id": "p", "points": [2], "ended": []})
    desk.now += PERIOD
    desk.telemetry.sample({"prompt_id": "q", "points": [3], "ended": []})
    assert [message["points"] for _, message, _ in desk.sent] == [[1], [3]]


def test_points_that_wait_have_a_bound(desk: Desk) -> None:
    desk.telemetry.ask("a")
    desk.telemetry.sample({"prompt_id": "p"})
    for number in range(100):
        desk.telemetry.sample({"prompt_id": "p", "points": [number] * RING})
    desk.now += PERIOD
    desk.telemetry.sample({"prompt_id": "p"})
    assert desk.sent[-1][1]["points"] == [98] * (POINTS - RING) + [99] * RING


def test_the_end_of_a_run(desk: Desk) -> None:
    row = {"prompt_id": "p", "verdict": "resident", "text": "what happened"}
    desk.telemetry.closed(row, "b")
    assert desk.sent == [("offload.report", row, "b")], "who queued it is told without asking"
    desk.sent.clear()
    desk.telemetry.ask("a")
    desk.telemetry.closed(row, "b")
    assert [sid for _, _, sid in desk.sent] == ["a", "b"]
    desk.sent.clear()
    desk.telemetry.closed(row, None)
    assert [sid for _, _, sid in desk.sent] == ["a"]
