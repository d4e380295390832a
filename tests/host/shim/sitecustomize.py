"""Invariant: on a CPU build of torch, torchvision and torchaudio import without compiled parts; elsewhere nothing.

What package registries offer of both is built for CUDA: their libraries cannot be opened beside a CPU torch, and then
`import torchvision` ends in "operator torchvision::nms does not exist", `import torchaudio` in an OSError. A ComfyUI
host imports both and needs none of the compiled operators on a CPU. So the two schemas are declared, and a library that
cannot be opened counts as one that is not there. Calling a compiled operator still raises the library's own message.

Python imports this module by itself from a folder on PYTHONPATH; in a running process, call `install()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# As torchvision's own C++ declares them.
SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept: list[Any] = []  # a torch.library.Library takes its schemas back when it is collected


def _torch_is_for_cpu() -> bool:
    import torch

    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


def _before_meta_registrations(module: ModuleType) -> None:
    """torchvision registers shape functions for operators of its library: declare them if that did not open."""
    import torch
    from torchvision import extension

    if extension._has_ops():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
    _kept.append(library)


def _after_audio_utils(module: ModuleType) -> None:
    """torchaudio goes without its extension if the file is absent; the same for one that cannot be opened."""
    load = module._load_lib

    def load_or_absent(name: str) -> bool:
        try:
            return bool(load(name))
        except OSError:
            return False

    module._load_lib = load_or_absent  # type: ignore[attr-defined]


BEFORE: dict[str, Callable[[ModuleType], None]] = {"torchvision._meta_registrations": _before_meta_registrations}
AFTER: dict[str, Callable[[ModuleType], None]] = {"torchaudio._extension.utils": _after_audio_utils}


class _Around(Loader):
    """The module's own loader, with one of the functions above before or after it."""

    def __init__(self, loader: Loader, name: str) -> None:
        self.loader, self.name = loader, name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        for_cpu = _torch_is_for_cpu()
        if for_cpu and self.name in BEFORE:
            BEFORE[self.name](module)
        self.loader.exec_module(module)
        if for_cpu and self.name in AFTER:
            AFTER[self.name](module)

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.loader, name)


class Finder(MetaPathFinder):
    """Looks only at the two modules; torch is imported by them anyway."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in BEFORE and fullname not in AFTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Around(spec.loader, fullname)
        return spec


def install() -> None:
    """Once per process; a second call changes nothing."""
    if not any(type(finder).__name__ == Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


if __name__ == "sitecustomize":
    install()
