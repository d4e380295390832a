"""Diffusers pipelines inside a host. Invariant: a pipeline's files are read once, whatever policy it is used under.

Its heavy models are components of the host's one session, and each stands in the host's own list of loaded models as a
patcher, so that each side sees the other's bytes and can have them given back. What a node hands out is a light object
with its policy; the models stay as long as one of those is alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..policy import OffloadMode, OffloadPolicy
from ..session import Session
from . import comfyui_device, comfyui_host
from .attachments import attachments_of
from .comfyui_folder import choose_dtype, choose_variant
from .comfyui_generate import Request, generate, left_out, variant_for
from .comfyui_runs import runs
from .guards import ExecutionDevice, check_part, check_pipeline, refusals
from .loading import load_pipeline
from .parts import Part, modules_of, parts_of

WORLD = "pipeline"
NOT_INSTALLED = (
    "This node needs diffusers and transformers, which are not installed. Install them into the host's Python "
    "(`python -m pip install diffusers transformers`) and start the host again; the other nodes work without them."
)

_MEANS = {
    OffloadMode.AUTO: "all models stay on the device if the run fits, else your card's profile applies",
    OffloadMode.NONE: "all models are on the device whole",
    OffloadMode.BALANCED: "each model stays up to the high mark, the rest streams behind the compute",
    OffloadMode.MODEL: "one model at a time is on the device, whole",
    OffloadMode.SEQUENTIAL: "the models stream layer by layer",
}


class DiffusersMissing(ImportError):
    """diffusers or transformers is not installed."""


def installed() -> bool:
    """Whether pipelines can be loaded here; imports nothing."""
    import importlib.util

    return all(importlib.util.find_spec(name) is not None for name in ("diffusers", "transformers"))


# ---------------------------------------------------------------------- the models, read once
class LoadedPipeline:
    """A pipeline whose models are in memory and, while it is attached, components of the host's session."""

    def __init__(self, pipe: Any, name: str) -> None:
        self.pipe = pipe
        self.name = name
        self.session: Session | None = None
        self.patchers: dict[str, Any] = {}  # component -> what stands in the host's list
        self.outputs: weakref.WeakSet[OffloadPipeline] = weakref.WeakSet()
        self._kinds: dict[bool, Any] = {}  # with an image or without -> the pipeline that does it
        self._policy: OffloadPolicy | None = None  # of the last run
        self._undo = contextlib.ExitStack()

    @property
    def attached(self) -> bool:
        """Whether the session has all of it."""
        return self.session is not None and all(p.hosted.managed is not None for p in self.patchers.values())

    def attach(self, policy: OffloadPolicy) -> None:
        """Make its models components of the host's session, each with a patcher for the host's list, under `policy`.

        Raises:
            ComponentError: (a ValueError) a model whose weights cannot be placed.
            ValueError: another offloader holds it. Whatever is raised, it is as it was.
        """
        if not self.attached:
            self.detach()
            check_pipeline(self.pipe)
            parts = parts_of(self.pipe)
            for part in parts:
                check_part(part)
            with contextlib.ExitStack() as undo:
                undo.callback(self._forget)
                self._take(parts, policy, undo)
                self._undo = undo.pop_all()
        self._adopt(policy)

    def _take(self, parts: list[Part], policy: OffloadPolicy, undo: contextlib.ExitStack) -> None:
        session = self.session = comfyui_device.open_device_session()
        if policy.mode is OffloadMode.NONE:  # which would load all of it now, before the host has made room
            policy = dataclasses.replace(policy, mode=OffloadMode.AUTO)
        for part in parts:
            patcher = comfyui_device.part_patcher(part.module, part.name, part.role, policy)
            undo.callback(_give_back, patcher)
            patcher.hosted.entries = part.entries
            patcher.hosted.attach()
            self.patchers[patcher.hosted.name] = patcher
        device = session.backend.device
        for module in modules_of(self.pipe).values():
            if device.type != "cpu" and "_hf_hook" not in module.__dict__:
                module.__dict__["_hf_hook"] = ExecutionDevice(device)
                undo.callback(module.__dict__.pop, "_hf_hook", None)
        for key, value in refusals(self.pipe).items():
            self.pipe.__dict__[key] = value
            undo.callback(self.pipe.__dict__.pop, key, None)
        _tile_when_short(session)

    def _adopt(self, policy: OffloadPolicy) -> None:
        """Its components go by `policy` from their next stage on."""
        assert self.session is not None
        shared = attachments_of(self.session)
        if policy.mode is not OffloadMode.NONE and self.session.policy != policy:
            self.session.policy = policy  # else models that are always resident would not be asked again
        for name, patcher in self.patchers.items():
            patcher.policy = patcher.hosted.policy = policy
            patcher.hosted.attach()
            if policy.vae_tiling == "on":
                shared.tile(self.session, name)
            elif policy != self._policy:  # tiles that a step down took stay until somebody asks for something else
                shared.tiling.off(name)
        self._policy = policy

    def detach(self) -> None:
        """Give the models back: no component, no patcher in the host's list."""
        undo, self._undo = self._undo, contextlib.ExitStack()
        undo.close()
        self._forget()

    def _forget(self) -> None:
        if self.session is not None:
            for name in self.patchers:
                attachments_of(self.session).tiling.off(name)
        self.patchers, self.session, self._policy = {}, None, None

    def kind_for(self, request: Request) -> Any:
        """The pipeline that does it: itself, or its image-to-image kind on the same modules."""
        key = request.image is not None
        if key not in self._kinds:
            self._kinds[key] = variant_for(self.pipe, request)
        return self._kinds[key]


