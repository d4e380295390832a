"""The host pages this model itself (dynamic VRAM). Invariant: its weights are the host's, we only state limits.

`comfyui_pager.py` says what a policy means in the pager's figures; here they are stated to it. What shaped this file:

- Loading a model makes its watermark whole again, and the host zeroes every watermark limit after each node. So both
  are stated again in ON_LOAD, the last thing of every load, and when a sampler starts.
- The pager lowers a watermark under pressure. We lower it too and never raise it: that is the next load's affair.
  Lowering makes the pager wait for the device, once, at a load or before the first step.
- The pager's state hangs on the module, which all clones of a MODEL share: the policy that was loaded last is in force.

Nothing here moves a weight or runs within a forward, so the guard that hosts from 0.35 want around moves inside their
captured forwards (`pause_malloc_graph`) has nothing to guard.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..policy import ComponentInfo, OffloadPolicy, Role
from . import comfyui_host
from .comfyui_device import restored
from .comfyui_host import KEY
from .comfyui_pager import (
    Limits,
    beyond,
    card_of,
    component_of,
    figure,
    limits_for,
    pager,
    pages_up,
    residency,
    wants_static,
    watermark,
    words,
)
from .comfyui_runs import runs

PAGER_KEY = f"{KEY}_pager"
"""Of the callback and the wrapper that state the limits; other parts of the pack have keys of their own."""

_log = logging.getLogger(__name__)


class NoStaticCopy(RuntimeError):
    """The host cannot load this model static: its loader left no way to read the files again."""


@dataclass(eq=False)
class Marks:
    """One policy on one patcher and its clones: states the limits to the pager whenever the host forgets them.

    The host's callback lists hold it strongly; it holds module and pages weakly, or models would never die.
    """

    policy: OffloadPolicy
    info: ComponentInfo
    module: weakref.ref[Any]
    limits: Limits = field(default_factory=Limits)
    failures: list[str] = field(default_factory=list)
    _vbar: weakref.ref[Any] | None = None

    def on_load(self, patcher: Any, *_: Any) -> None:
        """The host's ON_LOAD: the last thing of every load. A static delegate of the host has no pages."""
        find = getattr(patcher, "_vbar_get", None)
        vbar = find() if find is not None else None
        if vbar is None or restored():
            return
        runs().touch("dynamic", self.policy)
        self._vbar = weakref.ref(vbar)
        _owners[patcher.model] = self
        self.limits = self._measure(patcher)
        self._state(vbar)

    def on_sample(self, executor: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The host's SAMPLER_SAMPLE: a node between load and sampling may have ended and taken the floor along."""
        vbar, module = self.vbar(), self.module()
        if vbar is not None and not restored() and module is not None and _owners.get(module) is self:
            if self.limits.prioritize:
                self._ask(vbar, "prioritize")
            self._state(vbar)
        return executor(*arguments, **options)

    def vbar(self) -> Any:
        """The model's pages, None before its first load and after its death."""
        return None if self._vbar is None else self._vbar()

    def release(self) -> None:
        """Leave the pages as a load of the stock host does, until the next one under this policy."""
        vbar, module = self.vbar(), self.module()
        if vbar is None or module is None or _owners.get(module) is not self:
            return
        if self.limits.watermark is not None and hasattr(vbar, "max_size"):
            self._ask(vbar, "set_watermark", int(vbar.max_size))
        if self.limits.floor:
            self._ask(vbar, "set_watermark_limit", 0)

    def _measure(self, patcher: Any) -> Limits:
        outside = int(getattr(patcher.model, "model_loaded_weight_memory", 0))
        try:
            return limits_for(self.policy, card_of(patcher), self.info, outside)
        except Exception as error:  # the load itself went well, and a model without limits is the stock host's
            self._failed("limits", error)
            return Limits()

    def _state(self, vbar: Any) -> None:
        ceiling, floor, _ = self.limits
        if ceiling is not None:
            now = watermark(vbar)
            if now is None or now > ceiling:
                self._ask(vbar, "set_watermark", ceiling)
        if floor or ceiling is not None:
            self._ask(vbar, "set_watermark_limit", floor)

    def _ask(self, vbar: Any, call: str, *arguments: int) -> None:
        """One call of the pager. From 0.6 on they raise where they fail; a limit not taken must not end the run."""
        method = getattr(vbar, call, None)
        if method is None:
            self._failed(call, "this comfy-aimdo does not have it")
            return
        try:
            method(*arguments)
        except Exception as error:
            self._failed(call, error)

    def _failed(self, call: str, why: object) -> None:
        text = f"{call}: {why}"
        if text not in self.failures:
            self.failures.append(text)
            _log.warning("Balanced Offload: %s was not taken for %s", text, self.info.class_name)


_owners: weakref.WeakKeyDictionary[Any, Marks] = weakref.WeakKeyDictionary()
"""Module -> the marks that its last load stated."""

_living: weakref.WeakSet[Marks] = weakref.WeakSet()


# ---------------------------------------------------------------------- putting a policy on a model
def apply_dynamic(
    patcher: Any, policy: OffloadPolicy, *, name: str | None = None, role: Role | None = None
) -> tuple[Any, str]:
    """A clone of the dynamic `patcher` under `policy`, and one sentence for the user.

    Where the policy wants the model for us (`use_core_dynamic`), the clone is static (`is_dynamic()` is False then) and
    the caller takes it over. The given patcher stays as it was.
    """
    info = component_of(patcher, name, role)
    missed = ""
    if why := wants_static(policy, info):
        try:
            return to_static_clone(patcher), _bypassed(why)
        except NoStaticCopy as error:
            missed = f"; not static as asked for ({', '.join(why)}): {error}"
    elif left := beyond(policy, info):
        missed = f"; it cannot do {' and '.join(left)}"
    clone = patcher.clone()
    shared = _shared(patcher.model, policy)
    mark(clone, policy, info)
    return clone, _followed(policy, clone, info) + missed + shared + "."


def mark(patcher: Any, policy: OffloadPolicy, info: ComponentInfo) -> Marks:
    """State `policy` for this very patcher from its next load on, in place of what was stated for it before."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    marks = Marks(policy, info, weakref.ref(patcher.model))
    unmark(patcher)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, PAGER_KEY, marks.on_load)
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, PAGER_KEY, marks.on_sample)
    _living.add(marks)
    return marks


def unmark(patcher: Any) -> None:
    """Take our callback and wrapper off this patcher; its clones keep theirs."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, PAGER_KEY)
    patcher.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, PAGER_KEY)


