"""Invariant: of a file on disk only the header is read; bytes are exact, and what is a guess is called one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from balanced_offload.offload.models import NAMES, Resolution, build_denoiser, meta_denoiser, walk
from balanced_offload.offload.models.files import walk_path

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def sparse_file(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A safetensors file with these shapes whose weights take no place on the disk."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_units_and_bytes_of_a_saved_folder(name: str, tmp_path: Path) -> None:
    module = build_denoiser(name, torch.float32, tiny=True)
    module.save_pretrained(tmp_path / "transformer")
    walked = walk_path(tmp_path / "transformer")
    stored = {key.rpartition(".")[0] or key for key in module.state_dict()}
    traced = {u.name: u.nbytes for u in walk(name, dtype=torch.float32, tiny=True).units}
    assert {u.name for u in walked.units} == stored
    assert all(u.nbytes == traced[u.name] for u in walked.units if u.name in traced)
    assert "estimated" in walked.source
    assert walk_path(tmp_path / "transformer", dtype=torch.bfloat16).weights < walked.weights
    (tmp_path / "model_index.json").write_text("{}")
    assert walk_path(tmp_path).units == walked.units


@pytest.mark.parametrize(("name", "near"), [("flux1-dev", 0.1), ("qwen-image", 0.65), ("sd35-large", 0.6)])
def test_real_sizes_are_guessed_within_reason(name: str, near: float, tmp_path: Path) -> None:
    """Without attention and with all text as long as the picture; SD3.5 runs a batch of two, which no file says."""
    file = sparse_file(tmp_path / "model.safetensors", dict(meta_denoiser(name).state_dict()))
    walked, traced = walk_path(file), walk(name)
    assert walked.weights == traced.weights
    assert walked.flops == pytest.approx(traced.flops, rel=near)
    assert walk_path(file, Resolution(512, 512)).flops < walked.flops / 3.5


def test_running_order_is_guessed_from_the_names(tmp_path: Path) -> None:
    names = [
        "proj_out",
        "single_transformer_blocks.0.a",
        "transformer_blocks.10.a",
        "transformer_blocks.9.b",
        "x_embedder",
    ]
    file = sparse_file(tmp_path / "a.safetensors", {f"{n}.weight": torch.zeros(4, 4) for n in names})
    assert [u.name for u in walk_path(file).units] == [
        "x_embedder",
        "transformer_blocks.9.b",
        "transformer_blocks.10.a",
        "single_transformer_blocks.0.a",
        "proj_out",
    ]
    assert [u.block for u in walk_path(file).units][1:4] == [
        "transformer_blocks.9",
        "transformer_blocks.10",
        "single_transformer_blocks.0",
    ]


def test_of_a_checkpoint_with_everything_the_denoiser(tmp_path: Path) -> None:
    names = ["model.diffusion_model.input_blocks.0.0", "first_stage_model.decoder.conv_in", "conditioner.embedders.0.x"]
    file = sparse_file(tmp_path / "sdxl.safetensors", {f"{n}.weight": torch.zeros(4, 4) for n in names})
    walked = walk_path(file)
    assert [u.name for u in walked.units] == ["input_blocks.0.0"]
    assert walked.notes == ("2 tensors of text encoders and the VAE are left out",)


def test_modulation_sees_one_vector_and_not_every_token(tmp_path: Path) -> None:
    shapes = {"blocks.0.img_mod.1.weight": torch.zeros(64, 8), "blocks.0.to_q.weight": torch.zeros(64, 8)}
    by_name = {u.name: u for u in walk_path(sparse_file(tmp_path / "a.safetensors", shapes)).units}
    assert by_name["blocks.0.img_mod.1"].flops == 2 * 64 * 8
    assert by_name["blocks.0.to_q"].flops == 2 * 64 * 8 * 4096


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nothing", "there is no such file"),
        (lambda p: touch(p / "a.ckpt"), "pickled"),
        (lambda p: touch(p / "a.txt"), "no format"),
        (lambda p: touch(p / "a.safetensors"), "damaged or truncated"),
        (lambda p: sparse_file(p / "a.safetensors", {}), "no weights"),
        (lambda p: cut(p / "a.safetensors"), r"damaged or truncated \(\d+ bytes, where its header says \d+\)"),
        (lambda p: header(p / "a.safetensors", b'{"a": 3}'), "damaged"),
        (lambda p: header(p / "a.safetensors", b"[]"), "damaged"),
        (lambda p: header(p / "a.safetensors", b"no json"), "damaged"),
        (lambda p: p, "no .safetensors file"),
        (lambda p: touch(p / "model_index.json").parent, "no transformer or unet"),
        (lambda p: two_models(p), "several models"),
    ],
)
def test_what_is_refused(make, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        walk_path(make(tmp_path))
    assert str(tmp_path) in str(refused.value)


def touch(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


def cut(path: Path) -> Path:
    sparse_file(path, {"x.weight": torch.zeros(2, 2)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    return path


def header(path: Path, text: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def two_models(folder: Path) -> Path:
    for name in ("a", "b"):
        sparse_file(folder / f"{name}.safetensors", {"x.weight": torch.zeros(2, 2)})
    return folder
