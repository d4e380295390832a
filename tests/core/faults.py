"""Faults on request, and a net under a session that is looked at from all sides after one.

Invariant: `Rig.sound` passes if and only if nothing of a fault is left: what comes out, what moves, what lies on the
device, hooks, streams, and the model itself once it is given back.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload import OffloadPolicy, Session

from .toys import DEVICE, Chain, build, clone, copied, device_bytes, hooks, policy, state_of, tokens


@pytest.fixture(scope="module", autouse=True)
def frozen(vram: ModuleType) -> None:
    """What the first forward of a process loads stays for good: the collections around every test need not walk it."""
    net = build(lambda: Chain(2))
    with Session(policy("sequential"), device=DEVICE) as session, torch.no_grad():
        session.add("net", net)
        for _ in range(3):
            net(tokens().to(DEVICE))
    del net, session
    gc.collect()
    gc.freeze()


CORE = Path(__file__).resolve().parents[2] / "offload"


class Interrupt(BaseException):
    """What a host raises to stop a run: no Exception."""


# ---------------------------------------------------------------------- an interrupt at any line
Place = tuple[str, int, int]  # file, line, how often it had run before


class Lines:
    """Interrupts Python code at a line of its choice, as Ctrl+C does: between any two lines of the core.

    `names` are the files of the core whose lines count.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._files = {str(CORE / name) for name in names}
        missing = [name for name in self._files if not Path(name).is_file()]
        assert not missing, missing
        self._runs: dict[tuple[str, int], int] = {}
        self._functions: dict[tuple[str, int], str] = {}
        self._target: Place | None = None
        self._error: type[BaseException] = Interrupt
        self.struck: str | None = None

    def places(self, work: Callable[[], Any], most: int = 3) -> list[Place]:
        """Run `work` once; the lines that it passed, each at up to `most` of its runs: the first, the last, one in the
        middle."""
        self._target = None
        with self._tracing():
            work()
        found: list[Place] = []
        for (file, line), count in self._runs.items():
            found += [(file, line, at) for at in sorted({0, *[count - 1, count // 2][: most - 1]})]
        return found

    def function(self, place: Place) -> str:
        """The function that the line is in."""
        return self._functions.get(place[:2], "<lambda>")

    def strike(self, work: Callable[[], Any], place: Place, error: type[BaseException] = Interrupt) -> bool:
        """Run `work`, and raise `error` at `place`; whether it came out. `struck` is None if it was never there."""
        self._target, self._error = place, error
        try:
            with self._tracing():
                work()
        except error:
            return True
        return False

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        self._runs, self.struck = {}, None
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            key = (frame.f_code.co_filename, frame.f_lineno)
            run = self._runs.get(key, 0)
            self._runs[key] = run + 1
            if not frame.f_code.co_name.startswith("<"):  # a comprehension is part of the line that it is in
                self._functions[key] = frame.f_code.co_name
            if self._target == (*key, run):
                self.struck = f"{Path(key[0]).name}:{key[1]} ({frame.f_code.co_name}), run {run}"
                raise self._error(self.struck)
        return self._line


# ---------------------------------------------------------------------- a net under a session
class Rig:
    """A net under one policy beside its untouched twin on the plain CPU."""

    def __init__(
        self,
        sim: ModuleType,
        make: Callable[[], nn.Module],
        inputs: Callable[[int], torch.Tensor],
        wanted: OffloadPolicy | str,
        expected: list[torch.Tensor] | None = None,
    ) -> None:
        self.sim = sim
        self.net = build(make)
        self.inputs = inputs
        self.expected = expected or [clone(self.net)(inputs(seed)) for seed in range(3)]
        self.before = state_of(self.net)
        self.start = sim.memory_allocated()
        self.locked = sim.counters()["pinned"]
        self.session = Session(policy(wanted) if isinstance(wanted, str) else wanted, device=DEVICE)
        self.managed = self.session.add("net", self.net)
        self.weights = self.managed.weights
        self.xs = [inputs(seed).to(DEVICE) for seed in range(3)]
        sim.synchronize()
        self.mine = sim.memory_allocated() - self.start - self.managed.engine.device_bytes

    def forward(self, seed: int = 0) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = self.net(self.xs[seed])
        return out

    def check(self, seed: int = 0, note: str = "") -> None:
        """One forward draws what the plain CPU draws."""
        assert torch.equal(self.forward(seed).cpu(), self.expected[seed]), note
        assert self.sim.races() == 0, f"{note}: {self.sim.last_race()}"

    def warm(self, forwards: int) -> None:
        for at in range(forwards):
            self.check(at % 3, f"forward {at}")

    def steady(self) -> dict[str, int]:
        """What one forward moves: copies and bytes by direction."""
        return copied(self.sim, lambda: self.forward(1))

    def settle(self, forwards: int = 4) -> dict[str, int]:
        """Until plans go by times, and what a forward moves from then on."""
        self.warm(forwards)
        self.session.stages.leave()
        self.warm(3)
        return self.steady()

    def sound(self, note: str = "") -> None:
        """Nothing is half done now."""
        sim, managed, session = self.sim, self.managed, self.session
        assert sim.current_stream() == sim.default_stream(), f"{note}: another stream is current"
        assert managed.running == 0, f"{note}: a call counts as running"
        assert not session.ledger.active, f"{note}: a run is open that nobody opened"
        self.check(1, note)
        self.check(2, note)
        assert not managed.engine.stream.busy, note
        loaded = managed.engine.loaded
        for unit in managed.component.units:
            count = len(unit.module._forward_hooks) + len(unit.module._forward_pre_hooks)
            wanted = 0 if unit.index in loaded or not unit.hookable else 2
            assert count == wanted, f"{note}: {unit.name} has {count} hooks, not {wanted}"
        told = managed.engine.device_bytes
        there = self._there(self.start + self.mine + told) - self.start - self.mine
        assert there == told, f"{note}: {there} bytes there, {told} told"

    def _there(self, wanted: int) -> int:
        """Device bytes; garbage is only collected where there are others than `wanted`, since that takes its time."""
        self.sim.synchronize()
        self.sim.empty_cache()
        there = int(self.sim.memory_allocated())
        return there if there == wanted else device_bytes(self.sim)

    def leave(self, note: str = "") -> None:
        """Give it back: all as it was."""
        self.session.detach()
        self.xs.clear()
        assert state_of(self.net) == self.before, note
        assert hooks(self.net) == [] and self._there(self.start) == self.start, note
        assert self.session.ledger.total_bytes_d2h == 0, note
        if self.managed.weights is self.weights:  # masters that were taken anew are another test's
            if self.sim.counters()["pinned"] > self.locked:
                gc.collect()
            assert self.sim.counters()["pinned"] <= self.locked, f"{note}: host memory is still page-locked"
