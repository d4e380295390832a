"""Invariant: the loader asks the host's functions for just the files that were chosen, once, and hands out copies."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui, comfyui_host, comfyui_pager, comfyui_runs
from balanced_offload.offload.policy import OffloadPolicy

from .test_loader_files import KEYS, header

FILES = {
    "checkpoints/base.safetensors": KEYS["checkpoint"],
    "checkpoints/other.safetensors": KEYS["checkpoint"],
    "diffusion_models/flux.safetensors": KEYS["diffusion_model"],
    "text_encoders/clip.safetensors": KEYS["text_encoder"],
    "text_encoders/t5.safetensors": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "text_encoders/g.safetensors": KEYS["text_encoder"],
    "vae/vae.safetensors": KEYS["vae"],
    "vae_approx/taesd_encoder.safetensors": ["1.weight"],
    "vae_approx/taesd_decoder.safetensors": ["1.weight"],
    "vae_approx/taesd3_encoder.pth": [],
    "vae_approx/taesd3_decoder.pth": [],
}
SEPARATE = {
    "diffusion_model": "flux.safetensors",
    "text_encoder": "clip.safetensors",
    "text_encoder_2": "t5.safetensors",
    "clip_type": "flux",
    "vae": "vae.safetensors",
}


class Patcher:
    """A MODEL: clones remember where they come from, as the host's do."""

    def __init__(self, what: str, parent: Patcher | None = None) -> None:
        self.what, self.model, self.parent = what, f"module of {what}", parent

    def clone(self) -> Patcher:
        return Patcher(self.what, self)


class Wrapper:
    """A CLIP or a VAE."""

    def __init__(self, what: str, inner: str) -> None:
        self.what, self.patcher = what, Patcher(what)
        setattr(self, inner, what)

    def clone(self) -> Wrapper:
        made = Wrapper(self.what, next(name for name in vars(self) if name.endswith("_model")))
        made.patcher = self.patcher
        return made


class Sd(ModuleType):
    """`comfy.sd`: notes every call, and gives objects that say what they were made of."""

    class CLIPType:
        STABLE_DIFFUSION, FLUX, SD3 = "sd", "flux", "sd3"

    def __init__(self) -> None:
        super().__init__("comfy.sd")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.has_vae = True

    def load_checkpoint_guess_config(
        self,
        ckpt_path: str,
        output_vae: bool = True,
        output_clip: bool = True,
        embedding_directory: Any = None,
        disable_dynamic: bool = False,
    ) -> tuple[Any, ...]:
        self.calls.append(
            (
                "checkpoint",
                {"path": Path(ckpt_path).name, "vae": output_vae, "clip": output_clip, "static": disable_dynamic},
            )
        )
        name = Path(ckpt_path).name
        return (
            Patcher(name),
            Wrapper(name, "cond_stage_model") if output_clip else None,
            Wrapper(name, "first_stage_model") if output_vae and self.has_vae else None,
            None,
        )

    def load_diffusion_model(self, unet_path: str, model_options: Any = None, disable_dynamic: bool = False) -> Any:
        name = Path(unet_path).name
        made_of = {"path": name, "options": model_options, "static": disable_dynamic}
        self.calls.append(("diffusion_model", made_of))
        return Patcher(name)

    def load_clip(
        self, ckpt_paths: list[str], embedding_directory: Any = None, clip_type: Any = None, model_options: Any = None
    ) -> Any:
        names = [Path(path).name for path in ckpt_paths]
        self.calls.append(("clip", {"paths": names, "type": clip_type}))
        return Wrapper("+".join(names), "cond_stage_model")

    def names(self) -> list[str]:
        made = [name for name, _ in self.calls]
        self.calls.clear()
        return made


@pytest.fixture
def sd(host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sd]:
    """A host with FILES in its folders."""
    import folder_paths

    import nodes

    folder_paths.root = tmp_path
    for name, keys in FILES.items():
        header(tmp_path / name, keys)
    made = Sd()
    comfy = ModuleType("comfy")
    comfy.sd = made  # type: ignore[attr-defined]
    patchers = ModuleType("comfy.model_patcher")
    patchers.ModelPatcher = Patcher  # type: ignore[attr-defined]
    comfy.model_patcher = patchers  # type: ignore[attr-defined]
    for module in (comfy, made, patchers):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def load_vae(name: str) -> Any:
        made.calls.append(("vae", {"name": name}))
        return Wrapper(name, "first_stage_model")

    nodes.VAELoader.made = staticmethod(load_vae)
    notes: list[tuple[str, str]] = []
    runs = SimpleNamespace(
        notes=notes,
        idle=[],
        on_idle=lambda call: runs.idle.append(call),
        touch=lambda world, policy=None: None,
        note=lambda kind, text: notes.append((kind, text)),
    )
    monkeypatch.setattr(comfyui_runs, "runs", lambda: runs)
    made.runs = runs  # type: ignore[attr-defined]

    def apply_policy(policy: OffloadPolicy, obj: Any) -> comfyui.Applied:
        out = obj.clone()
        if isinstance(out, Wrapper):
            out.patcher = out.patcher.clone()
        return comfyui.Applied(out, "static", f"mode {policy.mode.value}")

    monkeypatch.setattr(comfyui, "apply_policy", apply_policy)
    yield made
    gc.collect()
    sys.modules["balanced_offload.nodes.stock"].drop_idle()


