"""Invariant: a picture drawn for a node is the one that diffusers draws from the same values, bit for bit.

What the pipeline adapter does by itself is tested here beside a stand-in for the few calls of a host that it makes;
with a real host, its memory manager and the simulated accelerator: tests/host/test_pipeline.py.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from balanced_offload.offload.adapters.comfyui_folder import choose_dtype, choose_variant
from balanced_offload.offload.adapters.comfyui_generate import (
    GenerateError,
    Request,
    call_arguments,
    generate,
    left_out,
    pictures,
    variant_for,
)
from balanced_offload.offload.backend import open_backend
from balanced_offload.offload.ledger import Ledger

from .conftest import EXAMPLES, build_sd
from .toy import build_toy

SD = Request("a cat", "a dog", 32, 32, 4, 5.0, 11)


class Interrupted(BaseException):
    """As on newer hosts: not an Exception."""


class FakeHost:
    """What the adapter calls of a host: its bar, its interrupt, its preview, its opinion of number types."""

    def __init__(self) -> None:
        self.bars: list[list[tuple[int, int, Any]]] = []
        self.interrupt_after: int | None = None  # checks until somebody asks for the interrupt
        self.preview_method = "none"
        self.half = True
        self.drawn: list[torch.Tensor] = []

    def check(self) -> None:
        if self.interrupt_after is not None:
            self.interrupt_after -= 1
            if self.interrupt_after < 0:
                self.interrupt_after = None
                raise Interrupted

    def modules(self) -> dict[str, ModuleType]:
        host = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.seen: list[tuple[int, int, Any]] = []
                host.bars.append(self.seen)

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                assert total is not None
                self.seen.append((value, total, preview))

        class Latent2RGBPreviewer:
            def __init__(self, factors: Any, bias: Any = None) -> None:
                assert len(factors) == 4

            def decode_latent_to_preview_image(self, kind: str, latents: torch.Tensor) -> Any:
                assert latents.device.type == "cpu" and latents.shape[:2] == (1, 4)
                host.drawn.append(latents)
                return kind, latents, 512

        def module(name: str, **names: Any) -> ModuleType:
            made = ModuleType(name)
            made.__dict__.update(names)
            return made

        sd15 = type("SD15", (), {"latent_rgb_factors": [[0.0] * 3] * 4})
        parts = {
            "utils": module("comfy.utils", ProgressBar=ProgressBar),
            "model_management": module(
                "comfy.model_management",
                throw_exception_if_processing_interrupted=self.check,
                should_use_fp16=lambda device: self.half,
                should_use_bf16=lambda device: self.half,
            ),
            "latent_formats": module("comfy.latent_formats", SD15=sd15),
            "cli_args": module(
                "comfy.cli_args", args=SimpleNamespace(preview_method=SimpleNamespace(value=self.preview_method))
            ),
        }
        found = {f"comfy.{name}": part for name, part in parts.items()}
        found["comfy"] = module("comfy", **parts)
        found["latent_preview"] = module("latent_preview", Latent2RGBPreviewer=Latent2RGBPreviewer)
        return found


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHost]:
    """Makes the stand-in and puts it where a host would be."""

    def put(**values: Any) -> FakeHost:
        host = FakeHost()
        host.__dict__.update(values)
        for name, module in host.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        return host

    return put


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(open_backend("cpu"))


def image(batch: int = 1, height: int = 32, width: int = 32) -> torch.Tensor:
    """[batch, height, width, 3] in 0..1."""
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(1))


def bare(pipe: Any, **more: Any) -> torch.Tensor:
    """The same values given to diffusers by hand, as a host shows pictures."""
    call: dict[str, Any] = {
        "prompt": SD.prompt,
        "negative_prompt": SD.negative,
        "num_inference_steps": SD.steps,
        "guidance_scale": SD.guidance,
        "generator": torch.Generator("cpu").manual_seed(SD.seed),
        "output_type": "pt",
        **more,
    }
    return pipe(**call).images.movedim(1, -1)


def bare_from_image(pipe: Any, start: torch.Tensor, **more: Any) -> torch.Tensor:
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return bare(other, image=start.movedim(-1, 1).contiguous(), **more)


# ---------------------------------------------------------------------- arguments
def test_a_call_gets_what_it_takes_and_no_more() -> None:
    given = call_arguments(build_sd(), SD)
    assert {k: v for k, v in given.items() if k != "generator"} == {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "width": 32,
        "height": 32,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "output_type": "pt",
    }
    assert given["generator"].initial_seed() == 11 and given["generator"].device.type == "cpu"


def test_an_empty_negative_prompt_is_the_pipelines_own() -> None:
    assert "negative_prompt" not in call_arguments(build_sd(), Request("a cat", "  \n"))


def test_what_a_pipeline_does_not_know_is_left_out() -> None:
    class Plain:
        def __call__(self, num_inference_steps: int = 1) -> None: ...

    assert call_arguments(Plain(), SD) == {"num_inference_steps": 4}


def test_the_largest_seed_of_the_node_is_a_seed() -> None:
    call_arguments(build_sd(), Request("", seed=0xFFFFFFFFFFFFFFFF))


def test_an_image_brings_its_own_size_and_a_prompt_for_each_picture() -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    class Edits:
        def __call__(self, prompt: str, image: Any, strength: float, height: int, width: int) -> None: ...

    given = call_arguments(Edits(), Request("x", image=image(2, 24, 40), strength=0.5, width=512, height=512))
    assert (given["height"], given["width"], given["strength"]) == (24, 40, 0.5)
    assert given["prompt"] == ["x", "x"] and given["image"].shape == (2, 3, 24, 40)
    assert "height" not in StableDiffusionXLImg2ImgPipeline.__call__.__annotations__


def test_values_that_leave_nothing_to_do_name_the_field_and_what_is_allowed() -> None:
    class Edits:
        def __call__(self, image: Any, strength: float) -> None: ...

    with pytest.raises(GenerateError, match=r"strength: got 0\.2 with 4 steps.*at least 0\.25"):
        call_arguments(Edits(), Request("x", steps=4, image=image(), strength=0.2))
    with pytest.raises(GenerateError, match=r"image: got a tensor \[32, 32, 3\], allowed is"):
        call_arguments(Edits(), Request("x", image=image()[0]))


def test_what_was_left_out_is_said() -> None:
    class Plain:
        def __call__(self, prompt: str, image: Any = None) -> None: ...

    assert left_out(build_sd(), SD) == [] and left_out(Plain(), Request("x")) == []
    assert left_out(Plain(), Request("x", "y", image=image())) == [
        "negative: Plain has no negative prompt; it was left out.",
        "strength: Plain takes an image without a strength; it was left out.",
    ]


# ---------------------------------------------------------------------- the kind of pipeline
def test_image_to_image_shares_every_model() -> None:
    pipe = build_sd()
    other = variant_for(pipe, Request("x", image=image()))
    assert type(other).__name__ == "StableDiffusionImg2ImgPipeline"
    for name, part in pipe.components.items():
        assert getattr(other, name) is part
    assert variant_for(pipe, SD) is pipe


def test_a_class_without_image_to_image_is_named() -> None:
    with pytest.raises(
        GenerateError, match=r"image: ToyPipeline takes none.*no image-to-image pipeline.*Take the image"
    ):
        variant_for(build_toy(), Request("x", image=image()))


def test_an_image_to_image_class_without_an_image_is_named() -> None:
    pipe = variant_for(build_sd(), Request("x", image=image()))
    with pytest.raises(GenerateError, match="image: got none, and StableDiffusionImg2ImgPipeline needs one"):
        variant_for(pipe, SD)
    assert variant_for(pipe, Request("x", image=image())) is pipe


# ---------------------------------------------------------------------- pictures
def test_pictures_are_those_of_diffusers(fake: Any, ledger: Ledger) -> None:
    fake()
    expected = bare(build_sd(), width=32, height=32)
    drawn = generate(build_sd(), SD, ledger)
    assert drawn.shape == (1, 32, 32, 3) and drawn.dtype is torch.float32 and drawn.is_contiguous()
    assert 0 <= drawn.min() < drawn.max() <= 1
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_from_an_image_are_those_of_diffusers(count: int, fake: Any, ledger: Ledger) -> None:
    fake()
    pipe, start = build_sd(), image(count)
    lists = {} if count == 1 else {"prompt": ["a cat"] * 2, "negative_prompt": ["a dog"] * 2}
    expected = bare_from_image(build_sd(), start, strength=0.5, **lists)
    request = Request(SD.prompt, SD.negative, 512, 512, SD.steps, SD.guidance, SD.seed, start, 0.5)
    drawn = generate(variant_for(pipe, request), request, ledger)
    assert drawn.shape == (count, 32, 32, 3)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_other_pipelines_draw_as_diffusers_does(name: str, fake: Any, ledger: Ledger) -> None:
    fake()
    example = EXAMPLES[name]
    request = Request("a photo of a cat", "", 32, 32, 2, 3.0, 5)
    expected = example.build()(**call_arguments(example.build(), request))
    drawn = generate(example.build(), request, ledger)
    assert drawn.shape[-1] == 3 and torch.equal(drawn, expected.images.movedim(1, -1))


def test_the_scheduler_is_as_before_and_the_next_run_as_the_first(fake: Any, ledger: Ledger) -> None:
    fake()
    pipe = build_sd()
    before = copy.copy(vars(pipe.scheduler))
    first = generate(pipe, SD, ledger)
    assert vars(pipe.scheduler).keys() == before.keys()
    assert all(
        vars(pipe.scheduler)[key] is value or vars(pipe.scheduler)[key] == value for key, value in before.items()
    )
    assert torch.equal(generate(pipe, SD, ledger), first)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupt_ends_it_between_two_steps_and_leaves_nothing(after: int, fake: Any, ledger: Ledger) -> None:
    host = fake()
    pipe = build_sd()
    first = generate(pipe, SD, ledger)
    host.interrupt_after = after
    with pytest.raises(Interrupted):
        generate(pipe, SD, ledger)
    assert len(host.bars) == (1 if after == 0 else 2) and len(host.bars[-1]) == (4 if after == 0 else after - 1)
    assert torch.equal(generate(pipe, SD, ledger), first)


def test_types_that_a_run_had_cast_are_cast_back_after_an_error(fake: Any, ledger: Ledger) -> None:
    fake()
    pipe = build_sd()
    decode = pipe.vae.decode

    def fail(*args: Any, **kwargs: Any) -> Any:
        pipe.vae.to(torch.float64)
        raise Interrupted

    pipe.vae.decode = fail
    with pytest.raises(Interrupted):
        generate(pipe, SD, ledger)
    assert pipe.vae.dtype is torch.float32
    pipe.vae.decode = decode


def test_a_pipeline_without_a_generator_is_seeded_and_the_global_one_left_alone(fake: Any, ledger: Ledger) -> None:
    fake()

    class Global:
        components: ClassVar[dict[str, Any]] = {}

        def progress_bar(self, iterable: Any = None, total: Any = None) -> Any:
            raise AssertionError

        def __call__(self, num_inference_steps: int) -> Any:
            return SimpleNamespace(images=torch.rand(1, 3, 8, 8))

    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    one, two = generate(Global(), SD, ledger), generate(Global(), Request("", seed=12), ledger)
    assert torch.equal(one, generate(Global(), SD, ledger)) and not torch.equal(one, two)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------------- progress
def test_every_step_is_on_the_bar(fake: Any, ledger: Ledger) -> None:
    host = fake()
    generate(build_sd(), SD, ledger)
    assert host.bars == [[(1, 4, None), (2, 4, None), (3, 4, None), (4, 4, None)]]


def test_the_bar_counts_the_steps_that_an_image_leaves(fake: Any, ledger: Ledger) -> None:
    host = fake()
    request = Request("x", "", 32, 32, 4, 5.0, 1, image(), 0.5)
    generate(variant_for(build_sd(), request), request, ledger)
    assert host.bars == [[(1, 2, None), (2, 2, None)]]


@pytest.mark.parametrize("method", ["none", "auto"])
def test_a_preview_changes_no_picture_and_its_time_is_counted(method: str, fake: Any, ledger: Ledger) -> None:
    host = fake(preview_method=method)
    expected = bare(build_sd(), width=32, height=32)
    ledger.open_run()
    drawn = generate(build_sd(), SD, ledger)
    record = ledger.close_run()
    assert torch.equal(drawn, expected)
    assert len(host.drawn) == (0 if method == "none" else 4)
    assert [preview is not None for _, _, preview in host.bars[0]] == [method != "none"] * 4
    assert (record.seconds["preview"] > 0) is (method != "none")


def test_a_preview_that_fails_is_given_up_and_not_the_picture(
    fake: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = fake(preview_method="auto")
    calls = []

    def broken(*args: Any) -> Any:
        calls.append(args)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(sys.modules["latent_preview"].Latent2RGBPreviewer, "decode_latent_to_preview_image", broken)
    drawn = generate(build_sd(), SD, ledger)
    assert torch.equal(drawn, bare(build_sd(), width=32, height=32))
    assert len(calls) == 1 and [preview for _, _, preview in host.bars[0]] == [None] * 4


def test_packed_latents_are_unpacked_for_the_preview() -> None:
    from balanced_offload.offload.adapters.comfyui_progress import _as_picture

    pipe = EXAMPLES["flux"].build()
    latents = torch.rand(1, 16, 6, 4)
    packed = pipe._pack_latents(latents, 1, 16, 6, 4)
    size = 6 * pipe.vae_scale_factor, 4 * pipe.vae_scale_factor
    assert torch.equal(_as_picture(pipe, packed, size), latents)


class Barred:
    """A pipeline that only has a bar; by `with`, or by iterating over it."""

    components: ClassVar[dict[str, Any]] = {}

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        from tqdm import tqdm

        return tqdm(iterable, total=total, disable=False, file=io.StringIO())

    def __call__(self, num_inference_steps: int, generator: Any = None) -> Any:
        with self.progress_bar(total=num_inference_steps) as bar:
            for _ in range(num_inference_steps):
                bar.update()
        for _ in self.progress_bar(range(2)):
            pass
        return SimpleNamespace(images=torch.zeros(1, 3, 8, 8))


def test_a_pipeline_that_does_not_call_back_is_listened_to(fake: Any, ledger: Ledger) -> None:
    host, pipe = fake(), Barred()
    generate(pipe, SD, ledger)
    steps = [value for value, _, _ in host.bars[0]]
    assert steps[:4] == [1, 2, 3, 4] and host.bars[0][0][1] == 4
    host.interrupt_after = 2  # one check before it begins
    with pytest.raises(Interrupted):
        generate(pipe, SD, ledger)
    assert len(host.bars[1]) == 1 and "progress_bar" not in pipe.__dict__


# ---------------------------------------------------------------------- what comes out
def test_pictures_of_every_form_become_one() -> None:
    from PIL import Image

    tensor = torch.rand(2, 3, 4, 6)
    expected = tensor.movedim(1, -1)
    assert torch.equal(pictures(SimpleNamespace(images=tensor), "P"), expected)
    assert torch.equal(pictures(SimpleNamespace(images=list(tensor)), "P"), expected)
    assert torch.equal(pictures(SimpleNamespace(images=expected.numpy()), "P"), expected)
    assert torch.equal(pictures(SimpleNamespace(frames=tensor[None]), "P"), expected)
    assert pictures(SimpleNamespace(images=tensor.bfloat16()), "P").dtype is torch.float32
    drawn = [Image.fromarray(numpy.full((4, 6, 3), value, numpy.uint8)) for value in (0, 51)]
    assert torch.equal(pictures(SimpleNamespace(images=drawn), "P")[1], torch.full((4, 6, 3), 0.2))
    grey = Image.fromarray(numpy.full((4, 6), 255, numpy.uint8))
    assert torch.equal(pictures(SimpleNamespace(images=[grey]), "P"), torch.ones(1, 4, 6, 3))
    assert pictures(SimpleNamespace(images=torch.full((1, 3, 2, 2), 1.5)), "P").max() == 1


def test_what_is_no_picture_names_the_class() -> None:
    with pytest.raises(GenerateError, match="pipeline: AudioPipeline returns SimpleNamespace, which has no pictures"):
        pictures(SimpleNamespace(audios=[1]), "AudioPipeline")
    with pytest.raises(GenerateError, match=r"AudioPipeline returned a tensor \[9, 2\]"):
        pictures(SimpleNamespace(images=torch.zeros(9, 2)), "AudioPipeline")


# ---------------------------------------------------------------------- how files are read
def _folder(tmp_path: Path, **files: torch.dtype) -> Path:
    """`unet__model` -> unet/model.safetensors with weights of that type."""
    for name, dtype in files.items():
        path = tmp_path / (name.replace("__", "/").replace("_DOT_", ".") + ".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.zeros(64, dtype=dtype), "b": torch.zeros(2, dtype=torch.int64)}, path)
    return tmp_path


CPU = torch.device("cpu")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("half", [True, False])
def test_auto_takes_the_type_of_the_files_where_the_host_computes_in_it(
    stored: torch.dtype, half: bool, tmp_path: Path, fake: Any
) -> None:
    fake(half=half)
    folder = _folder(tmp_path, unet__model=stored)
    assert choose_dtype("auto", folder, CPU) is (stored if half else torch.float32)
    assert choose_dtype("bf16", folder, CPU) is torch.bfloat16
    assert choose_dtype("fp32", folder, CPU) is torch.float32


def test_a_type_that_cannot_be_seen_is_left_to_the_loader(tmp_path: Path) -> None:
    assert choose_dtype("auto", tmp_path, CPU) is None
    (tmp_path / "unet").mkdir()
    for content in (b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x0a\0\0\0\0\0\0\0" + b'{"a": [1]}'):
        (tmp_path / "unet" / "model.safetensors").write_bytes(content)
        assert choose_dtype("auto", tmp_path, CPU) is None
    with pytest.raises(ValueError, match="dtype: got 'fp8', allowed are auto, bf16, fp16, fp32"):
        choose_dtype("fp8", tmp_path, CPU)


def test_the_variant_is_what_some_model_has_alone_or_what_the_type_asks_for(tmp_path: Path) -> None:
    half, full = torch.float16, torch.float32
    both = _folder(tmp_path / "both", **{"unet__m": full, "unet__m_DOT_fp16": half, "vae__m": full})
    assert choose_variant(both, full) is None and choose_variant(both, None) is None
    assert choose_variant(both, half) == "fp16" and choose_variant(both, torch.bfloat16) is None
    alone = _folder(tmp_path / "alone", **{"unet__m_DOT_fp16-00001-of-00002": half, "vae__m": full})
    assert choose_variant(alone, full) == "fp16"


def test_no_module_is_left_behind(fake: Any, ledger: Ledger) -> None:
    """A finished call holds no pipeline: what was dropped between prompts is gone."""
    import gc
    import weakref

    fake()
    pipe = build_sd()
    generate(pipe, SD, ledger)
    models = [weakref.ref(part) for part in pipe.components.values() if isinstance(part, nn.Module)]
    del pipe
    gc.collect()
    assert len(models) == 3 and not any(model() for model in models)
