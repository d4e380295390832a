"""Invariant: a test here runs unchanged on a real accelerator and on the simulated one, so that it cannot rot.

Every test that takes `accelerator` exists twice: `[real]` is marked gpu (run it with `-m gpu`), `[simulated]` runs with
the rest of the suite. `BALANCED_OFFLOAD_TEST_DEVICE` names another device for `[real]`: cuda:1, xpu, or vram.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload import OffloadPolicy, Session, simulator
from balanced_offload.offload.arbiter import slack
from balanced_offload.offload.backend import Backend, open_backend

DEVICE_VARIABLE = "BALANCED_OFFLOAD_TEST_DEVICE"
MIB = 1 << 20
SIMULATED_CARD = 512 * MIB
# Looked up when tests are collected: loading the simulator later makes it torch's current accelerator.
FOUND = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


@dataclass(frozen=True)
class Sizes:
    """How large the models of these tests are: large enough on a card for its figures to mean something."""

    width: int
    depth: int
    tokens: int
    dtype: torch.dtype
    headroom: int  # bytes, more than any forward here needs beside weights

    @property
    def layer(self) -> int:
        return self.width * self.width * self.dtype.itemsize


# 32 matrices of 32 MiB: a copy takes longer than launching does, and 1 GiB is more than the slack of a large card
CARD = Sizes(width=4096, depth=32, tokens=4096, dtype=torch.float16, headroom=256 * MIB)
SIMULATED = Sizes(width=512, depth=24, tokens=64, dtype=torch.float32, headroom=4 * MIB)


class Accelerator:
    """The device under test, and what its tests need of it. Bytes and seconds."""

    def __init__(self, backend: Backend, sizes: Sizes) -> None:
        self.backend = backend
        self.device = backend.device
        self.simulated = backend.rung == "simulated"
        self.sizes = sizes
        self.module: Any = torch.get_device_module(backend.device)

    def allocated(self) -> int:
        """Bytes of living tensors, after everything that can go is gone."""
        gc.collect()
        self.backend.synchronize()
        self.backend.empty_cache()
        return self.backend.memory().allocated

    def policy(self, mode: str, budget: int, **fields: Any) -> OffloadPolicy:
        """A policy under which this device has `budget` bytes, whatever its size: the rest of it is reserved."""
        now = self.backend.memory()
        reserve = now.total - now.others - now.allocated - budget
        assert reserve > 0, f"{budget} bytes are more than {self.backend.name} has"
        return OffloadPolicy(mode=mode, reserve=reserve, headroom=self.sizes.headroom, **fields)

    def budget(self, share: float, weights: int) -> int:
        """Room for `share` of `weights`, the activations, and what the arbiter never counts on."""
        return int(share * weights) + self.sizes.headroom + slack(self.backend.memory().total)

    def session(self, policy: OffloadPolicy) -> Session:
        return Session(policy, backend=self.backend)

    def seconds(self, work: Callable[[], Any], repeats: int = 7) -> float:
        """Median seconds on the device's own clock."""
        taken = []
        for _ in range(repeats):
            self.backend.synchronize()
            start = self.backend.mark()
            work()
            end = self.backend.mark()
            self.backend.synchronize()
            taken.append(self.backend.seconds(start, end))
        return median(taken)


def _real() -> torch.device:
    wanted = os.environ.get(DEVICE_VARIABLE)
    if wanted == "vram":
        return _simulated()
    if simulator.loaded() is not None:
        pytest.skip("the simulator is loaded in this process, and host memory is pinned for it: run with -m gpu")
    if wanted:
        return torch.device(wanted)
    if FOUND is None:
        pytest.skip(f"torch {torch.__version__} finds no accelerator here")
    return FOUND


def _simulated() -> torch.device:
    try:
        simulator.load("vram")
    except simulator.SimulatorUnavailable as reason:
        pytest.skip(str(reason))
    return torch.device("vram", 0)


