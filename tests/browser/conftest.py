"""Invariant: a browser test runs the pack's own files in a real front end, or skips with the reason.

Fixtures; a boot of the front end costs seconds of processor time, so take the cheapest that proves the point:

    open_plain(theme="dark")       a page with the host's colours and no front end, on `stub`: for modules of plain DOM
    here                           (page, stub, where): one page for each `where` in a file, shared by its tests, four
                                   times; put back before each test: workflow 02 loaded, no reports, settings as usual
    open_page(frontend=..., vue=..., theme=..., settings=...)     a fresh page in a context of its own, on `stub`
    where                          (frontend, vue) over 1.49.6 and 1.58.1, canvas and Nodes 2.0: for
                                   open_page(*where); a test that takes it runs four times
    stub                           the host that these pages are on; see stub.py for what it can be told
    shot(page, "panel-live")       writes panel-live.png (also of a locator) below BALANCED_OFFLOAD_SHOTS

At its end a test fails if a page complained in the console or asked another host for anything; what is expected goes
into `open_page.allow(...)` or `here.allow(...)`. `pages.py` has what a user does: load_workflow, queue, saved, heap ...
Pure functions need no page: tests/browser/unit/*.test.mjs run under Node (test_units.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from . import places
from .chromium import chromium_or_skip

if TYPE_CHECKING:  # imported where they are used: without playwright and aiohttp these tests skip
    from playwright.sync_api import Browser, Page

    from .pages import Pages
    from .shared import Here
    from .stub import Stub

HERE = Path(__file__).resolve().parent
GRAPH = "02-fit-aware-hires"


BOTH = ("test_boots_and_runs_quietly", "test_the_strip_of_a_running_node_is_the_event")
"""Tests that run in two front ends that differ in version and mode. A boot costs some 8 s of two cores, so the others
run in one of the four; the rest of the matrix, and what is marked slow, runs where it is asked for: -m slow."""
OLD = places.Where(places.FRONTENDS[0], False)
NEW = places.Where(places.FRONTENDS[-1], True)


def _usual(item: pytest.Item) -> bool:
    """Whether a test runs without being asked for."""
    values = getattr(item, "callspec", None)
    where = next((one for one in values.params.values() if isinstance(one, places.Where)), None) if values else None
    name = getattr(item, "originalname", item.name)
    return where is None or where in ((OLD, NEW) if name in BOTH else (NEW,))


# first: what is marked here is looked at when `-m` selects
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share pages, so they go to one worker (`--dist loadgroup`)."""
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group(f"browser/{Path(item.path).stem}"))
            if not _usual(item):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a file: while it is there an event loop runs on this thread, which other tests must not find."""
    with chromium_or_skip() as made:
        yield made


@pytest.fixture
def stub() -> Iterator[Stub]:
    if places.why_not() is not None:
        pytest.skip(str(places.why_not()))
    from .stub import Stub

    made = Stub(places.frontend(places.NEWEST)).start()
    yield made
    made.stop()


@pytest.fixture
def open_page(browser: Browser, stub: Stub) -> Iterator[Callable[..., Page]]:
    from .pages import Pages

    pages = Pages(browser, stub)

    class Open:
        """As `Pages`, and skips where there is no such front end."""

        def __call__(self, frontend: str = places.NEWEST, *args: Any, **kwargs: Any) -> Page:
            reason = places.why_not(frontend)
            if reason is not None:
                pytest.skip(reason)
            return pages(frontend, *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(pages, name)

    yield Open()
    pages.close()
    pages.watch.check()


@pytest.fixture
def open_plain(browser: Browser, stub: Stub) -> Iterator[Callable[..., Page]]:
    from .pages import Pages

    pages: Pages = Pages(browser, stub)
    yield pages.plain
    pages.close()
    pages.watch.check()


def _params() -> list[Any]:
    return [pytest.param(where, id=str(where)) for where in places.WHERES]


@pytest.fixture(params=_params())
def where(request: pytest.FixtureRequest) -> places.Where:
    """A front end and its way to draw nodes: all four."""
    found: places.Where = request.param
    reason = places.why_not(found.frontend)
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module", params=_params())
def shared_page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Here]:
    """The page behind `here`: made once for a file and a `where`."""
    found: places.Where = request.param
    reason = places.why_not(found.frontend)
    if reason is not None:
        pytest.skip(reason)
    from .shared import Here

    made = Here.open(browser, found)
    yield made
    made.close()


@pytest.fixture
def here(shared_page: Here) -> Iterator[Here]:
    shared_page.put_back(GRAPH)
    yield shared_page
    shared_page.pages.watch.check()


@pytest.fixture
def shot(tmp_path: Path) -> Callable[[Any, str], Path]:
    """Writes a picture of a page or a locator -> its path."""
    if places.why_not() is not None:
        pytest.skip(str(places.why_not()))
    from .pages import shooter

    return shooter(tmp_path)
