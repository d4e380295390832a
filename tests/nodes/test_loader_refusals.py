"""Invariant: what is wrong with a choice is said by field before the run, and what went wrong in one by file."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from balanced_offload.offload.policy import OffloadPolicy

from . import stock_host
from .stock_host import SEPARATE, Sd

sd, loader, stock = stock_host.sd, stock_host.loader, stock_host.stock


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
