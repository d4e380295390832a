"""The host's own loader nodes, as far as their lists and the VAE loader are asked for."""

from __future__ import annotations

from typing import Any

import folder_paths


class CLIPLoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = folder_paths.get_filename_list("text_encoders")
        return {"required": {"clip_name": (names,), "type": (["stable_diffusion", "sd3", "wan"],)}}


class DualCLIPLoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = folder_paths.get_filename_list("text_encoders")
        return {"required": {"clip_name1": (names,), "clip_name2": (names,), "type": (["sdxl", "sd3", "flux"],)}}


class UNETLoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = folder_paths.get_filename_list("diffusion_models")
        types = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]
        return {"required": {"unet_name": (names,), "weight_dtype": (types,)}}


class VAELoader:
    made: Any = None  # what a test wants to be given

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = folder_paths.get_filename_list("vae")
        approx = folder_paths.get_filename_list("vae_approx")
        for name in ("taesd", "taesd3"):
            if any(f.startswith(f"{name}_encoder.") for f in approx):
                names.append(name)
        return {"required": {"vae_name": ([*names, "pixel_space"],)}}

    def load_vae(self, vae_name: str) -> tuple[Any]:
        return (type(self).made(vae_name),)
