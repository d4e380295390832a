"""Guards: every cell of a file goes to the input that its column names, and a row that is cut short is an error.

A .csv file has a column per input, whose header is `NODE.INPUT`, or one column for the input that --set names. A .txt
file has one text per line, commas and all.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .values import parse_scalar
from .workflow import Asked, Prompt, Target, find_target, value_of

ENDINGS = (".csv", ".txt")
MOST_BYTES = 64 << 20
Row = dict[Target, Any]
csv.field_size_limit(MOST_BYTES)  # 128 KiB else, which a long prompt passes


def is_table(text: str) -> bool:
    """Whether a VALUE names a file."""
    return text.lower().endswith(ENDINGS)


def read_table(prompt: Prompt, path: Path, target: Target | None, named: str) -> list[Row]:
    """The rows of a file, as values per input. `named`: the --set as written.

    Raises:
        Asked: the file cannot be read, has a row of another width, or a column that is no input of the workflow.
    """
    text = _text(path, named)
    if path.suffix.lower() == ".txt":
        if target is None:
            raise Asked(f"--set {named}: a .txt file needs an input, as in --set 6.text={path}")
        lines = [(number, [line]) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return _rows(prompt, path, [target], lines)
    lines = _records(path, text)
    if not lines:
        raise Asked(f"--set {named}: {path} has no rows")
    columns, lines = _columns(prompt, path, target, named, lines)
    return _rows(prompt, path, columns, lines)


def _text(path: Path, named: str) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise Asked(f"--set {named}: {path} is larger than {MOST_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        hint = " (a text that ends so is written within double quotes: '6.text=\"a.csv\"')"
        raise Asked(f"--set {named}: {path}: {error.strerror or error}{hint}") from None
    except UnicodeDecodeError as error:
        raise Asked(f"--set {named}: {path}: not UTF-8 ({error.reason} at byte {error.start}); save it so") from None


def _records(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Records with the line that each ends on; empty ones left out."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise Asked(f"{path}, line {reader.line_num}: {error}; a cell with a quote in it doubles it") from None


def _columns(
    prompt: Prompt, path: Path, target: Target | None, named: str, lines: list[tuple[int, list[str]]]
) -> tuple[list[Target], list[tuple[int, list[str]]]]:
    """The input of every column, and the records without the header."""
    header = [cell.strip() for cell in lines[0][1]]
    if len(header) == 1 and target is not None:
        is_header = header[0].casefold() in (str(target).casefold(), target.input.casefold(), named.casefold())
        if is_header or not _names_an_input(prompt, header[0]):
            return [target], lines[1:] if is_header else lines
    try:
        columns = [target if _same(cell, target) else find_target(prompt, cell) for cell in header]
    except Asked as error:
        if len(header) > 1 and target is not None and not any(_names_an_input(prompt, cell) for cell in header):
            raise Asked(
                f"{path}, line {lines[0][0]}: {len(header)} columns, and the first row does not name their inputs "
                "as NODE.INPUT; write such a row, put a text with commas within double quotes, or one text per "
                "line into a .txt file"
            ) from None
        raise Asked(f"{path}, line {lines[0][0]}: {error}") from None
    known = [column for column in columns if column is not None]
    twice = [str(column) for column in set(known) if known.count(column) > 1]
    if twice:
        raise Asked(f"{path}, line {lines[0][0]}: two columns for {', '.join(sorted(twice))}")
    if target is not None and target not in known:
        have = ", ".join(str(column) for column in known)
        raise Asked(f"--set {named}: {path} has no column {target}, its header has {have}; write --set {path}")
    return known, lines[1:]


def _same(cell: str, target: Target | None) -> bool:
    return target is not None and cell in (str(target), target.input)


def _names_an_input(prompt: Prompt, cell: str) -> bool:
    try:
        find_target(prompt, cell)
    except Asked as error:
        return "is linked to" in str(error)  # named rightly, and refused when it is read
    return True


def _rows(prompt: Prompt, path: Path, columns: Sequence[Target], lines: list[tuple[int, list[str]]]) -> list[Row]:
    if not lines:
        raise Asked(f"{path}: no rows below the header")
    rows = []
    for number, cells in lines:
        if len(cells) != len(columns):
            raise Asked(
                f"{path}, line {number}: {len(cells)} cells, where {len(columns)} are expected "
                f"({', '.join(map(str, columns))}); a text with commas stands within double quotes"
            )
        try:
            rows.append(
                {
                    # a cell's own quotes are gone by now: what is left belongs to the text
                    column: cell
                    if isinstance(present := value_of(prompt, column), str)
                    else parse_scalar(cell, present, str(column))
                    for column, cell in zip(columns, cells, strict=True)
                }
            )
        except Asked as error:
            raise Asked(f"{path}, line {number}: {error}") from None
    return rows
