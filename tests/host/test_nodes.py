"""Invariant: on a real host the nodes give what the stock loaders give, read each file once, and refuse by name."""

from __future__ import annotations

import gc
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .inprocess import sample
from .tiny import CLIP_CONFIG

CHOSEN = {
    "checkpoint": "none",
    "diffusion_model": "tiny_sd3.safetensors",
    "text_encoder": "tiny_clip.safetensors",
    "clip_type": "sd3",
    "vae": "taesd3",
}
WHOLE = {"checkpoint": "tiny_checkpoint.safetensors"}
Pack = Callable[[str], ModuleType]


@pytest.fixture
def stock_nodes(in_process: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The host's own `nodes`, with nothing kept of ours before and after."""
    import comfy.sd

    import nodes

    reader = comfy.sd.load_state_dict_guess_config

    def with_tiny_sizes(sd: Any, *rest: Any, **options: Any) -> Any:
        """In a checkpoint the host looks for the text encoder's sizes under another name than in a file of its own."""
        sizes = {"clip_l_model_config": dict(CLIP_CONFIG)}
        return reader(
            sd, *rest, **{**options, "te_model_options": {**(options.get("te_model_options") or {}), **sizes}}
        )

    monkeypatch.setattr(comfy.sd, "load_state_dict_guess_config", with_tiny_sizes)
    yield nodes
    gc.collect()
    kept = sys.modules.get("balanced_offload.nodes.stock")
    if kept is not None:
        kept.drop_idle()


@pytest.fixture
def loader(stock_nodes: ModuleType, pack: Pack) -> Any:
    return pack("nodes.loader").ModelLoaderWithOffload


@pytest.fixture
def stock(stock_nodes: ModuleType, pack: Pack) -> ModuleType:
    return pack("nodes.stock")


@pytest.fixture
def policy(pack: Pack) -> type:
    return pack("offload.policy").OffloadPolicy


class Opened:
    """Model files opened while `on`, by Python's own audit of every open."""

    def __init__(self) -> None:
        self.on, self.paths = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and str(arguments[0]).endswith(".safetensors"):
            self.paths.append(str(arguments[0]))

    def during(self, call: Callable[[], Any]) -> list[str]:
        """Names of what `call` opened. safetensors opens its files in Rust, so the host's reader is watched as well."""
        import comfy.utils

        self.paths.clear()
        reader = comfy.utils.load_torch_file

        def noted(path: str, *arguments: Any, **options: Any) -> Any:
            self.paths.append(str(path))
            return reader(path, *arguments, **options)

        comfy.utils.load_torch_file, self.on = noted, True
        try:
            call()
        finally:
            comfy.utils.load_torch_file, self.on = reader, False
        return [Path(path).name for path in self.paths]


opened = Opened()


def state(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}


def equal_states(a: Any, b: Any) -> bool:
    first, second = state(a), state(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------- what it gives
def test_single_files_load_as_by_the_stock_loaders(stock_nodes: ModuleType, loader: Any) -> None:
    model, clip, vae = loader.execute(**CHOSEN).args
    (stock_model,) = stock_nodes.UNETLoader().load_unet("tiny_sd3.safetensors", "default")
    (stock_clip,) = stock_nodes.CLIPLoader().load_clip("tiny_clip.safetensors", "sd3")
    (stock_vae,) = stock_nodes.VAELoader().load_vae("taesd3")
    assert equal_states(model.model, stock_model.model)
    assert equal_states(clip.cond_stage_model, stock_clip.cond_stage_model)
    assert equal_states(vae.first_stage_model, stock_vae.first_stage_model)
    assert torch.equal(sample(model, "sd3"), sample(stock_model, "sd3"))
    text, stock_text = (
        clip.encode_from_tokens(clip.tokenize("a cat")),
        stock_clip.encode_from_tokens(stock_clip.tokenize("a cat")),
    )
    assert torch.equal(text, stock_text)
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(vae.decode(latent), stock_vae.decode(latent))


def test_a_checkpoint_loads_as_by_the_stock_loader(stock_nodes: ModuleType, loader: Any) -> None:
    model, clip, vae = loader.execute(**WHOLE).args
    stock_model, stock_clip, stock_vae = stock_nodes.CheckpointLoaderSimple().load_checkpoint(WHOLE["checkpoint"])
    assert equal_states(model.model, stock_model.model)
    assert equal_states(clip.cond_stage_model, stock_clip.cond_stage_model)
    assert equal_states(vae.first_stage_model, stock_vae.first_stage_model)
    assert torch.equal(sample(model, "sd3"), sample(stock_model, "sd3"))


def test_parts_beside_a_checkpoint_take_the_place_of_its_own(loader: Any) -> None:
    names = opened.during(
        lambda: loader.execute(**WHOLE, vae="taesd3", text_encoder="tiny_clip.safetensors", clip_type="sd3")
    )
    assert {"tiny_checkpoint.safetensors", "tiny_clip.safetensors", "taesd3_decoder.safetensors"} <= set(names)


def test_what_the_files_do_not_hold_names_the_remedy(
    loader: Any, stock_nodes: ModuleType, pack: Pack, policy: type
) -> None:
    model, clip, vae = loader.execute(diffusion_model="tiny_sd3.safetensors").args
    assert model.model is not None
    with pytest.raises(AttributeError, match="choose its VAE at 'vae'"):
        stock_nodes.VAEDecode().decode(vae, {"samples": torch.zeros(1, 16, 8, 8)})
    with pytest.raises(AttributeError, match="choose its text encoder at 'text_encoder'"):
        stock_nodes.CLIPTextEncode().encode(clip, "a cat")
    made = pack("nodes.apply").ApplyOffloadPolicy.execute(policy=policy(), clip=clip, vae=vae)
    assert made.args == (None, clip, vae) and "choose its VAE" in made.ui["text"][1]


# ---------------------------------------------------------------------- read once
def test_another_policy_reads_no_file_though_the_host_dropped_the_outputs(
    loader: Any, stock: ModuleType, policy: type
) -> None:
    made: list[Any] = []
    assert set(opened.during(lambda: made.extend(loader.execute(policy=policy(), **CHOSEN).args))) >= {
        "tiny_sd3.safetensors",
        "tiny_clip.safetensors",
    }
    first = weakref.ref(made[0])
    module = made[0].model
    made.clear()
    gc.collect()
    assert first() is None, "the host dropped the outputs before it runs the node again"
    assert opened.during(lambda: made.extend(loader.execute(policy=policy(mode="sequential"), **CHOSEN).args)) == []
    assert made[0].model is module
    assert torch.equal(sample(made[0], "sd3"), sample(made[0], "sd3"))


def test_idle_and_unheld_it_is_dropped(loader: Any, stock: ModuleType) -> None:
    made = list(loader.execute(**CHOSEN).args)
    module = weakref.ref(made[0].model)
    stock.drop_idle()
    assert len(stock.kept()) == 1, "an output still lives"
    clone = made[0].clone()
    made.clear()
    gc.collect()
    stock.drop_idle()
    assert module() is clone.model and len(stock.kept()) == 1, "a clone of it lives, as behind a LoRA node"
    del clone
    gc.collect()
    stock.drop_idle()
    gc.collect()
    assert stock.kept() == [] and module() is None


def test_another_file_forgets_the_one_before_before_it_is_read(loader: Any, stock: ModuleType) -> None:
    """So that RAM holds two models only where the stock host holds two."""
    made = list(loader.execute(**CHOSEN).args)
    module = weakref.ref(made[0].model)
    made.clear()
    gc.collect()
    alive: list[bool] = []
    prompt = {"1": {"class_type": "ModelLoaderWithOffload", "inputs": {**WHOLE, "policy": ["2", 0]}}}

    class Asked(loader):
        hidden = type("Hidden", (), {"prompt": prompt})

    import comfy.sd

    reader = comfy.sd.load_checkpoint_guess_config

    def watched(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        alive.append(module() is not None)
        return reader(*arguments, **options)

    comfy.sd.load_checkpoint_guess_config = watched
    try:
        kept_alive = Asked.execute(**WHOLE)
    finally:
        comfy.sd.load_checkpoint_guess_config = reader
    assert alive == [False]
    assert [held.checkpoint is not None for held in stock.kept()] == [True]
    del kept_alive


def test_a_changed_file_is_read_again(loader: Any, models: Path) -> None:
    extra = models / "diffusion_models" / "tiny_extra.safetensors"
    shutil.copy(models / "diffusion_models" / "tiny_sd3.safetensors", extra)
    try:
        chosen = {"diffusion_model": extra.name}
        before = loader.fingerprint_inputs(**chosen)
        first = loader.execute(**chosen)
        assert opened.during(lambda: loader.execute(**chosen)) == []
        shutil.copy(models / "diffusion_models" / "tiny_sd3.safetensors", extra)
        assert loader.fingerprint_inputs(**chosen) != before
        assert extra.name in opened.during(lambda: loader.execute(**chosen))
        del first
    finally:
        extra.unlink()


# ---------------------------------------------------------------------- applied
def test_apply_leaves_the_given_and_gives_the_same_kind(stock_nodes: ModuleType, pack: Pack, policy: type) -> None:
    apply = pack("nodes.apply").ApplyOffloadPolicy
    given = stock_nodes.CheckpointLoaderSimple().load_checkpoint(WHOLE["checkpoint"])
    made = apply.execute(policy=policy(mode="balanced", high="50%"), model=given[0], clip=given[1], vae=given[2])
    model, clip, vae = made.args
    assert type(clip) is type(given[1]) and type(vae) is type(given[2])
    assert model is not given[0] and model.model is given[0].model
    assert clip.cond_stage_model is clip.patcher.model and vae.first_stage_model is vae.patcher.model
    assert all(made.ui["text"]) and len(made.ui["text"]) == 3
    assert torch.equal(sample(model, "sd3"), sample(given[0], "sd3"))


def test_a_foreign_patcher_passes_through_with_the_reason(
    stock_nodes: ModuleType, pack: Pack, policy: type, models: Path
) -> None:
    import comfy.model_patcher

    class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
        pass

    (given,) = stock_nodes.UNETLoader().load_unet("tiny_sd3.safetensors", "default")
    foreign = given.clone()
    foreign.__class__ = GGUFModelPatcher
    made = pack("nodes.apply").ApplyOffloadPolicy.execute(policy=policy(mode="sequential"), model=foreign)
    assert made.args == (foreign, None, None)
    assert "GGUFModelPatcher" in made.ui["text"][0]


def test_nothing_connected_says_so(pack: Pack, policy: type, stock_nodes: ModuleType) -> None:
    made = pack("nodes.apply").ApplyOffloadPolicy.execute(policy=policy())
    assert made.args == (None, None, None) and "connect" in made.ui["text"][0]


# ---------------------------------------------------------------------- freed
def test_free_passes_on_and_says_what_it_did(pack: Pack, stock_nodes: ModuleType) -> None:
    anything = object()
    made = pack("nodes.free").FreeVRAMToFit.execute(anything=anything, need_gib=0.5)
    assert made.args[0] is anything
    assert made.args[1] == made.ui["text"][0] != ""


# ---------------------------------------------------------------------- refused before the run
@pytest.mark.parametrize(
    ("chosen", "field", "remedy"),
    [
        ({"checkpoint": "tiny_checkpont.safetensors"}, "checkpoint", "near it: tiny_checkpoint.safetensors"),
        ({"checkpoint": "model.ckpt"}, "checkpoint", "convert it to .safetensors"),
        ({}, "checkpoint", "choose a checkpoint"),
        ({**WHOLE, "diffusion_model": "tiny_sd3.safetensors"}, "diffusion_model", "set the other to 'none'"),
        ({**CHOSEN, "text_encoder": "none", "text_encoder_2": "tiny_clip.safetensors"}, "text_encoder", "no gap"),
        ({**CHOSEN, "clip_type": "no_such"}, "clip_type", "choose one of these"),
        ({**CHOSEN, "weight_dtype": "fp3"}, "weight_dtype", "choose one of these"),
        ({**CHOSEN, "vae": "taesd9"}, "vae", "which is not there"),
    ],
)
def test_a_bad_choice_is_refused_before_the_run(loader: Any, chosen: dict[str, str], field: str, remedy: str) -> None:
    message = loader.validate_inputs(**chosen)
    assert isinstance(message, str) and message.startswith(f"{field}: got ") and remedy in message
    with pytest.raises(ValueError, match=f"^{field}: got "):
        loader.execute(**chosen)


@pytest.mark.parametrize(
    ("folder", "source", "field", "what"),
    [
        ("checkpoints", "loras/tiny_sd3_a.safetensors", "checkpoint", "a LoRA"),
        ("diffusion_models", "vae_approx/taesd3_decoder.safetensors", "diffusion_model", None),
        ("diffusion_models", "text_encoders/tiny_clip.safetensors", "diffusion_model", "a text encoder"),
        ("text_encoders", "diffusion_models/tiny_sd3.safetensors", "text_encoder", "a diffusion model"),
        ("vae", "checkpoints/tiny_checkpoint.safetensors", "vae", "a whole checkpoint"),
    ],
)
def test_the_wrong_file_for_the_socket(
    loader: Any, models: Path, folder: str, source: str, field: str, what: str | None
) -> None:
    """A TAESD half is told by nothing in its header: there the host's own refusal comes with the field's name."""
    import folder_paths

    wrong = models / folder / "wrong.safetensors"
    wrong.parent.mkdir(exist_ok=True)
    shutil.copy(models / source, wrong)
    folder_paths.filename_list_cache.clear()
    chosen = {**CHOSEN, field: wrong.name}
    if field == "checkpoint":
        chosen = {field: wrong.name}
    try:
        message = loader.validate_inputs(**chosen)
        if what is None:
            assert message is True
        else:
            assert message.startswith(f"{field}: got 'wrong.safetensors', which is {what}; allowed: ")
        with pytest.raises(ValueError, match=field):
            loader.execute(**chosen)
    finally:
        wrong.unlink()
        folder_paths.filename_list_cache.clear()


def test_what_the_host_lists_is_what_is_offered(stock_nodes: ModuleType, loader: Any, pack: Pack) -> None:
    schema = loader.define_schema()
    assert [entry.id for entry in schema.inputs] == [
        "policy",
        "checkpoint",
        "diffusion_model",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "clip_type",
        "vae",
        "weight_dtype",
    ]
    by_id = {entry.id: entry for entry in schema.inputs}
    types = stock_nodes.CLIPLoader.INPUT_TYPES()["required"]["type"][0]
    assert by_id["clip_type"].options[: len(types)] == types
    assert by_id["weight_dtype"].options == stock_nodes.UNETLoader.INPUT_TYPES()["required"]["weight_dtype"][0]
    assert by_id["checkpoint"].options == ["none", "tiny_checkpoint.safetensors"]
    assert by_id["vae"].options[0] == "from checkpoint" and "taesd3" in by_id["vae"].options
    schema.validate()
    for kind in (pack("nodes.apply").ApplyOffloadPolicy, pack("nodes.free").FreeVRAMToFit):
        kind.define_schema().validate()