@pytest.fixture(params=[pytest.param("real", marks=pytest.mark.gpu), "simulated"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    """The device under test, with a kernel run on it, so that libraries have their workspace before anyone counts."""
    device = _real() if request.param == "real" else _simulated()
    if device.type == "vram":
        vram = request.getfixturevalue("sim")
        vram.set_memory_cap(SIMULATED_CARD)
    backend = open_backend(device)
    if backend.shared_memory:
        pytest.skip(f"{backend.name} shares its memory with the host: every mode is none there")
    found = Accelerator(backend, SIMULATED if backend.rung == "simulated" else CARD)
    with torch.inference_mode():
        found.seconds(lambda: Toy(found.sizes, depth=1).to(device)(_tokens(found.sizes).to(device)), repeats=1)
        before = found.allocated()
        failed = request.session.testsfailed
        yield found
        left = found.allocated() - before
    if request.session.testsfailed == failed:  # the traceback of a failure holds tensors, which is no leak
        assert left == 0, f"the test left {left} bytes of device memory behind"


# ---------------------------------------------------------------------- models
class Toy(nn.Module):
    """`depth` square matrices in a row with a norm after each: weights of depth * width^2, copied one by one."""

    def __init__(self, sizes: Sizes, depth: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.layers = nn.ModuleList()
        self.norms = nn.ModuleList()
        for _ in range(sizes.depth if depth is None else depth):
            layer = nn.utils.skip_init(nn.Linear, sizes.width, sizes.width, bias=False, dtype=sizes.dtype)
            layer.weight.data.normal_(0, sizes.width**-0.5, generator=generator)
            self.layers.append(layer)
            self.norms.append(nn.LayerNorm(sizes.width, dtype=sizes.dtype))
        self.spike = 0  # bytes of a short-lived buffer in the middle of the forward
        self.interrupt = False  # once, in the middle of the forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = len(self.layers) // 2
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(x + layer(x))
            if index == middle and self.spike:
                torch.empty(self.spike, dtype=torch.uint8, device=x.device)
            if index == middle and self.interrupt:
                self.interrupt = False
                raise KeyboardInterrupt
        return x


class Decoder(nn.Module):
    """A VAE's way out: called by `decode`, with convolutions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1, dtype=sizes.dtype)
        self.last = nn.Conv2d(32, 3, 3, padding=1, dtype=sizes.dtype)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x[None, None])))


def _tokens(sizes: Sizes, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes.tokens, sizes.width, generator=generator).to(sizes.dtype)


class Pipeline:
    """Encode, denoise in steps, decode: three components on whatever holds them."""

    def __init__(self, accelerator: Accelerator) -> None:
        torch.manual_seed(0)
        self.accelerator = accelerator
        sizes = accelerator.sizes
        with torch.inference_mode(False):
            self.encoder = Toy(sizes, depth=4).eval().requires_grad_(False)
            self.denoiser = Toy(sizes).eval().requires_grad_(False)
            self.decoder = Decoder(sizes).eval().requires_grad_(False)

    @property
    def weights(self) -> int:
        modules = (self.encoder, self.denoiser, self.decoder)
        return sum(t.numel() * t.element_size() for m in modules for t in m.parameters())

    def add_to(self, session: Session) -> Session:
        session.add("text_encoder", self.encoder, role="text_encoder")
        session.add("denoiser", self.denoiser, role="denoiser")
        session.add("vae", self.decoder, role="vae", entries=("decode",))
        return session

    def session(self, policy: OffloadPolicy) -> Session:
        return self.add_to(self.accelerator.session(policy))

    def generate(self, steps: int = 3, seed: int = 1) -> torch.Tensor:
        """One picture, on the CPU."""
        x = self.encoder(_tokens(self.accelerator.sizes, seed).to(self.accelerator.device))
        for _ in range(steps):
            x = self.denoiser(x)
        return self.decoder.decode(x[:64, :64]).cpu()

    def reference(self, seed: int = 1) -> torch.Tensor:
        """The picture with everything resident and no session at all, on the same device."""
        modules = (self.encoder, self.denoiser, self.decoder)
        for module in modules:
            module.to(self.accelerator.device)
        picture = self.generate(seed=seed)
        for module in modules:
            module.to("cpu")
        return picture


@pytest.fixture
def pipeline(accelerator: Accelerator) -> Pipeline:
    return Pipeline(accelerator)
