"""Invariant: a size means one number of bytes, whether it is typed as a share, a percentage or with a unit.

A size is written as whole bytes (``4_000_000_000``), a share of the card (``0.6``, a float from 0.0 to 1.0),
a percentage (``"60%"``), bytes with a unit (``"9.5GiB"``, ``"9.5GB"``, ``"512MiB"``) or ``"auto"``. Arithmetic is
decimal, so ``0.6`` and ``"60%"`` give the same byte, and the result is rounded down. Units ending in ``iB`` are powers
of 1024, units ending in ``B`` are powers of 1000.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from enum import Enum

Size = int | float | str | None
Complaint = Callable[[str], ValueError]
"""Builds the ValueError of the field being read from a remedy."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MAX_BYTES = (1 << 63) - 1
"""No card and no machine holds more; larger numbers are typing errors, and C++ would overflow on them."""

ALLOWED = (
    'whole bytes (4000000000), a share of the card from 0.0 to 1.0 (0.6), a percentage ("60%"), '
    'a size with a unit ("9.5GiB", "9.5GB", "512MiB")'
)

_UNITS: dict[str, int] = {
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_NUMBER = re.compile(r"([+-]?)(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})\s*([a-z%]*)", re.ASCII)


class SizeKind(Enum):
    """How a size was written; two sizes compare without a card only when their kinds are equal."""

    AUTO = "auto"
    SHARE = "share"
    BYTES = "bytes"


@dataclass(frozen=True)
class ReadSize:
    """A size understood but not yet applied to a card: a share (0..1) or a number of bytes; 0 for auto."""

    kind: SizeKind
    amount: Decimal

    @property
    def is_zero(self) -> bool:
        return self.kind is not SizeKind.AUTO and self.amount == 0

    def to_bytes(self, field: str, total: int | None) -> int | None:
        """Bytes, rounded down; None for auto. ValueError for a share when `total` (bytes) is unknown."""
        if self.kind is SizeKind.AUTO:
            return None
        if self.kind is SizeKind.BYTES:
            return int(self.amount)
        if total is None:
            raise ValueError(
                f"{field}: a share ({self.amount}) needs the total, which is unknown here; "
                f'allowed: bytes or "auto"; write it in bytes, for example "4GiB"'
            )
        return int((self.amount * total).to_integral_value(rounding=ROUND_FLOOR))


def bad_value(field: str, given: object, allowed: str, remedy: str) -> ValueError:
    """The one shape of every complaint about input: the field, what was given, what is allowed, what to do."""
    shown = repr(given)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ValueError(f"{field}: got {shown}; allowed: {allowed}; {remedy}")


def read_size(field: str, value: object, *, auto: bool = True, share: bool = True) -> ReadSize:
    """Understand a size as written, without a card.

    `auto` and `share` say whether the field takes "auto" (or None) and shares. Raises ValueError naming the field,
    what was given, what is allowed and a remedy.
    """
    allowed = ALLOWED if share else 'whole bytes (536870912) or a size with a unit ("512MiB")'
    if auto:
        allowed += ' or "auto"'

    def bad(remedy: str) -> ValueError:
        return bad_value(field, value, allowed, remedy)

    if value is None or (isinstance(value, str) and value.strip().lower() == "auto"):
        if not auto:
            raise bad("this field has no automatic value, write 0 for none")
        return ReadSize(SizeKind.AUTO, Decimal(0))
    if isinstance(value, bool):
        raise bad("true and false are not sizes")
    if isinstance(value, int):
        read = _from_int(value, bad)
    elif isinstance(value, float):
        read = _from_float(value, bad)
    elif isinstance(value, str):
        read = _from_text(value, bad)
    else:
        raise bad(f"{type(value).__name__} is not a size")
    if read.kind is SizeKind.SHARE and not share:
        if read.amount == 0:
            return ReadSize(SizeKind.BYTES, Decimal(0))
        raise bad("a share of the card has no meaning here, write bytes")
    return read


def parse_size(field: str, value: object, *, total: int | None) -> int | None:
    """Bytes of a written size on a device of `total` bytes; None for "auto" and None.

    Not clamped: a number of bytes may exceed `total`. Raises ValueError naming the field, what was given, what is
    allowed and a remedy; also when `value` is a share and `total` is unknown.
    """
    return read_size(field, value).to_bytes(field, total)


def format_size(n: int | None) -> str:
    """Bytes for people: "9.8 GiB", "512.0 MiB", "3.0 KiB", "17 B"; "n/a" when unknown."""
    if n is None:
        return "n/a"
    size = abs(n)
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        # 1023.96 MiB would print as "1024.0 MiB": what rounds up to the next unit is printed in that unit.
        if size >= unit - unit // 20480:
            return f"{n / unit:.1f} {name}"
    return f"{n} B"


def _from_int(value: int, bad: Complaint) -> ReadSize:
    return _bytes(Decimal(value), bad)


def _from_float(value: float, bad: Complaint) -> ReadSize:
    if value != value or value in (float("inf"), float("-inf")):
        raise bad("the value must be a finite number")
    if value < 0:
        raise bad("a size cannot be negative")
    # str() gives the shortest writing of the float, so 0.6 means six tenths and not its binary neighbour.
    if value <= 1:
        return ReadSize(SizeKind.SHARE, Decimal(str(value)))
    if value.is_integer():
        return _bytes(Decimal(int(value)), bad)
    raise bad(f'a share is at most 1.0; did you mean "{value:g}GiB" or "{value:g}%"?')


def _from_text(value: str, bad: Complaint) -> ReadSize:
    text = value.strip().lower()
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise bad('write for example "60%", "9.5GiB" or "auto"')
    sign, digits, unit = match.groups()
    number = Decimal(digits)
    if sign == "-" and number != 0:
        raise bad("a size cannot be negative")
    if unit == "%":
        if number > 100:
            raise bad("a percentage is at most 100%")
        return ReadSize(SizeKind.SHARE, number / 100)
    if unit == "":
        return _from_bare_text(digits, number, bad)
    if unit not in _UNITS:
        hint = f'did you mean "{digits}{unit.upper()}iB"?' if unit in ("k", "m", "g", "t") else "unknown unit"
        raise bad(f"{hint} units are B, KiB, MiB, GiB, TiB, KB, MB, GB, TB")
    return _bytes(number * _UNITS[unit], bad)


def _from_bare_text(digits: str, number: Decimal, bad: Complaint) -> ReadSize:
    if "." in digits:
        if number > 1:
            raise bad(f'a share is at most 1.0; did you mean "{digits}GiB" or "{digits}%"?')
        return ReadSize(SizeKind.SHARE, number)
    # A text field that says 8 means 8 GiB or 8 %, never eight bytes. Integers from code are taken at their word.
    if 0 < number < MIB:
        raise bad(f'a number without a unit is bytes; did you mean "{digits}GiB" or "{digits}%"?')
    return _bytes(number, bad)


def _bytes(amount: Decimal, bad: Complaint) -> ReadSize:
    if amount < 0:
        raise bad("a size cannot be negative")
    if amount > MAX_BYTES:
        raise bad(f"more than {MAX_BYTES} bytes is no size of memory")
    return ReadSize(SizeKind.BYTES, amount.to_integral_value(rounding=ROUND_FLOOR))
