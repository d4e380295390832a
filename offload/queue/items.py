"""Guards: the list of items is a pure function of the workflow and the options, so that a restart finds each again."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tables import Row, is_table, read_table
from .values import needs_float, parse_values
from .workflow import Asked, Prompt, Target, find_target, set_inputs, value_of

COMBINE = ("product", "zip")
MOST_ITEMS = 100_000


@dataclass(frozen=True)
class Item:
    """One prompt of the batch: its number from 1, and what it sets."""

    number: int
    values: Row

    def __str__(self) -> str:
        return "  ".join(f"{target}={_short(value)}" for target, value in self.values.items()) or "as it is"


@dataclass(frozen=True)
class Batch:
    """A workflow and the items to run it with. `fingerprint`: the same workflow and items, the same text."""

    prompt: Prompt
    items: tuple[Item, ...]
    targets: tuple[Target, ...]
    fingerprint: str
    sentence: str

    def prompt_of(self, item: Item) -> Prompt:
        """The graph to send."""
        return set_inputs(self.prompt, item.values)

    def floats(self) -> list[tuple[Target, float]]:
        """Inputs with a whole number in the workflow that get a fraction, with the first one that they get."""
        found: dict[Target, float] = {}
        for item in self.items:
            for target, value in item.values.items():
                if target not in found and needs_float(value_of(self.prompt, target), value):
                    found[target] = value
        return list(found.items())


def make_batch(prompt: Prompt, settings: Sequence[str], combine: str = "product") -> Batch:
    """The batch that several --set make.

    An axis is one input with its values (several --set for one input are one axis, in the order written) or one file.
    product: every combination, the last axis the fastest. zip: the first of each, the second of each and so on; an
    axis with one value goes with all.

    Raises:
        Asked: a setting that means nothing, lengths that do not pair, or too many items.
    """
    axes = _axes(prompt, settings)
    if combine not in COMBINE:
        raise Asked(f"--combine: got {combine!r}, allowed: {', '.join(COMBINE)}")
    names = [f"{'+'.join(map(str, axis[0]))} ({len(axis)})" for axis in axes]
    count = _count(axes, names, combine)
    if count > MOST_ITEMS:
        raise Asked(f"--set: {' x '.join(names)} = {count:,} items, allowed: {MOST_ITEMS:,}; split the batch")
    items = tuple(Item(number, row) for number, row in enumerate(_rows(axes, combine), 1))
    targets = tuple(target for axis in axes for target in axis[0])
    between = " x " if combine == "product" else " with "
    sentence = f"{_items(len(items))}: {between.join(names)}" if axes else "1 item: the workflow as it is"
    return Batch(prompt, items, targets, _fingerprint(prompt, items), sentence)


def _axes(prompt: Prompt, settings: Sequence[str]) -> list[list[Row]]:
    """An axis is a list of rows with the same inputs each."""
    axes: list[list[Row]] = []
    single: dict[Target, list[Row]] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        target = None
        if not equals:
            if not is_table(setting):
                raise Asked(f"--set: got {setting!r}, allowed: NODE.INPUT=VALUE, or a .csv file with a header")
            value = setting
        else:
            target = find_target(prompt, name.strip())
        if is_table(value):
            axes.append(read_table(prompt, Path(value), target, setting))
        else:
            assert target is not None
            if target not in single:
                single[target] = []
                axes.append(single[target])
            single[target] += [{target: one} for one in parse_values(value, value_of(prompt, target), name.strip())]
    seen: set[Target] = set()
    for axis in axes:
        for target in axis[0]:
            if target in seen:
                raise Asked(f"--set {target}: set twice, once by a file; leave one out, or write both into one file")
            seen.add(target)
    return axes


def _count(axes: Sequence[Sequence[Row]], names: Sequence[str], combine: str) -> int:
    if combine == "product":
        return math.prod(len(axis) for axis in axes)
    lengths = {len(axis) for axis in axes if len(axis) > 1}
    if len(lengths) > 1:
        raise Asked(f"--combine zip: {', '.join(names)} values do not pair; allowed: the same number each, or one")
    return max(lengths, default=1)


def _rows(axes: Sequence[Sequence[Row]], combine: str) -> Iterator[Row]:
    if combine == "product":
        picked: Iterator[tuple[Row, ...]] = itertools.product(*axes)
    else:
        most = max((len(axis) for axis in axes), default=1)
        picked = zip(*(axis if len(axis) == most else [axis[0]] * most for axis in axes), strict=True)
        if not axes:
            picked = iter([()])
    for rows in picked:
        yield {target: value for row in rows for target, value in row.items()}


def _fingerprint(prompt: Prompt, items: Sequence[Item]) -> str:
    told: dict[str, Any] = {
        "prompt": prompt,
        "items": [[[str(target), value] for target, value in item.values.items()] for item in items],
    }
    text = json.dumps(told, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _short(value: Any, most: int = 48) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 1] + "…"
