"""Invariant: models of real size have the published counts, bytes and ties, and cost no RAM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from balanced_offload.offload.models import (
    NAMES,
    build_denoiser,
    build_model,
    call_arguments,
    denoiser_name,
    load_spec,
    meta_denoiser,
)

# Published parameter counts. What is not written out here stands in the JSON, from the same sources.
SDXL_UNET = 2_567_463_684
SD35_LARGE_TRANSFORMER = 8_056_627_520
FLUX_TRANSFORMER = 11_901_408_320
QWEN_IMAGE_TRANSFORMER = 20_430_401_088
WAN_14B_TRANSFORMER = 14_288_491_584
T5_XXL_ENCODER = 4_762_310_656
UMT5_XXL_ENCODER = 5_680_910_336
QWEN_VL_7B = 8_292_166_656
# Bytes of the published bf16 checkpoint of SD3.5 Large in one file: transformer with its positions, and the VAE.
SD35_LARGE_FILE = 16_460_379_262


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> tuple[str, dict[str, torch.nn.Module]]:
    return request.param, build_model(request.param, torch.bfloat16)


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameter storages, each counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())


def test_names() -> None:
    assert NAMES == ("flux1-dev", "qwen-image", "sd35-large", "sdxl", "wan21-14b")


def test_parameter_counts(model: tuple[str, dict[str, torch.nn.Module]]) -> None:
    name, components = model
    published = {key: entry["parameters"] for key, entry in load_spec(name)["components"].items()}
    assert {key: sum(p.numel() for p in module.parameters()) for key, module in components.items()} == published


def test_the_counts_that_everyone_knows() -> None:
    assert load_spec("sdxl")["components"]["unet"]["parameters"] == SDXL_UNET
    flux = load_spec("flux1-dev")["components"]
    assert flux["transformer"]["parameters"] == FLUX_TRANSFORMER
    assert flux["text_encoder_2"]["parameters"] == T5_XXL_ENCODER
    sd35 = load_spec("sd35-large")["components"]
    assert sd35["transformer"]["parameters"] == SD35_LARGE_TRANSFORMER
    assert sd35["text_encoder_3"]["parameters"] == T5_XXL_ENCODER
    qwen = load_spec("qwen-image")["components"]
    assert qwen["transformer"]["parameters"] == QWEN_IMAGE_TRANSFORMER
    assert qwen["text_encoder"]["parameters"] == QWEN_VL_7B
    wan = load_spec("wan21-14b")["components"]
    assert wan["transformer"]["parameters"] == WAN_14B_TRANSFORMER
    assert wan["text_encoder"]["parameters"] == UMT5_XXL_ENCODER


def test_stored_positions_are_weights() -> None:
    """The published file of SD3.5 Large holds transformer, VAE and the table of positions; the rest is its header."""
    components = load_spec("sd35-large")["components"]
    module = build_denoiser("sd35-large")
    positions = dict(module.named_buffers())["pos_embed.pos_embed"]
    assert (positions.shape, positions.dtype, positions.is_meta) == ((1, 192 * 192, 2432), torch.bfloat16, False)
    stored = 2 * (components["transformer"]["parameters"] + positions.numel() + components["vae"]["parameters"])
    assert 0 < SD35_LARGE_FILE - stored < 1 << 20


def test_two_bytes_a_parameter_and_no_gradient(model: tuple[str, dict[str, torch.nn.Module]]) -> None:
    name, components = model
    for key, module in components.items():
        assert weight_bytes(module) == 2 * load_spec(name)["components"][key]["parameters"]
        assert {(p.dtype, p.device.type, p.requires_grad) for p in module.parameters()} == {
            (torch.bfloat16, "cpu", False)
        }
        assert not [child for child in module.modules() if child.training]


def test_ties_are_kept() -> None:
    t5 = build_model("flux1-dev")["text_encoder_2"]
    with_ties = dict(t5.named_parameters(remove_duplicate=False))
    assert with_ties["shared.weight"] is with_ties["encoder.embed_tokens.weight"]
    assert len(with_ties) == len(list(t5.parameters())) + 1


def test_computed_buffers_hold_their_values(model: tuple[str, dict[str, torch.nn.Module]]) -> None:
    name, components = model
    positions = [b for n, b in components["text_encoder"].named_buffers() if n.endswith("position_ids")]
    assert len(positions) == (1 if type(components["text_encoder"]).__name__.startswith("CLIP") else 0)
    assert all(torch.equal(found, torch.arange(77).unsqueeze(0)) for found in positions)
    if name == "wan21-14b":
        rope = components["transformer"].rope.freqs_cos
        assert torch.equal(rope[0], torch.ones_like(rope[0])) and not torch.equal(rope[1], rope[0])
    assert not [n for module in components.values() for n, b in module.named_buffers() if b.is_meta]


def test_fp32_has_twice_the_bytes() -> None:
    published = load_spec("sdxl")["components"]["unet"]["parameters"]
    assert weight_bytes(build_model("sdxl", torch.float32)["unet"]) == 4 * published


def test_an_unknown_name_is_refused_with_a_near_one() -> None:
    with pytest.raises(
        ValueError, match=r"'flux-dev' is not known, allowed: flux1-dev, .*wan21-14b; did you mean 'flux1-dev'"
    ):
        build_model("flux-dev")


def test_the_call_is_the_models_own() -> None:
    assert call_arguments("sdxl")["height"] == 1024
    assert call_arguments("sdxl", tiny_sizes=True)["height"] == 64
    assert call_arguments("flux1-dev")["prompt"] == call_arguments("sdxl")["prompt"]


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_alone_is_the_models(name: str) -> None:
    """Real size, the twin and the one without memory: the same class, names and shapes as in the whole model."""
    alone, sketch, twin = build_denoiser(name), meta_denoiser(name), build_denoiser(name, torch.float32, tiny=True)
    parameters = load_spec(name)["components"][denoiser_name(name)]["parameters"]

    def shapes(module: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {key: (p.shape, p.dtype) for key, p in module.named_parameters()}

    assert sum(p.numel() for p in alone.parameters()) == parameters
    assert {p.device.type for p in alone.parameters()} == {"cpu"}
    assert shapes(alone) == shapes(sketch)
    assert {t.device.type for t in (*sketch.parameters(), *sketch.buffers())} == {"meta"}
    assert type(alone) is type(sketch) is type(twin)
    assert sum(p.numel() for p in twin.parameters()) < parameters / 300
    assert not alone.training and not sketch.training and not twin.training


def test_the_twins_denoiser_is_drawn_from_its_seed() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_denoiser("flux1-dev", torch.float32, tiny=True, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.proj_out.weight, again.proj_out.weight)
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)


def test_a_pinned_denoiser(sim: ModuleType) -> None:
    for tiny in (False, True):
        module = build_denoiser("sdxl", pinned=True, tiny=tiny)
        assert all(tensor.is_pinned() for tensor in (*module.parameters(), *module.buffers()))
        del module


MEASURE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conftest  # registers the checkout as balanced_offload
import psutil, diffusers, transformers
from balanced_offload.offload.models import build_pipeline
diffusers.FluxPipeline, diffusers.FluxTransformer2DModel, diffusers.AutoencoderKL, transformers.T5EncoderModel
before = psutil.Process().memory_info().rss
pipe = build_pipeline("flux1-dev")
grown = psutil.Process().memory_info().rss - before
parts = [pipe.text_encoder, pipe.text_encoder_2, pipe.transformer, pipe.vae]
print(json.dumps({"grown": grown, "weights": sum(p.nbytes for part in parts for p in part.parameters())}))
"""


def test_flux_costs_no_ram(root: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(root / "tests")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] == 2 * sum(entry["parameters"] for entry in load_spec("flux1-dev")["components"].values())
    assert found["weights"] > 31 * 2**30
    assert found["grown"] < 2**30


def test_pinned_and_on_a_ghost_device_it_costs_no_ram_either(sim: ModuleType) -> None:
    sim.configure(ghost=1 << 20)
    process = psutil.Process()
    before = process.memory_info().rss
    components = build_model("sdxl", torch.float16, pinned=True)
    assert {p.is_pinned() for module in components.values() for p in module.parameters()} == {True}
    expected = 2 * sum(entry["parameters"] for entry in load_spec("sdxl")["components"].values())
    for module in components.values():
        module.to("vram")
    assert sim.copy_totals()["h2d_bytes"] - buffer_bytes(components) == expected
    assert sim.memory_allocated() >= expected
    assert process.memory_info().rss - before < 2**30


def buffer_bytes(components: dict[str, torch.nn.Module]) -> int:
    return sum(buffer.nbytes for module in components.values() for buffer in module.buffers())
