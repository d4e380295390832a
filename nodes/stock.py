"""Invariant: what this loads is what the stock loaders load, bit for bit: it is loaded by the host's own functions.

And a file is read once: the objects stay here as long as anything handed out from them lives, and until no prompt runs
any more. The host drops a node's outputs before it runs the node again, so without this a changed policy would read the
files anew. What is handed out is watched by weak references; a dropped model is forgotten as soon as a prompt asks for
other files, or when the host is idle.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..offload.adapters.comfyui_dynamic import with_patcher
from ..offload.adapters.comfyui_host import takes
from . import files

EMBEDDED = "from checkpoint"
"""Of the VAE list: the one in the checkpoint."""


class Wanted(NamedTuple):
    """The files and options of one load; equal to another one as long as nobody touched the files.

    `checkpoint` or `diffusion_model`, the other None. `vae`: None for the one in the checkpoint, else the name in the
    host's list. static: outside the host's own pager, where it has one.
    """

    checkpoint: files.Stamp | None
    diffusion_model: files.Stamp | None
    text_encoders: tuple[files.Stamp, ...]
    clip_type: str
    vae: str | None
    vae_files: tuple[files.Stamp, ...]
    weight_dtype: str
    static: bool


@dataclass
class Stock:
    """What the host's loaders gave; None for what the files do not hold. `handed`: weakly, who lives from it."""

    model: Any = None
    clip: Any = None
    vae: Any = None
    handed: list[weakref.ref[Any]] = field(default_factory=list)

    def hand_out(self, *objects: Any) -> None:
        """Keep all this while one of `objects`, or what the host cloned from it, lives."""
        self.handed = [ref for ref in self.handed if ref() is not None]
        for obj in objects:
            self.handed += _watch(obj)

    @property
    def in_use(self) -> bool:
        return any(ref() is not None for ref in self.handed)


def _watch(obj: Any) -> list[weakref.ref[Any]]:
    """A clone of a CLIP or a VAE keeps the patcher that it came from, not the object."""
    patcher = getattr(obj, "patcher", None)
    return [weakref.ref(each) for each in (obj, patcher) if each is not None]


def fresh(obj: Any) -> Any:
    """Another object of the same kind for the same weights: what is kept here is never handed out itself, or it would
    keep itself alive."""
    patcher = getattr(obj, "patcher", None)
    return obj.clone() if patcher is None else with_patcher(obj, patcher.clone())


# ---------------------------------------------------------------------- what is kept
_lock = threading.RLock()
_kept: dict[Wanted, Stock] = {}
_held: list[tuple[list[weakref.ref[Any]], Any]] = []


def fetch(wanted: Wanted, load: Callable[[Wanted], Stock], others: Iterable[Wanted] | None) -> Stock:
    """The kept objects of `wanted`, loaded by `load` where there are none.

    `others`: what the loaders of this prompt ask for; what none of them does and nobody holds is dropped before
    anything new is read, so that two models are in RAM only where the stock host has two. None: not known, all is kept.
    """
    with _lock:
        known = _kept.get(wanted)
        if known is not None:
            return known
        if others is not None:
            asked = {other._replace(static=False) for other in others}
            drop(lambda held: held._replace(static=False) not in asked)
        made = load(wanted)
        _kept[wanted] = made
        return made


def drop(may_go: Callable[[Wanted], bool] = lambda held: True) -> int:
    """Forget what nobody holds and `may_go`; how many. For the host's idle moments, with no prompt running."""
    with _lock:
        gone = [wanted for wanted, stock in _kept.items() if not stock.in_use and may_go(wanted)]
        for wanted in gone:
            del _kept[wanted]
        return len(gone)


def hold(*objects: Any) -> None:
    """Keep how the pack manages these models until the host is idle without them.

    Between dropping a node's outputs and running it again nobody holds a patcher: the weights would leave the device,
    and come back for the next policy.
    """
    with _lock:
        for obj in objects:
            managed = getattr(getattr(obj, "patcher", obj), "hosted", None)
            if managed is not None:
                _held.append((_watch(obj), managed))


def drop_idle() -> None:
    """The host's idle callback: no prompt runs, so what nobody holds is not asked for again at once."""
    with _lock:
        drop()
        _held[:] = [(refs, managed) for refs, managed in _held if any(ref() is not None for ref in refs)]


def kept() -> list[Wanted]:
    """What is kept now."""
    with _lock:
        return list(_kept)


