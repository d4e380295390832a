"""Guards: the demo's pipeline is small, complete, offline and honest: the prompt decides the digit that is drawn."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

from torch import nn

from balanced_offload.offload.demo import pictures, words
from balanced_offload.offload.demo.classifier import load_reader, read_digit, read_digits, view_of
from balanced_offload.offload.demo.pipeline import DEFAULTS, FOLDER, PROMPTS, load_pipeline

SDXL = {
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}


def weight_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def draw(pipe, prompts, seed):
    generators = [torch.Generator().manual_seed(1000 * seed + index) for index in range(len(prompts))]
    return list(pipe(prompts, generator=generators, output_type="pt", **DEFAULTS).images)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def ten(pipe):
    return draw(pipe, PROMPTS, seed=0)


def test_files_are_small_and_hold_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files) < 12_000_000
    weights = {path.relative_to(FOLDER).parts[0] for path in files if path.suffix == ".safetensors"}
    assert weights == {"unet", "vae", "text_encoder", "text_encoder_2", "classifier.safetensors"}


def test_component_set_is_the_one_of_sdxl(pipe):
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert {name: type(getattr(pipe, name)).__name__ for name in SDXL} == SDXL
    assert hasattr(pipe.scheduler, "step")
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.vae_scale_factor == 4
    assert not pipe.vae.config.force_upcast
    assert pipe.watermark is None
    index = json.loads((FOLDER / "model_index.json").read_text(encoding="utf-8"))
    assert index["force_zeros_for_empty_prompt"] is True


def test_the_unet_dominates(pipe):
    sizes = {name: weight_bytes(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    total = sum(sizes.values())
    assert 10 * 2**20 <= total <= 20 * 2**20
    assert 0.55 <= sizes["unet"] / total <= 0.65
    assert all(0.08 <= size / total <= 0.16 for name, size in sizes.items() if name != "unet")
    leaves = [m for m in pipe.unet.modules() if not list(m.children()) and list(m.parameters())]
    assert len(leaves) >= 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_weight_has_the_dtype_asked_for(dtype):
    loaded = load_pipeline(dtype)
    found = {p.dtype for c in loaded.components.values() if isinstance(c, nn.Module) for p in c.parameters()}
    assert found == {dtype}


def test_loads_without_a_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError, match="a connection was tried"):
        socket.create_connection(("example.invalid", 80))
    assert load_pipeline().unet is not None


def test_a_missing_folder_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"demo\.train --out"):
        load_pipeline(folder=tmp_path)


def test_loading_leaves_the_libraries_settings_alone():
    from transformers.utils import logging as log

    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    load_pipeline()
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_each_prompt_draws_its_digit(ten):
    read = read_digits(ten)
    assert sum(a == b for a, b in enumerate(read)) >= 9, read


def test_pictures_are_rgb_of_64_pixels_on_paper(ten):
    for picture in ten:
        assert tuple(picture.shape) == (3, 64, 64)
        corner = picture[:, :3, :3].mean(dim=(1, 2))
        assert torch.allclose(corner, torch.tensor(pictures.PAPER), atol=0.06)


def test_the_same_seed_gives_the_same_bits(pipe, ten):
    again = draw(pipe, PROMPTS, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(ten, again, strict=True))


def test_different_prompts_differ_from_the_same_noise(pipe):
    drawn = [
        pipe(prompt, generator=torch.Generator().manual_seed(5), output_type="pt", **DEFAULTS).images[0]
        for prompt in PROMPTS[:4]
    ]
    for first in range(4):
        for second in range(first):
            assert (drawn[first] - drawn[second]).abs().max() > 0.2


def test_the_wording_does_not_matter(pipe):
    prompts = ["7", "the number seven", "a handwritten 7 on old paper", "Draw me a SEVEN, please!"]
    assert read_digits(draw(pipe, prompts, seed=3)).count(7) >= 3


@pytest.mark.parametrize("prompt", ["", "a cat", "Ünknöwn 漢字 🙂", "seven " * 100])
def test_no_prompt_crashes(pipe, prompt):
    picture = draw(pipe, [prompt], seed=1)[0]
    assert torch.isfinite(picture).all()


def test_every_digit_is_one_token_in_every_template(pipe):
    prompts, labels = words.every_prompt()
    assert len(prompts) == len(words.TEMPLATES) * 20
    tokens = [pipe.tokenizer.convert_tokens_to_ids(form + "</w>") for form in (*words.DIGITS, *"0123456789")]
    assert len(set(tokens)) == 20
    for prompt, label in zip(prompts, labels.tolist(), strict=True):
        found = [index % 10 for index, token in enumerate(tokens) if token in pipe.tokenizer(prompt).input_ids]
        assert found == [label], prompt


def test_random_prompts_depend_on_the_seed_alone():
    def make(seed):
        return words.random_prompts(50, torch.Generator().manual_seed(seed))[0]

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_ink_is_the_inverse_of_colour():
    ink = torch.linspace(0.0, 1.0, 64 * 64).view(1, 1, 64, 64)
    assert torch.allclose(pictures.ink_of(pictures.colour(ink)), ink, atol=1e-5)


def test_reader_takes_pil_and_tensors_alike(ten):
    from PIL import Image

    for picture in ten[:3]:
        bytes_ = (picture * 255).round().byte().permute(1, 2, 0).contiguous()
        assert read_digit(Image.fromarray(bytes_.numpy())) == read_digit(picture)


def test_reader_refuses_another_shape():
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        read_digit(torch.zeros(1, 64, 64))
    assert read_digits([]) == []


def test_reader_reads_held_out_digits():
    pytest.importorskip("sklearn")
    grey, labels = pictures.load_digits()
    _, test = pictures.split(len(grey), 297, seed=0)
    with torch.inference_mode():
        logits = load_reader()(view_of(pictures.colour(pictures.enlarge(grey[test]))))
    assert (logits.argmax(dim=1) == labels[test]).float().mean() >= 0.97


@pytest.mark.slow
def test_fifty_pictures(pipe):
    right = sum(
        read == asked for seed in range(1, 6) for asked, read in enumerate(read_digits(draw(pipe, PROMPTS, seed)))
    )
    assert right >= 45


@pytest.mark.slow
def test_the_training_script_runs_and_repeats(tmp_path):
    pytest.importorskip("sklearn")
    from balanced_offload.offload.demo.train import Steps, train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("one", "two"):
            train(tmp_path / name, Steps(text=2, vae=2, unet=2, classifier=2), seed=3)
    finally:
        torch.set_num_threads(threads)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert Path(tmp_path / "one" / file).read_bytes() == Path(tmp_path / "two" / file).read_bytes(), file
