"""What of which component stays on the device in each stage. Invariant: a byte stays where it saves the most copies.

A run is a sequence of stages (encode, denoise, decode), each with one running component, and runs repeat. A byte of
the running component that is not resident is copied in every call of the stage, as long as copies are what the call
waits for: below max(C, S / B) = C a further resident byte saves nothing. A byte of another component is copied once,
when its turn comes. So the running component comes first, with what its calls need to be compute-bound, where it is
called more than once. What is left keeps of the others what their compute would not hide, those of the next use first
(Belady 1966: what is used latest goes; byte by byte and at equal costs that is optimal). No further byte saves time:
the rest is for the smaller ones first, the running component among them, since one that is whole needs no streaming.

The hand-over: in the last call of a stage each unit is dead behind its own use, and the copy engine has the time that
the call's own copies leave. That much of the next component comes up unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .schedule import Rates

ROUNDS = 3  # runs until the sets recur: what a run finds is what the run before left


@dataclass(frozen=True)
class Stage:
    """One stage: `calls` forwards of `component`, with `activations` bytes and `compute_s` seconds for each.

    `ring` is what the component needs on the device at least, in order to stream: a few of its units, bytes.
    """

    component: str
    calls: int
    activations: int
    compute_s: float
    ring: int


@dataclass(frozen=True)
class StageKeep:
    """The device during one stage. Bytes.

    `budget` is for the running component, its ring included; `kept` are the others, by name, none with 0. `loads` is
    what of it is brought up when the stage begins, the rest of a streaming component not counted; `streams` what each
    call copies. `early` of the next stage's component can come up during the last call, `hidden_s` seconds of copies.
    """

    component: str
    budget: int
    kept: Mapping[str, int]
    loads: int
    streams: int
    early: int
    hidden_s: float


def useful_bytes(size: int, stage: Stage, rates: Rates) -> int:
    """Bytes of a component of `size` bytes whose residence shortens the calls of its stage.

    None for a single call, which copies each byte once in any case; otherwise all that the compute time of a call does
    not hide.
    """
    if stage.calls <= 1:
        return 0
    return max(0, min(size, size - int(rates.h2d * stage.compute_s)))


def keep_sets(
    sizes: Mapping[str, int], stages: Sequence[Stage], room: int, rates: Rates, *, repeats: bool = True
) -> list[StageKeep]:
    """What stays during each of `stages` within `room` bytes of weights and activations.

    `sizes` are device bytes by component. `repeats`: another run of the same stages follows.

    Raises:
        ValueError: a stage whose component has no size, or whose ring and activations take more than the room.
    """
    _check(sizes, stages, room)
    loaded = dict.fromkeys(sizes, 0)
    found: list[StageKeep] = []
    for _ in range(ROUNDS if repeats else 1):
        found = [_enter(at, loaded, sizes, stages, room, rates, repeats) for at in range(len(stages))]
    return found


def _check(sizes: Mapping[str, int], stages: Sequence[Stage], room: int) -> None:
    for number, stage in enumerate(stages):
        if stage.component not in sizes:
            raise ValueError(
                f"stages: stage {number} runs {stage.component!r}; allowed: {', '.join(sorted(sizes))}; give its size"
            )
        least = min(sizes[stage.component], stage.ring) + stage.activations
        if least > room:
            raise ValueError(
                f"room: {stage.component!r} needs {least} bytes for its ring and activations, and there are {room}; "
                "lower the activations (a smaller picture, tiles), or free memory of the card"
            )


def _enter(
    at: int,
    loaded: dict[str, int],
    sizes: Mapping[str, int],
    stages: Sequence[Stage],
    room: int,
    rates: Rates,
    repeats: bool,
) -> StageKeep:
    """Stage number `at` begins with `loaded` bytes of each component, which it changes."""
    stage = stages[at]
    name, size = stage.component, sizes[stage.component]
    space = room - stage.activations
    wanted = min(size, useful_bytes(size, stage, rates) + stage.ring)
    left = max(0, space - wanted)
    there = {**loaded, name: size - wanted}  # what of each could stay in what is left; our own comes with its call
    kept = dict.fromkeys(sizes, 0)
    uses = _next_uses(at, stages, repeats)
    for other in sorted(uses, key=lambda other: (uses[other], other)):
        unhidden = sizes[other] - int(rates.h2d * stages[(at + uses[other]) % len(stages)].compute_s)
        kept[other] = min(there[other], max(0, unhidden - wanted if other == name else unhidden), left)
        left -= kept[other]
    for other in sorted({*uses, name}, key=lambda other: (sizes[other], other)):
        more = min(there[other] - kept[other], left)
        kept[other] += more
        left -= more
    del kept[name]
    loaded.update(kept)
    kept = {other: nbytes for other, nbytes in kept.items() if nbytes}
    budget = min(size, space - sum(kept.values()))
    resident = size if budget >= size else max(0, budget - stage.ring)
    loads = max(0, resident - loaded[name])
    loaded[name] = resident
    streams = size - resident
    early = _early(at, loaded, sizes, stages, space - sum(kept.values()), streams, rates, repeats)
    return StageKeep(name, budget, kept, loads, streams, early, early / rates.h2d)


def _next_uses(at: int, stages: Sequence[Stage], repeats: bool) -> dict[str, int]:
    """The components that will run again, with the number of stages until then."""
    uses: dict[str, int] = {}
    for distance in range(1, len(stages) + 1 if repeats else len(stages) - at):
        uses.setdefault(stages[(at + distance) % len(stages)].component, distance)
    return uses


def _early(
    at: int,
    loaded: Mapping[str, int],
    sizes: Mapping[str, int],
    stages: Sequence[Stage],
    space: int,
    streams: int,
    rates: Rates,
    repeats: bool,
) -> int:
    """Bytes of the next stage's component that the last call of stage `at` can bring up unseen."""
    if at + 1 == len(stages) and not repeats:
        return 0
    stage, following = stages[at], stages[(at + 1) % len(stages)]
    if following.component == stage.component:
        return 0
    missing = sizes[following.component] - loaded[following.component]
    fits = space - min(stage.ring, sizes[stage.component])  # what it has already run gives way, unit by unit
    unhidden = max(0.0, rates.h2d * stage.compute_s - streams)
    return int(max(0, min(missing, fits, unhidden)))