# ---------------------------------------------------------------------- the host's loaders
def load(wanted: Wanted) -> Stock:
    """Read the files by the host's own loaders. Whatever these raise comes through."""
    made = Stock()
    if wanted.checkpoint is not None:
        made = _checkpoint(wanted)
    elif wanted.diffusion_model is not None:
        made.model = _diffusion_model(wanted)
    if wanted.text_encoders:
        made.clip = _text_encoders(wanted)
    if wanted.vae is not None:
        made.vae = vae_loader()().load_vae(wanted.vae)[0]
    return made


def _checkpoint(wanted: Wanted) -> Stock:
    import comfy.sd
    import folder_paths

    assert wanted.checkpoint is not None
    read = comfy.sd.load_checkpoint_guess_config
    # A part that another file stands for is not made: the host would fill RAM with it.
    found = read(
        wanted.checkpoint.path,
        output_vae=wanted.vae is None,
        output_clip=not wanted.text_encoders,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        **_static(read, wanted),
    )
    return Stock(*found[:3])


def _diffusion_model(wanted: Wanted) -> Any:
    import comfy.sd

    assert wanted.diffusion_model is not None
    read = comfy.sd.load_diffusion_model
    return read(wanted.diffusion_model.path, model_options=_dtype(wanted.weight_dtype), **_static(read, wanted))


def _dtype(name: str) -> dict[str, Any]:
    """The host's options for a name of its own list."""
    import torch

    options: dict[str, Any] = {}
    if name.startswith("fp8_e4m3fn"):
        options["dtype"] = torch.float8_e4m3fn
    elif name == "fp8_e5m2":
        options["dtype"] = torch.float8_e5m2
    if name.endswith("_fast"):
        options["fp8_optimizations"] = True
    return options


def _text_encoders(wanted: Wanted) -> Any:
    import comfy.sd
    import folder_paths

    read = comfy.sd.load_clip
    kinds = comfy.sd.CLIPType
    return read(
        ckpt_paths=[stamp.path for stamp in wanted.text_encoders],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=getattr(kinds, wanted.clip_type.upper(), kinds.STABLE_DIFFUSION),
        model_options={},
        **_static(read, wanted),
    )


def _static(read: Callable[..., Any], wanted: Wanted) -> dict[str, bool]:
    return {"disable_dynamic": True} if wanted.static and takes(read, "disable_dynamic") else {}


def vae_loader() -> Any:
    """The host's VAELoader class."""
    import nodes

    return nodes.VAELoader


# ---------------------------------------------------------------------- the host's lists
def vae_names() -> list[str]:
    """The host's VAELoader's list without what would be read from a pickle."""
    offered = vae_loader().INPUT_TYPES()["required"]["vae_name"][0]
    return [name for name in offered if vae_files(name) is not None]


def vae_files(name: str) -> tuple[str, ...] | None:
    """The files behind a name of the host's VAE list; () for one made of nothing, None where one of them is no
    safetensors file or is missing."""
    import folder_paths

    if name == "pixel_space":
        return ()
    if "." in name:
        return None if not name.lower().endswith(files.SAFE) else _only_paths(("vae", "vae_approx"), [name])
    approx = folder_paths.get_filename_list("vae_approx")
    # As the host takes them: the first that starts like this.
    parts = [next((f for f in approx if f.startswith(f"{name}_{part}.")), None) for part in ("encoder", "decoder")]
    if not all(part is not None and part.lower().endswith(files.SAFE) for part in parts):
        return None
    return _only_paths(("vae_approx",), [part for part in parts if part is not None])


def _only_paths(folders: tuple[str, ...], names: list[str]) -> tuple[str, ...] | None:
    import folder_paths

    found = [
        next((path for folder in folders if (path := folder_paths.get_full_path(folder, name)) is not None), None)
        for name in names
    ]
    return None if None in found else tuple(str(path) for path in found)


def clip_types(encoders: int | None = None) -> list[str]:
    """The types that the host's loader of so many text encoders offers; None for all of them, in the host's order."""
    import nodes

    single = list(nodes.CLIPLoader.INPUT_TYPES()["required"]["type"][0])
    double = list(nodes.DualCLIPLoader.INPUT_TYPES()["required"]["type"][0])
    if encoders == 1:
        return single
    if encoders == 2:
        return double
    return list(dict.fromkeys(single + double))  # three are told apart by the files alone


def weight_dtypes() -> list[str]:
    """The host's UNETLoader's list."""
    import nodes

    return list(nodes.UNETLoader.INPUT_TYPES()["required"]["weight_dtype"][0])
