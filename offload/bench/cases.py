"""What a suite runs: models, sizes of picture, cards and caps. Invariant: a case names all that its figures hang on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..sizes import GIB, parse_size
from .places import shown_cap

SUITES = ("peers", "peers-small")
SMALL = "flux1-cut"
# The card of each class whose memory is nearest, on PCIe 4.0 x16, by which a cap without a card is clocked.
CARDS_BY_MEMORY = ("rtx3070-8g", "rtx4070-12g", "rtx4080-16g", "rtx4090-24g", "rtx5090-32g-pcie5")
PEERS_CARDS = CARDS_BY_MEMORY[:4]
PEERS: tuple[tuple[str, str], ...] = (
    ("flux1-dev", "1024x1024"),
    ("flux1-dev", "512x512"),
    ("qwen-image", "1024x1024"),
    ("sd35-large", "1024x1024"),
    ("sdxl", "1024x1024"),
)
GPU_CAPS = (12 * GIB, 24 * GIB, 8 * GIB, 16 * GIB)  # the order of a matrix that may be cut short
# The small suite: half of it fits, and all of it, on a card where the link decides.
SMALL_CAPS = (3 * GIB, 6 * GIB)
SMALL_CARD = "rtx4090-24g"


@dataclass(frozen=True)
class Case:
    """One model at one size of picture under one cap (bytes). `card` is the simulated card's key; None on a GPU."""

    model: str
    resolution: str  # "1024x1024"
    card: str | None
    cap: int

    def __str__(self) -> str:
        where = f"{self.card}, " if self.card else ""
        return f"{self.model} {self.resolution} on {where}{shown_cap(self.cap)}"


def cases_of(
    suite: str,
    simulated: bool,
    models: Sequence[str] | None = None,
    caps: Sequence[str] | None = None,
    card: str | None = None,
    resolutions: Sequence[str] | None = None,
) -> tuple[Case, ...]:
    """The suite's cases; what is named replaces what it would take by itself.

    Raises:
        ValueError: an option that is not known, or has no meaning on this kind of device.
    """
    if suite not in SUITES:
        raise ValueError(f"--suite: got {suite!r}; allowed: {', '.join(SUITES)}")
    if card is not None and not simulated:
        raise ValueError(f"--card: got {card!r}; a card's rates are for the simulated accelerator (--device vram)")
    _check_models(models or ())
    places = _places(suite, simulated, caps, card)
    found = _pictures(suite, models, resolutions)
    return tuple(Case(model, size, key, cap) for model, size in found for key, cap in places)


def _check_models(models: Sequence[str]) -> None:
    from .subjects import names

    for model in models:
        if model not in names():
            raise ValueError(f"--model: got {model!r}; allowed: {', '.join(names())}")


def _pictures(suite: str, models: Sequence[str] | None, sizes: Sequence[str] | None) -> list[tuple[str, str]]:
    """(model, resolution); "512" is short for "512x512"."""
    from .subjects import find

    usual = [(SMALL, "512x512")] if suite == "peers-small" else list(PEERS)
    if models is not None:
        known = [pair for pair in usual if pair[0] in models]
        there = {model for model, _ in known}
        usual = known + [(model, find(model).canonical(None)) for model in models if model not in there]
    if sizes is not None:
        written = [f"{text}x{text}" if text.isdigit() else text for text in sizes]
        every = dict.fromkeys(model for model, _ in usual)
        usual = [(model, find(model).canonical(size)) for model in every for size in written]
    return usual


def _places(suite: str, simulated: bool, caps: Sequence[str] | None, card: str | None) -> list[tuple[str | None, int]]:
    if not simulated:
        sizes = [_cap(text, None) for text in caps] if caps is not None else list(GPU_CAPS)
        return [(None, size) for size in sizes]
    from ..simulator.cards import CARDS

    if card is not None and card not in CARDS:
        raise ValueError(f"--card: got {card!r}; allowed: {', '.join(CARDS)}")
    if suite == "peers-small":
        card = card or SMALL_CARD
    if caps is not None:
        total = CARDS[card].vram if card is not None else None
        sizes = [_cap(text, total) for text in caps]
        return [(card or _nearest(size, {key: CARDS[key].vram for key in CARDS_BY_MEMORY}), size) for size in sizes]
    if suite == "peers-small":
        return [(card, size) for size in SMALL_CAPS]
    return [(key, CARDS[key].vram) for key in ([card] if card is not None else PEERS_CARDS)]


def _nearest(cap: int, cards: dict[str, int]) -> str:
    return next((key for key, vram in cards.items() if vram >= cap), list(cards)[-1])


def _cap(text: str, total: int | None) -> int:
    size = parse_size("--cap", text, total=total)
    if size is None or size <= 0:
        raise ValueError(f'--cap: got {text!r}; allowed: a size above zero ("12GiB"), or a share of --card ("80%")')
    return size
