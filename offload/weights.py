"""CPU masters: the one copy of every weight. Invariant: a master is copied from, never to, so eviction copies nothing.

Binding a storage points every tensor that views it at a device buffer; unbinding points them back at the master.
Parameter objects, ties and views keep their identity throughout, because only `.data` changes hands.

Masters lie in page-locked slabs where the budget allows (a copy from those runs beside the compute), in definition
order, and stay pageable beyond it. Slabs are powers of two, the sizes that torch's host allocator gives exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from .backend import Backend
from .units import ALIGNMENT, Component, Storage, TensorRef, aligned

SLAB_BYTES = 256 << 20
SMALLEST_SLAB = 1 << 20


class Pinner:
    """Hands out page-locked host memory within one RAM budget, shared by all components of a session."""

    def __init__(self, backend: Backend, budget: int) -> None:
        self._backend = backend
        self.budget = budget
        self.used = 0

    def slab(self, nbytes: int, charge: int) -> torch.Tensor | None:
        """A pinned uint8 tensor of `nbytes`, or None where the budget or the system says no.

        `charge` is what the host allocator really locks for it.
        """
        if nbytes <= 0 or self.used + charge > self.budget:
            return None
        slab = self._backend.pinned_empty(nbytes)
        if slab is not None:
            self.used += charge
        return slab

    def give_back(self, nbytes: int) -> None:
        """A slab of `nbytes` was dropped."""
        self.used = max(0, self.used - nbytes)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of `tensor` as uint8, without copying."""
    storage = tensor.untyped_storage()
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def slab_bytes(need: int) -> int:
    """What torch's host allocator locks for a slab of `need` bytes: the next power of two."""
    return max(SMALLEST_SLAB, 1 << (need - 1).bit_length())


