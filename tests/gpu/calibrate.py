"""Measures what the simulator's clock assumes. Invariant: a file in results/ was measured on a real device, never less.

    python tests/gpu/calibrate.py [--device cuda|vram] [--out FILE]

The same measurements run twice: on the device, and on the simulated accelerator with the parameters that the first run
gave. Copies, kernels and matrix products define those parameters, so their ratio says only how well the clock's
formula holds over sizes; the models were not used to set anything, so theirs says how far the clock can be trusted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGE = "balanced_offload"
SCHEMA = "offload-calibration/1"
REPEATS = 7
MIB = 1 << 20

if PACKAGE not in sys.modules:
    # The checkout's top folder is the package, whatever it is called; an installed copy is never measured by mistake.
    _spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert _spec is not None and _spec.loader is not None
    _package = importlib.util.module_from_spec(_spec)
    sys.modules[PACKAGE] = _package
    _spec.loader.exec_module(_package)

from balanced_offload.offload import OffloadPolicy, Session, simulator  # noqa: E402
from balanced_offload.offload.backend import Backend, NoAcceleratorError, open_backend  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """How much is measured. Bytes for copies, the side of square matrices, layers of the stack of Linear layers."""

    copies: tuple[int, ...]
    bandwidth: int
    matrix16: int
    matrix32: int
    small_ops: int
    stack_width: int
    stack_depth: int
    stack_tokens: int

    @property
    def stack_bytes(self) -> int:
        return self.stack_depth * self.stack_width**2 * torch.float16.itemsize


SIZES = {
    # 32 matrices of 32 MiB are 1 GiB of weights
    "card": Sizes((1 * MIB, 16 * MIB, 256 * MIB), 1024 * MIB, 8192, 8192, 2000, 4096, 32, 4096),
    # for the test of the method, within seconds
    "small": Sizes((1 * MIB, 2 * MIB, 8 * MIB), 8 * MIB, 1024, 1024, 200, 512, 12, 256),
}


class Bench:
    """One device and its clocks. All times are seconds."""

    def __init__(self, backend: Backend, sizes: Sizes) -> None:
        self.backend = backend
        self.device = backend.device
        self.sizes = sizes
        module: Any = torch.get_device_module(backend.device)
        # the simulated device's host has a virtual clock too
        self.host: Callable[[], float] = module.host_clock if backend.rung == "simulated" else time.perf_counter
        self.figures: dict[str, float] = {}

    def device_seconds(self, work: Callable[[], Any], count: int = 1) -> float:
        """Median seconds of `work` on the device, as one of `count` in a row.

        The first `count` run ahead of the first mark: they keep the device busy while the rest is queued, so that
        the marks lie around device time and not around the host's.
        """
        taken = []
        for _ in range(REPEATS):
            self.backend.synchronize()
            for _ in range(count):
                work()
            start = self.backend.mark()
            for _ in range(count):
                work()
            end = self.backend.mark()
            self.backend.synchronize()
            taken.append(self.backend.seconds(start, end) / count)
        return median(taken)

    def host_seconds(self, work: Callable[[], Any], count: int) -> float:
        """Median seconds that the host spends to queue `work`."""
        taken = []
        for _ in range(REPEATS):
            self.backend.synchronize()
            start = self.host()
            for _ in range(count):
                work()
            taken.append((self.host() - start) / count)
        self.backend.synchronize()
        return median(taken)

    # ------------------------------------------------------------------ what the clock is made of
    def copies(self) -> None:
        """Copies in both directions, from pinned and from pageable memory, and the fixed cost of one."""
        for kind in ("pinned", "pageable"):
            for nbytes in self.sizes.copies:
                host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=kind == "pinned")
                there = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
                size = f"{nbytes // MIB}MiB"
                self.figures[f"h2d.{kind}.{size}"] = self.device_seconds(_copy(host, there), 4)
                self.figures[f"d2h.{kind}.{size}"] = self.device_seconds(_copy(there, host), 4)
        host = torch.ones(4, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(4, dtype=torch.uint8, device=self.device)
        self.figures["h2d.pinned.4B"] = self.device_seconds(_copy(host, there), self.sizes.small_ops)

    def kernels(self) -> None:
        """A small operation, matrix products in both precisions, and a copy within device memory."""
        small = torch.zeros(16, device=self.device)
        self.figures["launch"] = self.host_seconds(lambda: small.add_(1), self.sizes.small_ops)
        for name, side, dtype in (
            ("matmul.fp16", self.sizes.matrix16, torch.float16),
            ("matmul.fp32", self.sizes.matrix32, torch.float32),
        ):
            a = torch.ones(side, side, device=self.device).to(dtype)
            out = torch.empty_like(a)
            self.figures[name] = self.device_seconds(lambda a=a, out=out: torch.mm(a, a, out=out), 5)
        here = torch.ones(self.sizes.bandwidth, dtype=torch.uint8, device=self.device)
        there = torch.empty_like(here)
        self.figures["copy.on_device"] = self.device_seconds(lambda: there.copy_(here), 5)

    # ------------------------------------------------------------------ what it is asked to foretell
    def stack(self) -> None:
        """A stack of Linear layers, resident, and streamed by our engine leaf by leaf."""
        sizes = self.sizes
        side, dtype = sizes.stack_width, torch.float16
        layers = [nn.utils.skip_init(nn.Linear, side, side, bias=False, dtype=dtype) for _ in range(sizes.stack_depth)]
        model = nn.Sequential(*layers).requires_grad_(False)
        for weight in model.parameters():
            weight.fill_(1 / side)
        x = torch.ones(sizes.stack_tokens, side, device=self.device).to(dtype)
        for mode, name in (("none", "stack.resident"), ("sequential", "stack.streamed")):
            with Session(OffloadPolicy(mode=mode), backend=self.backend) as session:
                session.add("stack", model)
                for _ in range(3):  # the first forward records the order, the second runs ahead
                    model(x)
                self.figures[name] = self.device_seconds(lambda: model(x))
                moved = session.ledger.total_bytes_h2d
                assert moved >= 3 * sizes.stack_bytes or mode == "none", "nothing was streamed"

    def digits(self) -> None:
        """A real model: one forward of the digits pipeline's denoiser; left out where diffusers is not installed."""
        if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("transformers") is None:
            return
        from balanced_offload.offload.demo.pipeline import load_pipeline

        unet = load_pipeline(torch.float32).unet.requires_grad_(False).to(self.device)
        config = unet.config
        size = config.sample_size if isinstance(config.sample_size, int) else 8
        text = torch.ones(2, 8, config.cross_attention_dim, device=self.device)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {
            "text_embeds": torch.ones(2, pooled, device=self.device),
            "time_ids": torch.ones(2, 6, device=self.device),
        }
        x = torch.ones(2, config.in_channels, size, size, device=self.device)
        step = torch.tensor(500.0, device=self.device)

        def forward() -> Any:
            return unet(x, step, encoder_hidden_states=text, added_cond_kwargs=added)

        forward()
        self.figures["digits.unet"] = self.device_seconds(forward)

    def all(self) -> dict[str, float]:
        """Every item in seconds, by name."""
        with torch.no_grad():
            for part in (self.copies, self.kernels, self.stack, self.digits):
                part()
                self.backend.empty_cache()
        return self.figures


