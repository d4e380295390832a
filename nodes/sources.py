"""Invariant: which files a loader node reads follows from its widgets alone, and is judged before anything is read.

Needs a host's lists, no `comfy_api`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import files, stock
from .files import NONE, Stamp

_CLASS = "ModelLoaderWithOffload"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Chosen(NamedTuple):
    """The widgets of ModelLoaderWithOffload. None: a link, whose value is known only when the node runs."""

    checkpoint: str | None = NONE
    diffusion_model: str | None = NONE
    text_encoders: tuple[str | None, ...] = (NONE, NONE, NONE)
    clip_type: str | None = None
    vae: str | None = stock.EMBEDDED
    weight_dtype: str | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Chosen:
        """From the inputs of a run; what is left out takes its default."""
        encoders = tuple(inputs.get(name, NONE) for name in ENCODERS)
        rest = {name: inputs[name] for name in cls._fields if name in inputs}
        return cls(**{**rest, "text_encoders": encoders})

    def files(self) -> Iterator[tuple[str, str, str]]:
        """(field, name, folder) of each file that is chosen by name."""
        if self.checkpoint not in (None, NONE):
            yield "checkpoint", str(self.checkpoint), "checkpoints"
        if self.diffusion_model not in (None, NONE):
            yield "diffusion_model", str(self.diffusion_model), "diffusion_models"
        for field, name in zip(ENCODERS, self.text_encoders, strict=False):
            if name not in (None, NONE):
                yield field, str(name), "text_encoders"

    def stamps(self) -> list[Stamp]:
        """Every file that is read, as it is now. ValueError or OSError where one is not there."""
        found = [files.stamp(files.find(*entry)) for entry in self.files()]
        return found + [files.stamp(path) for path in self._vae_paths()]

    def _vae_paths(self) -> tuple[str, ...]:
        return () if self.vae in (None, stock.EMBEDDED) else stock.vae_files(str(self.vae)) or ()

    def wanted(self, static: bool = False) -> stock.Wanted:
        """What is to be loaded. The values are those of a run, none of them None, and `problem` found none."""
        paths = {field: files.stamp(files.find(field, name, folder)) for field, name, folder in self.files()}
        own_vae = self.vae in (None, stock.EMBEDDED)
        encoders = tuple(paths[field] for field in ENCODERS if field in paths)
        whole = "checkpoint" in paths
        return stock.Wanted(
            checkpoint=paths.get("checkpoint"),
            diffusion_model=paths.get("diffusion_model"),
            text_encoders=encoders,
            clip_type=(self.clip_type or stock.clip_types()[0]) if encoders else "",
            vae=None if own_vae else str(self.vae),
            vae_files=tuple(files.stamp(path) for path in self._vae_paths()),
            weight_dtype="" if whole else self.weight_dtype or stock.weight_dtypes()[0],
            static=static,
        )

    def load(self, wanted: stock.Wanted) -> stock.Stock:
        """`stock.load`, where what the host cannot make sense of is said with the field that it came from."""
        try:
            made = stock.load(wanted)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's is a RuntimeError, and has its own handling
                raise
            given = ", ".join(f"{field} {name!r}" for field, name, _ in self.files())
            more = "" if wanted.vae is None else f", vae {wanted.vae!r}"
            raise ValueError(
                f"Load Model (Offload): ComfyUI's own loaders cannot read {given}{more} ({type(error).__name__}: "
                f"{error}); check that each file is of the kind that its input takes, and whole"
            ) from error
        if made.model is None:
            source = "checkpoint" if wanted.checkpoint is not None else "diffusion_model"
            raise ValueError(
                f"{source}: got {getattr(self, source)!r}, in which ComfyUI finds no diffusion model that it knows; "
                "allowed: a model that this ComfyUI supports; a newer ComfyUI may know it"
            )
        return made


def problem(chosen: Chosen) -> str | None:
    """What is wrong with the widgets, as one message that names the field and the remedy; None where nothing is."""
    try:
        _check_source(chosen)
        for field, name, folder in chosen.files():
            files.check_kind(field, name, files.find(field, name, folder))
        _check_encoders(chosen)
        _check_vae(chosen)
        _check_one_of("weight_dtype", chosen.weight_dtype, stock.weight_dtypes())
    except ValueError as error:
        return str(error)
    return None


def _check_source(chosen: Chosen) -> None:
    if None in (chosen.checkpoint, chosen.diffusion_model):
        return
    if chosen.checkpoint == NONE and chosen.diffusion_model == NONE:
        raise ValueError(
            "checkpoint: got 'none' and diffusion_model 'none' as well; allowed: one of the two; choose a checkpoint, "
            "or a diffusion model with its text encoder and VAE"
        )
    if chosen.checkpoint != NONE and chosen.diffusion_model != NONE:
        raise ValueError(
            f"diffusion_model: got {chosen.diffusion_model!r} beside checkpoint {chosen.checkpoint!r}; allowed: one of "
            "the two; set the other to 'none'"
        )


def _check_encoders(chosen: Chosen) -> None:
    if None in chosen.text_encoders:
        return
    given = [name != NONE for name in chosen.text_encoders]
    count = sum(given)
    if given != sorted(given, reverse=True):
        gap = ENCODERS[given.index(False)]
        raise ValueError(f"{gap}: got 'none' with a later text encoder chosen; allowed: no gap; choose them in order")
    if count == 0:
        return
    if count < 3:
        _check_one_of("clip_type", chosen.clip_type, stock.clip_types(count), f" with {count} text encoder file(s)")


def _check_vae(chosen: Chosen) -> None:
    if chosen.vae in (None, stock.EMBEDDED):
        return
    name = str(chosen.vae)
    allowed = stock.vae_names()
    if name not in allowed:
        raise ValueError(files.refusal("vae", name, allowed, "vae"))
    paths = stock.vae_files(name) or ()
    if len(paths) == 1:
        files.check_kind("vae", name, paths[0])


def _check_one_of(field: str, value: str | None, allowed: list[str], where: str = "") -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"{field}: got {value!r}; allowed{where}: {', '.join(allowed)}; choose one of these")


def named_in(prompt: Any) -> list[stock.Wanted] | None:
    """What each loader of this kind in the prompt asks for (`static` left open); None where that is not known (a link,
    no prompt)."""
    if not isinstance(prompt, Mapping) or not prompt:
        return None
    found: list[stock.Wanted] = []
    for entry in prompt.values():
        if not isinstance(entry, Mapping) or entry.get("class_type") != _CLASS:
            continue
        chosen = Chosen.of(entry.get("inputs") or {})
        given = (
            chosen.clip_type or "",
            chosen.weight_dtype or "",
            chosen.checkpoint,
            chosen.diffusion_model,
            chosen.vae,
        )
        if not all(isinstance(value, str) for value in (*given, *chosen.text_encoders)):
            return None
        try:
            found.append(chosen.wanted())
        except (ValueError, OSError):
            continue  # that node will fail by itself
    return found
