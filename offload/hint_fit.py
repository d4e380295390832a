"""Would all of it have fitted? Invariant: said of a run only where its own peaks say so, and never against them.

What else was on the device during a stage is known at the run's end (what was left there), so for its last stage, and
between bounds for earlier ones: at least nothing, at most all that each component ever had there.
"""

from __future__ import annotations

from dataclasses import dataclass

from .hint_digest import Digest, Row, Stage


@dataclass(frozen=True)
class Room:
    """What a decode took by its measured peak, beside the other components' weights. Bytes, with bounds."""

    least: int
    most: int
    others: int  # weights of all components that it does not run

    def needed(self, available: int) -> bool:
        """Certainly it could not have run with everything else resident."""
        return self.least + self.others > available

    def spared(self, available: int) -> bool:
        """Certainly it could have."""
        return self.most + self.others <= available


def everything_fits(run: Digest) -> bool:
    """The weights of all and the largest activations fit what was available, by the fit rule and by every decode."""
    if not run.fits or run.weights is None or run.activations is None or run.available is None:
        return False
    if run.weights + run.activations > run.available:
        return False
    rooms = [_room(run, stage) for stage in _to_check(run)]
    return all(room is not None and room.spared(run.available) for room in rooms)


def spare(run: Digest) -> int:
    """Bytes that were available beyond all weights and the largest activations; `everything_fits` holds."""
    assert run.weights is not None and run.activations is not None and run.available is not None
    rooms = [room for stage in _to_check(run) if (room := _room(run, stage)) is not None]
    need = max([run.weights + run.activations, *(room.most + room.others for room in rooms)])
    return max(0, run.available - need)


def decode_needed(run: Digest) -> Room | None:
    """The decode that needed the room which the other weights would have taken; None where none certainly did."""
    if run.available is None:
        return None
    rooms = [room for stage in _to_check(run) if (room := _room(run, stage)) is not None]
    needed = [room for room in rooms if room.needed(run.available)]
    return max(needed, key=lambda room: room.least + room.others, default=None)


def decode_alone(run: Digest) -> Room | None:
    """The decode for which not all could stay; None where the weights alone would not have fitted either."""
    if run.weights is not None and run.available is not None and run.weights > run.available:
        return None
    return decode_needed(run)


def beside_decodes(run: Digest, component: str) -> int | None:
    """Bytes of the component that may be there during every decode, at most; None where nothing says so."""
    if run.available is None:
        return None
    stages = [stage for stage in _to_check(run) if component not in stage.components]
    rooms = [room for stage in stages if (room := _room(run, stage)) is not None]
    return max(0, run.available - max(room.least for room in rooms)) if rooms else None


def decodes(run: Digest) -> list[Stage]:
    return [stage for stage in run.stages if stage.name == "decode"]


def _to_check(run: Digest) -> list[Stage]:
    """The decodes, and what a long run's stages were put together to: decodes may be among them."""
    return [stage for stage in run.stages if stage.name in ("decode", "several")]


def _room(run: Digest, stage: Stage) -> Room | None:
    others = [row for row in run.rows if row.component not in stage.components and "+" not in row.component]
    own = sum(row.weight or 0 for row in run.rows if row.component in stage.components)
    weights = [row.weight for row in others if row.weight is not None]
    if len(weights) == len(others):
        total = sum(weights)
    elif run.weights is not None:  # by the fit rule's sum, of which the decoder has its part
        total = max(0, run.weights - own)
    else:
        return None
    if stage.peak is None:  # what it was expected to need, with as much of its weights as was missing
        return None if stage.need is None else Room(stage.need, stage.need + own, total)
    left = [row.left for row in others]
    if stage is run.stages[-1] and stage.name == "decode" and None not in left:
        beside = sum(nbytes for nbytes in left if nbytes is not None)
        exact = max(0, stage.peak - beside)
        return Room(exact, exact, total)
    most = [_at_most(row) for row in others]
    beside = total if None in most else sum(nbytes for nbytes in most if nbytes is not None)
    return Room(max(0, stage.peak - beside), stage.peak, total)


def _at_most(row: Row) -> int | None:
    known = [nbytes for nbytes in (row.weight, row.resident) if nbytes is not None]
    return min(known, default=None)
