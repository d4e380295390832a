"""Where the tensors of a few storages point. Invariant: up and down are assignments to `.data`, prepared beforehand.

A streamed unit lies at the same address in every step, so the views of it are made once; what is left to do in a step
is to hand them to the tensors, which keep their identity, and to look whether somebody wrote through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from .units import Storage, TensorRef, aligned, counts_writes

if TYPE_CHECKING:
    from .weights import Weights


version_of = attrgetter("_version")


def stretches(storages: Sequence[Storage], buffer: torch.Tensor) -> list[torch.Tensor]:
    """The stretch of `buffer` (uint8) that each storage takes, every one on an aligned start."""
    found, start = [], 0
    for storage in storages:
        found.append(buffer[start : start + storage.nbytes])
        start += aligned(storage.nbytes)
    return found


class Binding:
    """The tensors that view `storages`, with their views of one device buffer and of their masters.

    `ups` and `downs` are (what has a `data`, what to assign to it); `counted` is what counts writes to them.
    """

    __slots__ = (
        "_bound_now",
        "_raws",
        "_refs",
        "_weights",
        "bound",
        "counted",
        "downs",
        "suspects",
        "ups",
        "versions",
    )

    def __init__(self, weights: Weights, storages: Sequence[Storage], buffer: torch.Tensor) -> None:
        parts = stretches(storages, buffer)
        self._weights = weights
        self._raws = {storage.index: part for storage, part in zip(storages, parts, strict=True)}
        self._refs = [ref for storage in storages for ref in storage.refs]
        self._bound_now = weights.bound_now
        targets: list[Any] = [ref.target for ref in self._refs]
        homes = [view for storage in storages for view in weights.homes(storage)]
        views = [weights.view(self._raws[ref.storage], ref) for ref in self._refs]
        # a wrapper behind its inner tensors: it looks at them
        wrappers = [(wrapper, None) for wrapper in dict.fromkeys(w for s in storages for w in s.wrappers)]
        self.ups = [*zip(targets, views, strict=True), *wrappers]
        self.downs = [*zip(targets, homes, strict=True), *wrappers]
        # what was made in inference mode counts no writes, and running statistics are written without being counted
        self.counted = [ref.writes for ref in self._refs if counts_writes(ref.writes)]
        self.suspects = [ref for ref in self._refs if ref.keeps_statistics or ref.storage in weights.looks]
        self.versions = self.versions_now()
        self.bound = False

    def versions_now(self) -> list[int]:
        """How often each tensor was written in place so far; to point it elsewhere is no write."""
        return list(map(version_of, self.counted))

    def up(self) -> None:
        """Point the tensors at the device."""
        self.versions = self.versions_now()  # first: whatever interrupts this, `down` finds nothing to keep
        self.bound = True
        self._bound_now.update(self._raws)
        for tensor, view in self.ups:
            tensor.data = view

    def down(self) -> None:
        """Point the tensors at their masters; bytes that were written meanwhile come down first. Again does nothing."""
        if not self.bound:
            return
        if self.suspects or self.versions != self.versions_now():
            self.keep_writes()
        for tensor, home in self.downs:
            tensor.data = home
        for index in self._raws:
            self._bound_now.pop(index, None)
        self.bound = False

    def keep_writes(self) -> None:
        """Bring down what was written since `versions` were looked at."""
        before = dict(zip(map(id, self.counted), self.versions, strict=True))
        written: dict[int, TensorRef] = {}
        for ref in self._refs:
            version = before.get(id(ref.writes))
            if ref.unseen_writes or (version is not None and ref.writes._version != version):
                written[ref.storage] = ref
        for index in written:
            self._weights.bring_down(index, self._raws[index])
        looks = self._weights.looks
        for index in {ref.storage for ref in self.suspects if ref.storage in looks} - written.keys():
            self._weights.look(index, self._raws[index])
            if index not in looks:
                self.suspects = [ref for ref in self.suspects if ref.keeps_statistics or ref.storage != index]
        self.versions = self.versions_now()