def slab_groups(sizes: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Group storages, (index, bytes) in order, into slabs of at most SLAB_BYTES, as many as `budget` bytes allow."""
    groups: list[list[int]] = []
    filled = 0
    for index, nbytes in sizes:
        room = aligned(nbytes)
        joined = slab_bytes(filled + room)
        if groups and filled + room <= SLAB_BYTES and joined - slab_bytes(filled) <= budget:
            budget -= joined - slab_bytes(filled)
            groups[-1].append(index)
            filled += room
        elif slab_bytes(room) <= budget:
            budget -= slab_bytes(room)
            groups.append([index])
            filled = room
    return groups


class Weights:
    """The masters of one component and what its tensors are bound to now."""

    def __init__(
        self,
        component: Component,
        backend: Backend,
        pinner: Pinner,
        origins: Mapping[str, torch.device] | None = None,
    ) -> None:
        """`origins`: where `restore` puts a storage, by its first tensor's name; else where it is found now."""
        self.component = component
        self._origins = origins or {}
        self._backend = backend
        self._pinner = pinner
        self._pinned_bytes = 0
        self._in_slab: set[int] = set()  # storages whose master lies in a slab of ours
        self._bound: dict[int, torch.Tensor] = {}
        self._versions: dict[int, int] = {}
        self._homes: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}  # storage -> master, views of it
        self._originals: list[torch.device] = []
        self.came_down = 0  # bytes copied down so far: weights found on the device, or written there
        self._one_memory = backend.shared_memory and backend.device.type != "cpu"
        self.masters: list[torch.Tensor] = []
        self._adopt()

    # ------------------------------------------------------------------ masters
    def _adopt(self) -> None:
        """Take every storage as a CPU master, bringing down once what was loaded straight onto the device."""
        for storage in self.component.storages:
            raw = _raw(storage.refs[0].tensor)
            self._originals.append(self._origins.get(storage.refs[0].name, raw.device))
            if raw.device.type != "cpu":
                self.came_down += raw.numel()
                raw = raw.to("cpu")
            self.masters.append(raw)
        for storage in self.component.storages:
            self._point_at_master(storage)
        self._pin()
        self._pinned_masters = {i for i, master in enumerate(self.masters) if master.is_pinned()}

    def _pin(self) -> None:
        """Move masters into pinned slabs, as far as the budget goes; pinned ones are adopted where they lie."""
        if self._backend.shared_memory:
            return
        todo = [i for i, master in enumerate(self.masters) if not master.is_pinned()]
        with torch.inference_mode(False):
            for group in slab_groups(
                [(i, self.masters[i].numel()) for i in todo], self._pinner.budget - self._pinner.used
            ):
                need = sum(aligned(self.masters[i].numel()) for i in group)
                slab = self._pinner.slab(need, slab_bytes(need))
                if slab is None:
                    return
                self._pinned_bytes += slab_bytes(need)
                start = 0
                for i in group:
                    nbytes = self.masters[i].numel()
                    home = slab[start : start + nbytes]
                    home.copy_(self.masters[i])
                    self.masters[i] = home
                    self._in_slab.add(i)
                    self._point_at_master(self.component.storages[i])
                    start += aligned(nbytes)

    def is_pinned(self, storage: Storage) -> bool:
        """Whether a copy from this master runs beside the compute, without holding the host."""
        return storage.index in self._pinned_masters

    @property
    def pinned(self) -> int:
        """Bytes of masters in page-locked memory."""
        return sum(self.masters[i].numel() for i in self._pinned_masters)

    # ------------------------------------------------------------------ binding
    @staticmethod
    def _view(raw: torch.Tensor, ref: TensorRef) -> torch.Tensor:
        over = raw.numel() % ref.dtype.itemsize
        # A view made in inference mode would turn the model's own tensor into an inference tensor: its writes would
        # not be counted, and nobody could ask for a gradient later.
        with torch.inference_mode(False):
            typed = (raw[:-over] if over else raw).view(ref.dtype)
            return typed.as_strided(ref.size, ref.stride, typed.storage_offset() + ref.offset)

    def _point_at_master(self, storage: Storage) -> None:
        raw = self.masters[storage.index]
        home = self._homes.get(storage.index)
        if home is None or home[0] is not raw:  # made once: unbinding happens for every streamed unit of every step
            home = self._homes[storage.index] = (raw, [self._view(raw, ref) for ref in storage.refs])
        for ref, view in zip(storage.refs, home[1], strict=True):
            ref.tensor.data = view

    def bind(self, storage: Storage, raw: torch.Tensor) -> None:
        """Point the tensors of `storage` at `raw`, a device uint8 tensor of its size."""
        for ref in storage.refs:
            ref.tensor.data = self._view(raw, ref)
            self._versions[id(ref)] = _version(ref.tensor)
        self._bound[storage.index] = raw
        if self._one_memory:
            self.masters[storage.index] = raw[:0]  # a second copy in the same memory would only take room

    def unbind(self, storage: Storage, *, keep_foreign: bool = False) -> None:
        """Point the tensors back at the master.

        `keep_foreign`: a tensor that something else has replaced since it was bound is left to it.
        A storage that was written while it was bound (a counter, a running statistic, weights edited in place)
        comes down first, since the edit would be lost otherwise; `came_down` counts its bytes.
        """
        foreign = keep_foreign and self._changed(storage) is not None
        raw = self._bound.pop(storage.index, None)
        if raw is None or foreign:
            return
        if self._one_memory:
            self.masters[storage.index] = raw.to("cpu")
        elif any(ref.unseen_writes or _version(ref.tensor) != self._versions[id(ref)] for ref in storage.refs):
            self.masters[storage.index].copy_(raw[: storage.nbytes])
            self.came_down += storage.nbytes
        self._point_at_master(storage)

    def bound(self, storage: Storage) -> torch.Tensor | None:
        """The device buffer that `storage` is bound to, or None while its tensors are at the master."""
        return self._bound.get(storage.index)

    def copy_to(self, storage: Storage, raw: torch.Tensor) -> None:
        """Start the copy of a master into `raw` on the current stream (asynchronous where the master is pinned)."""
        raw.copy_(self.masters[storage.index], non_blocking=True)

    def foreign_change(self) -> str | None:
        """The name of a tensor that something else has replaced or moved since we bound it, or None."""
        return next((name for s in self.component.storages if (name := self._changed(s)) is not None), None)

    def _changed(self, storage: Storage) -> str | None:
        raw = self._bound.get(storage.index)
        base = raw if raw is not None else self.masters[storage.index]
        return next((ref.name for ref in storage.refs if self._replaced(ref, base)), None)

    @staticmethod
    def _replaced(ref: TensorRef, base: torch.Tensor) -> bool:
        tensor = ref.tensor
        at_home = tensor.data_ptr() == base.data_ptr() + ref.offset * ref.dtype.itemsize and tensor.dtype == ref.dtype
        return not at_home and tensor.numel() > 0

    @property
    def origins(self) -> dict[str, torch.device]:
        """Where each storage came from, by its first tensor's name."""
        return {s.refs[0].name: self._originals[s.index] for s in self.component.storages}

    def leave_slabs(self) -> None:
        """Give every tensor that still lies in a slab memory of its own, pageable; what is on the device is left."""
        with torch.inference_mode(False):
            for index in sorted(self._in_slab - self._bound.keys()):
                storage, slab = self.component.storages[index], self.masters[index]
                mine = [ref for ref in storage.refs if not self._replaced(ref, slab)]
                self.masters[index] = slab.clone()
                for ref in mine:
                    ref.tensor.data = self._view(self.masters[index], ref)
                self._in_slab.remove(index)
                self._homes.pop(index, None)
                self._pinned_masters.discard(index)

    def abandon(self) -> None:
        """Forget the masters, and leave the tensors as they are: something else has replaced them."""
        self.masters = []
        self._bound = {}
        self._homes = {}
        self._pinner.give_back(self._pinned_bytes)
        self._pinned_bytes = 0

    def restore(self) -> None:
        """Give every storage memory of its own again, on the device it came from, and forget the masters.

        A storage that something else has replaced meanwhile is left to it. Where the device has no room left for
        what came from it, all of that stays in system memory, with a warning.
        """
        with torch.inference_mode(False):
            mine = [s for s in self.component.storages if self._changed(s) is None]
            for storage in mine:
                self.unbind(storage)
            up: dict[int, torch.Tensor] = {}
            try:
                for storage in mine:
                    home = self._originals[storage.index]
                    if home.type != "cpu":
                        up[storage.index] = self.masters[storage.index].to(home)
            except torch.OutOfMemoryError:
                up = {}
                warnings.warn(
                    f"{self.component.name}: the device has no room to take its weights back; they are in system "
                    "memory now. Free some and call `.to(device)` on it.",
                    stacklevel=2,
                )
            for storage in mine:
                if storage.index in up:
                    self.masters[storage.index] = up[storage.index]
                elif storage.index in self._in_slab:
                    self.masters[storage.index] = self.masters[storage.index].clone()
                self._point_at_master(storage)
        self.abandon()


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor was written in place; what was made in inference mode does not count, and reads as never."""
    try:
        return int(tensor._version)
    except RuntimeError:
        return -2


assert SLAB_BYTES % ALIGNMENT == 0
