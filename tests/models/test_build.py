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

from balanced_offload.offload.models import NAMES, build_model, call_arguments, load_spec

# Published parameter counts. What is not written out here stands in the JSON, from the same sources.
SDXL_UNET = 2_567_463_684
FLUX_TRANSFORMER = 11_901_408_320
T5_XXL_ENCODER = 4_762_310_656


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> tuple[str, dict[str, torch.nn.Module]]:
    return request.param, build_model(request.param, torch.bfloat16)


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameter storages, each counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())


def test_names() -> None:
    assert NAMES == ("flux1-dev", "sdxl")


def test_parameter_counts(model: tuple[str, dict[str, torch.nn.Module]]) -> None:
    name, components = model
    published = {key: entry["parameters"] for key, entry in load_spec(name)["components"].items()}
    assert {key: sum(p.numel() for p in module.parameters()) for key, module in components.items()} == published


def test_the_counts_that_everyone_knows() -> None:
    assert load_spec("sdxl")["components"]["unet"]["parameters"] == SDXL_UNET
    flux = load_spec("flux1-dev")["components"]
    assert flux["transformer"]["parameters"] == FLUX_TRANSFORMER
    assert flux["text_encoder_2"]["parameters"] == T5_XXL_ENCODER


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
    _, components = model
    positions = [b for n, b in components["text_encoder"].named_buffers() if n.endswith("position_ids")]
    assert len(positions) == 1
    assert torch.equal(positions[0], torch.arange(77).unsqueeze(0))
    assert not [n for module in components.values() for n, b in module.named_buffers() if b.is_meta]


def test_fp32_has_twice_the_bytes() -> None:
    published = load_spec("sdxl")["components"]["unet"]["parameters"]
    assert weight_bytes(build_model("sdxl", torch.float32)["unet"]) == 4 * published


def test_an_unknown_name_is_refused_with_a_near_one() -> None:
    with pytest.raises(
        ValueError, match=r"'flux-dev' is not known, allowed: flux1-dev, sdxl; did you mean 'flux1-dev'"
    ):
        build_model("flux-dev")


def test_the_call_is_the_models_own() -> None:
    assert call_arguments("sdxl")["height"] == 1024
    assert call_arguments("sdxl", tiny_sizes=True)["height"] == 64
    assert call_arguments("flux1-dev")["prompt"] == call_arguments("sdxl")["prompt"]


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
