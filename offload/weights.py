"""CPU masters: the one copy of every weight. Invariant: a master is copied from, never to, so eviction copies nothing.

Binding a storage points every tensor that views it at a device buffer; unbinding points them back at the master.
Parameter objects, ties and views keep their identity throughout, because only `.data` changes hands.

A master that is copied again and again lies in a page-locked slab (a copy from there runs beside the compute), as far
as the RAM budget goes, and stays where it was found beyond it. The storages of a unit lie in a slab as they lie in the
ring, one behind the other, so that a unit is one copy. What leaves its old place for a slab gives that place back at
once: there is never a second copy of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch

from .backend import Backend
from .binding import stretches
from .pinning import Pinner
from .units import Component, Storage, TensorRef, Unit, aligned

LOOKS = 2  # buffers whose writes torch does not count are compared with their masters, until nothing changed so often
SLAB_BYTES = 256 << 20  # the most that is in two places at once while masters move into a slab


def _own(storage: torch.UntypedStorage) -> torch.Tensor:
    """The whole storage as uint8, without copying."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def share_out(sizes: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """Group (unit, bytes) in order into slabs of at most SLAB_BYTES (or one unit); only as much as `budget` allows.

    Where the budget does not hold all, what stays out is spread evenly, so that slow copies do not come in a row.
    """
    total = sum(nbytes for _, nbytes in sizes)
    share = min(1.0, budget / total) if total else 0.0
    groups: list[list[int]] = []
    filled, due, taken = 0, 0.0, 0
    for index, nbytes in sizes:
        due += nbytes * share
        if not nbytes or taken + nbytes > (budget if share == 1.0 else min(budget, due + nbytes / 2)):
            continue
        taken += nbytes
        if groups and filled + nbytes <= SLAB_BYTES:
            groups[-1].append(index)
            filled += nbytes
        else:
            groups.append([index])
            filled = nbytes
    return groups


class Weights:
    """The masters of one component and what its tensors are bound to now."""

    def __init__(
        self,
        component: Component,
        backend: Backend,
        pinner: Pinner,
        origins: Mapping[str, torch.device] | None = None,
        slabs: Mapping[int, tuple[torch.Tensor, int]] | None = None,
    ) -> None:
        """`origins`: where `restore` puts a storage, by its first tensor's name; else where it is found now.
        `slabs`: the slab and the place in it of masters that are in one already, by address (`places`)."""
        self.component = component
        self.bound_now: dict[int, torch.Tensor] = {}  # storage index -> the device bytes it is bound to
        self.came_down = 0  # bytes copied down so far: weights found on the device, or written there
        self.masters: list[torch.Tensor] = []
        self._origins = origins or {}
        self._backend = backend
        self._pinner = pinner
        self._slabs: dict[int, tuple[torch.Tensor, int]] = {}  # storage index -> its slab, and where in it
        self._pinned: set[int] = set()
        self._versions: dict[int, int] = {}
        uncounted = (s for s in component.storages if any(ref.uncounted for ref in s.refs))
        self.looks = {storage.index: LOOKS for storage in uncounted}  # storage index -> looks until we trust it
        self._homes: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}  # storage -> master, views of it
        self._originals: list[torch.device] = []
        self._one_memory = backend.shared_memory and backend.device.type != "cpu"
        self._adopt(slabs or {})

    # ------------------------------------------------------------------ masters
    def _adopt(self, slabs: Mapping[int, tuple[torch.Tensor, int]]) -> None:
        """Take every storage as a CPU master, bringing down once what was loaded straight onto the device."""
        for storage in self.component.storages:
            raw = _own(storage.refs[0].target.untyped_storage())
            self._originals.append(self._origins.get(storage.refs[0].held_as, raw.device))
            if raw.device.type != "cpu":
                self.came_down += raw.numel()
                raw = raw.to("cpu")
            self.masters.append(raw)
        for storage in self.component.storages:
            self._point_at_master(storage)
        self._pinned = {i for i, master in enumerate(self.masters) if master.is_pinned()}
        found = ((i, slabs.get(self.masters[i].data_ptr())) for i in self._pinned)
        self._slabs = {i: place for i, place in found if place is not None}

    def pin(self, units: Iterable[Unit]) -> bool:
        """Move the masters of `units` into page-locked slabs, in this order, as far as the RAM budget goes.

        Ask between forwards, for what will be copied again and again. Masters that are page-locked already stay where
        they are. True if a master moved: views of it that somebody prepared are out of date then.
        """
        if self._backend.shared_memory or self._pinner.refused:
            return False
        todo = {u.index: u for u in units if any(s.index not in self._pinned for s in u.storages)}
        sizes = [(index, unit.slot_bytes) for index, unit in todo.items()]
        moved = False
        for group in share_out(sizes, self._pinner.room):
            slab = self._pinner.slab(sum(todo[index].slot_bytes for index in group))
            if slab is None:
                break
            start = 0
            for index in group:
                self._settle(todo[index], slab, start)
                start += todo[index].slot_bytes
            moved = True
        return moved

    def _settle(self, unit: Unit, slab: torch.Tensor, start: int) -> None:
        memory = slab.untyped_storage()
        base = slab.storage_offset() + start
        for storage in unit.storages:
            nbytes = storage.nbytes
            home = _own(memory[base : base + nbytes])  # a storage of its own: nobody takes the slab for one weight
            with torch.inference_mode(False), torch.no_grad():
                home.copy_(self.masters[storage.index])
            self.masters[storage.index] = home
            self._slabs[storage.index] = (slab, int(base - slab.storage_offset()))
            self._pinned.add(storage.index)
            if storage.index not in self.bound_now:
                self._point_at_master(storage)
            base += aligned(nbytes)

    @property
    def places(self) -> dict[int, tuple[torch.Tensor, int]]:
        """The slab of each master that lies in one, and where in it, by the master's address."""
        return {self.masters[i].data_ptr(): place for i, place in self._slabs.items()}

    def unpinnable(self) -> frozenset[int]:
        """Units that would stream from pageable memory, as the RAM budget has no room for their masters."""
        room = 0 if self._backend.shared_memory else self._pinner.room
        found = []
        for unit in self.component.units:
            if any(storage.index not in self._pinned for storage in unit.storages):
                room -= unit.slot_bytes
                if room < 0:
                    found.append(unit.index)
        return frozenset(found)

    def is_pinned(self, storage: Storage) -> bool:
        """Whether a copy from this master runs beside the compute, without holding the host."""
        return storage.index in self._pinned

    @property
    def pinned(self) -> int:
        """Bytes of masters in page-locked memory."""
        return sum(self.masters[i].numel() for i in self._pinned)

    def copies(self, storages: Sequence[Storage], buffer: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) pairs that fill `buffer`, as few as the masters' places allow: one, out of a slab.

        Such a copy takes the few bytes along that pad a storage to its alignment.
        """
        parts = stretches(storages, buffer)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        run: tuple[torch.Tensor, int, int, int] | None = None  # slab, start in it, end in it, start in the buffer
        start = 0
        for storage, part in zip(storages, parts, strict=True):
            place = self._slabs.get(storage.index)
            end = start + storage.nbytes
            if place is None:
                found.append((part, self.masters[storage.index]))
                run = None
            elif run is not None and place[0] is run[0] and place[1] - run[1] == start - run[3]:
                run = (run[0], run[1], place[1] + storage.nbytes, run[3])
                found[-1] = (buffer[run[3] : end], run[0][run[1] : run[2]])
            else:
                run = (place[0], place[1], place[1] + storage.nbytes, start)
                found.append((part, place[0][run[1] : run[2]]))
            start += aligned(storage.nbytes)
        return found

    # ------------------------------------------------------------------ binding
    @staticmethod
    def view(raw: torch.Tensor, ref: TensorRef) -> torch.Tensor:
        """The tensor of `ref` within `raw`, the uint8 bytes of its storage."""
        if ref.is_inference:
            with torch.inference_mode():
                start = raw.storage_offset() // ref.dtype.itemsize + ref.offset
                empty = torch.empty(0, dtype=ref.dtype, device=raw.device)
                return empty.set_(raw.untyped_storage(), start, ref.size, ref.stride)
        over = raw.numel() % ref.dtype.itemsize
        # A view made in inference mode would turn the model's own tensor into an inference tensor: its writes would
        # not be counted, and nobody could ask for a gradient later.
        with torch.inference_mode(False):
            typed = (raw[:-over] if over else raw).view(ref.dtype)
            return typed.as_strided(ref.size, ref.stride, typed.storage_offset() + ref.offset)

    def homes(self, storage: Storage) -> list[torch.Tensor]:
        """The views of the master that the storage's tensors have at home."""
        raw = self.masters[storage.index]
        home = self._homes.get(storage.index)
        if home is None or home[0] is not raw:
            home = self._homes[storage.index] = (raw, [self.view(raw, ref) for ref in storage.refs])
        return home[1]

    def _point_at_master(self, storage: Storage) -> None:
        for ref, view in zip(storage.refs, self.homes(storage), strict=True):
            ref.target.data = view
        for wrapper in storage.wrappers:
            wrapper.settle()

    def bind(self, storage: Storage, raw: torch.Tensor) -> None:
        """Point the tensors of `storage` at `raw`, a device uint8 tensor of its size."""
        for ref in storage.refs:
            ref.target.data = self.view(raw, ref)
            self._versions[id(ref)] = _version(ref.writes)
        for wrapper in storage.wrappers:
            wrapper.settle()
        self.bound_now[storage.index] = raw
        if self._one_memory:
            self.masters[storage.index] = raw[:0]  # a second copy in the same memory would only take room

    def unbind(self, storage: Storage, *, keep_foreign: bool = False) -> None:
        """Point the tensors back at the master.

        `keep_foreign`: a tensor that something else has replaced since it was bound is left to it.
        A storage that was written while it was bound (a counter, a running statistic, weights edited in place)
        comes down first, since the edit would be lost otherwise; `came_down` counts its bytes.
        """
        foreign = keep_foreign and self._changed(storage) is not None
        raw = self.bound_now.pop(storage.index, None)
        if raw is None or foreign:
            return
        if self._one_memory:
            self.masters[storage.index] = raw.to("cpu")
        elif any(ref.unseen_writes or _version(ref.writes) != self._versions.get(id(ref), -1) for ref in storage.refs):
            self.bring_down(storage.index, raw)
        elif storage.index in self.looks:
            self.look(storage.index, raw)
        self._point_at_master(storage)

    def bring_down(self, index: int, raw: torch.Tensor) -> None:
        """Somebody wrote to a storage on the device: the master takes it over."""
        nbytes = self.component.storages[index].nbytes
        self.masters[index].copy_(raw[:nbytes])
        self.came_down += nbytes

    def look(self, index: int, raw: torch.Tensor) -> None:
        """Torch does not count writes to this storage: bring it down, and see whether there was one."""
        before = self.masters[index].clone()
        self.bring_down(index, raw)
        if not torch.equal(before, self.masters[index]):
            self.looks[index] = LOOKS
        elif self.looks[index] == 1:
            del self.looks[index]
        else:
            self.looks[index] -= 1

    def bound(self, storage: Storage) -> torch.Tensor | None:
        """The device buffer that `storage` is bound to, or None while its tensors are at the master."""
        return self.bound_now.get(storage.index)

    def foreign_change(self) -> str | None:
        """The name of a tensor that something else has replaced or moved since we bound it, or None."""
        refs = (ref for storage in self.component.storages for ref in storage.refs)
        return next((ref.name for ref in refs if ref.replaced or self._moved(ref)), None)

    def _changed(self, storage: Storage) -> str | None:
        return next((ref.name for ref in storage.refs if self._moved(ref)), None)

    def _moved(self, ref: TensorRef) -> bool:
        raw = self.bound_now.get(ref.storage)
        base = raw if raw is not None else self.masters[ref.storage]
        target = ref.target
        at_home = target.data_ptr() == base.data_ptr() + ref.offset * ref.dtype.itemsize and target.dtype == ref.dtype
        return not at_home and target.numel() > 0

    @property
    def origins(self) -> dict[str, torch.device]:
        """Where each storage came from, by its first tensor's name."""
        return {s.refs[0].held_as: self._originals[s.index] for s in self.component.storages}

    # ------------------------------------------------------------------ the end
    def abandon(self) -> None:
        """Forget the masters, and leave the tensors as they are: something else has replaced them."""
        self.masters = []
        self.bound_now.clear()
        self._homes = {}
        self._slabs = {}
        self._pinned = set()
        self.looks = {}

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
                elif storage.index in self._slabs:  # the last one out of a slab frees it
                    self.masters[storage.index] = self.masters[storage.index].clone()
                    del self._slabs[storage.index]
                self._point_at_master(storage)
        self.abandon()


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor was written in place; what was made in inference mode does not count, and reads as never."""
    try:
        return int(tensor._version)
    except RuntimeError:
        return -2
