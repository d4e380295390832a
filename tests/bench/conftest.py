"""Invariant: benches here run on the simulated accelerator with its strict race detector, and leave it empty."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from balanced_offload.offload.bench.cases import Case
from balanced_offload.offload.bench.places import SimulatedPlace
from balanced_offload.offload.bench.run import Options, run_suite
from balanced_offload.offload.bench.strategies import Strategy
from balanced_offload.offload.bench.subjects import TINY
from balanced_offload.offload.cli_bench import add_bench

TIGHT, LOOSE = 1_450_000, 4 << 20
"""Caps, bytes, below and above the 2.3 MiB of weights and 0.2 MiB of activations of "flux1-tiny"."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output as one JSON document: anything else on it fails."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def command(*arguments: str) -> Ended:
    """Run `bench arguments` through its own sub-parser."""
    parser = argparse.ArgumentParser()
    add_bench(parser.add_subparsers())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            options = parser.parse_args(["bench", *arguments])
            code = int(options.run(options))
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", autouse=True)
def settled() -> Iterator[None]:
    """What the libraries made when they were imported is left out of every garbage collection: it takes most of it."""
    with torch.no_grad():
        TINY.build()(**TINY.inputs(None, True))
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def place(sim: ModuleType) -> Iterator[SimulatedPlace]:
    """The simulated accelerator as a place, a 4090's clock."""
    found = SimulatedPlace(sim)
    found.use("rtx4090-24g", None)
    yield found
    sim.use_card("generic-8g")


Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(place: SimulatedPlace) -> Bench:
    """Run strategies on "flux1-tiny", where every value is computed; returns the document."""

    def run(
        *strategies: Strategy, caps: tuple[int, ...] = (TIGHT,), path: Path | None = None, **more: Any
    ) -> dict[str, Any]:
        cases = tuple(Case("flux1-tiny", "128x128", "rtx4090-24g", cap) for cap in caps)
        options = Options("peers-small", cases, strategies, steps=2, hooks=False, path=path, **more)
        return run_suite(place, options, lambda text: None)

    return run