def _give_back(patcher: Any) -> None:
    """Take a patcher from the host's list of loaded models, and its module from the session, as it was."""
    loaded = comfyui_host.model_management().current_loaded_models
    for entry in [entry for entry in loaded if entry.model is patcher]:
        entry.model_unload()
        loaded.remove(entry)
    patcher.hosted.release()


class _Tile:
    """The session's step down may tile the VAE of a pipeline; others are left to who was asked before."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._before = session.step_down.tile

    def __call__(self, name: str) -> bool:
        session = self._session()
        if session is not None and attachments_of(session).tile(session, name):
            return True
        return self._before is not None and self._before(name)


def _tile_when_short(session: Session) -> None:
    if not isinstance(session.step_down.tile, _Tile):
        session.step_down.tile = _Tile(session)


# ---------------------------------------------------------------------- what a node hands out
class OffloadPipeline:
    """OFFLOAD_PIPELINE: a loaded pipeline and the policy to use it under. Light; two of them share the models."""

    def __init__(self, loaded: LoadedPipeline, policy: OffloadPolicy) -> None:
        self._loaded = loaded
        self.policy = policy
        loaded.outputs.add(self)

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline, on whose instance the switches of other offloaders refuse."""
        return self._loaded.pipe

    @property
    def name(self) -> str:
        """The pipeline's name below the host's `diffusers` folders."""
        return self._loaded.name

    @property
    def session(self) -> Session | None:
        """What places its models: the host's one session, None once the host's stock behaviour was restored."""
        return self._loaded.session

    @property
    def patchers(self) -> list[Any]:
        """Its models in the host's list, in their order of use."""
        return list(self._loaded.patchers.values())

    @property
    def patcher(self) -> Any:
        """The largest of them, by which the host's cache knows that a model hangs on this output; None without any."""
        return max(self.patchers, key=lambda patcher: patcher.model_size(), default=None)

    @property
    def notice(self) -> str:
        """Which world this is and what the policy means there, a sentence."""
        if comfyui_host.load_device().type == "cpu":
            return "Pipeline: this host computes on the CPU, so weights are where they are used and nothing is moved."
        mode = OffloadMode(self.policy.mode)
        return f"Pipeline, placed by this pack and counted by ComfyUI (mode {mode.value}): {_MEANS[mode]}."

    def generate(self, request: Request) -> torch.Tensor:
        """Pictures [B, H, W, C], float32 on the CPU, in 0..1.

        Raises:
            GenerateError: (a ValueError) an input that this pipeline cannot work with.
            torch.OutOfMemoryError: the policy stops there, or there is no step left.
            BaseException: the host's interrupt. After any of them the next call is as the first.
        """
        loaded = self._loaded
        comfyui_device.open_device_session()  # which the run has to know from its first moment on
        runs().touch(WORLD, self.policy)
        loaded.attach(self.policy)
        pipe = loaded.kind_for(request)
        session = loaded.session
        assert session is not None
        for name in loaded.patchers:
            comfyui_device.used_in_this_run(name)
        for sentence in left_out(pipe, request):
            runs().note("ignored", sentence)
        tiled = sorted(attachments_of(session).tiling.active & loaded.patchers.keys())
        if tiled:  # by the policy, or by a step down of a run before, which this report would not know of
            runs().note("tiled", f"{', '.join(tiled)} works in tiles, which changes pixels slightly.")
        peak, _ = session.stages.peaks.largest()
        comfyui_host.model_management().load_models_gpu(self.patchers, memory_required=peak)
        return generate(pipe, request, session.ledger)


