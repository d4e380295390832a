"""Guards: what the demo claims is checked on every run, and a claim that does not hold is named, never rounded away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..sizes import format_size
from .audit import Looks

SHARE = 0.85
"""Balanced must use at least this share of the cap."""
READABLE = 0.9
"""Share of pictures in which the classifier must read the digit that was asked for."""


@dataclass
class ModeRun:
    """One mode as it ran, or as predicted. Bytes and seconds; None where it was not or cannot be measured."""

    mode: str
    resolved: str | None = None
    cap: int | None = None  # None: lifted, as for the reference
    context: int = 0  # what libraries hold on the device beside us (a cuBLAS workspace), part of peak and cap
    high: int | None = None
    pictures: Tensor | None = None  # [N, 3, H, W] in 0..1 on the CPU
    asked: list[int] = field(default_factory=list)  # the digit of each prompt
    read: list[int] = field(default_factory=list)  # what the classifier read
    equal_to_none: bool | None = None
    equal_to_cpu: bool | None = None
    peak_vram: int | None = None
    resident_peak: int | None = None
    high_crossings: int | None = None
    bytes_h2d: int | None = None
    bytes_d2h: int | None = None
    moves: int | None = None
    stall_s: float | None = None
    time_s: float | None = None
    host_s: float | None = None
    looks: Looks | None = None
    report: dict[str, Any] | None = None
    error: str | None = None
    predicted: bool = False

    @property
    def digits_right(self) -> int:
        """Pictures in which the digit that was asked for was read."""
        return sum(asked == read for asked, read in zip(self.asked, self.read, strict=True))

    @property
    def cap_share(self) -> float | None:
        """Peak over cap, less what libraries hold; None where either is not known."""
        if self.peak_vram is None or self.cap is None or self.cap <= self.context:
            return None
        return (self.peak_vram - self.context) / (self.cap - self.context)


def check_mode(run: ModeRun, *, on_simulator: bool, tight: bool) -> list[str]:
    """What does not hold for one mode, in words; empty when all is well.

    on_simulator: the plain CPU run and the copy log are there to compare with. tight: the cap is below what the run
    needs, so that balanced has to make use of it.
    """
    if run.predicted:
        return []
    if run.error is not None:
        return [f"did not finish: {run.error}"]
    found: list[str] = []
    if run.equal_to_none is not True:
        found.append("its pictures differ from those of mode none")
    if on_simulator and run.equal_to_cpu is not True:
        found.append("its pictures differ from those of the plain CPU run")
    if run.cap is not None and (run.peak_vram is None or run.peak_vram > run.cap):
        found.append(f"the allocator's peak {format_size(run.peak_vram)} is over the cap {format_size(run.cap)}")
    found += _check_marks(run)
    found += _check_bytes(run, on_simulator)
    if run.resolved == "balanced" and tight and run.cap is not None and (run.cap_share or 0.0) < SHARE:
        found.append(f"it uses {run.cap_share or 0.0:.0%} of the cap, at least {SHARE:.0%} is wanted")
    return found


def _check_marks(run: ModeRun) -> list[str]:
    found: list[str] = []
    if run.high is not None:
        if run.high_crossings != 0:
            found.append(f"a component's weights were over high {run.high_crossings} times")
        if run.looks is not None and run.looks.component_peak > run.high:
            peak = format_size(run.looks.component_peak)
            found.append(f"a component held {peak} of weights, over high {format_size(run.high)}")
    if run.looks is None:
        return [*found, "nobody looked at its modules"]
    if run.looks.hooks_on_resident:
        found.append(f"{run.looks.hooks_on_resident} hooks on resident modules")
    return found


def _check_bytes(run: ModeRun, on_simulator: bool) -> list[str]:
    found: list[str] = []
    if run.bytes_d2h != 0:
        found.append(f"{format_size(run.bytes_d2h)} of weights were copied back to the host, by the ledger")
    looks = run.looks
    if not on_simulator or looks is None:
        return found
    if looks.log_d2h != 0:
        found.append(f"{format_size(looks.log_d2h)} of weights were copied back to the host, by the copy log")
    if looks.log_h2d != run.bytes_h2d:
        found.append(f"the ledger has {run.bytes_h2d} bytes of weights copied up, the copy log {looks.log_h2d}")
    if looks.races != 0:
        found.append(f"{looks.races} races between streams")
    if looks.lost:
        found.append(f"the copy log lost {looks.lost} copies, so nothing is proven")
    return found


def check_pictures(pictures: Tensor, asked: Sequence[int], read: Sequence[int]) -> list[str]:
    """What does not hold for the pictures [N, 3, H, W] of one seed or more, in words."""
    found: list[str] = []
    first: dict[int, Tensor] = {}
    for digit, picture in zip(asked, pictures, strict=False):
        first.setdefault(digit, picture)
    digits = sorted(first)
    same = [(a, b) for i, a in enumerate(digits) for b in digits[i + 1 :] if bool((first[a] == first[b]).all())]
    if same:
        pairs = ", ".join(f"{a} and {b}" for a, b in same[:5])
        found.append(f"different prompts gave the same picture: {pairs}")
    right = sum(a == r for a, r in zip(asked, read, strict=True))
    if not asked or right < READABLE * len(asked):
        found.append(
            f"the classifier read the digit right in {right} of {len(asked)}, at least {READABLE:.0%} is wanted"
        )
    return found
