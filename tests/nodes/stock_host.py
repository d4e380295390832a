"""Invariant: the loader meets a host with files in its folders, whose functions tell what they were asked for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui, comfyui_runs
from balanced_offload.offload.policy import OffloadPolicy

from .test_loader_files import KEYS, header

FILES = {
    "checkpoints/base.safetensors": KEYS["checkpoint"],
    "checkpoints/other.safetensors": KEYS["checkpoint"],
    "diffusion_models/flux.safetensors": KEYS["diffusion_model"],
    "text_encoders/clip.safetensors": KEYS["text_encoder"],
    "text_encoders/t5.safetensors": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "text_encoders/g.safetensors": KEYS["text_encoder"],
    "vae/vae.safetensors": KEYS["vae"],
    "vae_approx/taesd_encoder.safetensors": ["1.weight"],
    "vae_approx/taesd_decoder.safetensors": ["1.weight"],
    "vae_approx/taesd3_encoder.pth": [],
    "vae_approx/taesd3_decoder.pth": [],
}
SEPARATE = {
    "diffusion_model": "flux.safetensors",
    "text_encoder": "clip.safetensors",
    "text_encoder_2": "t5.safetensors",
    "clip_type": "flux",
    "vae": "vae.safetensors",
}


class Patcher:
    """A MODEL: clones remember where they come from, as the host's do."""

    def __init__(self, what: str, parent: Patcher | None = None) -> None:
        self.what, self.model, self.parent = what, f"module of {what}", parent

    def clone(self) -> Patcher:
        return Patcher(self.what, self)


class Wrapper:
    """A CLIP or a VAE."""

    def __init__(self, what: str, inner: str) -> None:
        self.what, self.patcher = what, Patcher(what)
        setattr(self, inner, what)

    def clone(self) -> Wrapper:
        made = Wrapper(self.what, next(name for name in vars(self) if name.endswith("_model")))
        made.patcher = self.patcher
        return made


class Sd(ModuleType):
    """`comfy.sd`: notes every call, and gives objects that say what they were made of."""

    class CLIPType:
        STABLE_DIFFUSION, FLUX, SD3 = "sd", "flux", "sd3"

    def __init__(self) -> None:
        super().__init__("comfy.sd")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.has_vae = True

    def load_checkpoint_guess_config(
        self,
        ckpt_path: str,
        output_vae: bool = True,
        output_clip: bool = True,
        embedding_directory: Any = None,
        disable_dynamic: bool = False,
    ) -> tuple[Any, ...]:
        self.calls.append(
            (
                "checkpoint",
                {"path": Path(ckpt_path).name, "vae": output_vae, "clip": output_clip, "static": disable_dynamic},
            )
        )
        name = Path(ckpt_path).name
        return (
            Patcher(name),
            Wrapper(name, "cond_stage_model") if output_clip else None,
            Wrapper(name, "first_stage_model") if output_vae and self.has_vae else None,
            None,
        )

    def load_diffusion_model(self, unet_path: str, model_options: Any = None, disable_dynamic: bool = False) -> Any:
        name = Path(unet_path).name
        made_of = {"path": name, "options": model_options, "static": disable_dynamic}
        self.calls.append(("diffusion_model", made_of))
        return Patcher(name)

    def load_clip(
        self, ckpt_paths: list[str], embedding_directory: Any = None, clip_type: Any = None, model_options: Any = None
    ) -> Any:
        names = [Path(path).name for path in ckpt_paths]
        self.calls.append(("clip", {"paths": names, "type": clip_type}))
        return Wrapper("+".join(names), "cond_stage_model")

    def names(self) -> list[str]:
        made = [name for name, _ in self.calls]
        self.calls.clear()
        return made


@pytest.fixture
def sd(host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sd]:
    """A host with FILES in its folders."""
    import folder_paths

    import nodes

    folder_paths.root = tmp_path
    for name, keys in FILES.items():
        header(tmp_path / name, keys)
    made = Sd()
    comfy = ModuleType("comfy")
    comfy.sd = made  # type: ignore[attr-defined]
    patchers = ModuleType("comfy.model_patcher")
    patchers.ModelPatcher = Patcher  # type: ignore[attr-defined]
    comfy.model_patcher = patchers  # type: ignore[attr-defined]
    for module in (comfy, made, patchers):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def load_vae(name: str) -> Any:
        made.calls.append(("vae", {"name": name}))
        return Wrapper(name, "first_stage_model")

    nodes.VAELoader.made = staticmethod(load_vae)
    notes: list[tuple[str, str]] = []
    runs = SimpleNamespace(
        notes=notes,
        idle=[],
        on_idle=lambda call: runs.idle.append(call),
        touch=lambda world, policy=None: None,
        note=lambda kind, text: notes.append((kind, text)),
    )
    monkeypatch.setattr(comfyui_runs, "runs", lambda: runs)
    made.runs = runs  # type: ignore[attr-defined]

    def apply_policy(policy: OffloadPolicy, obj: Any) -> comfyui.Applied:
        out = obj.clone()
        if isinstance(out, Wrapper):
            out.patcher = out.patcher.clone()
        return comfyui.Applied(out, "static", f"mode {policy.mode.value}")

    monkeypatch.setattr(comfyui, "apply_policy", apply_policy)
    yield made
    gc.collect()
    sys.modules["balanced_offload.nodes.stock"].drop_idle()


@pytest.fixture
def loader(sd: Sd, nodes: dict[str, Any]) -> Any:
    return nodes["ModelLoaderWithOffload"]


@pytest.fixture
def stock(loader: Any) -> ModuleType:
    return sys.modules["balanced_offload.nodes.stock"]
