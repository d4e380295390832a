"""Invariant: the loader asks the host's functions for just the files that were chosen, once, and hands out copies."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from balanced_offload.offload.adapters import comfyui_host, comfyui_pager
from balanced_offload.offload.policy import OffloadPolicy

from . import stock_host
from .stock_host import SEPARATE, Sd
from .test_loader_files import KEYS, header

sd, loader, stock = stock_host.sd, stock_host.loader, stock_host.stock


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
