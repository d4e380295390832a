"""One hint that says what to change. Invariant: at most one a run, and only for a saving that the ledger has proven.

Two comparable runs have to have measured it (equal workload, device and rung, both to the end), and it has to be 0.3 s
or 5 % of the run. Of several the largest is told, of equal ones the first in the catalogue. Where it was the decode for
which something had to go, nothing is told that would keep more. Digests in, words out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .hint_digest import Digest, digest
from .hint_rules import (
    LEAST_S,
    LEAST_SHARE,
    Found,
    Hint,
    fits_but_moved,
    high_mark_too_low,
    latest,
    objection,
    ram_pressure,
)
from .hint_runs import core_default_best, decode_peak, no_offload_faster

__all__ = ["CODES", "LEAST_S", "LEAST_SHARE", "Digest", "Found", "Hint", "digest", "find"]

_RULES: dict[str, Callable[[Digest, Sequence[Digest]], Found]] = {
    "FITS_BUT_MOVED": fits_but_moved,
    "NO_OFFLOAD_FASTER": no_offload_faster,
    "DECODE_PEAK": decode_peak,
    "HIGH_MARK_TOO_LOW": high_mark_too_low,
    "RAM_PRESSURE": ram_pressure,
    "CORE_DEFAULT_BEST": core_default_best,
}
CODES = tuple(_RULES)


_BESIDE_A_DECODE = ("DECODE_PEAK", "RAM_PRESSURE")  # what they change keeps nothing more in VRAM


def find(now: Digest, before: Sequence[Digest]) -> Found:
    """The hint of a run that has just ended, and the note. `before`: the runs before it, oldest first."""
    found = [rule(now, before) for rule in _RULES.values()]
    hints = [one.hint for one in found if one.hint is not None]
    note = next((one.note for one in found if one.note is not None), None)
    last = latest(now, before)
    needed = None if last is None else objection(now, last)
    if needed is not None:
        spoken = [hint for hint in hints if hint.code in _BESIDE_A_DECODE]
        if note is None and len(spoken) < len(hints):
            note = f"Nothing is said that would keep more in VRAM, as {needed}."
        hints = spoken
    return Found(max(hints, key=lambda hint: hint.saving_s, default=None), note)  # the first of equals
