"""A stand-in for a host that pages its models: comfy-aimdo's Python contract, and as much of a patcher as meets it.

`Pages` honours what the real range of pages does (seen in comfy-aimdo 0.4.9 to 0.6.0): sizes round up to 32 MiB pages,
`set_watermark` drops what lies above and is clamped to the range, faults above the watermark stream instead, pressure
lowers the watermark down to the limit, `prioritize` makes it whole, `get_watermark` counts pages. It stands on no
device: a page is a flag.
"""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

from torch import nn

PAGE = 32 << 20


class PagesWithoutCeiling:
    """A range whose watermark is the pager's own affair. `log`: every call in order, as (name, arguments)."""

    def __init__(self, size: int, device: int) -> None:
        self.device, self.max_size, self.offset = device, size, 0
        self.pages = -(-size // PAGE)
        self.resident = [False] * self.pages
        self.mark, self.limit = self.pages, 0
        self.log: list[tuple[Any, ...]] = []

    def prioritize(self, malloc_async_clamp: int | None = None) -> None:
        self.log.append(("prioritize",))
        self.mark = self.pages

    def deprioritize(self) -> None:
        self.log.append(("deprioritize",))

    def alloc(self, num_bytes: int) -> tuple[PagesWithoutCeiling, int, int]:
        self.offset = (self.offset + 511) & ~511
        if self.offset + num_bytes > self.max_size:
            raise MemoryError("VBAR OOM")
        start = self.offset
        self.offset += num_bytes
        return self, start, num_bytes

    def fault(self, alloc: int, size: int) -> list[int] | None:
        """Resident from now on, or None: stream it."""
        first, end = alloc // PAGE, -(-(alloc + size) // PAGE)
        if end > self.mark:
            return None
        self.resident[first:end] = [True] * (end - first)
        return list(range(first, end))

    def unpin(self, alloc: int, size: int) -> None:
        self.log.append(("unpin", alloc, size))

    def loaded_size(self) -> int:
        return sum(self.resident) * PAGE

    def set_watermark_limit(self, size_bytes: int) -> None:
        self.log.append(("set_watermark_limit", size_bytes))
        self.limit = -(-size_bytes // PAGE)

    def free_memory(self, size_bytes: int) -> int:
        """Pressure: pages go from the back, down to the limit, and the watermark with them."""
        wanted, freed = -(-size_bytes // PAGE), 0
        while freed < wanted and self.mark > self.limit:
            self.mark -= 1
            freed += self.resident[self.mark]
            self.resident[self.mark] = False
        return freed * PAGE

    def get_nr_pages(self) -> int:
        return self.pages

    def get_residency(self) -> list[int]:
        return [int(page) for page in self.resident]


class Pages(PagesWithoutCeiling):
    """`ModelVBAR` of 0.4.13."""

    def set_watermark(self, size_bytes: int) -> None:
        self.log.append(("set_watermark", size_bytes))
        self.mark = min(-(-size_bytes // PAGE), self.pages)
        self.resident[self.mark :] = [False] * (self.pages - self.mark)

    def get_watermark(self) -> int:
        return self.mark


class PagesThatRefuse(Pages):
    """0.6: a call that fails raises."""

    def set_watermark(self, size_bytes: int) -> None:
        raise RuntimeError("VBAR set_watermark failed")


class Net(nn.Module):
    """A BaseModel as the pager meets it: leaves of whole MiB, and what the host keeps on the module."""

    def __init__(self, leaves: int, leaf: int, small: int = 0) -> None:
        super().__init__()
        self.diffusion_model = nn.Identity()
        self.sizes, self.model_loaded_weight_memory, self.small = [leaf] * leaves, 0, small
        self.dynamic_vbars: dict[Any, PagesWithoutCeiling] = {}


class StaticPatcher:
    """`ModelPatcher`: what clone, callbacks and wrappers need."""

    def __init__(self, model: Net, pages: type[PagesWithoutCeiling] = Pages) -> None:
        self.model, self.pages = model, pages
        self.load_device = SimpleNamespace(type="cuda", index=0)
        self.callbacks: dict[str, dict[str, list[Any]]] = collections.defaultdict(dict)
        self.wrappers: dict[str, dict[str, list[Any]]] = collections.defaultdict(dict)
        self.patches: dict[str, Any] = {}
        self.parent: StaticPatcher | None = None
        self.is_clip = False
        self.cached_patcher_init: tuple[Any, ...] | None = None

    def is_dynamic(self) -> bool:
        return False

    def model_size(self) -> int:
        return sum(self.model.sizes) + self.model.small

    def add_callback_with_key(self, call_type: str, key: str, callback: Any) -> None:
        self.callbacks[call_type].setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, call_type: str, key: str) -> None:
        self.callbacks[call_type].pop(key, None)

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        self.wrappers[wrapper_type].setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        self.wrappers[wrapper_type].pop(key, None)

    def get_clone_model_override(self) -> tuple[Net, tuple[Any, ...]]:
        return self.model, ({}, {}, {}, set())

    def clone(self, disable_dynamic: bool = False, model_override: Any = None) -> StaticPatcher:
        kind = type(self)
        if self.is_dynamic() and disable_dynamic:
            kind = StaticPatcher
            if model_override is None:
                if self.cached_patcher_init is None:
                    raise RuntimeError("stand-in: whoever loaded this left no way to load it again")
                loader, arguments = self.cached_patcher_init
                model_override = loader(*arguments, disable_dynamic=True).get_clone_model_override()
        made = kind((model_override or self.get_clone_model_override())[0], self.pages)
        made.patches, made.parent, made.is_clip = dict(self.patches), self, self.is_clip
        made.cached_patcher_init = self.cached_patcher_init
        for mine, its in ((self.callbacks, made.callbacks), (self.wrappers, made.wrappers)):
            for call_type, keys in mine.items():
                its[call_type] = {key: list(entries) for key, entries in keys.items()}
        return made


class DynamicPatcher(StaticPatcher):
    """`ModelPatcherDynamic`: loading maps the weights into pages and moves none of them."""

    def is_dynamic(self) -> bool:
        return True

    def _vbar_get(self, create: bool = False) -> PagesWithoutCeiling | None:
        found = self.model.dynamic_vbars.get(0)
        if found is None and create:
            found = self.model.dynamic_vbars[0] = self.pages(self.model_size() * 10, 0)
            self.model.allocs = [found.alloc(size) for size in self.model.sizes]
        return found

    def load(self) -> PagesWithoutCeiling:
        """What `load_models_gpu` does to it at each use: the callbacks come last, with five arguments."""
        vbar = self._vbar_get(create=True)
        assert vbar is not None
        vbar.prioritize()
        self.model.model_loaded_weight_memory = self.model.small
        for callbacks in list(self.callbacks["on_load"].values()):
            for callback in callbacks:
                callback(self, self.load_device, 0, False, False)
        return vbar

    def forward(self) -> list[int]:
        """One step: bytes of every leaf that had to be streamed."""
        return [size for vbar, start, size in self.model.allocs if vbar.fault(start, size) is None]

    def sample(self, steps: int = 1) -> list[list[int]]:
        """Load, then the sampler within its wrappers."""
        self.load()
        return self.sampler(steps)

    def sampler(self, steps: int = 1) -> list[list[int]]:
        wrappers = [wrapper for entries in self.wrappers["sampler_sample"].values() for wrapper in entries]

        def run(position: int, steps: int) -> list[list[int]]:
            if position == len(wrappers):
                return [self.forward() for _ in range(steps)]
            return wrappers[position](lambda count: run(position + 1, count), steps)

        return run(0, steps)


def end_of_node(*patchers: DynamicPatcher) -> None:
    """What the host does after every node."""
    for patcher in patchers:
        for vbar in patcher.model.dynamic_vbars.values():
            vbar.limit = 0
