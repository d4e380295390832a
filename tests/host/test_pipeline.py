"""Invariant: in a host a pipeline draws what diffusers draws, its files are read once, and neither side starves the
other of memory."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from . import tiny
from .graphs import Builder, Graph, policy_node
from .inprocess import load_model, sample
from .server import HostError

MODES = ("none", "balanced", "model", "sequential", "auto")
CALL: dict[str, Any] = {"prompt": "a lighthouse", "negative": "fog", "width": 64, "height": 64}
MORE: dict[str, Any] = {"steps": 3, "guidance": 4.0, "seed": 9}


def start_image() -> torch.Tensor:
    """[1, 64, 64, 3] in 0..1."""
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))


def draw(pipe: Any, image: torch.Tensor | None = None, **changed: Any) -> torch.Tensor:
    """What diffusers draws from the values of a node, called by hand."""
    from diffusers import AutoPipelineForImage2Image

    given = {**CALL, **MORE, **changed}
    call = {
        "prompt": given["prompt"],
        "negative_prompt": given["negative"],
        "num_inference_steps": given["steps"],
        "guidance_scale": given["guidance"],
        "generator": torch.Generator("cpu").manual_seed(given["seed"]),
        "output_type": "pt",
    }
    if image is None:
        call |= {"width": given["width"], "height": given["height"]}
    else:
        pipe = AutoPipelineForImage2Image.from_pipe(pipe)
        call |= {"image": image.movedim(-1, 1).contiguous(), "strength": 0.67}
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call).images.cpu().movedim(1, -1)


@pytest.fixture
def folder(models: Path) -> Path:
    return models / "diffusers" / "tiny_sdxl"


@pytest.fixture
def loaded(pack: Any) -> Iterator[Callable[..., Any]]:
    """Opens the tiny pipeline under a policy, and gives everything back at the end."""
    adapter, device = pack("offload.adapters.comfyui_pipeline"), pack("offload.adapters.comfyui_device")
    files, policies = pack("nodes.pipeline_files"), pack("offload.policy")

    def open_it(folder: Path, **fields: Any) -> Any:
        policy = policies.OffloadPolicy(**fields)
        return adapter.pipelines().open(folder, folder.name, policy, stamp=files.stamp(folder), dtype="fp32")

    yield open_it
    gc.collect()
    adapter.pipelines().drop_unused()
    held = dict(adapter.pipelines()._loaded)
    adapter.pipelines()._loaded.clear()
    for pipeline in held.values():  # a failed test's traceback
        pipeline.detach()
    device.close_device_session()


@pytest.fixture
def request_of(pack: Any) -> Callable[..., Any]:
    kind = pack("offload.adapters.comfyui_generate").Request

    def make(image: torch.Tensor | None = None, **changed: Any) -> Any:
        return kind(**{**CALL, **MORE, **changed}, image=image, strength=0.67)

    return make


@pytest.fixture
def bare(pack: Any, folder: Path) -> Callable[..., torch.Tensor]:
    """Draws with a pipeline of its own, moved to a device whole, and lets go of it."""

    def run(device: Any, image: torch.Tensor | None = None, **changed: Any) -> torch.Tensor:
        pipe = pack("offload.adapters.loading").load_pipeline(folder, torch_dtype=torch.float32).to(device)
        found = draw(pipe, image, **changed)
        del pipe
        gc.collect()
        return found

    return run


def fields(mode: str) -> dict[str, Any]:
    """Balanced with a mark below the denoiser, so that it streams."""
    return {"mode": mode, "high": "1MiB"} if mode == "balanced" else {"mode": mode}


# ---------------------------------------------------------------------- equal
@pytest.mark.parametrize("mode", MODES)
def test_on_the_cpu_it_draws_what_diffusers_draws(
    mode: str, in_process: ModuleType, folder: Path, loaded: Any, request_of: Any, bare: Any
) -> None:
    pipeline = loaded(folder, **fields(mode))
    for image in (None, start_image()):
        expected = bare("cpu", image)
        with torch.inference_mode():
            first, second = (pipeline.generate(request_of(image)) for _ in range(2))
        assert first.shape == (1, 64, 64, 3) and first.dtype is torch.float32 and first.device.type == "cpu"
        assert first.std() > 0.01 and torch.equal(first, expected) and torch.equal(second, expected)


@pytest.mark.parametrize("mode", MODES)
def test_on_the_accelerator_it_draws_what_diffusers_draws_there(
    mode: str, sim_host: Any, folder: Path, loaded: Any, request_of: Any, bare: Any
) -> None:
    expected = {image is None: bare(sim_host.device, image) for image in (None, start_image())}
    pipeline = loaded(folder, **fields(mode))
    sim_host.moved()
    with torch.inference_mode():
        for image in (None, start_image(), None):
            drawn = pipeline.generate(request_of(image))
            assert torch.equal(drawn, expected[image is None])
    assert sim_host.moved()["h2d_bytes"] > 0, "it ran on the device"


def test_each_mode_does_what_it_says(sim_host: Any, folder: Path, loaded: Any, request_of: Any) -> None:
    """Bytes moved in the second run: nothing where it fits or is whole, everything where it streams."""
    moved = {}
    for mode in MODES:
        pipeline = loaded(folder, **fields(mode))
        with torch.inference_mode():
            pipeline.generate(request_of())
            sim_host.moved()
            pipeline.generate(request_of())
        moved[mode] = sim_host.moved()["h2d_bytes"]
    whole = sum(patcher.hosted.managed.component.device_bytes for patcher in pipeline.patchers)
    assert moved["none"] < 1 << 20 and moved["auto"] < 1 << 20  # prompts, noise and steps
    assert moved["sequential"] > whole
    assert moved["balanced"] > 0.3 * whole
    assert moved["model"] > whole


# ---------------------------------------------------------------------- files
class Opened:
    """Weight files opened since `clear`, by Python's own audit."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._on = True
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if self._on and event == "open" and isinstance(args[0], str) and args[0].endswith((".safetensors", ".json")):
            self.files.append(args[0])


