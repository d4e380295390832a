"""Invariant: a pipeline that loads is whole and draws what was saved; anything else is one error with a remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from balanced_offload.offload import OffloadPolicy
from balanced_offload.offload.adapters.diffusers import ModelFileError, load_pipeline, offload

from .conftest import EXAMPLES, build_sd, device_bytes

CASE = EXAMPLES["sd"]
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that diffusers wrote."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    build_sd().save_pretrained(folder, safe_serialization=True)
    assert (folder / UNET).exists() and (folder / TEXT).exists()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-sd"))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refused(source: Path | str, **kw: Any) -> str:
    """The error's text, which names the path, and has no more than one problem and one remedy to it."""
    before = torch.get_rng_state()
    with pytest.raises(ModelFileError) as caught:
        load_pipeline(source, **kw)
    assert isinstance(caught.value, ValueError)
    text = str(caught.value)
    assert text.startswith(str(caught.value.path)) and text.endswith(".") and len(text) < 700
    assert torch.equal(before, torch.get_rng_state())
    return text


# ---------------------------------------------------------------------- what loads
def test_a_folder(saved: Path) -> None:
    pipe = quiet(load_pipeline(saved))
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert not any(part.training for part in pipe.components.values() if isinstance(part, nn.Module))
    assert torch.equal(CASE.draw(pipe), CASE.expected)
    assert torch.equal(CASE.draw(quiet(load_pipeline(str(saved)))), CASE.expected)


def test_a_folder_under_a_policy(sim: ModuleType, saved: Path) -> None:
    with offload(quiet(load_pipeline(saved)), OffloadPolicy(mode="sequential"), device="vram") as handle:
        assert torch.equal(CASE.draw(handle), CASE.expected)
    assert device_bytes(sim) == 0


def test_a_dtype(saved: Path) -> None:
    pipe = load_pipeline(saved, torch_dtype=torch.bfloat16)
    kinds = {p.dtype for part in pipe.components.values() if isinstance(part, nn.Module) for p in part.parameters()}
    assert kinds == {torch.bfloat16}