@pytest.fixture
def loader(sd: Sd, nodes: dict[str, Any]) -> Any:
    return nodes["ModelLoaderWithOffload"]


@pytest.fixture
def stock(loader: Any) -> ModuleType:
    return sys.modules["balanced_offload.nodes.stock"]


# ---------------------------------------------------------------------- which files, how
def test_a_checkpoint_alone(loader: Any, sd: Sd) -> None:
    model, clip, vae = loader.execute(checkpoint="base.safetensors").result
    assert (model.what, clip.what, vae.what) == ("base.safetensors",) * 3
    assert sd.calls == [("checkpoint", {"path": "base.safetensors", "vae": True, "clip": True, "static": False})]


def test_parts_that_other_files_stand_for_are_not_made(loader: Any, sd: Sd) -> None:
    _, clip, vae = loader.execute(
        checkpoint="base.safetensors", text_encoder="clip.safetensors", clip_type="sd3", vae="taesd"
    ).result
    assert (clip.what, vae.what) == ("clip.safetensors", "taesd")
    assert sd.calls[0][1]["clip"] is False and sd.calls[0][1]["vae"] is False


def test_a_diffusion_model_with_its_parts(loader: Any, sd: Sd) -> None:
    model, clip, vae = loader.execute(**SEPARATE).result
    assert (model.what, vae.what) == ("flux.safetensors", "vae.safetensors")
    assert clip.what == "clip.safetensors+t5.safetensors"
    assert ("clip", {"paths": ["clip.safetensors", "t5.safetensors"], "type": "flux"}) in sd.calls
    assert sd.calls[0] == ("diffusion_model", {"path": "flux.safetensors", "options": {}, "static": False})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fp8_e4m3fn", {"dtype": "float8_e4m3fn"}),
        ("fp8_e4m3fn_fast", {"dtype": "float8_e4m3fn", "fp8_optimizations": True}),
        ("fp8_e5m2", {"dtype": "float8_e5m2"}),
    ],
)
def test_the_hosts_own_weight_dtypes(loader: Any, sd: Sd, name: str, options: dict[str, Any]) -> None:
    loader.execute(**{**SEPARATE, "weight_dtype": name})
    found = dict(sd.calls[0][1]["options"])
    found["dtype"] = str(found["dtype"]).removeprefix("torch.")
    assert found == options


def test_the_vae_list_leaves_out_what_would_be_unpickled(stock: ModuleType) -> None:
    assert stock.vae_names() == ["vae.safetensors", "taesd", "pixel_space"]


@pytest.mark.parametrize(("paged", "static"), [(True, True), (False, False)])
def test_bypass_loads_static_only_where_the_host_pages(
    loader: Any, sd: Sd, monkeypatch: pytest.MonkeyPatch, paged: bool, static: bool
) -> None:
    monkeypatch.setattr(comfyui_host, "dynamic_vram", lambda: paged)
    loader.execute(policy=OffloadPolicy(use_core_dynamic="bypass"), **SEPARATE)
    assert sd.calls[0][1]["static"] is static


def test_a_host_that_cannot_load_static_is_not_asked_to(loader: Any, sd: Sd, monkeypatch: pytest.MonkeyPatch) -> None:
    """load_clip of the stand-in has no such parameter, as 0.3.64's has not: passing it would be a TypeError."""
    monkeypatch.setattr(comfyui_host, "dynamic_vram", lambda: True)
    monkeypatch.setattr(comfyui_pager, "pager", lambda: comfyui_pager.Pager("0.4.13", True, True))
    loader.execute(policy=OffloadPolicy(mode="balanced", low=0), **SEPARATE)
    assert sd.names() == ["diffusion_model", "clip", "vae"]


# ---------------------------------------------------------------------- once
def test_another_policy_loads_nothing_though_the_outputs_died(loader: Any, sd: Sd) -> None:
    first = weakref.ref(loader.execute(policy=OffloadPolicy(), **SEPARATE).result[0])
    gc.collect()
    assert first() is None
    sd.calls.clear()
    loader.execute(policy=OffloadPolicy(mode="sequential"), **SEPARATE)
    assert sd.calls == []


