"""Invariant: every browser of the tests is started here, in the same way, or its test skips with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from . import places

if TYPE_CHECKING:  # imported where it is used: without playwright these tests skip
    from playwright.sync_api import Browser

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGUMENTS += ["--disable-sync", "--no-first-run", "--disable-quic", "--enable-precise-memory-info"]


@contextmanager
def chromium_or_skip() -> Iterator[Browser]:
    """A Chromium. While it is there an event loop runs on this thread."""
    reason = places.why_not()
    if reason is not None:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=places.chromium(), headless=True, args=ARGUMENTS)
        yield made
        made.close()
