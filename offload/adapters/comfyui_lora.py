"""The host's weight patches (LoRA and its kin) on weights that come and go. Invariant: masters stay pristine.

A patched weight that is resident was patched in its place on the device when it came up; one that streams is patched
in each forward, by a function that the host's own layers call. Both compute what the host computes when it loads a
model whole: the same operations, in the same precision, from the same pristine weight. So results are equal to the
bit, and to switch a LoRA moves the touched weights at most once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..hosting import HostSession
from ..managed import Managed
from . import comfyui_host as host


class Site(NamedTuple):
    """Where a patch applies: `module.<param>`, named `key` in the host's words."""

    module: nn.Module
    param: str
    key: str


class WeightPatch:
    """A function for the host's layers: the patched weight, in the dtype and on the device of what it is given."""

    def __init__(self, site: Site, patches: list[Any]) -> None:
        self.site = site
        self.patches = patches

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return self.patched().to(weight.dtype)

    def patched(self) -> torch.Tensor:
        """The weight as the host would have it after a full load. Starts from the parameter itself: what a layer was
        given may have been cast already, and would round differently."""
        return self.applied_to(getattr(self.site.module, self.site.param).detach())

    def applied_to(self, pristine: torch.Tensor) -> torch.Tensor:
        """The patched weight, where `pristine` is and in its dtype."""
        import comfy.float
        import comfy.lora

        work = pristine.to(dtype=host.lora_dtype(pristine.device), copy=True)
        out = comfy.lora.calculate_weight(self.patches, work, self.site.key)
        rounded: torch.Tensor = comfy.float.stochastic_rounding(out, pristine.dtype, seed=_seed(self.site.key))
        return rounded


