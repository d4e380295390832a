"""Invariant: a file is opened only if the host lists it, it is safetensors, and it is what its socket takes.

Pickled models (.ckpt, .pt, .pth, .bin) can run code when they are read, so they are neither listed nor read. What a
safetensors file holds is told by the names of its tensors: its header is read, a few MB at most, no weight.
"""

from __future__ import annotations

import difflib
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

NONE = "none"
"""Of a file list: no file."""

SAFE = (".safetensors", ".sft")
PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAX_HEADER = 100 << 20
"""Bytes; the format's own limit for a header."""

_NEAR = 5


class Stamp(NamedTuple):
    """A file as it is now: another one at the same path has another stamp."""

    path: str
    mtime_ns: int
    size: int


def stamp(path: str) -> Stamp:
    """OSError where there is no file. Links stay: what one leads to may be named like no model file."""
    found = os.stat(path)
    return Stamp(path, found.st_mtime_ns, found.st_size)


# ---------------------------------------------------------------------- lists
def listed(folder: str) -> list[str]:
    """The safetensors files that the host lists in `folder`, in its order; [] where it knows no such folder."""
    import folder_paths

    try:
        names = folder_paths.get_filename_list(folder)
    except KeyError:
        return []
    return [name for name in names if name.lower().endswith(SAFE)]


def choices(folder: str) -> list[str]:
    """`listed` behind "none"."""
    return [NONE, *listed(folder)]


def find(field: str, name: str, folder: str) -> str:
    """The path of a listed file.

    Raises:
        ValueError: pickled, or not there (near names listed); names the field, what was given, and the remedy.
    """
    import folder_paths

    allowed = listed(folder)
    if name in allowed and (path := folder_paths.get_full_path(folder, name)) is not None:
        return str(path)
    raise ValueError(refusal(field, name, allowed, folder))


def refusal(field: str, name: Any, allowed: Sequence[str], folder: str) -> str:
    """Why `name` is not taken, and what to do: pickled, or missing."""
    given = str(name)
    if given.lower().endswith(PICKLED):
        return (
            f"{field}: got {given!r}; allowed: safetensors files, as a pickled one can run code when it is read; "
            "convert it to .safetensors (or load it with the stock loader and use Apply Offload Policy)"
        )
    where = f"the files of the host's {folder!r} folders"
    if not allowed:
        return f"{field}: got {given!r}; allowed: {where}, which hold no .safetensors file; put it there and reload"
    by_fold = {entry.casefold(): entry for entry in allowed}
    base = {os.path.basename(entry).casefold(): entry for entry in allowed}
    pool = [*by_fold, *base]
    near = difflib.get_close_matches(given.casefold(), pool, n=2 * _NEAR, cutoff=0.5)
    near += difflib.get_close_matches(os.path.basename(given).casefold(), pool, n=2 * _NEAR, cutoff=0.5)
    likely = list(dict.fromkeys(by_fold.get(entry) or base[entry] for entry in near))[:_NEAR]
    hint = f"near it: {', '.join(likely)}" if likely else f"there are {len(allowed)}, none with a name like it"
    return f"{field}: got {given!r}, which is not there; allowed: {where}; {hint}"


# ---------------------------------------------------------------------- what a file holds
class Kind(NamedTuple):
    """A kind of file: how to tell it, and where it belongs."""

    name: str
    article: str
    belongs: str
    test: Callable[[frozenset[str]], bool]


def _any(keys: Iterable[str], *parts: str) -> bool:
    return any(part in key for key in keys for part in parts)


def _starts(keys: Iterable[str], *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in keys)