def _copy(source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
    return lambda: target.copy_(source, non_blocking=True)


def parameters_of(figures: dict[str, float], sizes: Sizes) -> dict[str, float]:
    """The clock's parameters that explain the figures: rates from the slope over size, so that fixed costs drop out."""
    small, large = min(sizes.copies), max(sizes.copies)

    def rate(kind: str) -> float:
        slope = figures[f"{kind}.{large // MIB}MiB"] - figures[f"{kind}.{small // MIB}MiB"]
        return (large - small) / slope

    found = {f"{way}_{kind}": rate(f"{way}.{kind}") for way in ("h2d", "d2h") for kind in ("pinned", "pageable")}
    found["copy_lat"] = figures["h2d.pinned.4B"] - 4 / found["h2d_pinned"]
    found["launch"] = figures["launch"]
    found["hbm"] = 2 * sizes.bandwidth / figures["copy.on_device"]
    found["flops16"] = 2 * sizes.matrix16**3 / figures["matmul.fp16"]
    found["flops32"] = 2 * sizes.matrix32**3 / figures["matmul.fp32"]
    return found


def simulate(parameters: dict[str, float], name: str, memory: int) -> dict[str, float]:
    """The same items by the simulator's clock; its options are put back. Not in a process with another device."""
    vram = simulator.load("vram")
    options, cap = vram.configuration(), vram.memory_cap()
    try:
        # the arithmetic would take a CPU minutes, and nobody looks at its results
        vram.configure(**parameters, ghost=1 << 16, python_time=0)
        vram.set_memory_cap(memory)
        vram.reset_clock()
        return Bench(open_backend("vram"), SIZES[name]).all()
    finally:
        vram.configure(**options)
        vram.set_memory_cap(cap)


def simulate_elsewhere(parameters: dict[str, float], name: str, memory: int) -> tuple[dict[str, float] | None, str]:
    """`simulate` in a process of its own: beside the simulated one, torch would pin no memory for the real device."""
    possible, reason = simulator.available()
    if not possible:
        return None, reason
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        task.write_text(json.dumps({"parameters": parameters, "sizes": name, "memory": memory}))
        command = [sys.executable, str(Path(__file__).resolve()), "--simulate", str(task), "--out", str(answer)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return None, f"the simulator failed: {done.stderr.strip()[-500:]}"
        return json.loads(answer.read_text()), ""


def calibrate(device: str | None, name: str) -> dict[str, Any]:
    """The document `offload-calibration/1`."""
    if device == "vram":
        simulator.load("vram")
    try:
        backend = open_backend(device)
    except NoAcceleratorError:
        raise SystemExit(
            f"torch {torch.__version__} finds no accelerator: nothing to measure. --device vram runs the same "
            "on the simulated one"
        ) from None
    if backend.rung == "cpu" or backend.shared_memory:
        raise SystemExit(f"{backend.name} shares its memory with the host: there is no copy to measure")
    memory = backend.memory().total
    on_simulator = backend.rung == "simulated"
    figures = simulate({}, name, memory) if on_simulator else Bench(backend, SIZES[name]).all()
    parameters = parameters_of(figures, SIZES[name])
    simulated: dict[str, float] | None
    if on_simulator:
        simulated, reason = simulate(parameters, name, memory), ""
    else:
        simulated, reason = simulate_elsewhere(parameters, name, memory)
    return {
        "schema": SCHEMA,
        "rung": backend.rung,
        "device": backend.name,
        "torch": torch.__version__,
        "os": platform.platform(),
        "sizes": name,
        "unit": "seconds, medians of 7; parameters in bytes/s, FLOP/s and seconds",
        "figures": figures,
        "parameters": parameters,
        "simulated": simulated,
        "not_simulated_because": reason or None,
        "ratios": None if simulated is None else {item: figures[item] / simulated[item] for item in figures},
    }


def default_file(document: dict[str, Any]) -> Path | None:
    """Where the document goes unless told otherwise: nowhere, for anything but a real device."""
    if document["rung"] != "gpu":
        return None
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", document["device"].lower()).strip("-") + ".json")


def table(document: dict[str, Any]) -> str:
    """The document for people: measured, simulated, ratio."""
    lines = [f"{document['device']} ({document['rung']}), torch {document['torch']}", f"{'item':24}{'measured':>14}"]
    if document["simulated"] is None:
        lines.append(f"not simulated: {document['not_simulated_because']}")
    else:
        lines[-1] += f"{'simulated':>14}{'ratio':>9}"
    for item, seconds in document["figures"].items():
        line = f"{item:24}{seconds * 1e3:>11.4f} ms"
        if document["simulated"] is not None:
            line += f"{document['simulated'][item] * 1e3:>11.4f} ms{document['ratios'][item]:>9.3f}"
        lines.append(line)
    lines += [f"{item:24}{value:>14.4g}" for item, value in document["parameters"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what the simulator's clock assumes, and compare.")
    parser.add_argument("--device", help="a torch device, or vram for the simulated one; default: the accelerator")
    parser.add_argument("--out", type=Path, help="file to write; a real device has one in tests/gpu/results")
    parser.add_argument("--sizes", choices=list(SIZES), help="default: card, for the simulated device small")
    parser.add_argument("--simulate", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.simulate is not None:
        task = json.loads(given.simulate.read_text())
        figures = simulate(task["parameters"], task["sizes"], task["memory"])
        given.out.write_text(json.dumps(figures))
        return 0
    document = calibrate(given.device, given.sizes or ("small" if given.device == "vram" else "card"))
    print(table(document))
    out = given.out or default_file(document)
    if out is None:
        print("simulated figures are not kept; --out FILE writes them")
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