class Patches:
    """The weight patches of one module that a session manages."""

    def __init__(self) -> None:
        self._live: dict[str, WeightPatch] = {}
        self._fixed: dict[str, tuple[Site, list[Any], torch.Tensor]] = {}  # no layer would call a function for them
        self._in_place: set[str] = set()  # keys whose weight is patched on the device now
        self._wrappers: dict[str, list[Any]] = {}
        self._written: dict[str, Site] = {}  # where a function of ours, or a wrapper, is on a layer
        self._managed: Managed | None = None
        self._component: Any = None
        self._unit_of: dict[int, int] = {}
        self._one_memory = False  # device and host share it: what is patched in place has no pristine master

    def install(self, patcher: Any, session: HostSession, managed: Managed) -> None:
        """Make the patches of `patcher` the ones that count. What they do not touch stays where it is."""
        self._managed = managed
        self._one_memory = session.backend.shared_memory
        wanted = {key: list(patches) for key, patches in patcher.patches.items()}
        gone = [key for key in self._live if not _same(self._live[key].patches, wanted.get(key))]
        fixed = [key for key in self._fixed if not _same(self._fixed[key][1], wanted.get(key))]
        new = [key for key in wanted if (key not in self._live and key not in self._fixed) or key in (*gone, *fixed)]
        sites = {key: site for key in new if (site := _site(patcher.model, key)) is not None}
        before = [*(self._live[key].site for key in gone), *(self._fixed[key][0] for key in fixed)]
        self._drop_units(session, managed, [*before, *sites.values()])
        self._restore_fixed(fixed)  # in RAM, now that nothing of it is on the device
        for key in gone:
            del self._live[key]
            self._in_place.discard(key)
        for key, site in sites.items():
            if self._wants_function(managed, site):
                self._live[key] = WeightPatch(site, wanted[key])
            else:
                self._fix(session, managed, site, wanted[key])
        wrapped = set(self._wrappers)  # by a clone that ran before this one
        self._wrappers = {key: list(found) for key, found in getattr(patcher, "weight_wrapper_patches", {}).items()}
        self._write_functions(patcher.model, {*gone, *self._live, *wrapped, *self._wrappers})
        self.placed()

    def remove(self) -> None:
        """Take every patch off; the weights are pristine in RAM, and nothing is on the device."""
        self._live.clear()
        self._in_place.clear()
        self._wrappers = {}
        for site in self._written.values():
            setattr(site.module, f"{site.param}_function", [])
        self._written.clear()
        self._restore_fixed(list(self._fixed))
        self._managed = None

    # ------------------------------------------------------------------ on the device
    def placed(self) -> None:
        """Weights have come to the device or left it: patch in place what is there, by a function what streams."""
        managed = self._managed
        if managed is None or not self._live:
            return
        loaded = managed.engine.loaded
        for key, patch in self._live.items():
            there = self._unit(managed, patch.site.module) in loaded
            if there and key not in self._in_place:
                self._patch_in_place(key, patch)
            elif not there and key in self._in_place:
                self._in_place.discard(key)
                self._write(patch.site)

    def _patch_in_place(self, key: str, patch: WeightPatch) -> None:
        if self._one_memory or self._is_shared(self._managed, patch.site):
            return  # what is patched in place there would be patched for others, or for good
        try:
            with torch.no_grad():
                out = patch.patched()
                weight = getattr(patch.site.module, patch.site.param)
                if out.shape != weight.shape:
                    return  # a patch that changes the layer's shape
                weight.data.copy_(out)  # through .data: nobody takes it for an edit to be kept
        except torch.OutOfMemoryError:
            return  # no room to compute it now: the function does it in each forward
        self._in_place.add(key)
        self._write(patch.site)

    def _unit(self, managed: Managed, module: nn.Module) -> int | None:
        if self._component is not managed.component:
            self._component = managed.component
            self._unit_of = {id(unit.module): unit.index for unit in managed.component.units}
        return self._unit_of.get(id(module))

    def _drop_units(self, session: HostSession, managed: Managed, sites: Iterable[Site]) -> None:
        units = {unit for site in sites if (unit := self._unit(managed, site.module)) is not None}
        if units:
            session.reload(managed.name, units)

    # ------------------------------------------------------------------ functions
    def _write_functions(self, model: nn.Module, keys: Iterable[str]) -> None:
        for key in keys:
            site = _site(model, key)
            if site is not None:
                self._write(site)

    def _write(self, site: Site) -> None:
        """What the host's layer calls on this weight: our patch where it streams, then the wrappers of others."""
        patch = self._live.get(site.key)
        functions: list[Any] = [] if patch is None or site.key in self._in_place else [patch]
        functions += self._wrappers.get(site.key, [])
        setattr(site.module, f"{site.param}_function", functions)
        if functions:
            self._written[site.key] = site
        else:
            self._written.pop(site.key, None)

    # ------------------------------------------------------------------ patched in RAM
    def _wants_function(self, managed: Managed, site: Site) -> bool:
        """Whether its layer casts it by a function when it is called, and nobody reads it otherwise.

        Embeddings are read beside their layer's forward, for positions and for the device they are on.
        """
        if not hasattr(site.module, f"{site.param}_function"):
            return False
        if self._is_shared(managed, site):
            return True  # the host patches the one of two tied weights that is named
        unit = self._unit(managed, site.module)
        return not isinstance(site.module, nn.Embedding) and unit not in managed.engine.held_units

    def _is_shared(self, managed: Managed | None, site: Site) -> bool:
        if managed is None:
            return False
        index = self._unit(managed, site.module)
        unit = None if index is None else managed.component.units[index]
        return unit is not None and (unit.tied or bool(unit.borrowed))

    def _fix(self, session: HostSession, managed: Managed, site: Site, patches: list[Any]) -> None:
        """Patch the master itself, once; what was pristine is kept beside it. Computed where the host computes it."""
        weight = getattr(site.module, site.param)
        pristine = weight.detach().to("cpu", copy=True)
        with torch.no_grad():
            out = WeightPatch(site, patches).applied_to(pristine.to(session.backend.device))
        if out.shape != pristine.shape:
            return  # nothing of this kind is known to change its shape
        session.ledger.move(managed.name, "h2d", pristine.nbytes, "lora")
        session.ledger.move(managed.name, "d2h", pristine.nbytes, "lora")
        self._fixed[site.key] = (site, patches, pristine)
        _write_to(weight, out)

    def _restore_fixed(self, keys: Iterable[str]) -> None:
        for key in list(keys):
            site, _, pristine = self._fixed.pop(key)
            _write_to(getattr(site.module, site.param), pristine)


def _write_to(weight: torch.Tensor, value: torch.Tensor) -> None:
    with torch.inference_mode():  # where both kinds of tensors may be written
        weight.data.copy_(value)


def patched_by_host(model: nn.Module, keys: Iterable[str]) -> bool:
    """Whether some weight is of a format that only the host knows how to patch: with rules to read and write it."""
    for key in keys:
        site = _site(model, key)
        if site is not None:
            special = any(hasattr(site.module, f"{verb}_{site.param}") for verb in ("set", "convert"))
            if special or type(getattr(site.module, site.param)) not in (torch.Tensor, nn.Parameter):
                return True
    return False


def _site(model: nn.Module, key: str) -> Site | None:
    path, _, param = key.rpartition(".")
    module: Any = model
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    if not isinstance(module, nn.Module) or getattr(module, param, None) is None:
        return None
    # the host passes by what has parameters below it: a table of a block, say
    below = any(True for part in module.children() for _ in part.parameters())
    return None if below else Site(module, param, key)


def _same(old: list[Any], new: list[Any] | None) -> bool:
    """Whether two lists of patches hold the same things: the host makes a new list for each clone."""
    if new is None or len(old) != len(new):
        return False
    return all(_same_patch(a, b) for a, b in zip(old, new, strict=True))


def _same_patch(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same_patch(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (bool, int, float, str, type(None))):
        return type(a) is type(b) and a == b
    return a is b


def _seed(key: str) -> int:
    import comfy.model_patcher
    import comfy.utils

    found = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
    return int(found(key))
