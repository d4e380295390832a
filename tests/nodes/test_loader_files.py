"""Invariant: a wrong file is refused before a weight is read, with its field, what is allowed there and the remedy."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from balanced_offload.nodes import files


def header(path: Path, names: Iterable[str], size: int = 16) -> Path:
    """A safetensors file that is only a header and zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)
    return path


KEYS = {
    "checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
    "diffusion_model": ["double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight"],
    "vae": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "text_encoder": ["text_model.encoder.layers.0.self_attn.k_proj.weight"],
    "lora": ["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"],
    "controlnet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "embedding": ["clip_l", "clip_g"],
}


@pytest.fixture
def root(host: ModuleType, tmp_path: Path) -> Path:
    """The host's models folder, with one file of each kind in every folder."""
    import folder_paths

    folder_paths.root = tmp_path
    for folder in ("checkpoints", "diffusion_models", "text_encoders", "vae"):
        for kind, names in KEYS.items():
            header(tmp_path / folder / f"{kind}.safetensors", names)
    return tmp_path


@pytest.mark.parametrize("kind", KEYS)
def test_a_file_is_told_by_the_names_of_its_tensors(tmp_path: Path, kind: str) -> None:
    found = files.kind_of(str(header(tmp_path / "a.safetensors", KEYS[kind])))
    assert found is not None and found.name == kind


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["model.diffusion_model.joint_blocks.0.x.weight"], "diffusion_model"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "text_encoder"),
        (["taesd_decoder.1.weight"], "vae"),
        (["unet.up_blocks.0.to_q_lora.up.weight", "unet.up_blocks.0.to_q_lora.down.weight"], "lora"),
        (["transformer.single_transformer_blocks.0.proj.lora_A.weight"], "lora"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.weight"], "controlnet"),
    ],
)
def test_other_spellings(tmp_path: Path, names: list[str], kind: str) -> None:
    found = files.kind_of(str(header(tmp_path / "a.safetensors", names)))
    assert found is not None and found.name == kind


@pytest.mark.parametrize(
    "names",
    [
        ["net.blocks.0.weight", "unknown"],
        # A model with a LoRA or two of its own inside is no LoRA, and one that is a language model is still a denoiser.
        ["a.weight", "b.weight", "c.weight", "a.lora_A.weight"],
        ["model.layers.0.self_attn.q_proj.weight", "patch_embed.proj.weight", "final_layer.linear.weight"],
        [],
    ],
)
def test_what_cannot_be_told_is_left_to_the_host(tmp_path: Path, names: list[str]) -> None:
    path = header(tmp_path / "a.safetensors", names)
    assert files.kind_of(str(path)) is None
    for field in files.TAKES:
        files.check_kind(field, "a.safetensors", str(path))


@pytest.mark.parametrize(
    ("field", "kind", "remedy"),
    [
        ("checkpoint", "lora", "Load LoRA behind this node"),
        ("checkpoint", "vae", "choose it at 'vae'"),
        ("checkpoint", "text_encoder", "choose it at 'text_encoder'"),
        ("diffusion_model", "vae", "choose it at 'vae'"),
        ("diffusion_model", "controlnet", "Load ControlNet Model"),
        ("text_encoder", "diffusion_model", "choose it at 'diffusion_model'"),
        ("text_encoder_2", "checkpoint", "choose it at 'checkpoint'"),
        ("vae", "checkpoint", "choose it at 'checkpoint'"),
        ("vae", "embedding", "embeddings folder"),
    ],
)
def test_the_wrong_kind_names_field_file_and_remedy(tmp_path: Path, field: str, kind: str, remedy: str) -> None:
    path = header(tmp_path / "x.safetensors", KEYS[kind])
    with pytest.raises(ValueError, match=rf"^{field}: got 'x.safetensors', which is ") as caught:
        files.check_kind(field, "x.safetensors", str(path))
    assert "allowed: " in str(caught.value) and remedy in str(caught.value)


@pytest.mark.parametrize("field", list(files.TAKES))
def test_the_right_kind_passes(tmp_path: Path, field: str) -> None:
    for kind in files.TAKES[field]:
        files.check_kind(field, "x", str(header(tmp_path / f"{kind}.safetensors", KEYS[kind])))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 9) + b"not json!" + b"\0" * 8,
        struct.pack("<Q", 2) + b"[]" + b"\0" * 8,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ],
)
def test_a_broken_file_says_to_fetch_it_again(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^vae: got 'broken.safetensors'; .*download it again"):
        files.check_kind("vae", "broken.safetensors", str(path))


def test_reading_a_header_reads_no_weight(tmp_path: Path) -> None:
    path = header(tmp_path / "a.safetensors", KEYS["vae"], size=0)
    with path.open("ab") as file:
        file.truncate(10 << 30)  # sparse: reading it would take seconds and 10 GiB
    assert files.kind_of(str(path)).name == "vae"


def test_a_file_that_changed_is_told_anew(tmp_path: Path) -> None:
    path = header(tmp_path / "a.safetensors", KEYS["vae"])
    assert files.kind_of(str(path)).name == "vae"
    header(path, KEYS["lora"])
    assert files.kind_of(str(path)).name == "lora"


# ---------------------------------------------------------------------- lists
def test_pickled_files_are_not_listed(root: Path) -> None:
    for name in ("old.ckpt", "old.pt", "old.bin", "old.pth", "model.gguf"):
        (root / "checkpoints" / name).write_bytes(b"x")
    header(root / "checkpoints" / "sub" / "NEW.SFT", KEYS["checkpoint"])
    listed = files.choices("checkpoints")
    assert listed[0] == "none" and "sub/NEW.SFT" in listed
    assert all(name.lower().endswith((".safetensors", ".sft")) for name in listed[1:])


@pytest.mark.parametrize("name", ["old.ckpt", "not/there.PT", "a.bin"])
def test_a_pickled_file_is_refused_with_the_remedy(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"can run code.*convert it to .safetensors"):
        files.find("checkpoint", name, "checkpoints")


def test_a_missing_file_lists_near_ones(root: Path) -> None:
    header(root / "checkpoints" / "xl" / "Juggernaut_XL_v9.safetensors", KEYS["checkpoint"])
    with pytest.raises(ValueError, match=r"got 'juggernautXL_v9[.]safetensors', which is not there") as caught:
        files.find("checkpoint", "juggernautXL_v9.safetensors", "checkpoints")
    assert "near it: xl/Juggernaut_XL_v9.safetensors" in str(caught.value)


def test_an_empty_folder_says_where_to_put_a_file(host: ModuleType, tmp_path: Path) -> None:
    import folder_paths

    folder_paths.root = tmp_path
    with pytest.raises(ValueError, match=r"'vae' folders, which hold no .safetensors file"):
        files.find("vae", "a.safetensors", "vae")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..\\x.safetensors", "checkpoints/../x"])
def test_only_what_the_host_lists_is_opened(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header(root / "secret.safetensors", KEYS["vae"])
    opened: list[Any] = []
    monkeypatch.setattr(files, "tensor_names", lambda path: opened.append(path))
    with pytest.raises(ValueError, match="is not there"):
        files.find("vae", name, "vae")
    assert opened == []


def test_a_folder_that_the_host_does_not_know_is_empty(root: Path) -> None:
    assert files.choices("no_such_folder") == ["none"]
    assert "folder_paths" in sys.modules
