"""Guards: a value has the type that the workflow has there, and a range is exact: 0.1..0.3:0.1 is 0.1, 0.2, 0.3.

A number that the workflow writes without a point may still be a FLOAT of the node (8 for 8.0), which only the host
knows: `needs_float` tells which values ask for that.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from .workflow import Asked

MOST_VALUES = 100_000
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*(?::\s*({_NUMBER})\s*)?")


def parse_values(text: str, present: Any, name: str) -> list[Any]:
    """What `VALUE` of --set means for an input that now has the value `present`: one value, or those of a range.

    Only numbers have ranges: in a text `1..20` is a text. A text within double quotes is what is between them.

    Raises:
        Asked: it has another type, a range that is empty or endless, or one of too many values.
    """
    if isinstance(present, (int, float)) and not isinstance(present, bool):
        return _numbers(text, present, name)
    return [parse_scalar(text, present, name)]


def parse_scalar(text: str, present: Any, name: str) -> Any:
    """One value of the type of `present`: bool, int, float, str; where the workflow has null, JSON or a text."""
    if isinstance(present, bool):
        return _bool(text, name)
    if isinstance(present, (int, float)):
        return _as_number(_decimal(text, name, present), present)
    if present is None:
        try:
            value = json.loads(text)
        except ValueError:
            return unquoted(text)
        return value if isinstance(value, (str, int, float, bool, type(None))) else text
    return unquoted(text)


def unquoted(text: str) -> str:
    """A text without the double quotes around the whole of it."""
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text


def needs_float(present: Any, value: Any) -> bool:
    """Whether the value can only stand there if the node's input is a FLOAT, though the workflow has a whole number."""
    return isinstance(present, int) and not isinstance(present, bool) and isinstance(value, float)


def _bool(text: str, name: str) -> bool:
    word = unquoted(text.strip()).casefold()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise Asked(f"--set {name}: got {text!r}, allowed: true or false (yes, no, on, off, 1, 0)")


def _numbers(text: str, present: float, name: str) -> list[Any]:
    matched = _RANGE.fullmatch(text)
    if matched is None:
        return [_as_number(_decimal(text, name, present), present)]
    first, last = (_decimal(matched[group], name, present) for group in (1, 2))
    step = _decimal(matched[3], name, present) if matched[3] else Decimal(1 if last >= first else -1)
    if step == 0 or (last - first) * step < 0:
        fit = f"{matched[1]}..{matched[2]}:{'-' if last < first else ''}{abs(step) or 1}"
        raise Asked(f"--set {name}: {text!r} never gets from {first} to {last}; allowed: for example {fit}")
    count = int((last - first) / step) + 1
    if count > MOST_VALUES:
        raise Asked(f"--set {name}: {text!r} has {count:,} values, allowed: {MOST_VALUES:,}; take a larger step")
    return [_as_number(first + index * step, present) for index in range(count)]


def _decimal(text: str, name: str, present: float) -> Decimal:
    try:
        value = Decimal(unquoted(text.strip()))
    except InvalidOperation:
        value = Decimal("NaN")
    # the size first: a whole number of 10^9 digits would never be made
    if not value.is_finite() or abs(value.adjusted()) > 308:
        kind = "a number" if isinstance(present, float) else "a whole number"
        raise Asked(
            f"--set {name}: got {text!r}, allowed: {kind} as in the workflow ({present}), a range 1..20 or 1..20:5, "
            "or a .csv or .txt file"
        )
    return value


def _as_number(value: Decimal, present: float) -> int | float:
    """A whole number stays one where the workflow has one; a fraction becomes a float."""
    if isinstance(present, int) and value == value.to_integral_value():
        return int(value)
    made = float(value)
    assert math.isfinite(made)
    return made
