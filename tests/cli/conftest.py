"""Invariant: the demo is run from the door that users take, `main([...])`, with both streams caught."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from balanced_offload.offload.cli import main


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
    """Run `balanced-offload arguments`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Ended]:
    """A demo of two pictures on the simulated accelerator, none and balanced."""
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")

    def run(*more: str) -> Ended:
        arguments = ["--device", "simulated", "--pictures", "2", "--mode", "balanced", "--out", str(tmp_path)]
        return command("demo", "--json", *arguments, *more)

    return run