_LORA = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w", ".lokr_w", "_lora.down.", "_lora.up.", ".alpha")
_CONTROL = ("control_model.", "controlnet_blocks.", "controlnet_cond_embedding.", "input_hint_block.", "zero_convs.")
_CHECKPOINT_EXTRAS = ("first_stage_model.", "cond_stage_model.", "conditioner.embedders.", "text_encoders.", "vae.")
_DENOISER = (
    "model.diffusion_model.",
    "diffusion_model.",
    "double_blocks.",
    "joint_blocks.",
    "input_blocks.",
    "transformer_blocks.",
    "single_transformer_blocks.",
    "patch_embedding.",
    "cap_embedder.",
)
_VAE = (
    "decoder.conv_in.",
    "decoder.conv1.",
    "decoder.up.",
    "decoder.up_blocks.",
    "decoder.mid.",
    "decoder.1.",
    "taesd_decoder.",
    "vae.decoder.",
    "first_stage_model.decoder.",
)
_TEXT = (
    "text_model.encoder.layers.",
    "transformer.text_model.",
    "transformer.resblocks.",
    "encoder.block.0.layer.0.",
    "model.layers.0.self_attn.",
    "clip_l.transformer.",
    "clip_g.transformer.",
)
_DIFFUSES = ("patch_embed", "time_embed", "t_embedder", "x_embedder", "timestep", "final_layer.")


def _is_lora(keys: frozenset[str]) -> bool:
    """Most of it: a model may have a LoRA or two inside."""
    return 2 * sum(any(part in key for part in _LORA) for key in keys) > len(keys)


def _is_embedding(keys: frozenset[str]) -> bool:
    return bool(keys) and keys <= {"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param"}


def _is_text_encoder(keys: frozenset[str]) -> bool:
    return _starts(keys, *_TEXT) and not _any(keys, *_DIFFUSES)


KINDS = (
    Kind("lora", "a LoRA", "load it with Load LoRA behind this node", _is_lora),
    Kind(
        "embedding", "a textual inversion", "put it into the embeddings folder and name it in a prompt", _is_embedding
    ),
    Kind("controlnet", "a ControlNet", "load it with Load ControlNet Model", lambda keys: _starts(keys, *_CONTROL)),
    Kind(
        "checkpoint",
        "a whole checkpoint",
        "choose it at 'checkpoint'",
        lambda keys: _starts(keys, "model.diffusion_model.") and _starts(keys, *_CHECKPOINT_EXTRAS),
    ),
    Kind(
        "diffusion_model", "a diffusion model", "choose it at 'diffusion_model'", lambda keys: _starts(keys, *_DENOISER)
    ),
    Kind("vae", "a VAE", "choose it at 'vae'", lambda keys: _starts(keys, *_VAE)),
    Kind("text_encoder", "a text encoder", "choose it at 'text_encoder'", _is_text_encoder),
)

# What the host's own loaders take at each socket: it finds a diffusion model inside of a checkpoint by itself.
TAKES: dict[str, tuple[str, ...]] = {
    "checkpoint": ("checkpoint", "diffusion_model"),
    "diffusion_model": ("diffusion_model", "checkpoint"),
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder",),
    "text_encoder_3": ("text_encoder",),
    "vae": ("vae",),
}


def kind_of(path: str) -> Kind | None:
    """What the file holds, None where its tensors' names tell nothing.

    Raises:
        ValueError: no safetensors file at all, or a broken one.
    """
    return _kind(stamp(path))


@lru_cache(maxsize=64)
def _kind(at: Stamp) -> Kind | None:
    keys = tensor_names(at.path)
    return next((kind for kind in KINDS if kind.test(keys)), None)


def tensor_names(path: str) -> frozenset[str]:
    """The names in the header of a safetensors file. ValueError where there is no sound header."""
    with open(path, "rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= min(MAX_HEADER, os.path.getsize(path) - 8):
            raise ValueError("its header is broken or missing, so it is no whole safetensors file; download it again")
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise ValueError("its header is no JSON, so it is no whole safetensors file; download it again") from error
    if not isinstance(header, dict):
        raise ValueError("its header lists no tensors, so it is no safetensors file; download it again")
    return frozenset(name for name in header if name != "__metadata__")


def check_kind(field: str, name: str, path: str) -> None:
    """ValueError where the file is known to be something else than what `field` takes; names the remedy."""
    try:
        kind = kind_of(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}: got {name!r}; {error}") from error
    if kind is None or kind.name in TAKES[field]:
        return
    allowed = " or ".join(entry.article for entry in KINDS if entry.name in TAKES[field])
    raise ValueError(f"{field}: got {name!r}, which is {kind.article}; allowed: {allowed}; {kind.belongs}")
