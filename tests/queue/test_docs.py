"""Invariant: every command in docs/queue.md is one that the command line takes, and its tables name what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from balanced_offload.offload.cli import build_parser
from balanced_offload.offload.cli_queue import DONE, FAILED, INTERRUPTED, UNREACHABLE, USAGE
from balanced_offload.offload.queue.outcome import STATUSES
from balanced_offload.offload.queue.results import FIRST, LAST

from ..cli.conftest import command

TEXT = (Path(__file__).parents[2] / "docs" / "queue.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ")
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.removeprefix("$ ").startswith("balanced-offload queue") and "..." not in line
]


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_taken(line: str) -> None:
    arguments = build_parser().parse_args(shlex.split(line)[1:])
    assert arguments.settings


def test_every_option_is_told_and_no_other() -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", command("queue", "--help").out)) - {"--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) == known


def test_every_column_and_status_is_told() -> None:
    told = set(re.findall(r"`([a-z_0-9]+)`", section("Results")))
    assert {*FIRST, *LAST, *STATUSES} <= told


def test_every_exit_code_is_told() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit code"), re.MULTILINE)}
    assert codes == {DONE, FAILED, USAGE, UNREACHABLE, INTERRUPTED}
