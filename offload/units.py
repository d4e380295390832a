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

from .subclasses import Anatomy, OwnMemory, Part, Target, Unsupported, Wrapper

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
    """Plain memory of one tensor object of the model (a Parameter or a buffer) as a view of its storage.

    Mostly that is the tensor itself. A wrapper around quantized data has one of these for each inner tensor.
    """

    tensor: torch.Tensor  # what the module holds
    target: Target  # whose `.data` changes hands: the tensor, or what subclasses.py found in it
    held_as: str  # the tensor's name in the model
    name: str  # that, and where in the tensor
    storage: int  # index into Component.storages
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements from the start of the storage
    is_buffer: bool
    is_inference: bool  # made in inference mode: its views have to be, as torch goes by it
    owner: nn.Module
    wrappers: tuple[Wrapper, ...] = ()  # what it is wrapped in, from the innermost on
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)  # whose attribute the tensor is

    @property
    def writes(self) -> torch.Tensor:
        """The tensor whose `_version` counts what is written to it."""
        return self.target.writes if isinstance(self.target, OwnMemory) else self.target

    @property
    def objects(self) -> tuple[torch.Tensor, ...]:
        """The tensor objects through which its bytes may be used: the model's, and those inside it."""
        inside = () if isinstance(self.target, OwnMemory) else (self.target,)
        return tuple({id(t): t for t in (self.tensor, *(w.tensor for w in self.wrappers), *inside)}.values())

    @property
    def replaced(self) -> bool:
        """Whether the model holds another tensor in its place, or other tensors inside it."""
        if any(wrapper.replaced for wrapper in self.wrappers):
            return True
        # buffers aside: some models put new ones in their place whenever they run
        held = (module._parameters.get(name) for module, name in self.holders)
        return not self.is_buffer and any(tensor is not self.tensor for tensor in held)

    @property
    def keeps_statistics(self) -> bool:
        """Whether it holds running statistics of a norm layer, which torch writes without counting."""
        return self.is_buffer and isinstance(self.owner, _KEEPS_STATISTICS)

    @property
    def uncounted(self) -> bool:
        """Whether a forward may write it and torch would not count that: a buffer made in inference mode."""
        return self.is_buffer and self.is_inference

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
    wrappers: list[Wrapper] = field(default_factory=list)  # with bytes in it; their device goes with them
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
        """The dtype of its first floating-point tensor; of quantized ones what they say they are."""
        for storage in self.storages:
            for ref in storage.refs:
                dtype = ref.tensor.dtype if ref.wrappers else ref.dtype
                if dtype.is_floating_point:
                    return dtype
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
    shelf = _Shelf()
    anatomy = Anatomy()
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
            for part in _parts(name, full, tensor, anatomy):
                # else there is nothing to place, even where it keeps the storage of another module alive
                if part.plain.numel():
                    shelf.put(unit, full, tensor_name, tensor, part, is_buffer)
                    touched = True
        if touched:
            units.append(unit)
    if not shelf.storages:
        raise ComponentError(
            f"component '{name}' ({type(module).__name__}) has no weights: there is nothing to place. "
            "Leave it out, or load its weights first."
        )
    return Component(name, module, role, units, shelf.storages)


class _Shelf:
    """The storages found so far."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self._by_pointer: dict[int, Storage] = {}
        self._refs: dict[tuple[int, int], TensorRef] = {}  # by the model's tensor and the plain one in it

    def put(self, unit: Unit, name: str, attribute: str, tensor: torch.Tensor, part: Part, is_buffer: bool) -> None:
        """Add one part of a tensor that `unit` holds as `attribute`."""
        plain = part.plain
        raw = plain.untyped_storage()
        storage = self._by_pointer.get(raw.data_ptr())
        if storage is None:
            storage = Storage(len(self.storages), raw.nbytes(), unit.index)
            self.storages.append(storage)
            self._by_pointer[raw.data_ptr()] = storage
            unit.storages.append(storage)
        elif storage.unit != unit.index and storage not in unit.borrowed:
            unit.borrowed.append(storage)
        storage.users.add(unit.index)
        key = (id(tensor), id(part.target))
        ref = self._refs.get(key)
        if ref is None:
            ref = self._refs[key] = TensorRef(
                tensor,
                part.target,
                name,
                name + part.suffix,
                storage.index,
                plain.dtype,
                tuple(plain.shape),
                plain.stride(),
                int(plain.storage_offset()),
                is_buffer,
                plain.is_inference() or not (isinstance(part.target, OwnMemory) or counts_writes(plain)),
                unit.module,
                part.wrappers,
            )
            storage.refs.append(ref)
            storage.wrappers += [wrapper for wrapper in part.wrappers if wrapper not in storage.wrappers]
        ref.holders.append((unit.module, attribute))


def counts_writes(tensor: torch.Tensor) -> bool:
    """Whether torch counts what is written to it: not what was made in inference mode, even where it was moved outside
    of it since, and neither passes for an inference tensor now nor works as any other."""
    try:
        return int(tensor._version) >= 0
    except RuntimeError:
        return False


def _parts(component: str, name: str, tensor: torch.Tensor, anatomy: Anatomy) -> list[Part]:
    """The plain memory in `tensor`."""
    if nn.parameter.is_lazy(tensor):
        raise ComponentError(
            f"component '{component}': '{name}' has no shape yet (a lazy module). Call the model once, or load its "
            "weights, first."
        )
    try:
        parts = anatomy.parts(tensor)
    except Unsupported as reason:
        raise ComponentError(
            f"component '{component}': '{name}' is a {type(tensor).__name__} ({tensor.layout}), which cannot be "
            f"rebound byte by byte: {reason}. Leave the component out and keep it where it runs, or load it without "
            "that quantization."
        ) from reason
    if any(part.plain.is_meta for part in parts):
        raise ComponentError(
            f"component '{component}': '{name}' is on the meta device, so its weights were never loaded "
            "(or another offloader took them). Load the model with its weights first."
        )
    return parts


def storages_by_unit(component: Component) -> dict[int, list[Storage]]:
    """Unit index -> the storages it needs in order to run: its own and the borrowed ones."""
    needs: dict[int, list[Storage]] = defaultdict(list)
    for unit in component.units:
        needs[unit.index] = [*unit.storages, *unit.borrowed]
    return needs
