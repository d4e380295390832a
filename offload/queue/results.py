"""Guards: the file of results holds whole rows only, each item once. A row is one write; a torn one is cut off again.

`.csv` has the figures of the report, `.jsonl` the whole report too. What a crash left out comes back from the resume
file, which is written first.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .items import Item
from .outcome import Outcome, figures
from .tables import MOST_BYTES
from .workflow import Asked

SCHEMA = "offload-queue-result/1"
ENDINGS = (".csv", ".jsonl")
FIRST = ("item", "status", "verdict", "rerun", "attempts", "prompt_id")
LAST = (
    "images",
    "cached",
    "prompt_s",
    "wall_s",
    "peak_vram",
    "moved_bytes",
    "onload_s",
    "stall_s",
    "mode",
    "fits",
    "hints",
    "finished",
    "error",
)
Row = dict[str, Any]
csv.field_size_limit(MOST_BYTES)  # a prompt may be longer than the 128 KiB that a cell has else


def make_row(item: Item, outcome: Outcome, prompt_id: str, attempts: int, finished: str) -> Row:
    """The row of an item, as JSON types. `finished`: ISO 8601."""
    return {
        "schema": SCHEMA,
        "item": item.number,
        "status": outcome.status,
        "rerun": attempts > 1,
        "attempts": attempts,
        "prompt_id": prompt_id,
        "inputs": {str(target): value for target, value in item.values.items()},
        "images": outcome.images,
        "cached": outcome.cached,
        "prompt_s": outcome.seconds,
        **figures(outcome.report),
        "finished": finished,
        "error": outcome.error,
        "report": outcome.report,
    }


def line_of(item: Item, row: Row) -> str:
    """A row in one line for people."""
    told = [f"item {item.number}", row["status"]]
    told += [row["verdict"]] if row["verdict"] not in (None, row["status"]) else []
    told += [f"{row['prompt_s']:.1f} s"] if row["prompt_s"] is not None else []
    told += [f"peak {row['peak_vram'] / 2**30:.2f} GiB"] if row["peak_vram"] is not None else []
    told += [f"moved {row['moved_bytes'] / 2**30:.2f} GiB"] if row["moved_bytes"] is not None else []
    told += [f"run again (attempt {row['attempts']})"] if row["rerun"] else []
    more = [str(item)] if item.values else []
    return "  ".join([", ".join(told), *more, *row["images"][:3], *([row["error"]] if row["error"] else [])])


class Results:
    """The file of results, appended to."""

    def __init__(self, path: Path, targets: Sequence[str]) -> None:
        """Raises Asked on an ending that is neither .csv nor .jsonl."""
        if path.suffix.lower() not in ENDINGS:
            raise Asked(f"--output: got {str(path)!r}, allowed: a name that ends in {' or '.join(ENDINGS)}")
        self.path = path
        self._csv = path.suffix.lower() == ".csv"
        self._columns = [*FIRST, *targets, *LAST]

    def repair(self, rows: Mapping[int, Row]) -> int:
        """Make the file hold exactly the rows that are done; how many it lacked.

        A torn last row is cut off. Raises Asked where the file has other columns, or rows of another batch.
        """
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: self._whole(text)]
        if whole != text:
            _truncate(self.path, len(whole))
        have = self._items(whole, rows)
        if self._csv and not whole:
            self._write(_line(self._columns))
        missing = [row for number, row in rows.items() if number not in have]
        for row in missing:
            self.append(row)
        return len(missing)

    def kept(self, row: Row) -> Row:
        """What of a row this file needs: a .csv has no place for the report itself."""
        return {name: value for name, value in row.items() if name != "report"} if self._csv else row

    def append(self, row: Row) -> None:
        """One row, whole or not at all."""
        if not self._csv:
            self._write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        # by name, and a node may be called as a column is: its own place is among the inputs
        first, last = ([_cell(row.get(name)) for name in names] for names in (FIRST, LAST))
        inputs = [_cell(row["inputs"].get(name)) for name in self._columns[len(FIRST) : -len(LAST)]]
        self._write(_line([*first, *inputs, *last]))

    def _items(self, whole: bytes, rows: Mapping[int, Row]) -> set[int]:
        """The items in the file. Every one has to be of this batch."""
        text = whole.decode("utf-8", "replace").removeprefix("\ufeff")
        try:
            if self._csv:
                header, *lines = list(csv.reader(io.StringIO(text, newline=""))) or [self._columns]
                if header != self._columns:
                    raise Asked(f"--output: {self.path} has other columns than this batch; name another file")
                found = [(int(line[0]), line[FIRST.index("prompt_id")]) for line in lines if line]
            else:
                told = [json.loads(line) for line in text.split("\n") if line.strip()]
                found = [(int(row["item"]), str(row["prompt_id"])) for row in told]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, Asked):
                raise
            raise Asked(f"--output: {self.path} is no file of results ({error}); name another file") from None
        for number, prompt_id in found:
            if number not in rows or rows[number]["prompt_id"] != prompt_id:
                raise Asked(
                    f"--output: {self.path} has a row (item {number}) that the resume file does not know; name another "
                    "file, or the resume file that belongs to it"
                )
        return {number for number, _ in found}

    def _whole(self, text: bytes) -> int:
        """How many bytes are whole records; in a .csv a line break within quotes ends none."""
        end = position = quotes = 0
        for line in text.split(b"\n")[:-1]:
            position += len(line) + 1
            quotes += line.count(b'"') if self._csv else 0
            if quotes % 2 == 0:
                end = position
        return end

    def _write(self, text: str) -> None:
        append_line(self.path, text.encode("utf-8", "backslashreplace"))


def append_line(path: Path, data: bytes) -> None:
    """Append in one write; where the disk takes only a part of it, the part is cut off again.

    Raises:
        OSError: it could not be written; the file is as before.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o644)
    try:
        before = os.fstat(handle).st_size
        try:
            written = os.write(handle, data)
            if written != len(data):
                raise OSError(28, f"only {written} of {len(data)} bytes could be written")
            os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def _line(cells: Sequence[Any]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out).writerow(cells)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A cell: lists joined by "; ", true and false as JSON has them, nothing for null."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return "" if value is None else value
