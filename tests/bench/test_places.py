"""The clock and the counters count what they say, and a GPU's trace is read to the byte."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from balanced_offload.offload.bench.gpu import counts_of_trace
from balanced_offload.offload.bench.overhead import hook_cost
from balanced_offload.offload.bench.places import Counts, SimulatedPlace, open_place
from balanced_offload.offload.bench.shapes import remembered_shapes

MIB = 1 << 20


def test_a_step_is_timed_and_counted_to_the_byte(place: SimulatedPlace, sim: ModuleType) -> None:
    host = torch.empty(24 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(24 * MIB, dtype=torch.uint8, device="vram")
    seconds, counts = place.time(lambda: device.copy_(host, non_blocking=True), 4)
    assert seconds == pytest.approx(24 * MIB / 24e9 + 8e-6, abs=5e-6)
    assert counts == Counts(bytes_h2d=24 * MIB, bytes_d2h=0, host_syncs=0, allocations=0)
    _, counts = place.time(lambda: device.cpu(), 2)
    assert (counts.bytes_d2h, counts.host_syncs) == (24 * MIB, 1)
    _, counts = place.time(lambda: torch.empty(4, device="vram"), 3)
    assert counts.allocations == 1


def test_what_is_the_models_own_is_taken_off() -> None:
    mine = Counts(bytes_h2d=10, bytes_d2h=0, host_syncs=7, allocations=30)
    assert mine.less(Counts(5, 5, 2, 30)) == Counts(10, 0, 5, 0)
    assert Counts(host_syncs=None).less(mine).host_syncs is None


def test_python_has_a_clock_of_its_own(place: SimulatedPlace, sim: ModuleType) -> None:
    device = torch.empty(64 * MIB, dtype=torch.uint8, device="vram")
    options = sim.configuration()

    def step() -> None:
        sum(range(200_000))
        device.fill_(1)

    python = place.python_seconds(step, 2)
    assert 5e-4 < python < 0.5, "some milliseconds of Python, and nothing of the device's"
    assert place.time(step, 2)[0] < 1e-3 < place.time_with_python(step, 2) + python
    assert sim.configuration() == options


def test_a_cap_is_what_is_left_of_the_card(place: SimulatedPlace, sim: ModuleType) -> None:
    place.use("rtx4090-24g", 3 << 30)
    assert sim.mem_get_info() == (3 << 30, 24 << 30)
    with pytest.raises(torch.OutOfMemoryError), place.ghost(True):
        torch.empty((3 << 30) + 512, dtype=torch.uint8, device="vram")
    place.use(None, 5 * MIB)  # a toy's card is as small as its cap
    assert sim.mem_get_info() == (5 * MIB, 5 * MIB)
    place.use(None, None)
    assert sim.mem_get_info()[0] == sim.mem_get_info()[1] > 1 << 40


def test_remembered_shapes_are_torchs_own(place: SimulatedPlace) -> None:
    linear = torch.nn.Linear(640, 1280).to("vram")
    conv = torch.nn.Conv2d(8, 16, 3, stride=2).to("vram")
    rows, picture = torch.randn(2, 512, 640).to("vram"), torch.randn(1, 8, 128, 128).to("vram")

    def shapes() -> list[Any]:
        found = []
        with torch.no_grad():
            for _ in range(2):
                hidden = torch.nn.functional.gelu(linear(rows)) * 2
                found += [hidden, hidden.transpose(1, 2) + 1, torch.cat([hidden, hidden.half()], dim=-1)]
                found += [hidden.pow(2).mean(-1, keepdim=True).rsqrt(), torch.nn.functional.layer_norm(rows, (640,))]
                found += [conv(picture), torch.nn.functional.silu(conv(picture)), hidden / 3, hidden * True]
                found.append(torch.nn.functional.scaled_dot_product_attention(*[rows.view(2, 512, 10, 64)] * 3))
        return [(one.shape, one.stride(), one.dtype) for one in found]

    with place._configured(ghost=1 << 10):
        plain = shapes()
        with remembered_shapes():
            assert shapes() == plain
        assert shapes() == plain, "torch's kernels are back"


def test_a_trace_of_a_gpu() -> None:
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 1000}},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 24}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "args": {"bytes": 7}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 99}},
        {"cat": "cuda_runtime", "name": "cudaMemcpyAsync", "args": {"bytes": 5}},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaEventSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaDeviceSynchronize"},
        {"cat": "kernel", "name": "cudaDeviceSynchronize"},
        {"ph": "M"},
    ]
    assert counts_of_trace(events) == Counts(bytes_h2d=1024, bytes_d2h=7, host_syncs=2)
    assert counts_of_trace([event for event in events if event.get("cat") != "kernel"]) == Counts(), "saw no device"


def test_no_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ValueError, match="--device: got 'cuda', but torch finds no CUDA device"):
        open_place("cuda")


def test_hooks_are_timed_on_the_same_leaves(place: SimulatedPlace) -> None:
    found = hook_cost(place, leaves=48, rounds=3)
    assert found["leaves"] == 48 and found["ratio"] == found["ours_us"] / found["accelerate_us"]
    assert 10 < found["accelerate_us"] < 5000, "accelerate's hook is Python: tens of microseconds at least"
    assert 0 < found["ours_us"] < found["accelerate_us"]
