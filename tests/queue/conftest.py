"""Invariant: a batch is run from the door that users take, `main(["queue", ...])`, against real HTTP on loopback."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..cli.conftest import Ended, command
from .stub import WORKFLOW, Host


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(WORKFLOW))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


@pytest.fixture
def queue(host: Host, workflow: Path, output: Path) -> Callable[..., Ended]:
    """`queue flow.json --host STUB --output results.csv` with more options, later ones winning."""

    def run(*more: str) -> Ended:
        return command("queue", str(workflow), "--host", host.url, "--output", str(output), "--wait", "20", *more)

    return run


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a .csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def records(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
