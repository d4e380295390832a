"""Invariant: the host is imported once per process, on the CPU, with a base folder of the tests; never with their argv.

Nothing below `tests/host` may import `comfy` before `open_host` ran.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ARGUMENTS = ("--cpu", "--use-pytorch-cross-attention", "--disable-api-nodes")
SEED, STEPS = 5, 3


def load_file(path: Path, name: str) -> ModuleType:
    """A module by its path, registered as `name`."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_host(host: Path, base: Path) -> ModuleType:
    """`comfy.model_management` of `host`, whose folders lie below `base`. A second call answers the same.

    Raises RuntimeError if this process has another host open.
    """
    if "comfy.model_management" in sys.modules:
        module = sys.modules["comfy.model_management"]
        if not Path(str(module.__file__)).is_relative_to(host):
            raise RuntimeError(f"this process has {module.__file__} open, not {host}: one host per process")
        return module
    load_file(HERE / "shim" / "sitecustomize.py", "torch_parts_shim").install()
    for folder in ("custom_nodes", "user", "input", "output", "temp", "models"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(host))
    # Once enabled, the host reads the command line when `comfy.cli_args` is imported: give it its own.
    given, sys.argv = sys.argv, ["main.py", *ARGUMENTS, "--base-directory", str(base)]
    try:
        options = importlib.import_module("comfy.options")
        options.enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = given
    helpers = load_file(HERE / "packs" / "test_nodes" / "__init__.py", "host_test_nodes")
    helpers.accept_tiny_text_encoders()
    return importlib.import_module("comfy.model_management")


def conditioning(kind: str, seed: int = 1) -> list[Any]:
    """Random conditioning of the width that the tiny model of this kind wants."""
    helpers = sys.modules["host_test_nodes"]
    return helpers.random_conditioning(kind, seed)


def latent(kind: str, seed: int = SEED) -> torch.Tensor:
    """Noise for the tiny model of this kind: 8 x 8 positions, one frame."""
    shape = {"wan": (1, 16, 1, 8, 8), "sd3": (1, 16, 8, 8), "sd15": (1, 4, 8, 8)}[kind]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load_model(models: Path, kind: str) -> Any:
    """The tiny diffusion model of this kind by the host's stock loader."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(models / "diffusion_models" / f"tiny_{kind}.safetensors"))


@torch.inference_mode()
def sample(model: Any, kind: str, start: torch.Tensor | None = None, denoise: float = 1.0, **options: Any) -> Any:
    """Euler, 3 steps, cfg 2, by the host's own sampler -> latent on the CPU. `start`: an image's latent, or none."""
    import comfy.sample

    noise = latent(kind, options.pop("seed", SEED))
    start = torch.zeros_like(noise) if start is None else start
    positive, negative = conditioning(kind, options.pop("prompt", 1)), conditioning(kind, 2)
    return comfy.sample.sample(
        model, noise, STEPS, 2.0, "euler", "normal", positive, negative, start, denoise=denoise, disable_pbar=True
    ).clone()


def under(fields: dict[str, Any], obj: Any) -> Any:
    """A MODEL, CLIP or VAE of the host under a policy of ours with these fields."""
    policy = importlib.import_module("balanced_offload.offload.policy").OffloadPolicy(**fields)
    return importlib.import_module("balanced_offload.offload.adapters.comfyui").apply_policy(policy, obj).obj


def with_lora(model: Any, models: Path, name: str = "a", strength: float = 0.8) -> Any:
    """The model with a tiny SD3's LoRA, by what the host's LoRA loader calls."""
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(models / "loras" / f"tiny_sd3_{name}.safetensors"), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def load_clip(models: Path) -> Any:
    """The tiny text encoder by the host's stock loader."""
    import comfy.sd

    path = str(models / "text_encoders" / "tiny_clip.safetensors")
    return comfy.sd.load_clip([path], clip_type=comfy.sd.CLIPType.SD3)


def load_vae(models: Path) -> Any:
    """TAESD for SD3's latents by the host's stock loader."""
    return sys.modules.get("nodes", importlib.import_module("nodes")).VAELoader().load_vae("taesd3")[0]


def close_models() -> None:
    """Everything off the device, as after `POST /free`, and our session closed."""
    ours = sys.modules.get("balanced_offload.offload.adapters.comfyui_device")
    if ours is not None:
        ours.close_device_session()
    management = sys.modules["comfy.model_management"]
    management.unload_all_models()
    management.soft_empty_cache()