def test_what_is_handed_out_is_never_what_is_kept(loader: Any, stock: ModuleType) -> None:
    """Or it would keep itself alive."""
    given = loader.execute(**SEPARATE).result
    (kept,) = stock._kept.values()
    assert all(a is not b for a, b in zip(given, (kept.model, kept.clip, kept.vae), strict=True))
    assert given[1].patcher is not kept.clip.patcher and given[2].patcher is not kept.vae.patcher


@pytest.mark.parametrize("kept_by", ["model", "lora", "clip", "clip's clone", "vae"])
def test_any_living_output_keeps_it(loader: Any, sd: Sd, stock: ModuleType, kept_by: str) -> None:
    model, clip, vae = loader.execute(**SEPARATE).result
    keeper = {"model": model, "lora": model.clone(), "clip": clip, "clip's clone": clip.clone(), "vae": vae}[kept_by]
    del model, clip, vae
    gc.collect()
    assert stock.drop_idle in sd.runs.idle  # the host's idle moments call it
    stock.drop_idle()
    assert len(stock.kept()) == 1
    del keeper
    gc.collect()
    stock.drop_idle()
    assert stock.kept() == []


def test_a_file_that_changed_is_loaded_again(loader: Any, sd: Sd, tmp_path: Path) -> None:
    before = loader.fingerprint_inputs(**SEPARATE)
    loader.execute(**SEPARATE)
    sd.calls.clear()
    header(tmp_path / "vae" / "vae.safetensors", KEYS["vae"], size=64)
    assert loader.fingerprint_inputs(**SEPARATE) != before
    loader.execute(**SEPARATE)
    assert sd.names() == ["diffusion_model", "clip", "vae"]


def test_the_policy_is_not_in_the_fingerprint(loader: Any) -> None:
    assert loader.fingerprint_inputs(policy=None, **SEPARATE) == loader.fingerprint_inputs(
        policy=OffloadPolicy(mode="model"), **SEPARATE
    )


def prompt(*loaders: dict[str, Any]) -> dict[str, Any]:
    found = {str(i): {"class_type": "ModelLoaderWithOffload", "inputs": inputs} for i, inputs in enumerate(loaders)}
    return {**found, "9": {"class_type": "KSampler", "inputs": {"model": ["0", 0]}}}


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ([], ["other.safetensors"]),
        ([{"checkpoint": "base.safetensors"}], ["base.safetensors", "other.safetensors"]),
        # A link may say anything, so nothing is dropped before the host is idle.
        ([{"checkpoint": ["5", 0]}], ["base.safetensors", "other.safetensors"]),
        ([{"checkpoint": "gone.safetensors"}], ["other.safetensors"]),
    ],
)
def test_what_this_prompt_does_not_ask_for_goes_before_more_is_loaded(
    loader: Any, stock: ModuleType, monkeypatch: pytest.MonkeyPatch, others: list[dict[str, Any]], left: list[str]
) -> None:
    loader.execute(checkpoint="base.safetensors")
    gc.collect()
    asked = {"checkpoint": "other.safetensors"}
    monkeypatch.setattr(loader, "hidden", SimpleNamespace(prompt=prompt(asked, *others)), raising=False)
    loader.execute(**asked)
    assert sorted(Path(held.checkpoint.path).name for held in stock.kept()) == left


