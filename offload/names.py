"""Invariant: a list entry names components by what people call them, and an entry that names none is never silent.

An entry matches a component by its name in the pipeline (`text_encoder_2`), by its class (`CLIPTextModel`) or by an
alias (`clip-l`), in any case; everything that matches counts. An alias may be written with underscores, except where
that writing is a component's own name: `text_encoder` is that component, `text-encoder` is every text encoder.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .policy import ComponentInfo

_NEAR_POOL = 200
"""Names compared for a near match: comparing thousands would cost more than the whole of resolve."""


class _Folded(NamedTuple):
    """A component with the two spellings every rule compares, folded once."""

    info: ComponentInfo
    name: str
    class_name: str


def _clip_l(c: _Folded) -> bool:
    return c.class_name == "cliptextmodel"


def _clip_g(c: _Folded) -> bool:
    return c.class_name == "cliptextmodelwithprojection"


def _t5(c: _Folded) -> bool:
    return c.class_name.startswith(("t5", "umt5", "mt5")) and c.info.role in ("text_encoder", "other")


def _vae(c: _Folded) -> bool:
    # A VAE's class is AutoencoderKL*, AutoencoderTiny, AutoencoderDC, AutoencoderKLWan or carries the word.
    return c.info.role == "vae" or c.name == "vae" or "autoencoder" in c.class_name or "vae" in c.class_name


def _denoiser(c: _Folded) -> bool:
    return c.info.role == "denoiser"


def _text_encoder(c: _Folded) -> bool:
    return c.info.role == "text_encoder"


ALIASES: dict[str, Callable[[_Folded], bool]] = {
    "clip-l": _clip_l,
    "clip-g": _clip_g,
    "t5": _t5,
    "vae": _vae,
    "unet": _denoiser,
    "denoiser": _denoiser,
    "text-encoder": _text_encoder,
}


@dataclass(frozen=True)
class Matches:
    """Component names that a list selects, and for each entry that selected none the names near it."""

    names: frozenset[str]
    unmatched: tuple[tuple[str, tuple[str, ...]], ...]


def match(entries: Sequence[str], components: Sequence[ComponentInfo]) -> Matches:
    """Match list entries against the components of a run; pure, linear in entries x components."""
    if not entries:
        return Matches(frozenset(), ())
    folded = [_Folded(c, c.name.casefold(), c.class_name.casefold()) for c in components]
    found: set[str] = set()
    unmatched: list[tuple[str, tuple[str, ...]]] = []
    for entry in entries:
        hits = _match_one(entry.casefold(), folded)
        found.update(hits)
        if not hits:
            unmatched.append((entry, _near(entry.casefold(), components)))
    return Matches(frozenset(found), tuple(unmatched))


def _match_one(entry: str, folded: Sequence[_Folded]) -> list[str]:
    hits: list[str] = []
    named = False
    for info, name, class_name in folded:
        if name == entry:
            named = True
            hits.append(info.name)
        elif class_name == entry:
            hits.append(info.name)
    alias = entry if named else entry.replace("_", "-")
    rule = ALIASES.get(alias)
    if rule is not None:
        # Hosts name a component like the alias ("clip_l"), whatever its class.
        hits += [
            c.info.name
            for c in folded
            if rule(c) or c.name == alias or ("_" in c.name and c.name.replace("_", "-") == alias)
        ]
    return hits


def _near(entry: str, components: Iterable[ComponentInfo]) -> tuple[str, ...]:
    """Up to three names that resemble `entry`, as their owner writes them."""
    pool: dict[str, str] = {alias: alias for alias in ALIASES}
    for component in components:
        if len(pool) >= _NEAR_POOL:
            break
        pool.setdefault(component.class_name.casefold(), component.class_name)
        pool.setdefault(component.name.casefold(), component.name)
    near = difflib.get_close_matches(entry, list(pool), n=3, cutoff=0.5)
    return tuple(pool[name] for name in near)