def test_changing_policy_prompt_or_kind_opens_no_file(
    sim_host: Any, folder: Path, loaded: Any, request_of: Any
) -> None:
    first = loaded(folder, mode="auto")
    with torch.inference_mode():
        first.generate(request_of())
        first.generate(request_of(start_image()))
        opened = Opened()
        second = loaded(folder, mode="balanced", high="1MiB")
        second.generate(request_of(prompt="a harbour"))
        first.generate(request_of(start_image(), prompt="a pier"))
    opened._on = False
    assert second.pipe is first.pipe and second is not first
    assert opened.files == []


def test_a_fitting_set_moves_no_weight_when_policy_or_prompt_change(
    sim_host: Any, folder: Path, loaded: Any, request_of: Any
) -> None:
    first = loaded(folder, mode="auto")
    with torch.inference_mode():
        first.generate(request_of())
        session = first.session
        session.close_run()
        with session.run():
            first.generate(request_of(prompt="a harbour"))
            second = loaded(folder, mode="auto", headroom="64MiB")
            second.generate(request_of(prompt="a pier"))
    assert (session.record.bytes_h2d, session.record.bytes_d2h, session.record.move_count) == (0, 0, 0)
    assert session.record.complete and session.record.seconds["denoise"] > 0


def test_files_that_changed_are_read_again(in_process: ModuleType, models: Path, tmp_path: Path, loaded: Any) -> None:
    copied = tmp_path / "pipe"
    shutil.copytree(models / "diffusers" / "tiny_sdxl", copied)
    first = loaded(copied)
    assert loaded(copied).pipe is first.pipe
    os.utime(copied / "unet" / "config.json", ns=(5, 5))
    assert loaded(copied).pipe is not first.pipe


def test_what_no_output_refers_to_is_dropped_between_prompts(
    pack: Any, sim_host: Any, folder: Path, loaded: Any, request_of: Any
) -> None:
    adapter = pack("offload.adapters.comfyui_pipeline")
    first, second = loaded(folder, mode="none"), loaded(folder, mode="auto")
    with torch.inference_mode():
        first.generate(request_of())
    models = [weakref.ref(patcher.model) for patcher in first.patchers]
    entries = len(sim_host.management.current_loaded_models)
    assert entries == len(models) == 4
    del first
    gc.collect()
    adapter.pipelines().drop_unused()
    assert len(sim_host.management.current_loaded_models) == entries and all(model() for model in models)
    del second
    gc.collect()
    adapter.pipelines().drop_unused()
    assert sim_host.management.current_loaded_models == []
    gc.collect()
    assert not any(model() for model in models)


