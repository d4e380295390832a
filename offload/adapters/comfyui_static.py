"""The host's model patcher, placed by our session. Invariant: where it cannot keep its promise it is the host's own.

Needs a host: `comfy` is imported here. The host keeps its list, its LoRA and object patches, its callbacks; we decide
which weights are on the device, and move them by pointer swap: masters stay in RAM, evicting copies nothing.

Residency belongs to the module and is shared by all clones. Cases that the host handles by writing into weights (hooks
on conditioning, `force_patch_weights` for saving) and a CPU device go the stock way: the module is given back first.
"""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ..hosting import MIB
from ..policy import OffloadPolicy
from ..sizes import read_size
from . import comfyui_host as host
from .comfyui_device import Hosted, open_device_session, restored
from .comfyui_lora import patched_by_host
from .comfyui_runs import runs


def managed_module(model: nn.Module) -> nn.Module:
    """The part of a host's model that is worth placing: the diffusion model, where there is one."""
    inner = getattr(model, "diffusion_model", None)
    return inner if isinstance(inner, nn.Module) else model


class OffloadModelPatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """A ModelPatcher whose weights our session places. Made by `of`; clones share the module's `Hosted`."""

    hosted: Hosted = None  # type: ignore[assignment]  # until `_join`: the host's constructor asks for sizes
    policy: OffloadPolicy

    @classmethod
    def of(cls, patcher: Any, hosted: Hosted) -> OffloadModelPatcher:
        """A clone of a static patcher that goes by `hosted`; the given one stays as it is."""
        clone = patcher.clone()
        clone.__class__ = cls
        clone._join(hosted, hosted.policy)
        return clone  # type: ignore[no-any-return]

    def _join(self, hosted: Hosted, policy: OffloadPolicy) -> None:
        self.hosted, self.policy = hosted, policy

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's; the clone goes by the same policy."""
        clone = super().clone(*args, **kwargs)
        if isinstance(clone, OffloadModelPatcher):
            clone.size = self.size  # of all its weights; the host hands on what `model_size` says
            clone._join(self.hosted, self.policy)
        return clone

    # ------------------------------------------------------------------ what the host counts
    def model_size(self) -> int:
        """What it will take of the device, bytes: the host frees that much of other models before it loads this one."""
        whole = super().model_size()
        managed = self.hosted.managed if self.hosted is not None else None
        if managed is None:
            return int(whole)
        if managed.placed and managed.policy == self.policy and managed.plan is not None:
            return max(1, self.loaded_size())
        high = open_device_session().machine.vram_total
        asked = read_size("high", self.policy.high)
        cap = None if asked.kind.value == "auto" else asked.to_bytes("high", high)
        return int(whole) if cap is None else max(1, min(int(whole), cap))

    def loaded_size(self) -> int:
        """Device bytes of its weights as they are now; they change with each stage."""
        if self.hosted is None or self.hosted.managed is None:
            return int(super().loaded_size())
        return self.hosted.device_bytes

    # ------------------------------------------------------------------ loading
    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        """The host wants it on the device, within `extra_memory` bytes beyond what it has there."""
        runs().touch(self.hosted.world, self.policy)
        if self._goes_stock(device_to, force_patch_weights):
            self.hosted.release()
            return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)
        with host.ejected(self):
            self._take_over()
            before = self.hosted.device_bytes
            self.patch_model(load_weights=False)
            self._move_rest(device_to)
            self._last_wins()
            managed = self.hosted.attach()
            self.hosted.marks.patching.install(self, open_device_session(), managed)
            try:
                self.hosted.load(self._activations(device_to, extra_memory))
            except BaseException:
                self.detach()
                raise
            self._count(device_to)
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, 0, force_patch_weights, False)
            return self.hosted.device_bytes - before

    def _goes_stock(self, device: torch.device, force: bool) -> bool:
        if device.type == "cpu" or device != host.load_device():
            return True
        if force or self.hook_patches or self.forced_hooks or restored():
            return True
        if self.patches and patched_by_host(self.model, self.patches):
            text = f"{self.hosted.name}: its LoRA is on quantized weights, which the host patches and places itself"
            runs().note("lora", text)
            return True
        return False

    def _take_over(self) -> None:
        """Undo what the stock way, or another clone's object patches, left on the module."""
        foreign = any(getattr(module, "comfy_patched_weights", False) for module in self.model.modules())
        if foreign or self.model.model_lowvram:
            self.hosted.release()
            super().unpatch_model(self.offload_device, unpatch_weights=True)
        else:
            super().unpatch_model(self.offload_device, unpatch_weights=False)

    def _last_wins(self) -> None:
        """Two policies on clones of one module: the one that is loaded last counts, and the report says so."""
        hosted, prompt = self.hosted, host.executing().prompt_id
        if hosted.asked_in != prompt:
            hosted.asked_in, hosted.asked = prompt, set()
        if hosted.policy != self.policy:
            if hosted.policy in hosted.asked:
                runs().note("policy", f"{hosted.name}: two policies on clones of one model; the one loaded last counts")
            hosted.policy = self.policy
        hosted.asked.add(self.policy)

    def _activations(self, device: torch.device, extra: float) -> int | None:
        """What the host expects the call to need, bytes: what it left of the free memory beyond its budget."""
        management = host.model_management()
        if extra <= 1 or extra > 1e30:
            return None  # no budget was made: a full load was asked for, or none at all
        left = int(management.get_free_memory(device) - extra - self._reserve())
        return left if left > management.minimum_inference_memory() - self._reserve() + MIB else None

    @staticmethod
    def _reserve() -> int:
        return int(getattr(host.model_management(), "extra_reserved_memory", lambda: 0)())

    def _move_rest(self, device: torch.device) -> None:
        """What the host's model has beside the part that we place: small tables, as a full load moves them."""
        inner = self.hosted.module
        if inner is self.model:
            return
        for child in self.model.children():
            if child is not inner:
                child.to(device)

    def _count(self, device: torch.device) -> None:
        model = self.model
        model.device = device
        model.model_loaded_weight_memory = max(1, self.hosted.device_bytes)
        model.model_lowvram = False  # so that the stock patcher of this module takes it as loaded, and lets it be
        model.current_weight_patches_uuid = self.patches_uuid
        self.hosted.marks.count(model, self.offload_device)

    # ------------------------------------------------------------------ who reads the weights
    def get_key_patches(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's, for merging: from the pristine weights, which are in RAM."""
        self.hosted.evict(None)
        return super().get_key_patches(*args, **kwargs)

    def model_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's: weights in RAM. To save patched ones the host loads with `force_patch_weights` first."""
        self.hosted.evict(None)
        return super().model_state_dict(*args, **kwargs)

    # ------------------------------------------------------------------ the way back
    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> Any:
        """Free at least so many bytes for another model of the host; what came free, bytes."""
        if self.hosted.managed is None:
            return super().partially_unload(device_to, memory_to_free, *args, **kwargs)
        freed = self.hosted.evict(int(min(memory_to_free, 1 << 60)))
        self.model.model_loaded_weight_memory = max(1, self.hosted.device_bytes)
        return freed

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """As the host's; weights are dropped from the device, not copied back."""
        if self.hosted.managed is None or not unpatch_weights:
            super().unpatch_model(device_to, unpatch_weights=unpatch_weights)
            return
        self.hosted.evict(None)
        super().unpatch_model(None, unpatch_weights=False)
        if device_to is not None:
            self._move_rest(device_to)
            self.model.device = device_to
        self.model.model_loaded_weight_memory = 0
        self.model.current_weight_patches_uuid = None
        self.hosted.marks.uncount()


class PartPatcher(OffloadModelPatcher):
    """A heavy part of a pipeline in the host's list: its own calls place it, the host counts and evicts it."""

    @classmethod
    def of(cls, hosted: Hosted, _: Any = None) -> PartPatcher:  # type: ignore[override]
        """The entry for one part."""
        management = host.model_management()
        patcher = cls(hosted.module, host.load_device(), management.unet_offload_device())
        patcher._join(hosted, hosted.policy)
        return patcher

    def current_loaded_device(self) -> torch.device:
        """Where the host is to count it; a pipeline's model answers for itself, and can't be told."""
        return self.load_device if self.hosted.device_bytes else self.offload_device  # type: ignore[no-any-return]

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        """It will run, at a time of the pipeline's choosing: only the room counts now."""
        runs().touch(self.hosted.world, self.policy)
        return 0

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> Any:
        """Free at least so many bytes for a model of the host; what came free, bytes."""
        return self.hosted.evict(int(min(memory_to_free, 1 << 60)))

    def detach(self, unpatch_all: bool = True) -> Any:
        """The host takes it off its list: its weights leave the device, and come back with its next call."""
        if unpatch_all:
            self.hosted.evict(None)
        return self.model
