"""What this machine moves, remembered. Invariant: a rate was measured here, or says that it is assumed; a broken,
foreign or unwritable file costs a warning and never a run.

Rates are kept per card, link, driver and torch as `offload-rates/1`. They are measured once (`measure`), where no
entry is there, and refreshed by the large copies that a run makes anyway: `observe` takes the median of the last ones.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .backend import Backend, driver_version
from .measure import ASSUMED, measure
from .schedule import Rates

__all__ = ["ASSUMED", "RateBook", "measure", "rate_book", "rates_for", "state_folder"]

SCHEMA = "offload-rates/1"
FOLDER = "BALANCED_OFFLOAD_STATE"  # environment: where what is learned about a machine is kept
FILE = "rates.json"
SAVE_EVERY_S = 60.0
LEAST_OBSERVED = 4 << 20  # bytes: the fixed part of a smaller copy, and what runs beside it, show too much
OBSERVED = 63  # copies whose median counts
ENOUGH = 9  # copies until it does
STEADY = 0.03  # relative: a rate that moves less stays, and so does every plan that was made with it
_FIELDS = ("h2d", "h2d_pageable", "copy_latency")
_PLAUSIBLE = {"h2d": (1e7, 1e13), "h2d_pageable": (1e7, 1e13), "copy_latency": (0.0, 1e-2)}


def state_folder() -> Path:
    """Where what is learned about this machine is kept: `BALANCED_OFFLOAD_STATE`, else the platform's place for it."""
    given = os.environ.get(FOLDER)
    if given:
        return Path(given)
    home = Path(os.path.expanduser("~"))  # unlike Path.home, no error where there is none
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "balanced-offload"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "balanced-offload"
    return Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "balanced-offload"


def machine_key(backend: Backend) -> str:
    """What rates depend on: card, memory, bus, driver, torch; for a simulated card also the link that is set."""
    parts = [backend.name, f"{backend.memory().total} bytes", backend.link(), f"torch {torch.__version__}"]
    simulated = backend.link_rates()
    if simulated is not None:
        parts.append("simulated {:g} {:g} {:g}".format(*simulated))
    elif backend.kind == "cuda":
        parts.append(f"driver {driver_version()}")
    return ", ".join(part for part in parts if part)


