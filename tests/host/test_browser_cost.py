"""Invariant tested: what the pack does for a page that watches costs a run at most 1 %, calls x cost, and no more than
the machine's own noise when runs with and without the pack are compared, each with a page open.

Minutes, and two servers with a page each: slow.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..browser import places
from . import graphs
from .browsing import Tab, chromium, open_tab
from .conftest import Host
from .server import HostServer
from .test_report import report_of, with_report

__all__ = ["chromium", "open_tab"]  # the fixtures

FRONTEND = ("--front-end-root", str(places.frontend(places.NEWEST)))
PAIRS = 60
pytestmark = pytest.mark.slow


@pytest.fixture
def bare(host: Host, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """The same host and front end without the pack."""
    server = HostServer(host.path, tmp_path_factory.mktemp("bare"), models, None, FRONTEND)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def watched(servers: Callable[..., HostServer]) -> HostServer:
    reason = places.why_not(places.NEWEST)
    if reason is not None:
        pytest.skip(reason)
    return servers(*FRONTEND)


def seconds(server: HostServer, client: str, graph: graphs.Graph) -> tuple[float, str]:
    """Of the prompt by the host's own clock, queued as this page's own."""
    prompt_id = server.queue(graph, client=client)
    entry = server.wait(prompt_id)
    times = {event: data["timestamp"] for event, data in entry["status"]["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1e3, prompt_id


def opened(open_tab: Callable[..., Tab], server: HostServer, graph: graphs.Graph, panel: bool) -> str:
    """A page with this graph -> its client's id."""
    tab = open_tab(server, known=panel)
    tab.open_graph(graph)
    if panel:
        tab.open_panel()
    found: str = tab.page.evaluate("() => app.api.clientId")
    return found


def test_a_page_that_watches_costs_a_hundredth(
    watched: HostServer, open_tab: Callable[..., Tab], record_property: Callable[[str, object], None]
) -> None:
    """The record counts its own cost, telemetry in it; of twenty the median share, with a page and without."""
    shares: dict[str, list[float]] = {"without": [], "with a page": []}
    client = ""
    for name in shares:
        if name != "without":
            client = opened(open_tab, watched, with_report(graphs.stock(seed=700))[0], True)
        for seed in range(20):
            graph = with_report(graphs.stock(seed=701 + seed, steps=30))[0]
            took, prompt_id = seconds(watched, client or "nobody", graph)
            shares[name].append(report_of(watched, prompt_id)["overhead_ms"] / 1e3 / took)
    told = ", ".join(f"{name} {statistics.median(found):.2%}" for name, found in shares.items())
    record_property("share", told)
    print(told)
    assert statistics.median(shares["with a page"]) <= 0.01, told


def test_pairs_with_and_without_the_pack_each_with_a_page(
    watched: HostServer, bare: HostServer, open_tab: Callable[..., Tab], record_property: Callable[[str, object], None]
) -> None:
    """Sixty pairs in random order; the 95 % interval of the median difference must include 3 % or less."""
    order = random.Random(11)
    plain = graphs.stock(seed=800, steps=10)
    clients = {
        "bare": opened(open_tab, bare, plain, False),
        "ours": opened(open_tab, watched, with_report(plain)[0], True),
    }
    differences = []
    for number in range(-3, PAIRS):  # the first three warm both up
        graph = graphs.stock(seed=900 + number, steps=10)
        pair: list[tuple[str, HostServer, Any]] = [("bare", bare, graph), ("ours", watched, with_report(graph)[0])]
        order.shuffle(pair)
        took = {name: seconds(server, clients[name], each)[0] for name, server, each in pair}
        if number >= 0:
            differences.append(took["ours"] / took["bare"] - 1)
    medians = sorted(statistics.median(order.choices(differences, k=PAIRS)) for _ in range(2000))
    low, high = medians[50], medians[1949]
    told = f"{statistics.median(differences):+.2%}, 95 % of {low:+.2%} to {high:+.2%}"
    record_property("difference", told)
    print(told)
    assert low <= 0.03, told
