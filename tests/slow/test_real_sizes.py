"""Invariant: pipelines of real size run under the caps that people have, in every mode of the table below.

Ghost mode: shapes, bytes, copies and memory are exact, large arithmetic is left out, so values are garbage and only
bytes and peaks are asserted. Weights are memory that nobody writes to: the test costs about 1 GiB of RAM.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from balanced_offload.offload import OffloadPolicy, simulator
from balanced_offload.offload.adapters.diffusers import offload
from balanced_offload.offload.models import build_pipeline, call_arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]

GIB = 1 << 30
DTYPES = {"sdxl": torch.float16, "flux1-dev": torch.bfloat16}
# model -> cap in GiB -> the modes that must run, and what auto resolves to once the activation peaks are learned.
# SDXL at 1024 weighs 6.5 GiB and its VAE, upcast, decodes in 3 GiB more; FLUX.1-dev weighs 31.4 GiB, its transformer
# 22.2. Mode none is left out where that is more than the cap; mode model steps down where a component is.
TABLE: dict[str, dict[int, tuple[str, str]]] = {
    "sdxl": {
        8: ("auto balanced model sequential", "balanced"),
        12: ("auto none balanced model sequential", "none"),
        16: ("auto none balanced model sequential", "none"),
        24: ("auto none balanced model sequential", "none"),
    },
    "flux1-dev": {
        8: ("auto balanced model sequential", "balanced"),
        12: ("auto balanced model sequential", "balanced"),
        16: ("auto balanced model sequential", "balanced"),
        24: ("auto balanced model sequential", "balanced"),
    },
}
ROWS = [(name, cap, mode) for name, caps in TABLE.items() for cap, (modes, _) in caps.items() for mode in modes.split()]


@pytest.fixture(scope="module")
def pipes() -> Iterator[dict[str, Any]]:
    """Built once per model, on the host, page-locked as the simulator counts it."""
    try:
        simulator.load("vram")
    except simulator.SimulatorUnavailable as reason:
        pytest.skip(str(reason))
    made: dict[str, Any] = {}
    yield made
    made.clear()
    gc.collect()


def pipeline(pipes: dict[str, Any], name: str) -> Any:
    if name not in pipes:
        pipes.clear()
        gc.collect()
        pipes[name] = build_pipeline(name, DTYPES[name], pinned=True)
    return pipes[name]


def draw(handle: Any, name: str) -> Any:
    """One picture in two steps; the record of the run."""
    handle(**{**call_arguments(name), "num_inference_steps": 2, "output_type": "pt"})
    return handle.session.record


@pytest.mark.parametrize(("name", "cap", "mode"), ROWS)
def test_it_runs_under_the_cap(sim: ModuleType, pipes: dict[str, Any], name: str, cap: int, mode: str) -> None:
    sim.configure(ghost=1 << 20)
    sim.set_memory_cap(cap * GIB)
    pipe = pipeline(pipes, name)
    kept = dict(pipe.scheduler.__dict__)
    handle = offload(pipe, OffloadPolicy(mode=mode), device="vram")
    try:
        session = handle.session
        for run in range(2):
            record = draw(handle, name)
            assert record.complete
            peak = max(stage.peak for stage in record.stages if stage.peak is not None)  # None: it ran out
            assert 0 < peak <= cap * GIB and session.stages.peak_allocated <= cap * GIB
            assert session.stages.high_crossings == 0
            assert record.bytes_d2h == 0
            assert len(record.steps) == 2
            stepped = [event["data"]["step"] for event in record.events if event["kind"] == "oom"]
            heaviest = max(m.component.weight_bytes for m in session.components.values())
            if mode != "model" or heaviest < cap * GIB * 0.9:
                assert stepped == [], f"run {run} ran out of memory and stepped down"
        if mode == "auto":
            assert session.resolved.mode.value == TABLE[name][cap][1]
            if session.resolved.mode.value == "none":
                vae = session.components[
                    "vae"
                ].component.weight_bytes  # SDXL's is cast to float32 and back each time: twice its size
                assert record.bytes_h2d <= 2 * vae
        if mode == "balanced" and session.resolved.high is not None and not session.resolved.fits:
            denoiser = session.components["unet" if name == "sdxl" else "transformer"].component.weight_bytes
            if denoiser > session.resolved.high:
                assert peak >= 0.85 * min(session.resolved.high, denoiser), "most of what it may use lies idle"
    finally:
        handle.detach()
        pipe.scheduler.__dict__.clear()
        pipe.scheduler.__dict__.update(kept)  # it keeps the last run's steps where the run was
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            assert {t.device.type for t in part.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", list(TABLE))
def test_none_says_that_it_does_not_fit(sim: ModuleType, pipes: dict[str, Any], name: str) -> None:
    """Weights alone are over the cap: refused at once, with the figures, and nothing half-attached."""
    sim.configure(ghost=1 << 20)
    sim.set_memory_cap(6 * GIB)
    pipe = pipeline(pipes, name)
    with pytest.raises(torch.OutOfMemoryError, match="Mode none keeps everything resident"):
        offload(pipe, OffloadPolicy(mode="none"), device="vram")
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.device.type for module in modules for p in module.parameters()} == {"cpu"}
    handle = offload(pipe, OffloadPolicy(mode="sequential"), device="vram")
    handle.detach()


def test_sdxl_moves_nothing_after_the_first_generation(sim: ModuleType, pipes: dict[str, Any]) -> None:
    """The second seed's scenario at real size on a 12 GiB card: a new prompt each time, mode auto, mode none beside it.

    In bf16, where the pipeline casts its VAE to nothing and back.
    """
    sim.configure(ghost=1 << 20)
    sim.set_memory_cap(12 * GIB)
    pipes.clear()
    gc.collect()
    pipe = pipes["sdxl bf16"] = build_pipeline("sdxl", torch.bfloat16, pinned=True)
    kept = dict(pipe.scheduler.__dict__)
    walls: dict[str, list[float]] = {}
    for mode in ("none", "auto"):
        with offload(pipe, OffloadPolicy(mode=mode), device="vram") as handle:
            moved = []
            for turn in range(6):
                sim.reset_clock()
                options = {"prompt": f"picture {'abcdef'[turn]}", "num_inference_steps": 2, "output_type": "pt"}
                handle(**{**call_arguments("sdxl"), **options})
                moved.append(handle.record.bytes_h2d)
                walls.setdefault(mode, []).append(handle.record.wall_s)
            weights = sum(m.component.weight_bytes for m in handle.session.components.values())
            assert moved == ([0] * 6 if mode == "none" else [weights] + [0] * 5)
            assert handle.session.resolved.mode.value == "none"
    pipe.scheduler.__dict__.clear()
    pipe.scheduler.__dict__.update(kept)  # it keeps the last run's steps where the run was
    for auto, none in zip(walls["auto"][1:], walls["none"][1:], strict=True):
        assert auto <= 1.01 * none