class _Key(NamedTuple):
    folder: str
    stamp: Hashable
    dtype: torch.dtype | None
    variant: str | None


class PipelineStore:
    """The loaded pipelines of this process. One whose outputs are all gone is dropped between two prompts."""

    def __init__(self) -> None:
        self._loaded: dict[_Key, LoadedPipeline] = {}
        self._keys: dict[tuple[str, Hashable, str], _Key] = {}
        self._listening = False

    def open(
        self, folder: Path, name: str, policy: OffloadPolicy, *, stamp: Hashable, dtype: str = "auto"
    ) -> OffloadPipeline:
        """The pipeline in `folder`; its files are read where nobody has read them as they are now, in this dtype.

        Raises:
            DiffusersMissing: (an ImportError) diffusers or transformers is not installed.
            ModelFileError: (a ValueError) missing, truncated, pickled or foreign weights.
            ValueError: see `LoadedPipeline.attach`.
        """
        if not installed():
            raise DiffusersMissing(NOT_INSTALLED)
        key = self._key(folder, stamp, dtype)
        comfyui_device.open_device_session()
        runs().touch(WORLD, policy)
        if not self._listening:
            runs().on_idle(self.drop_unused)
            self._listening = True
        loaded = self._loaded.get(key)
        if loaded is None:
            self.drop_unused()
            with torch.inference_mode(False):  # weights that other threads may place as well
                pipe = load_pipeline(folder, torch_dtype=key.dtype, variant=key.variant)
            loaded = LoadedPipeline(pipe, name)
            loaded.attach(policy)
            self._loaded[key] = loaded
        found = OffloadPipeline(loaded, policy)
        runs().note("policy", f"{name}: {found.notice}")
        return found

    def _key(self, folder: Path, stamp: Hashable, dtype: str) -> _Key:
        """What "auto" comes to is in the files, which are opened for it once."""
        asked = (str(folder.resolve()), stamp, dtype)
        if asked not in self._keys:
            kind = choose_dtype(dtype, folder, comfyui_host.load_device())
            self._keys[asked] = _Key(asked[0], stamp, kind, choose_variant(folder, kind))
        return self._keys[asked]

    def drop_unused(self) -> None:
        """Give back each pipeline that no output refers to any more."""
        unused = [key for key, loaded in self._loaded.items() if not loaded.outputs]
        for key in unused:
            self._loaded.pop(key).detach()
        if unused:
            self._keys = {asked: key for asked, key in self._keys.items() if key in self._loaded}
            gc.collect()  # pipelines refer to themselves in circles


_STORE = PipelineStore()


def pipelines() -> PipelineStore:
    """The one store of this process."""
    return _STORE