def test_what_is_in_use_stays_whatever_is_asked_for(
    loader: Any, stock: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = loader.execute(checkpoint="base.safetensors").result
    asked = {"checkpoint": "other.safetensors"}
    monkeypatch.setattr(loader, "hidden", SimpleNamespace(prompt=prompt(asked)), raising=False)
    loader.execute(**asked)
    assert len(stock.kept()) == 2
    del held


# ---------------------------------------------------------------------- said
def test_what_was_done_is_said_on_the_node_and_in_the_report(loader: Any, sd: Sd) -> None:
    made = loader.execute(policy=OffloadPolicy(mode="model"), **SEPARATE)
    lines = ["model: mode model", "clip: mode model", "vae: mode model"]
    assert made.ui == {"text": lines}
    assert sd.runs.notes == [("policy", line) for line in lines]


def test_not_connected_means_auto(loader: Any) -> None:
    assert loader.execute(**SEPARATE).ui["text"][0] == "model: mode auto"


def test_a_part_that_no_file_holds_says_what_to_choose(loader: Any, sd: Sd) -> None:
    sd.has_vae = False
    vae = loader.execute(checkpoint="base.safetensors").result[2]
    assert not vae and not hasattr(vae, "decode")  # hosts ask objects for what they have
    with pytest.raises(AttributeError, match=r"'base.safetensors' at 'checkpoint' holds none; choose its VAE at 'vae'"):
        vae.decode(None)
    clip = loader.execute(diffusion_model="flux.safetensors").result[1]
    with pytest.raises(AttributeError, match="choose its text encoder at 'text_encoder'"):
        clip.tokenize("a cat")


def test_what_the_host_cannot_read_comes_with_the_names(
    loader: Any, sd: Sd, stock: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("size mismatch for x")

    monkeypatch.setattr(sd, "load_clip", broken)
    with pytest.raises(ValueError, match=r"text_encoder 'clip.safetensors'.*RuntimeError: size mismatch for x"):
        loader.execute(**SEPARATE)
    assert stock.kept() == [], "nothing half loaded is kept"


def test_out_of_memory_is_the_hosts_to_handle(loader: Any, sd: Sd, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def full(*_: Any, **__: Any) -> None:
        raise OutOfMemoryError("no room")

    monkeypatch.setattr(sd, "load_clip", full)
    with pytest.raises(OutOfMemoryError, match="no room"):
        loader.execute(**SEPARATE)


def test_a_file_without_a_model_is_refused(loader: Any, sd: Sd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd, "load_diffusion_model", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"diffusion_model: got 'flux.safetensors', in which ComfyUI finds no"):
        loader.execute(**SEPARATE)


# ---------------------------------------------------------------------- refused before the run
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "checkpoint: got 'none' and diffusion_model 'none' as well; allowed: one of the two"),
        ({"checkpoint": "base.safetensors", "diffusion_model": "flux.safetensors"}, "diffusion_model: got 'flux"),
        ({"checkpoint": "base.ckpt"}, "checkpoint: got 'base.ckpt'; allowed: safetensors files"),
        (
            {**SEPARATE, "clip_type": "wan"},
            "clip_type: got 'wan'; allowed with 2 text encoder file(s): sdxl, sd3, flux",
        ),
        ({**SEPARATE, "text_encoder": "none"}, "text_encoder: got 'none' with a later text encoder chosen"),
        ({**SEPARATE, "vae": "taesd3"}, "vae: got 'taesd3', which is not there"),
        ({**SEPARATE, "weight_dtype": "int4"}, "weight_dtype: got 'int4'; allowed: default, fp8_e4m3fn"),
    ],
)
def test_a_bad_choice(loader: Any, sd: Sd, chosen: dict[str, str], message: str) -> None:
    found = loader.validate_inputs(**chosen)
    assert isinstance(found, str) and found.startswith(message)
    with pytest.raises(ValueError) as caught:
        loader.execute(**chosen)
    assert str(caught.value) == found
    assert sd.calls == []


def test_links_are_judged_when_the_node_runs(loader: Any) -> None:
    """The host gives None for what comes over a link."""
    assert loader.validate_inputs(checkpoint=None, diffusion_model="flux.safetensors") is True
    assert loader.validate_inputs(**{**SEPARATE, "clip_type": None, "text_encoder_2": None, "vae": None}) is True
    assert loader.validate_inputs(**SEPARATE) is True


def test_three_text_encoders_are_told_apart_by_the_files(loader: Any, sd: Sd) -> None:
    loader.execute(**{**SEPARATE, "text_encoder_3": "g.safetensors", "clip_type": "stable_diffusion"})
    assert sd.calls[1][1]["paths"] == ["clip.safetensors", "t5.safetensors", "g.safetensors"]


def test_the_schema(loader: Any) -> None:
    schema = loader.define_schema()
    assert schema.display_name == "Load Model (Offload)" and schema.category == "Offload"
    assert [entry.id for entry in schema.outputs] == ["MODEL", "CLIP", "VAE"]
    assert [entry.display_name for entry in schema.outputs] == ["model", "clip", "vae"]
    assert [entry.id for entry in schema.inputs if entry.advanced] == ["weight_dtype"] == [schema.inputs[-1].id]
    assert all(entry.tooltip and entry.tooltip.endswith(".") for entry in (*schema.inputs, *schema.outputs))
    assert {"lowvram", "block swap", "unload", "oom"} <= set(schema.search_aliases)
    by_id = {entry.id: entry for entry in schema.inputs}
    assert by_id["vae"].options == ["from checkpoint", "vae.safetensors", "taesd", "pixel_space"]
    assert by_id["clip_type"].options == ["stable_diffusion", "sd3", "wan", "sdxl", "flux"]
    assert by_id["checkpoint"].options == ["none", "base.safetensors", "other.safetensors"]
