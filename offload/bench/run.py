"""One run of a suite. Invariant: a peer's error is a line in the table, and never the end of the run.

Cases run one after the other, strategies in the table's order, and on a GPU all of that in rounds, so that what drifts
with time touches every strategy alike. Every result is saved before the next one begins.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .document import Book, title
from .measure import Baseline, Setting, measure, run_baseline
from .overhead import hook_cost
from .places import Place
from .strategies import Strategy
from .subjects import find
from .tables import result_line
from .twin import Twin, compare, make_twin

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to run. `rounds` is how often each strategy is set up anew on each case; `path` is where the JSON goes."""

    suite: str
    cases: tuple[Case, ...]
    strategies: tuple[Strategy, ...]
    steps: int = 3
    rounds: int = 1
    python_time: bool = False
    resume: bool = False
    path: Path | None = None
    hooks: bool = True
    limit_s: float | None = None  # begin no further strategy after that; `resume` goes on

    def parameters(self, place: Place) -> dict[str, Any]:
        """What the figures hang on, for the document."""
        notes = {one.name: one.note for one in self.strategies}
        versions = {"torch": torch.__version__, **_versions("diffusers", "accelerate")}
        more = {
            "steps": self.steps,
            "rounds": self.rounds,
            "python_time": self.python_time,
        }
        return {**place.parameters(), **more, "versions": versions, "strategies": notes}


@dataclass
class Suite:
    """A run in progress."""

    place: Place
    options: Options
    say: Say
    baselines: dict[tuple[str, str, str | None], Baseline] = field(default_factory=dict)
    twins: dict[str, Twin] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    stopped: bool = False

    def run(self) -> dict[str, Any]:
        """All cases, in the document `offload-bench/1`.

        Raises:
            ValueError: `--resume` with a file of another run.
        """
        options, place = self.options, self.place
        make = Book.resumed if options.resume and options.path is not None else Book.new
        book = make(options.suite, place.rung, place.name, options.parameters(place), options.path)  # type: ignore[arg-type]
        with quiet():
            if options.hooks and book.document["hooks"] is None:
                self.say("Python per streamed leaf ...")
                book.document["hooks"] = hook_cost(place)
                book.save()
            for number in range(options.rounds):
                for case in options.cases:
                    todo = [one for one in options.strategies if book.rounds(case, one.name) <= number]
                    if todo and not self._over():
                        self._case(book, case, todo, number)
        return book.finish(complete=not self.stopped)

    def _over(self) -> bool:
        """Whether the time that this call may take is over."""
        limit = self.options.limit_s
        self.stopped = self.stopped or (limit is not None and time.monotonic() - self.begun >= limit)
        return self.stopped

    def _case(self, book: Book, case: Case, todo: Sequence[Strategy], number: int) -> None:
        options, place = self.options, self.place
        subject = find(case.model)
        ghost = place.rung == "simulated" and not subject.computed
        setting = Setting(subject, case.resolution, False, not ghost, options.steps, options.python_time)
        place.use(case.card, case.cap)
        parameters, order = place.parameters(), tuple(one.name for one in options.strategies)
        with place.ghost(ghost):
            baseline = self._baseline(case, setting)
            place.use(case.card, case.cap)
            book.describe(case, baseline, place.bandwidth, parameters)
            self.say(f"{case}" + (f", round {number + 1}" if options.rounds > 1 else ""))
            for strategy in todo:
                if self._over():
                    return
                verdict = {}
                if ghost:
                    with place.ghost(False):
                        verdict = self._verdict(case.model, strategy)
                result = measure(place, strategy, setting, case.cap, baseline, case.card)
                if result["equal"] is not None:
                    result["equal_on"] = place.rung
                elif verdict.get("twin_equal") is not None:
                    result["equal_on"] = "tiny"
                book.add(case, result | verdict, order)
                self.say(result_line(book.case(case), strategy.name))

    def _baseline(self, case: Case, setting: Setting) -> Baseline:
        key = case.model, case.resolution, case.card
        if key not in self.baselines:
            self.baselines.clear()  # its output may be large, and cases of one key come together
            self.baselines[key] = run_baseline(self.place, setting)
        return self.baselines[key]

    def _verdict(self, model: str, strategy: Strategy) -> dict[str, Any]:
        if model not in self.twins:
            self.twins[model] = make_twin(self.place, find(model))
        key = model, strategy.name
        if key not in self.verdicts:
            self.verdicts[key] = compare(self.place, strategy, self.twins[model])
        return self.verdicts[key]


def run_suite(place: Place, options: Options, say: Say) -> dict[str, Any]:
    """Run it, and give the place back without a cap."""
    place.clean()
    frozen = gc.get_freeze_count()
    gc.freeze()  # what the libraries made when they were imported: walking it takes longer than a small case
    try:
        return Suite(place, options, say).run()
    finally:
        if not frozen:
            gc.unfreeze()
        place.use(None, None)
        place.clean()


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries' advice about offloading is not for who reads this table."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _versions(*names: str) -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


__all__ = ["Options", "Suite", "run_suite", "title"]
