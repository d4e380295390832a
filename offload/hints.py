"""One hint that says what to change. Invariant: at most one a run, and only for a saving that the ledger has proven.

Two comparable runs have to have measured it (equal workload, device and rung, both to the end), and it has to be 0.3 s
or 5 % of the run. Of several the largest is told, of equal ones the first in the catalogue. Digests in, words out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .hint_digest import Digest, digest
from .hint_rules import LEAST_S, LEAST_SHARE, Found, Hint, fits_but_moved, high_mark_too_low, ram_pressure
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


def find(now: Digest, before: Sequence[Digest]) -> Found:
    """The hint of a run that has just ended. `before`: the runs before it, oldest first."""
    found = [rule(now, before) for rule in _RULES.values()]
    hints = [one.hint for one in found if one.hint is not None]
    if hints:
        return Found(hint=max(hints, key=lambda hint: hint.saving_s))  # the first of equals
    return Found(note=next((one.note for one in found if one.note is not None), None))
