"""List entries by class, component name and alias, in any case; entries that match nothing name what is near."""

import pytest

from balanced_offload.offload.names import match
from balanced_offload.offload.policy import ComponentInfo, Role


def component(name: str, class_name: str, role: Role) -> ComponentInfo:
    return ComponentInfo(name, class_name, role, 1)


SDXL = (
    component("text_encoder", "CLIPTextModel", "text_encoder"),
    component("text_encoder_2", "CLIPTextModelWithProjection", "text_encoder"),
    component("unet", "UNet2DConditionModel", "denoiser"),
    component("controlnet", "ControlNetModel", "controlnet"),
    component("vae", "AutoencoderKL", "vae"),
)
FLUX = (
    component("text_encoder", "CLIPTextModel", "text_encoder"),
    component("text_encoder_2", "T5EncoderModel", "text_encoder"),
    component("transformer", "FluxTransformer2DModel", "denoiser"),
    component("vae", "AutoencoderKL", "vae"),
)
HOST = (  # components as a host other than diffusers names them
    component("clip_l", "SDClipModel", "text_encoder"),
    component("clip_g", "SDXLClipG", "text_encoder"),
    component("diffusion_model", "UNetModel", "denoiser"),
    component("first_stage_model", "AutoencodingEngine", "vae"),
)


@pytest.mark.parametrize(
    ("components", "entry", "expected"),
    [
        (SDXL, "CLIPTextModel", {"text_encoder"}),  # the whole class name, not its beginning
        (SDXL, "cliptextmodelwithprojection", {"text_encoder_2"}),
        (SDXL, "UNet2DConditionModel", {"unet"}),
        (SDXL, "text_encoder", {"text_encoder"}),  # a component's own name is that component ...
        (SDXL, "TEXT_ENCODER", {"text_encoder"}),
        (SDXL, "text-encoder", {"text_encoder", "text_encoder_2"}),  # ... the alias is the role
        (SDXL, "clip-l", {"text_encoder"}),
        (SDXL, "CLIP-L", {"text_encoder"}),
        (SDXL, "clip_l", {"text_encoder"}),
        (SDXL, "clip-g", {"text_encoder_2"}),
        (SDXL, "unet", {"unet"}),
        (SDXL, "denoiser", {"unet"}),
        (SDXL, "vae", {"vae"}),
        (SDXL, "controlnet", {"controlnet"}),
        (SDXL, "t5", set()),
        (FLUX, "t5", {"text_encoder_2"}),
        (FLUX, "unet", {"transformer"}),
        (FLUX, "transformer", {"transformer"}),
        (FLUX, "clip-g", set()),
        (HOST, "clip-l", {"clip_l"}),
        (HOST, "clip-g", {"clip_g"}),
        (HOST, "vae", {"first_stage_model"}),
        (HOST, "text_encoder", {"clip_l", "clip_g"}),  # no component has that name, so it is the alias
    ],
)
def test_one_entry(components: tuple[ComponentInfo, ...], entry: str, expected: set[str]) -> None:
    found = match([entry], components)
    assert found.names == expected
    assert bool(found.unmatched) == (not expected)


@pytest.mark.parametrize(
    "class_name",
    ["AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderTiny", "AsymmetricAutoencoderKL",
     "AutoencoderDC", "WanVAE", "VAEDecoder"],
)  # fmt: skip
def test_vae_is_every_vae_class(class_name: str) -> None:
    assert match(["vae"], [component("decoder", class_name, "other")]).names == {"decoder"}


@pytest.mark.parametrize("class_name", ["UNet2DConditionModel", "WanVACETransformer3DModel", "CLIPTextModel"])
def test_vae_is_no_other_class(class_name: str) -> None:
    assert match(["vae"], [component("x", class_name, "other")]).names == frozenset()


@pytest.mark.parametrize("class_name", ["T5EncoderModel", "UMT5EncoderModel", "T5ForConditionalGeneration"])
def test_t5_is_t5_and_umt5(class_name: str) -> None:
    assert match(["t5"], [component("te", class_name, "text_encoder")]).names == {"te"}


def test_two_denoisers_are_both_the_denoiser() -> None:
    pair = (component("transformer", "WanTransformer3DModel", "denoiser"),
            component("transformer_2", "WanTransformer3DModel", "denoiser"))  # fmt: skip
    assert match(["denoiser"], pair).names == {"transformer", "transformer_2"}
    assert match(["transformer_2"], pair).names == {"transformer_2"}


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("CLIPTextModl", "CLIPTextModel"),
        ("tex_encoder", "text_encoder"),
        ("autoencoderk", "AutoencoderKL"),
        ("clipg", "clip-g"),
        ("UNet2DCondition", "UNet2DConditionModel"),
    ],
)
def test_near_names_are_written_as_their_owner_writes_them(entry: str, near: str) -> None:
    ((given, names),) = match([entry], SDXL).unmatched
    assert given == entry
    assert near in names and len(names) <= 3


def test_nothing_near_gives_no_names() -> None:
    assert match(["zzzzqqqq"], SDXL).unmatched == (("zzzzqqqq", ()),)


def test_several_entries_add_up_and_only_the_wrong_one_is_named() -> None:
    found = match(["clip-l", "nonsense", "vae"], SDXL)
    assert found.names == {"text_encoder", "vae"}
    assert [entry for entry, _ in found.unmatched] == ["nonsense"]
