"""Invariant: what is alive before a core test is no garbage, so the collections around every test need not walk it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _freeze_what_is_loaded() -> Iterator[None]:
    """torch alone is half a million objects: walking them twice a test takes longer than most tests here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
