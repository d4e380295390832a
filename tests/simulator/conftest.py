"""Invariant: every test here starts at time 0 with the default card and empty logs, whatever ran before it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from balanced_offload.offload import simulator


@pytest.fixture(scope="session")
def loaded_vram() -> ModuleType:
    """The simulator's device module, built on first use; skips with the reason where it cannot be had."""
    possible, reason = simulator.available()
    if not possible:
        pytest.skip(reason)
    return simulator.load("vram")


def _defaults(vram: ModuleType, options: dict[str, float]) -> None:
    if vram.memory_allocated() > 0:  # left by reference cycles of an earlier test
        gc.collect()
    vram.set_stream(vram.default_stream())
    vram.use_card("generic-8g")
    vram.configure(**options)
    vram.set_others(0)
    vram.reset_clock()
    vram.empty_cache()
    vram.clear_copy_log()
    vram.clear_races()
    vram.reset_peak_memory_stats()


@pytest.fixture(scope="session")
def default_options(loaded_vram: ModuleType) -> dict[str, float]:
    """The options as they are after loading."""
    options: dict[str, float] = loaded_vram.configuration()
    return options


@pytest.fixture
def vram(loaded_vram: ModuleType, default_options: dict[str, float]) -> Iterator[ModuleType]:
    """The device module with its defaults, at time 0. Autograd is off."""
    _defaults(loaded_vram, default_options)
    with torch.no_grad():
        yield loaded_vram
    _defaults(loaded_vram, default_options)