# ---------------------------------------------------------------------- memory
def test_the_host_counts_and_evicts_it(sim_host: Any, folder: Path, loaded: Any, request_of: Any, bare: Any) -> None:
    expected = bare(sim_host.device)
    pipeline = loaded(folder, mode="none")
    with torch.inference_mode():
        pipeline.generate(request_of())
    held = {entry.model for entry in sim_host.management.current_loaded_models}
    assert held == set(pipeline.patchers)
    weights = sum(patcher.loaded_size() for patcher in pipeline.patchers)
    assert weights == sum(p.hosted.managed.component.device_bytes for p in pipeline.patchers)
    before = sim_host.vram.memory_allocated()
    management = sim_host.management
    management.free_memory(management.get_free_memory(sim_host.device) + weights // 2, sim_host.device)
    assert before - sim_host.vram.memory_allocated() >= weights // 2
    management.unload_all_models()
    assert sum(patcher.loaded_size() for patcher in pipeline.patchers) == 0
    assert management.current_loaded_models == []
    with torch.inference_mode():
        assert torch.equal(pipeline.generate(request_of()), expected)
    assert len(management.current_loaded_models) == 4


@pytest.mark.parametrize("mode", ["auto", "balanced", "model", "sequential"])
def test_it_runs_under_a_cap_that_holds_half_of_it(
    mode: str, sim_host: Any, folder: Path, loaded: Any, request_of: Any, bare: Any, cap: Any
) -> None:
    expected = bare(sim_host.device)
    pipeline = loaded(folder, mode=mode)
    sizes = [p.hosted.managed.component.device_bytes for p in pipeline.patchers]
    limit = max(sum(sizes) // 2, max(sizes) + (6 << 20) if mode == "model" else 0)
    cap(limit)
    sim_host.peak()
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(pipeline.generate(request_of()), expected)
    assert sim_host.peak() <= limit


def test_pipeline_and_native_model_give_way_to_each_other(
    pack: Any, sim_host: Any, folder: Path, models: Path, loaded: Any, request_of: Any, bare: Any, cap: Any
) -> None:
    """Neither fits beside the other; both are right, in turns."""
    apply_policy = pack("offload.adapters.comfyui").apply_policy
    tiny.make(models, "diffusion_models/tiny_sd15")
    native = load_model(models, "sd15")
    expected = bare(sim_host.device)
    native.model.memory_required = lambda *_, **__: 0  # pins the batching, which else depends on free memory
    native_expected = sample(native, "sd15")
    cap(native.model_size() + (24 << 20))
    sim_host.management.unload_all_models()
    pipelines = [loaded(folder, mode="auto"), loaded(folder, mode="none")]
    for model in (native, apply_policy(pipelines[0].policy, native).obj):
        for pipeline in pipelines:
            with torch.inference_mode():
                assert torch.equal(pipeline.generate(request_of()), expected)
            assert torch.equal(sample(model, "sd15"), native_expected)
        sim_host.management.unload_all_models()
    del model
    cap(8 << 30)


def test_runs_in_a_row_leave_the_device_as_it_is(sim_host: Any, folder: Path, loaded: Any, request_of: Any) -> None:
    pipelines = [loaded(folder, **fields(mode)) for mode in MODES]
    allocated = []
    with torch.inference_mode():
        for turn in range(8):
            for pipeline in pipelines:
                pipeline.generate(request_of(start_image() if turn % 2 else None, seed=turn))
            gc.collect()
            allocated.append(sim_host.vram.memory_allocated())
    assert len(set(allocated[2:])) == 1
    assert len(sim_host.management.current_loaded_models) == 4


# ---------------------------------------------------------------------- trouble
def test_mode_none_that_does_not_fit_says_so_and_auto_goes_on(
    sim_host: Any, folder: Path, loaded: Any, request_of: Any, bare: Any, cap: Any
) -> None:
    expected = bare(sim_host.device)
    whole, auto = loaded(folder, mode="none", on_oom="stop"), loaded(folder, mode="auto")
    cap(12 << 20)
    with torch.inference_mode():
        with pytest.raises(torch.OutOfMemoryError, match="Mode none keeps everything resident"):
            whole.generate(request_of())
        sim_host.management.unload_all_models()  # as the host does after an OOM
        assert torch.equal(auto.generate(request_of()), expected)


def test_the_hosts_own_previews_are_shown_and_change_nothing(
    pack: Any, sim_host: Any, folder: Path, loaded: Any, request_of: Any, bare: Any, monkeypatch: Any
) -> None:
    import comfy.cli_args
    import comfy.utils

    shown: list[Any] = []
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Auto)
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: shown.append((value, total, preview))
    )
    # the tiny VAE is of no known space: the host's table for the space of its kind will do
    monkeypatch.setattr(pack("offload.adapters.comfyui_progress"), "_SPACES", {(4, 1.0): "SDXL"})
    expected = bare(sim_host.device)
    pipeline = loaded(folder, mode="auto")
    with torch.inference_mode(), pipeline.session.run():
        assert torch.equal(pipeline.generate(request_of()), expected)
    assert [(value, total) for value, total, _ in shown] == [(1, 3), (2, 3), (3, 3)]
    assert all(preview[0] == "JPEG" and preview[1].size == (16, 16) for _, _, preview in shown)
    assert 0 < pipeline.session.record.seconds["preview"] < pipeline.session.record.wall_s