class RateBook:
    """The rates of the machines that were seen, in `folder` (None: the state folder). May be used by several threads.

    Read when it is first asked. A simulated card's rates stay in memory unless the state folder was named, since its
    parameters are whatever the last program set.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._named = folder is not None or bool(os.environ.get(FOLDER))
        self.file = (folder or state_folder()) / FILE
        self._lock = threading.Lock()
        self._known: dict[str, Rates] | None = None
        self._seen: dict[tuple[str, bool], deque[float]] = {}
        self._kept: set[str] = set()  # keys that go to the file
        self._keys: dict[tuple[Any, ...], str] = {}
        self._dirty = False
        self._saved = -math.inf
        self._silent = False

    def get(self, backend: Backend) -> Rates | None:
        """The rates known for the machine of `backend`, or None."""
        with self._lock:
            return self._entries().get(self._key(backend))

    def put(self, backend: Backend, rates: Rates) -> None:
        """Remember measured `rates`, and save them."""
        with self._lock:
            self._entries()[self._key(backend)] = rates
            self._change(backend)
        self.save()

    def observe(self, backend: Backend, nbytes: int, seconds: float, pinned: bool) -> None:
        """Learn from a copy that a run has made: `nbytes` to the device in `seconds` of the copy engine.

        Small ones and impossible ones are passed over. Cheap, but not for inside a step: it may save.
        """
        with self._lock:
            key = self._key(backend)
            now = self._entries().get(key)
            if now is None or nbytes < LEAST_OBSERVED:
                return
            moving = seconds - now.copy_latency
            field = "h2d" if pinned else "h2d_pageable"
            if not moving > 0 or not _plausible(field, nbytes / moving):
                return
            seen = self._seen.setdefault((key, pinned), deque(maxlen=OBSERVED))
            seen.append(nbytes / moving)
            if len(seen) < ENOUGH:
                return
            rate = median(seen)
            if abs(rate - getattr(now, field)) <= STEADY * rate:
                return
            self._entries()[key] = replace(now, h2d=rate) if pinned else replace(now, h2d_pageable=rate)
            self._change(backend)
            due = self._dirty and time.monotonic() - self._saved >= SAVE_EVERY_S
        if due:
            self.save()

    def save(self) -> None:
        """Write what has changed, if anything has, in one piece. Entries of other machines in the file stay."""
        with self._lock:
            if not self._dirty:
                return
            self._dirty, self._saved = False, time.monotonic()
            mine = {key: rates for key, rates in self._entries().items() if key in self._kept}
            try:
                self._write({**self._read(), **mine})
            except OSError as error:
                self._warn(f"cannot be written ({error.strerror or error}); rates are measured again next time")

    # ------------------------------------------------------------------ inside
    def _key(self, backend: Backend) -> str:
        # the device's name and driver cost a look into the system; what a simulated card may change costs little
        short = (backend.name, str(backend.device), backend.link_rates())
        if short not in self._keys:
            self._keys[short] = machine_key(backend)
        return self._keys[short]

    def _change(self, backend: Backend) -> None:
        if backend.rung != "simulated" or self._named:
            self._kept.add(self._key(backend))
            self._dirty = True

    def _entries(self) -> dict[str, Rates]:
        if self._known is None:
            self._known = self._read()
        return self._known

    def _read(self) -> dict[str, Rates]:
        try:
            document = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"cannot be read ({error}); rates are measured again")
            return {}
        machines = document.get("machines") if isinstance(document, dict) else None
        if not isinstance(machines, dict) or document.get("schema") != SCHEMA:
            self._warn(f"is not an {SCHEMA} document; rates are measured again")
            return {}
        found = {key: rates for key, entry in machines.items() if (rates := _entry(entry)) is not None}
        if len(found) < len(machines):
            self._warn(f"has {len(machines) - len(found)} entries that are no rates; those are measured again")
        return found

    def _write(self, machines: dict[str, Rates]) -> None:
        entries = {key: {name: getattr(rates, name) for name in _FIELDS} for key, rates in sorted(machines.items())}
        text = json.dumps({"schema": SCHEMA, "machines": entries}, indent=1)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=FILE, suffix=".tmp", dir=self.file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text + "\n")
            os.replace(name, self.file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _warn(self, what: str) -> None:
        if not self._silent:
            self._silent = True
            warnings.warn(f"{self.file.name} in the state folder {what}. Set {FOLDER} to another folder, or delete "
                          "the file, to be rid of this.", stacklevel=3)  # fmt: skip


def _plausible(field: str, value: float) -> bool:
    low, high = _PLAUSIBLE[field]
    return low <= value <= high  # false for what is no number, too


def _entry(entry: Any) -> Rates | None:
    """The rates of one entry of the file, or None where it has none that can be true."""
    if not isinstance(entry, dict):
        return None
    values: list[float] = []
    for name in _FIELDS:
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _plausible(name, value):
            return None
        values.append(float(value))
    return Rates(values[0], values[1], values[2], source="stored")


_books: dict[Path, RateBook] = {}


def rate_book() -> RateBook:
    """This process's book of the state folder."""
    folder = state_folder()
    book = _books.get(folder)
    return book if book is not None else _books.setdefault(folder, RateBook())


def rates_for(backend: Backend, book: RateBook | None = None, *, keep: bool = True) -> Rates:
    """The rates of the machine of `backend`; never raises. `keep` false: what has to be measured is not written down.

    Known ones where there are any; a simulated card's own figures, which need no measuring and no copies that its log
    would show; else measured now, once. `source` says which: "stored", "measured" or "assumed".
    """
    book = rate_book() if book is None else book
    try:
        known = book.get(backend)
        if known is not None:
            return known
        own = backend.link_rates()
        if own is not None:
            return Rates(*own, source="stored")
        rates = measure(backend)
        if rates.source == "measured" and keep:
            book.put(backend, rates)
    except Exception as error:  # whatever a driver raises: a plan with assumed rates is slower, not wrong
        warnings.warn(
            f"the rates of {backend.name} could not be measured ({error}); assumed ones are used", stacklevel=2
        )
        return ASSUMED
    return rates
