"""A model cut into pieces. Invariant: every weight storage belongs to exactly one unit, so a tie is counted once.

A *storage* is one block of weight memory; tied tensors are several views of one storage. A *unit* is a module
that owns tensors directly, with the storages that no earlier unit owns. A *component* is one model of a run
(denoiser, text encoder, VAE) as its units in definition order; the order of execution is learned by the engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

# torch's fused encoder layer looks for hooks below it, and computes otherwise where it finds one: other bits.
HOOKS_CHANGE_RESULTS: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer,)

_KEEPS_STATISTICS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase,)

# Slots and resident buffers start every storage on this boundary, as the device allocators do, so that a kernel
# sees the same alignment wherever the weight lies: some kernels choose their code path, and so their bits, by it.
ALIGNMENT = 512


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the allocator's granularity."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class ComponentError(ValueError):
    """A model that cannot be offloaded, with the reason and the remedy."""


@dataclass(eq=False)
class TensorRef:
    """One tensor object of the model (a Parameter or a buffer) as a view of its storage."""

    tensor: torch.Tensor
    name: str
    storage: int  # index into Component.storages
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements from the start of the storage
    is_buffer: bool
    owner: nn.Module

    @property
    def keeps_statistics(self) -> bool:
        """Whether it holds running statistics of a norm layer, which torch writes without counting."""
        return self.is_buffer and isinstance(self.owner, _KEEPS_STATISTICS)

    @property
    def unseen_writes(self) -> bool:
        """Whether torch writes it without counting now: the norm layer trains."""
        return self.keeps_statistics and self.owner.training


@dataclass(eq=False)
class Storage:
    """One block of weight memory and the tensors that view it."""

    index: int
    nbytes: int
    unit: int
    refs: list[TensorRef] = field(default_factory=list)
    users: set[int] = field(default_factory=set)  # units whose module holds a tensor of it; more than one = tied


@dataclass(eq=False)
class Unit:
    """A module that owns tensors directly, and the storages it brings."""

    index: int
    name: str
    module: nn.Module
    storages: list[Storage] = field(default_factory=list)
    borrowed: list[Storage] = field(default_factory=list)  # tied storages that an earlier unit owns
    is_leaf: bool = True
    hookable: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the storages it owns."""
        return sum(s.nbytes for s in self.storages)

    @property
    def slot_bytes(self) -> int:
        """Device bytes it takes: each storage aligned."""
        return sum(aligned(s.nbytes) for s in self.storages)

    @property
    def tied(self) -> bool:
        """Whether a storage of it is used by another unit too."""
        return bool(self.borrowed) or any(len(s.users) > 1 for s in self.storages)


@dataclass(eq=False)
class Component:
    """One model of a run.

    `role` is "denoiser", "text_encoder", "vae", "controlnet" or "other"; it names the stage in the report.
    """

    name: str
    module: nn.Module
    role: str
    units: list[Unit]
    storages: list[Storage]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all its storages, ties once."""
        return sum(s.nbytes for s in self.storages)

    @property
    def device_bytes(self) -> int:
        """Device bytes when fully resident, each storage aligned."""
        return sum(u.slot_bytes for u in self.units)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of its first floating-point tensor."""
        for storage in self.storages:
            for ref in storage.refs:
                if ref.dtype.is_floating_point:
                    return ref.dtype
        return None


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, False
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, True


def build_component(name: str, module: nn.Module, role: str = "other") -> Component:
    """Cut `module` into units by storage.

    Raises:
        ComponentError: it has no weights, a tensor has no data (meta), or a tensor type that cannot be rebound.
    """
    units: list[Unit] = []
    storages: list[Storage] = []
    by_pointer: dict[int, Storage] = {}
    seen: set[int] = set()
    unhookable = {
        id(inner) for outer in module.modules() if isinstance(outer, HOOKS_CHANGE_RESULTS) for inner in outer.modules()
    }
    for path, child in module.named_modules():
        unit = Unit(
            len(units),
            path or name,
            child,
            is_leaf=next(child.children(), None) is None,
            # the root's own hooks would run outside its entry points
            hookable=child is not module and id(child) not in unhookable,
        )
        touched = False
        for tensor_name, tensor, is_buffer in _own_tensors(child):
            full = f"{path}.{tensor_name}" if path else tensor_name
            _check(name, full, tensor)
            if tensor.numel() == 0:  # nothing to place, even where it keeps the storage of another module alive
                continue
            touched = True
            raw = tensor.untyped_storage()
            storage = by_pointer.get(raw.data_ptr())
            if storage is None:
                storage = Storage(len(storages), raw.nbytes(), unit.index)
                storages.append(storage)
                by_pointer[raw.data_ptr()] = storage
                unit.storages.append(storage)
            elif storage.unit != unit.index and storage not in unit.borrowed:
                unit.borrowed.append(storage)
            storage.users.add(unit.index)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                storage.refs.append(
                    TensorRef(
                        tensor,
                        full,
                        storage.index,
                        tensor.dtype,
                        tuple(tensor.shape),
                        tensor.stride(),
                        int(tensor.storage_offset()),
                        is_buffer,
                        child,
                    )
                )
        if touched:
            units.append(unit)
    if not storages:
        raise ComponentError(
            f"component '{name}' ({type(module).__name__}) has no weights: there is nothing to place. "
            "Leave it out, or load its weights first."
        )
    return Component(name, module, role, units, storages)


def _check(component: str, name: str, tensor: torch.Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ComponentError(
            f"component '{component}': '{name}' has no shape yet (a lazy module). Call the model once, or load its "
            "weights, first."
        )
    if tensor.is_meta:
        raise ComponentError(
            f"component '{component}': '{name}' is on the meta device, so its weights were never loaded "
            "(or another offloader took them). Load the model with its weights first."
        )
    if type(tensor.data) is not torch.Tensor or tensor.layout is not torch.strided:
        raise ComponentError(
            f"component '{component}': '{name}' is a {type(tensor.data).__name__} ({tensor.layout}), which cannot be "
            "rebound byte by byte. Name the component in `never`, or load it without that quantization."
        )


def storages_by_unit(component: Component) -> dict[int, list[Storage]]:
    """Unit index -> the storages it needs in order to run: its own and the borrowed ones."""
    needs: dict[int, list[Storage]] = defaultdict(list)
    for unit in component.units:
        needs[unit.index] = [*unit.storages, *unit.borrowed]
    return needs