@pytest.mark.parametrize("mode", ["none", "balanced"])
def test_after_an_interrupt_or_an_oom_the_next_run_is_as_the_first(
    mode: str, sim_host: Any, folder: Path, loaded: Any, request_of: Any, bare: Any, cap: Any
) -> None:
    expected = bare(sim_host.device)
    pipeline = loaded(folder, **fields(mode), on_oom="stop")
    management = sim_host.management
    with torch.inference_mode():
        assert torch.equal(pipeline.generate(request_of()), expected)
        kept = sim_host.vram.memory_allocated()
        unet = pipeline.pipe.unet
        calls = []

        def interrupt(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 2:
                management.interrupt_current_processing()

        handle = unet.register_forward_pre_hook(interrupt)
        with pytest.raises(management.InterruptProcessingException):
            pipeline.generate(request_of())
        handle.remove()
        assert len(calls) == 2, "the interrupt ends it after the step"
        gc.collect()
        assert sim_host.vram.memory_allocated() <= kept
        assert torch.equal(pipeline.generate(request_of()), expected)

        handle = unet.register_forward_pre_hook(_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            pipeline.generate(request_of())
        handle.remove()
        management.unload_all_models()  # as the host does after an OOM
        assert torch.equal(pipeline.generate(request_of()), expected)


def _out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("vram out of memory: tried to allocate 1.00 GiB")


def test_models_that_were_given_back_are_attached_anew(
    pack: Any, sim_host: Any, folder: Path, loaded: Any, request_of: Any, bare: Any
) -> None:
    expected = bare(sim_host.device)
    pipeline = loaded(folder, mode="auto")
    with torch.inference_mode():
        pipeline.generate(request_of())
        pack("offload.adapters.comfyui_device").restore_stock()
        try:  # a pipeline has no stock behaviour to go back to
            assert torch.equal(pipeline.generate(request_of()), expected)
        finally:
            pack("offload.adapters.comfyui_device").restore_stock(False)
        for patcher in pipeline.patchers:
            patcher.hosted.release()
        devices = {p.device.type for patcher in pipeline.patchers for p in patcher.model.parameters()}
        assert devices == {"cpu"}
        assert torch.equal(pipeline.generate(request_of()), expected)


def test_the_last_policy_counts(sim_host: Any, folder: Path, loaded: Any, request_of: Any) -> None:
    first, second = loaded(folder, mode="none"), loaded(folder, mode="sequential")
    with torch.inference_mode():
        first.generate(request_of())
        assert {p.hosted.managed.policy.mode.value for p in first.patchers} == {"none"}
        second.generate(request_of())
        assert {p.hosted.managed.policy.mode.value for p in first.patchers} == {"sequential"}
        first.generate(request_of())
        assert {p.hosted.managed.policy.mode.value for p in first.patchers} == {"none"}


# ---------------------------------------------------------------------- through the server
def graph(name: str = "tiny_sdxl", mode: str | None = None, twice: bool = False, **changed: Any) -> Graph:
    """A picture from the pipeline, and with `twice` another one from that; digests of both."""
    build = Builder()
    policy = {} if mode is None else {"policy": policy_node(build, fields(mode))}
    loader = build.add("PipelineLoaderWithOffload", pipeline_name=name, **policy)
    given = {**CALL, **MORE, **changed, "pipeline": [loader, 0]}
    first = build.add("PipelineGenerate", **given)
    build.add("TestDigest", value=[first, 0])
    if twice:
        second = build.add("PipelineGenerate", **given, image=[first, 0], strength=0.67)
        build.add("TestDigest", value=[second, 0])
    return build.graph


def digests(bare: Any, device: Any) -> list[str]:
    """Of what diffusers draws on a device: from the prompt, and from that picture."""
    digest = sys.modules["host_test_nodes"].digest
    first = bare(device)
    return [digest(first), digest(bare(device, first))]


@pytest.fixture
def expected(management: ModuleType, bare: Any) -> list[str]:
    return digests(bare, "cpu")


def test_every_mode_on_the_server_gives_the_picture_of_diffusers_and_opens_no_file(
    server: Any, expected: list[str]
) -> None:
    _every_mode(server, expected)


def test_so_it_does_on_a_server_with_the_accelerator(sim_server: Any, sim_host: Any, bare: Any) -> None:
    reports = _every_mode(sim_server, digests(bare, sim_host.device))
    for mode in ("model", "sequential"):
        assert reports[mode]["totals"]["bytes_h2d"] > 0
    assert reports["auto"]["verdict"] == "resident"


def _every_mode(server: Any, expected: list[str]) -> dict[str, Any]:
    """Runs them all, the files already read -> their reports."""
    assert server.digests(graph(twice=True)) == expected
    server.opened()
    reports = {}
    for mode in MODES:
        queued = server.queue(graph(mode=mode, twice=True))
        outputs = server.wait(queued)["outputs"]
        assert [outputs[node]["digest"][0] for node in sorted(outputs) if "digest" in outputs[node]] == expected
        said = [output["text"][0] for output in outputs.values() if "text" in output]
        assert any(text.startswith("Pipeline") for text in said)
        report = reports[mode] = server.get(f"/offload/report/{queued}")
        assert report["world"] == "pipeline" and report["policy"]["mode"] == mode
        assert report["totals"]["denoise_s"] > 0 and report["totals"]["decode_s"] > 0
        assert report["totals"]["bytes_d2h"] == 0
    assert server.opened() == []
    return reports


def test_steps_are_shown_and_an_interrupt_leaves_nothing(server: Any, expected: list[str]) -> None:
    with server.listen() as listener:
        queued = server.queue(graph(seed=10, steps=5), listener.client)
        assert server.wait(queued)["status"]["status_str"] == "success"
        values = [data["value"] for data in listener.of("progress") if data["prompt_id"] == queued]
        assert values == sorted(values) and values[-1] == 5 and listener.of("progress")[-1]["max"] == 5
        queued = server.queue(graph(steps=900), listener.client)
        listener.wait_for("progress", prompt_id=queued)
        server.interrupt()
        status = server.wait(queued)["status"]
    assert status["status_str"] == "error"
    assert "execution_interrupted" in [message[0] for message in status["messages"]]
    assert server.digests(graph(twice=True)) == expected


def test_after_free_it_is_read_again_and_right(server: Any, expected: list[str]) -> None:
    assert server.digests(graph(twice=True)) == expected
    server.opened()
    server.free()
    until = time.monotonic() + 30  # what nobody holds is dropped while no prompt runs, about once a second
    while server.get("/offload/status")["components"] != [] and time.monotonic() < until:
        time.sleep(0.1)
    assert server.digests(graph(twice=True, mode="none")) == expected
    # the library that reads the text encoders opens them where no audit sees it
    assert "diffusion_pytorch_model.safetensors" in server.opened()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny_sdlx", ("Near it are tiny_sdxl",)),
        ("../checkpoints", ("refused", "extra_model_paths.yaml")),
        ("/etc", ("refused",)),
    ],
)
def test_a_wrong_name_is_refused_before_anything_runs(server: Any, name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(HostError) as caught:
        server.queue(graph(name))
    assert "the prompt was refused" in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_pickled_pipeline_is_refused_and_the_queue_goes_on(server: Any, models: Path, expected: list[str]) -> None:
    place = models / "diffusers" / "pickled"
    shutil.copytree(models / "diffusers" / "tiny_sdxl", place)
    try:
        weights = place / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        info = server.object_info("PipelineLoaderWithOffload")["PipelineLoaderWithOffload"]["input"]["required"]
        listed = info["pipeline_name"]
        assert "pickled" in str(listed) and "tiny_sdxl" in str(listed)
        status = server.wait(server.queue(graph("pickled")))["status"]
    finally:
        shutil.rmtree(place)
    error = next(data for kind, data in status["messages"] if kind == "execution_error")
    assert error["node_type"] == "PipelineLoaderWithOffload"
    assert "component 'unet' has only pickled weights" in error["exception_message"]
    assert "safe_serialization" in error["exception_message"]
    assert server.digests(graph(twice=True)) == expected


def test_the_wrong_socket_and_values_name_the_remedy(server: Any) -> None:
    wrong = graph()
    node = next(key for key, value in wrong.items() if value["class_type"] == "PipelineGenerate")
    wrong["90"] = {"class_type": "VAELoader", "inputs": {"vae_name": "taesd"}}
    wrong[node]["inputs"]["pipeline"] = ["90", 0]
    with pytest.raises(HostError, match="OFFLOAD_PIPELINE"):
        server.queue(wrong)
    little = graph(twice=True)
    for value in little.values():
        if "strength" in value["inputs"]:
            value["inputs"]["strength"] = 0.1
    status = server.wait(server.queue(little))["status"]
    error = next(data for kind, data in status["messages"] if kind == "execution_error")
    assert "strength: got 0.1 with 3 steps" in error["exception_message"]