def test_another_pipeline_class(saved: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    assert type(load_pipeline(saved, pipeline_class=StableDiffusionImg2ImgPipeline)) is StableDiffusionImg2ImgPipeline


def test_a_component_of_ones_own(saved: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    mine = build_sd()
    (saved.parent / "empty").mkdir(exist_ok=True)
    pipe = load_pipeline(saved, unet=mine.unet, scheduler=EulerDiscreteScheduler())
    assert pipe.unet is mine.unet and type(pipe.scheduler) is EulerDiscreteScheduler


def test_a_variant(folder: Path) -> None:
    shutil.rmtree(folder)
    build_sd().to(torch.float16).save_pretrained(folder, safe_serialization=True, variant="fp16")
    assert sorted(f.name for f in (folder / "unet").glob("*.safetensors")) == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    pipe = load_pipeline(folder, variant="fp16", torch_dtype=torch.float16)
    wanted = build_sd().to(torch.float16).unet.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in pipe.unet.state_dict().items())
    text = refused(folder)
    assert "has weights as fp16 only" in text and "Pass `variant='fp16'`" in text
    # a model without the variant is taken as it is, as diffusers does
    shutil.rmtree(folder / "vae")
    build_sd().vae.save_pretrained(folder / "vae")
    assert load_pipeline(folder, variant="fp16").vae.dtype is torch.float32


def test_shards(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    build_sd().unet.save_pretrained(folder / "unet", max_shard_size="300KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(CASE.draw(quiet(load_pipeline(folder))), CASE.expected)
    shards[-1].unlink()
    assert f"lacks {shards[-1].name}" in refused(folder)


def test_a_single_file(folder: Path) -> None:
    parts = {k: v for k, v in load_pipeline(folder).components.items() if k != "unet"}
    file = folder.parent / "denoiser.safetensors"
    save_file(build_sd().unet.state_dict(), file)
    pipe = quiet(load_pipeline(file, config=str(folder), **parts, requires_safety_checker=False))
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert torch.equal(CASE.draw(pipe), CASE.expected)


# ---------------------------------------------------------------------- what does not
def test_a_path_that_is_not_there(saved: Path) -> None:
    text = refused(saved.parent / "tiny-ds")
    assert "no such file or folder" in text and "tiny-sd" in text
    assert "does not exist either" in refused("/nowhere/at/all")
    assert "only local files" in refused("an-org/a-model-on-the-hub")


def spoil_truncate(folder: Path) -> Path:
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: len(data) // 2])
    return folder / UNET


def spoil_header(folder: Path) -> Path:
    (folder / TEXT).write_bytes(b"\xff" * 64)
    return folder / TEXT


def spoil_empty(folder: Path) -> Path:
    (folder / UNET).write_bytes(b"")
    return folder / UNET


def spoil_no_weights(folder: Path) -> Path:
    (folder / UNET).unlink()
    return folder / "unet"


def spoil_no_folder(folder: Path) -> Path:
    shutil.rmtree(folder / "vae")
    return folder / "vae"


def spoil_no_config(folder: Path) -> Path:
    (folder / "vae" / "config.json").unlink()
    return folder / "vae"


def spoil_pickled(folder: Path) -> Path:
    torch.save(load_file(folder / TEXT), folder / "text_encoder" / "pytorch_model.bin")
    (folder / TEXT).unlink()
    return folder / "text_encoder"


def spoil_class(folder: Path) -> Path:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModle"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder / "unet"


def spoil_library(folder: Path) -> Path:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["os", "system"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder / "unet"


def spoil_index(folder: Path) -> Path:
    (folder / "model_index.json").write_text("{not json")
    return folder / "model_index.json"


def as_clip(folder: Path) -> Path:
    """The tokenizer as CLIP's, of a vocabulary and its merges: transformers makes one with two entries without them."""
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    place = folder / "tokenizer"
    (place / "tokenizer.json").unlink()
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    (place / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return place


def spoil_no_tokenizer(folder: Path) -> Path:
    shutil.rmtree(as_clip(folder))
    return folder / "tokenizer"


def spoil_no_vocabulary(folder: Path) -> Path:
    place = as_clip(folder)
    (place / "vocab.json").unlink()
    (place / "merges.txt").unlink()
    return place


def spoil_no_merges(folder: Path) -> Path:
    (as_clip(folder) / "merges.txt").write_text("")
    return folder / "tokenizer"


def spoil_no_tokenizer_config(folder: Path) -> Path:
    (as_clip(folder) / "tokenizer_config.json").unlink()
    return folder / "tokenizer"


def spoil_no_scheduler(folder: Path) -> Path:
    shutil.rmtree(folder / "scheduler")
    return folder / "scheduler"


def spoil_no_scheduler_config(folder: Path) -> Path:
    (folder / "scheduler" / "scheduler_config.json").unlink()
    return folder / "scheduler"


def spoil_other_model(folder: Path) -> Path:
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / UNET)
    return folder / "unet"


def spoil_missing_key(folder: Path) -> Path:
    weights = load_file(folder / UNET)
    del weights["conv_in.weight"]
    save_file(weights, folder / UNET, metadata={"format": "pt"})
    return folder / "unet"


def spoil_missing_text_key(folder: Path) -> Path:
    weights = load_file(folder / TEXT)
    key = next(k for k in weights if k.endswith("token_embedding.weight"))
    del weights[key]
    save_file(weights, folder / TEXT, metadata={"format": "pt"})
    return folder / "text_encoder"


def spoil_shape(folder: Path) -> Path:
    weights = load_file(folder / UNET)
    weights["conv_in.weight"] = weights["conv_in.weight"][:8].clone()
    save_file(weights, folder / UNET, metadata={"format": "pt"})
    return folder / "unet"


def spoil_text_shape(folder: Path) -> Path:
    weights = load_file(folder / TEXT)
    key = next(k for k in weights if k.endswith("token_embedding.weight"))
    weights[key] = weights[key][:8].clone()
    save_file(weights, folder / TEXT, metadata={"format": "pt"})
    return folder / "text_encoder"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_truncate, ["damaged or truncated", "Fetch the file again"]),
        (spoil_header, ["damaged or truncated"]),
        (spoil_empty, ["damaged or truncated"]),
        (spoil_no_weights, ["component 'unet' has no weights", "safetensors"]),
        (spoil_no_folder, ["component 'vae' is missing"]),
        (spoil_no_config, ["component 'vae' has no config.json"]),
        (spoil_pickled, ["only pickled weights (pytorch_model.bin)", "safe_serialization=True"]),
        (spoil_class, ["diffusers.UNet2DConditionModle", "near it are UNet2DConditionModel"]),
        (spoil_library, ["os.system", "not one that diffusers or transformers has"]),
        (spoil_index, ["not readable as JSON"]),
        (spoil_no_tokenizer, ["component 'tokenizer' is missing"]),
        (spoil_no_vocabulary, ["component 'tokenizer' lacks vocab.json, merges.txt (or tokenizer.json)"]),
        (spoil_no_merges, ["component 'tokenizer' lacks merges.txt (or tokenizer.json)"]),
        (spoil_no_tokenizer_config, ["component 'tokenizer' lacks tokenizer_config.json"]),
        (spoil_no_scheduler, ["component 'scheduler' is missing"]),
        (spoil_no_scheduler_config, ["component 'scheduler' lacks scheduler_config.json"]),
        (spoil_other_model, ["do not fit UNet2DConditionModel", "another model than config.json says"]),
        (spoil_missing_key, ["do not fit UNet2DConditionModel", "conv_in.weight"]),
        (spoil_missing_text_key, ["do not fit CLIPTextModel", "token_embedding.weight"]),
        (spoil_shape, ["do not fit UNet2DConditionModel", "conv_in.weight"]),
        (spoil_text_shape, ["do not fit CLIPTextModel"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_spoilt_folder(sim: ModuleType, folder: Path, spoil: Callable[[Path], Path], words: list[str]) -> None:
    place = spoil(folder)
    text = refused(folder)
    assert text.startswith(f"{place}: ")
    for word in words:
        assert word in text
    assert device_bytes(sim) == 0


def test_a_tokenizer_of_vocabulary_and_merges(folder: Path) -> None:
    place = as_clip(folder)
    assert len(load_pipeline(folder).tokenizer) == 54
    (place / "vocab.json").unlink()
    assert "lacks vocab.json" in refused(folder)
    given = build_sd().tokenizer
    assert load_pipeline(folder, tokenizer=given).tokenizer is given


def test_a_tokenizer_of_special_tokens_alone(folder: Path) -> None:
    """Each class says which files it reads; one that reads none needs none."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "tokenizer" / "tokenizer.json").unlink()
    for kind, lacking in {
        "T5TokenizerFast": "lacks spiece.model (or tokenizer.json)",
        "Qwen2Tokenizer": "lacks vocab.json, merges.txt (or tokenizer.json)",
        "CLIPProcessor": "lacks tokenizer.json (or the vocabulary in another form)",
    }.items():
        index["tokenizer"] = ["transformers", kind]
        (folder / "model_index.json").write_text(json.dumps(index))
        assert lacking in refused(folder)
    index["tokenizer"] = ["transformers", "ByT5Tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(folder).tokenizer("a").input_ids == [100, 1]


@pytest.mark.parametrize("deep", ["{", "[" * 100_000, "\xff"], ids=["half", "deep", "latin"])
@pytest.mark.parametrize("name", ["model_index.json", "unet/diffusion_pytorch_model.safetensors.index.json"])
def test_an_index_that_is_no_json(folder: Path, name: str, deep: str) -> None:
    (folder / name).write_bytes(deep.encode("latin-1"))
    text = refused(folder)
    assert text.startswith(f"{folder / name}: not readable as JSON") and "Fetch the file again" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("{}", "weight_map is not an object"),
        ('{"weight_map": []}', "weight_map is not an object"),
        ('{"weight_map": {"a": ["model.safetensors"]}}', "weight_map is not an object"),
        ('{"weight_map": {"a": 3}}', "weight_map is not an object"),
    ],
)
def test_a_shard_index_that_maps_no_weights(folder: Path, content: str, words: str) -> None:
    index = folder / "text_encoder/model.safetensors.index.json"
    index.write_text(content)
    text = refused(folder)
    assert text.startswith(f"{index}: ") and words in text


@pytest.mark.parametrize("name", [["evil", "Evil"], [], None, 3, {"a": "b"}], ids=repr)
def test_a_pipeline_class_that_is_no_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    """diffusers takes a list for a Python file of the folder, so it must not come to see one."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = name
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    save_file(build_sd().unet.state_dict(), tmp_path / "denoiser.safetensors")
    reached: list[Any] = []
    for method in ("from_pretrained", "from_single_file"):
        monkeypatch.setattr(diffusers.StableDiffusionPipeline, method, lambda *a, **k: reached.append(a))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **k: reached.append(a))
    for kind in (None, diffusers.StableDiffusionPipeline):
        for text in (
            refused(folder, pipeline_class=kind),
            refused(tmp_path / "denoiser.safetensors", config=str(folder), pipeline_class=kind),
        ):
            assert text.startswith(f"{folder / 'model_index.json'}: its _class_name is {json.dumps(name)}")
            assert "not a class name" in text
    assert not reached and not (tmp_path / "sprung").exists()


def test_a_single_file_whose_config_lacks_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "denoiser.safetensors"
    save_file(build_sd().unet.state_dict(), file)
    parts = {k: v for k, v in load_pipeline(folder).components.items() if k not in ("unet", "tokenizer")}
    spoil_no_tokenizer(folder)
    text = refused(file, config=str(folder), **parts, requires_safety_checker=False)
    assert text.startswith(f"{folder / 'tokenizer'}: component 'tokenizer' is missing")


def test_a_folder_that_is_no_pipeline(saved: Path, tmp_path: Path) -> None:
    assert "one model, not a pipeline" in refused(saved / "unet")
    assert "no pipeline (no model_index.json)" in refused(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "only pickled weights (model.ckpt)" in refused(tmp_path)
    (tmp_path / "model.ckpt").unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert "Name the file itself: a.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
def test_a_pickled_file_is_not_opened(tmp_path: Path, suffix: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save(Trap(), tmp_path / f"model{suffix}")
    text = refused(tmp_path / f"model{suffix}")
    assert "pickled" in text and "safe_serialization=True" in text
    assert not (tmp_path / "sprung").exists()


def test_single_files_that_do_not_load(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "weights.gguf"
    other.write_bytes(b"GGUF")
    assert "'.gguf' is no format" in refused(other)
    file = tmp_path / "model.safetensors"
    save_file({}, file)
    assert "holds no weights" in refused(file)
    file.write_bytes(b"\x00" * 20)
    assert "damaged or truncated" in refused(file)
    save_file({"nothing.weight": torch.ones(2)}, file)
    assert "not on this machine" in refused(file) and "config=" in refused(file)
    assert "does not load as StableDiffusionPipeline" in refused(file, config=str(folder))
    assert "no such" in refused(tmp_path / "modle.safetensors") and "model.safetensors" in refused(
        tmp_path / "modle.safetensors"
    )


def test_a_component_that_was_never_loaded(saved: Path) -> None:
    text = refused(saved, unet=build_sd().unet.to("meta"))
    assert "component 'unet' has no weights for conv_in.weight" in text and "pass it as `unet=`" in text


@pytest.mark.parametrize("key", ["trust_remote_code", "device_map", "custom_pipeline"])
def test_what_is_never_done(saved: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: not allowed here"):
        load_pipeline(saved, **{key: "yes"})
    with pytest.raises(ValueError, match="use_safetensors: got false"):
        load_pipeline(saved, use_safetensors=False)


def test_code_in_a_model_folder_is_not_run(folder: Path) -> None:
    (folder / "pipeline.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\n")
    (folder / "unet" / "my_unet.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["my_unet", "MyUNet"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "my_unet.MyUNet" in refused(folder)
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    index["_class_name"] = ["pipeline", "Mine"]
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(folder)
    assert not (folder / "sprung").exists()
