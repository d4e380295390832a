"""What each unit of a component computes, from one forward. Invariant: nobody waits for it, and its hooks go with it.

While it runs, every unit's module carries hooks that put marks on the compute stream: `before` and `ready` around
whatever else hooks the module ahead of its forward (that is where a streamed unit waits for its copy), `done` and
`after` around what hooks it behind. What lies between `before` and `ready`, and between `done` and `after`, is waiting;
all else is compute, and counts to the unit that started last, so that attention and other work without weights is in
the figure of the unit in front of it. The figures are read when the device has passed the last mark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from .backend import Backend, Mark
from .units import Component, Unit

# What a mark says of the module that set it. Both ends of the forward are marks of no unit.
_BEFORE, _READY, _DONE, _AFTER, _END = range(5)
_NOBODY = -1


@dataclass(frozen=True)
class Costs:
    """Seconds of compute of one forward.

    `walk` has (unit index, seconds) in the order in which units ran first: from the start of that unit's forward to
    the start of the next one's, without waits; a unit that ran more than once has the sum, and is in `repeats`. What
    ran before the first unit (`before_s`) is in the last unit's figure, as it follows it from step to step. `own` has
    the part until the unit's own forward ends, after which its weights are no longer needed. `total_s` is the sum of
    `walk`, and `waits_s` what was left out. Units that hooks would change, and those that did not run, are in neither.
    """

    walk: tuple[tuple[int, float], ...]
    own: Mapping[int, float]
    total_s: float
    before_s: float
    waits_s: float
    repeats: tuple[int, ...]


class Calibration:
    """Times the units of `component` in one call of one of its entry points.

    Start it right in front of the call, once all other hooks are in place, and stop it right behind, also when the
    call raises; or use it as a context manager, which does both. It can be started again for another forward.
    """

    def __init__(self, component: Component, backend: Backend) -> None:
        self._backend = backend
        self._units = [unit for unit in component.units if unit.hookable]
        self._handles: list[Any] = []
        self._marks: list[tuple[int, int, Mark]] = []
        self._whole = False
        self._costs: Costs | None = None

    def start(self) -> None:
        """Hook every unit and mark the start. What an earlier forward left unread is dropped."""
        self.stop(whole=False)
        self._marks, self._costs = [], None
        try:
            for unit in self._units:
                self._hook(unit)
        except BaseException:
            self.stop(whole=False)
            raise
        self._mark(_END, _NOBODY)

    def stop(self, *, whole: bool = True) -> None:
        """Mark the end and take every hook off again. `whole` false: the forward did not get to its end."""
        if not self._handles:
            return
        try:
            if whole:
                self._mark(_END, _NOBODY)  # first: taking hooks off takes time
            else:
                self._marks = []
            self._whole = whole
        finally:
            handles, self._handles = self._handles, []
            for handle in handles:
                handle.remove()

    def __enter__(self) -> Calibration:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(whole=error is None)

    def read(self) -> Costs | None:
        """The costs; None until the device has passed the end, and where the forward raised. Never blocks."""
        if self._costs is None and self._whole and self._marks and not self._handles:
            if not all(self._backend.ready(mark) for _, _, mark in reversed(self._marks)):  # the last one tells first
                return None
            self._costs = self._count()
            self._marks = []  # its events
        return self._costs

    # ------------------------------------------------------------------ marks
    def _mark(self, kind: int, index: int) -> None:
        self._marks.append((kind, index, self._backend.mark()))

    def _hook(self, unit: Unit) -> None:
        index, module, mark, handles = unit.index, unit.module, self._mark, self._handles

        def before(module: torch.nn.Module, args: Any) -> None:
            mark(_BEFORE, index)

        def ready(module: torch.nn.Module, args: Any) -> None:
            mark(_READY, index)

        def done(module: torch.nn.Module, args: Any, output: Any) -> None:
            mark(_DONE, index)

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            mark(_AFTER, index)

        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_pre_hook(ready))
        # always: a model may catch what a module raises, and go on
        handles.append(module.register_forward_hook(done, prepend=True, always_call=True))
        handles.append(module.register_forward_hook(after, always_call=True))

    # ------------------------------------------------------------------ figures
    def _count(self) -> Costs:
        walk: dict[int, float] = {}
        own: dict[int, float] = {}
        runs: dict[int, int] = {}
        inside: list[int] = []  # units whose own forward is running; one that calls itself is in here twice
        owner, before, waits = _NOBODY, 0.0, 0.0
        for (_, _, start), (kind, index, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds = max(0.0, self._backend.seconds(start, end))
            if kind in (_READY, _AFTER):
                waits += seconds
            else:
                if owner == _NOBODY:
                    before += seconds
                else:
                    walk[owner] += seconds
                for running in set(inside):
                    own[running] += seconds
            if kind == _READY:
                owner = index
                runs[index] = runs.get(index, 0) + 1
                walk.setdefault(index, 0.0)
                own.setdefault(index, 0.0)
                inside.append(index)
            elif kind == _DONE and index in inside:  # not where a hook in front of it raised, and was caught
                inside.remove(index)
        if walk:
            walk[owner] += before
        repeats = tuple(index for index, count in runs.items() if count > 1)
        return Costs(tuple(walk.items()), own, sum(walk.values()), before, waits, repeats)
