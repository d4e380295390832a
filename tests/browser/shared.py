"""Invariant: a test that gets the shared page finds it as the first one did: same graph, settings and no reports.

A boot takes seconds of processor time, and most tests need none of their own.
"""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Browser, Page

from . import places
from .pages import Pages, load_workflow
from .stub import Stub

OURS = {
    "BalancedOffload.RestoreStock": False,
    "BalancedOffload.Overlay": True,
    "BalancedOffload.Chip": True,
    "BalancedOffload.Hints": True,
    "BalancedOffload.HiddenHints": "",
}


class Here:
    """A page that several tests use, its stub, and where it is."""

    def __init__(self, pages: Pages, page: Page, stub: Stub, where: places.Where) -> None:
        self.pages, self.page, self.stub, self.where = pages, page, stub, where
        self._usual = dict(stub.settings)

    @classmethod
    def open(cls, browser: Browser, where: places.Where) -> Here:
        stub = Stub(places.frontend(where.frontend)).start()
        pages = Pages(browser, stub)
        return cls(pages, pages(where.frontend, where.vue), stub, where)

    def allow(self, pattern: str) -> None:
        """A complaint that this test expects."""
        self.pages.allow(pattern)

    def put_back(self, graph: str | dict[str, Any]) -> None:
        """The state in which a test finds it. What our modules keep goes with a reload, which costs little here."""
        self.page.goto("about:blank")  # else the page before asks for reports that are gone, and complains
        self.stub.reset()
        self.stub.settings.clear()
        self.stub.settings.update({**self._usual, **OURS})
        self.pages.watch.allowed.clear()
        self.pages.watch.complaints.clear()  # late ones of the page before, whose test has been judged
        self.pages.load(self.page)
        load_workflow(self.page, graph)

    def close(self) -> None:
        self.pages.close()
        self.stub.stop()
