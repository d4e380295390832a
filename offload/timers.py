"""The performance timers: what each figure of a run means, and what to turn. Invariant: the exclusive ones, in the
report's order, add up to the wall time; what lies beside them is marked as such and is in no sum.

`web/docs/PerformanceTimers.md` says the same at length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .hint_digest import seconds_of

Kind = Literal["exclusive", "beside", "figure"]


@dataclass(frozen=True)
class Timer:
    """`field`: where its figure is in the report's totals. A "figure" is bytes, and has no seconds."""

    name: str
    field: str
    kind: Kind
    means: str
    turn: str


TIMERS = (
    Timer(
        "encode",
        "encode_s",
        "exclusive",
        "Computing text encoders, and pictures that go into the VAE.",
        "A prompt that has not changed is not encoded again. Else: a smaller text encoder, or one of fewer bits.",
    ),
    Timer(
        "denoise",
        "denoise_s",
        "exclusive",
        "Computing the steps of the UNet or transformer.",
        "This is the work itself: fewer steps, a smaller picture, a faster attention. No offload setting shortens it.",
    ),
    Timer(
        "decode",
        "decode_s",
        "exclusive",
        "Computing the picture from the latent, by the VAE.",
        "A smaller picture. If it ran out of memory and was begun again: Before decode = free_all, or VAE tiling = on.",
    ),
    Timer(
        "preview",
        "preview_s",
        "exclusive",
        "Computing previews between the steps.",
        "Turn previews off, or choose the fast method.",
    ),
    Timer(
        "onload",
        "onload_s",
        "exclusive",
        "Waiting for weights to come from RAM to VRAM, outside the steps.",
        "In the first run of a model it is the price of loading it. In every run: something leaves and comes back; the "
        "table by component says what, and what it was evicted for. Low mark, Always offload and Before decode evict "
        "what would fit.",
    ),
    Timer(
        "stall",
        "stall_s",
        "exclusive",
        "Waiting for weights within a step: copies that the compute did not hide.",
        "A higher High mark, so that less streams; more Pinned RAM; smaller weights. With few of them the link is the "
        "limit.",
    ),
    Timer(
        "evict",
        "evict_s",
        "exclusive",
        "Making room in VRAM. Nothing is copied back, so it is short.",
        "If it is not: GC threshold, as giving cached blocks back to the driver takes time.",
    ),
    Timer(
        "other",
        "other_s",
        "exclusive",
        "Everything else between the first and the last mark: loading files, nodes that run no model, saving pictures.",
        "Look at the table by node.",
    ),
    Timer(
        "overlapped",
        "overlapped_s",
        "beside",
        "Copies that ran behind compute. They cost no time and are in no sum.",
        "Nothing: the more of the copies is here, the better.",
    ),
    Timer(
        "VRAM peak",
        "peak",
        "figure",
        "The most of the card that was seen in use at once, other programs included; high is the high mark, the most "
        "that one component's weights may occupy.",
        "Near the card's total: Headroom or Reserve larger, High mark lower. Far below while much moves: the reverse.",
    ),
    Timer(
        "RAM",
        "peak_rss",
        "figure",
        "The most system memory that the process held so far, models included.",
        "Near the machine's total: smaller weights, fewer models in one graph, a lower Pinned RAM.",
    ),
)
EXCLUSIVE = tuple(timer.name for timer in TIMERS if timer.kind == "exclusive")


def timers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report's `timers`: [{name, seconds, means, turn}], null where not known; the figures have `bytes` as well."""
    return [_row(timer, report) for timer in TIMERS]


def _row(timer: Timer, report: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": timer.name, "seconds": None, "means": timer.means, "turn": timer.turn}
    if timer.kind == "figure":
        return row | {
            "bytes": peak_of(report) if timer.name == "VRAM peak" else _whole(_of(report, "ram"), timer.field)
        }
    row["seconds"] = seconds_of(_of(report, "totals").get(timer.field))
    return row


def peak_of(report: Mapping[str, Any]) -> int | None:
    """The one figure called the peak; in reports that do not have it yet, what the allocator, the driver or the
    session saw. Bytes."""
    vram = _of(report, "vram")
    known = (_whole(vram, key) for key in ("peak", "peak_torch", "peak_device", "peak_noted"))
    return next((nbytes for nbytes in known if nbytes is not None), None)


def _of(report: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    found = report.get(section)
    return found if isinstance(found, Mapping) else {}


def _whole(section: Mapping[str, Any], key: str) -> int | None:
    found = seconds_of(section.get(key))
    return None if found is None else int(found)
