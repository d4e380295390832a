"""The models of a pipeline as components. Invariant: every weight belongs to one component, whoever names it.

A pipeline lists its models under names; the same object under two names is one component, and a model that is part of
another one is left to that one. The order is `model_cpu_offload_seq`, then the pipeline's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..policy import Role
from ..subclasses import addresses
from ..units import ComponentError

# Methods that pipelines call beside `forward`, and that use weights without going through it. `generate` is left out on
# purpose: it goes through `forward` once per token, and each of those calls streams by itself.
ENTRIES = (
    "forward",
    "encode",
    "decode",
    "get_text_features",
    "get_image_features",
    "get_audio_features",
    "encode_image",
    "encode_text",
)

_DENOISERS = ("unet", "transformer", "prior", "dit", "denoiser")
_DENOISER_CLASSES = ("UNet", "Transformer2D", "Transformer3D", "PriorTransformer", "DiT")
_VAES = ("vae", "vqgan", "vqvae", "movq")
_VAE_CLASSES = ("Autoencoder", "AsymmetricAutoencoder", "VQModel", "ConsistencyDecoder")
_TEXT_ENCODERS = ("text_encoder", "text_model", "llm", "language_model")


class Part(NamedTuple):
    """One component to be: its name in the pipeline, the module, and how the session shall take it."""

    name: str
    module: nn.Module
    role: Role
    entries: tuple[str, ...]


def role_of(name: str, module: nn.Module) -> Role:
    """What a model does in a run, by the name that the pipeline gives it and by its class."""
    key, kind = name.casefold(), type(module).__name__
    if "controlnet" in key or "ControlNet" in kind:
        return "controlnet"
    if any(word in key for word in _VAES) or kind.startswith(_VAE_CLASSES):
        return "vae"
    if any(word in key for word in _TEXT_ENCODERS):
        return "text_encoder"
    words = key.split("_")
    if any(key.startswith(word) or word in words[-2:] for word in _DENOISERS) and "encoder" not in words:
        return "denoiser"
    return "denoiser" if any(word in kind for word in _DENOISER_CLASSES) else "other"


def entries_of(role: Role, module: nn.Module) -> tuple[str, ...]:
    """The methods of `module` through which a pipeline calls it."""
    names = ENTRIES[:1] if role in ("denoiser", "controlnet") else ENTRIES
    return tuple(name for name in names if callable(getattr(module, name, None)))


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """Name -> module for every model of the pipeline, optional ones and lists of models too."""
    found: dict[str, nn.Module] = {}
    for name, entry in pipe.components.items():
        if isinstance(entry, nn.Module):
            found[name] = entry
        elif isinstance(entry, (list, tuple)):
            found |= {f"{name}.{i}": item for i, item in enumerate(entry) if isinstance(item, nn.Module)}
        elif isinstance(entry, Mapping):
            found |= {f"{name}.{key}": item for key, item in entry.items() if isinstance(item, nn.Module)}
    return found


def parts_of(pipe: Any) -> list[Part]:
    """The components of the pipeline, in its order of use as far as it says.

    Raises:
        ComponentError: two models share some weights, and neither is a part of the other.
    """
    modules = modules_of(pipe)
    sequence = [name for name in (getattr(pipe, "model_cpu_offload_seq", None) or "").split("->") if name in modules]
    inner = {id(child) for module in modules.values() for child in module.modules() if child is not module}
    owner: dict[int, str] = {}
    taken: set[int] = set()
    parts: list[Part] = []
    for name in dict.fromkeys([*sequence, *modules]):
        module = modules[name]
        pointers = {address for tensor in tensors_of(module) if has_data(tensor) for address in addresses(tensor)}
        empty = next(tensors_of(module), None) is None
        if id(module) in taken or id(module) in inner or empty:
            continue
        for pointer in pointers:
            if owner.setdefault(pointer, name) != name:
                raise ComponentError(
                    f"components '{owner[pointer]}' and '{name}' share weights, and neither is a part of the other, "
                    "so they cannot be placed apart. Give each its own copy (copy.deepcopy), or offload one of them."
                )
        taken.add(id(module))
        role = role_of(name, module)
        parts.append(Part(name, module, role, entries_of(role, module)))
    return parts


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer below `module`, ties as often as they are named."""
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            yield from (tensor for tensor in table.values() if tensor is not None)


def has_data(tensor: torch.Tensor) -> bool:
    """Whether the tensor has memory that can be asked for: not meta, strided, not empty."""
    return not tensor.is_meta and tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > 0
