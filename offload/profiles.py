"""Invariant: the profile depends on the card's total alone, so the same card always gets the same marks.

Cards report a little less than their name (11.75 GiB for a "12 GB" card, 23.6 for "24 GB"), so the total is rounded to
whole GiB, halves up, before a profile is chosen. Only the choice uses the rounded figure: shares become bytes of the
true total, or up to half a GiB would be handed out that does not exist. A card that hides more than half a GiB (22.5
GiB on some data-centre cards with ECC) gets the profile below its name.
"""

from __future__ import annotations

from dataclasses import dataclass

from .policy import OffloadMode
from .sizes import GIB


@dataclass(frozen=True)
class Profile:
    """The marks that apply where the user left a field on auto; `high` and `low` are shares of the card.

    A profile's low of 0.0 means "no floor"; only a user's 0 means "always evict".
    """

    name: str
    mode: OffloadMode
    low: float
    high: float
    gc_threshold: float
    never: tuple[str, ...]
    vae_tiling: str
    reason: str


# Tiling is auto everywhere, as tiles change pixels.
UP_TO_4_GIB = Profile(
    name="up_to_4_gib",
    mode=OffloadMode.SEQUENTIAL,
    low=0.0,
    high=0.6,
    gc_threshold=0.0,
    never=(),
    vae_tiling="auto",
    reason="the card has at most 4 GiB",
)
UP_TO_12_GIB = Profile(
    name="up_to_12_gib",
    mode=OffloadMode.BALANCED,
    low=0.0,
    high=0.6,
    gc_threshold=0.7,
    never=(),
    vae_tiling="auto",
    reason="the card has more than 4 and at most 12 GiB",
)
DEFAULT = Profile(
    name="default",
    mode=OffloadMode.BALANCED,
    low=0.2,
    high=0.6,
    gc_threshold=0.7,
    never=(),
    vae_tiling="auto",
    reason="the card has more than 12 and less than 24 GiB",
)
FROM_24_GIB = Profile(
    name="from_24_gib",
    mode=OffloadMode.BALANCED,
    low=0.2,
    high=0.8,
    gc_threshold=0.7,
    never=("clip-l", "clip-g", "vae"),
    vae_tiling="auto",
    reason="the card has 24 GiB or more",
)
PROFILES = (UP_TO_4_GIB, UP_TO_12_GIB, DEFAULT, FROM_24_GIB)


def profile_for(vram_total: int) -> Profile:
    """The profile of a card with `vram_total` bytes, chosen on whole GiB (halves up)."""
    gib = (vram_total + GIB // 2) // GIB
    if gib <= 4:
        return UP_TO_4_GIB
    if gib <= 12:
        return UP_TO_12_GIB
    if gib < 24:
        return DEFAULT
    return FROM_24_GIB