def release_all() -> None:
    """For "Restore stock behaviour": at once, and not with the next load, which states nothing while it is on."""
    for marks in list(_living):
        marks.release()
    _owners.clear()


def _shared(module: Any, policy: OffloadPolicy) -> str:
    """A clause when another policy is in force on a clone of the same module."""
    others = [marks for marks in _living if marks.module() is module and marks.policy != policy]
    return "; two policies share this model, and the one that is loaded last is in force" if others else ""


def _followed(policy: OffloadPolicy, patcher: Any, info: ComponentInfo) -> str:
    version, can_cap, _ = pager()
    world = f"ComfyUI pages this model itself (dynamic VRAM{f', comfy-aimdo {version}' if version else ''})"
    try:
        limits: Limits | None = limits_for(policy, card_of(patcher), info)
    except Exception:  # no card to ask yet: its load will
        limits = None
    if limits is not None and not can_cap:
        limits = limits._replace(watermark=None)
    return f"{world}; mode {policy.mode.value}: {words(policy, limits)}"


def _bypassed(why: list[str]) -> str:
    return (
        f"Loaded static, beside ComfyUI's own pager ({', '.join(why)}), which reads the files once more; this pack "
        "moves its weights."
    )


# ---------------------------------------------------------------------- static instead
def to_static_clone(patcher: Any) -> Any:
    """The same model outside the host's pager: a static clone with the same LoRAs. Reads the files once per model.

    Raises:
        NoStaticCopy: the loader of this model left the host no way to read it again.
    """
    twin = _twins.get(patcher.model)
    factory = getattr(patcher, "cached_patcher_init", None)
    if not comfyui_host.takes(patcher.clone, "disable_dynamic"):
        raise NoStaticCopy("this ComfyUI has no static clones")
    if twin is None and factory is None:
        raise NoStaticCopy("its loader cannot load it a second time; use one of ComfyUI's own loaders")
    static = patcher.clone(disable_dynamic=True, **({} if twin is None else {"model_override": twin}))
    if twin is None and hasattr(static, "get_clone_model_override"):
        _twins[patcher.model] = static.get_clone_model_override()
    unmark(static)
    return static


_twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Dynamic module -> its static twin as the host's `clone(model_override=)` takes it, so that a changed policy reads no
file again while the module lives. Not the twin's patcher: that would hold the very module that it stands for."""


def drop_static_twins() -> None:
    """Forget static twins; those in use live on with their patchers. For a host that wants its memory back."""
    _twins.clear()


def with_patcher(obj: Any, patcher: Any) -> Any:
    """A MODEL, CLIP or VAE like `obj` around `patcher`, its inner model the patcher's own.

    A CLIP and a VAE call their model beside their patcher; after a static clone these would be two modules.
    """
    if comfyui_host.is_patcher(obj):
        return patcher
    made = obj.clone() if hasattr(obj, "cond_stage_model") else copy.copy(obj)
    made.patcher = patcher
    for inner in ("cond_stage_model", "first_stage_model"):
        if hasattr(made, inner):
            setattr(made, inner, patcher.model)
    return made


# ---------------------------------------------------------------------- what it did
def states(pages: bool = False) -> list[dict[str, Any]]:
    """What the pager holds of every model under a policy, bytes, without synchronising; for reports and telemetry."""
    return [found for module in list(_owners) if (found := state(module, pages=pages)) is not None]


def state(module: Any, pages: bool = False) -> dict[str, Any] | None:
    """One model's: None before its first load under a policy. `pages` adds how many are resident and pinned.

    Figures that this comfy-aimdo does not give are None. The watermark is at most what the model weighs, since the
    pager's range is larger than its model.
    """
    marks = _owners.get(module)
    vbar = None if marks is None else marks.vbar()
    if marks is None or vbar is None:
        return None
    paged, ceiling = figure(vbar, "loaded_size"), watermark(vbar)
    outside = int(getattr(module, "model_loaded_weight_memory", 0))
    found: dict[str, Any] = {
        "name": marks.info.name,
        "class_name": marks.info.class_name,
        "mode": marks.policy.mode.value,
        "weights": marks.info.weight_bytes,
        "loaded": None if paged is None else paged + outside,
        "outside": outside,
        "watermark": None if ceiling is None else min(ceiling, pages_up(marks.info.weight_bytes)),
        "asked": {"watermark": marks.limits.watermark, "watermark_limit": marks.limits.floor},
        "failures": list(marks.failures),
    }
    if pages:
        found["pages"] = residency(vbar)
    return found
