"""The libraries themselves run on the simulated accelerator, and move what their code says: counted to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from balanced_offload.offload.bench.measure import Setting, measure, run_baseline
from balanced_offload.offload.bench.places import SimulatedPlace
from balanced_offload.offload.bench.strategies import chosen
from balanced_offload.offload.bench.subjects import TINY, find, names

from .conftest import LOOSE, TIGHT, Bench

STREAMING = [
    "diffusers.sequential",
    "diffusers.group_leaf",
    "diffusers.group_leaf_stream",
    "diffusers.group_leaf_stream_record",
    "diffusers.group_leaf_stream_lowcpu",
    "diffusers.group_block_stream",
    "diffusers.group_block_stream_record",
    "accelerate.dispatch",
]
WHOLE = ["diffusers.model", "torch.to"]


def raw_bytes() -> int:
    module = TINY.build()
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_every_peer_streams_under_the_tight_cap(bench: Bench) -> None:
    document = bench(*chosen([*STREAMING, *WHOLE]))
    results = {result["name"]: result for result in document["cases"][0]["results"]}
    assert {name for name, result in results.items() if result["completed"]} == set(STREAMING)
    for name in STREAMING:
        result = results[name]
        assert result["equal"] is True and result["equal_on"] == "simulated", name
        assert result["peak_vram"] <= TIGHT
        assert result["races"] == 0
    for name in WHOLE:
        assert "OutOfMemoryError" in results[name]["error"] and results[name]["step_s"] is None
    # what moves in a step: all of the weights, up; without a stream diffusers also sends them back
    weights = raw_bytes()
    for name in STREAMING[:5]:
        assert results[name]["bytes_h2d"] == weights, name
    assert results["diffusers.group_leaf"]["bytes_d2h"] == weights
    for name in ("diffusers.sequential", *STREAMING[2:5]):
        assert results[name]["bytes_d2h"] == 0, name
    assert 0 < results["accelerate.dispatch"]["bytes_h2d"] < weights
    # streams lock all weights in memory, except where that is done anew for each copy
    assert results["diffusers.group_leaf_stream"]["pinned_ram"] >= weights
    assert results["diffusers.group_leaf_stream_lowcpu"]["pinned_ram"] == 0
    assert results["diffusers.sequential"]["pinned_ram"] == 0
    # one copy per tensor, each of them waited for
    tensors = len(list(TINY.build().parameters()))
    assert results["diffusers.sequential"]["host_syncs"] == results["diffusers.sequential"]["allocations"] == tensors
    # the order that their designs have
    time = {name: results[name]["step_s"] for name in STREAMING}
    assert time["diffusers.group_leaf_stream_record"] < time["diffusers.group_leaf_stream"]
    assert time["diffusers.group_leaf_stream"] < time["diffusers.sequential"] < time["diffusers.group_leaf"]
    assert document["failures"] == []
    assert document["cases"][0]["best_peer"] == min(time, key=lambda name: time[name])


def test_what_fits_is_whole(bench: Bench) -> None:
    entry = bench(*chosen([*WHOLE, "accelerate.dispatch"]), caps=(LOOSE,))["cases"][0]
    assert entry["fits"] is True and entry["streamed_least"] == 0 and entry["bound_s"] == entry["compute_s"]
    for result in entry["results"]:
        assert result["completed"] and result["equal"] is True
        assert result["step_s"] == entry["compute_s"], "the same kernels on the same clock"
        assert (result["bytes_h2d"], result["host_syncs"], result["allocations"]) == (0, 0, 0)
        assert result["peak_vram"] == entry["weights"] + entry["activations"]


def test_the_case_says_what_it_is(bench: Bench) -> None:
    entry = bench(*chosen(["torch.to"]))["cases"][0]
    aligned = sum(-(-p.numel() * p.element_size() // 512) * 512 for p in TINY.build().parameters())
    assert entry["weights"] == aligned
    assert entry["streamed_least"] == aligned - (TIGHT - entry["activations"])
    assert entry["half_fits"] is (2 * entry["streamed_least"] <= aligned)
    assert entry["bound_s"] == max(entry["compute_s"], entry["streamed_least"] / 24e9)
    assert entry["parameters"]["card"] == "rtx4090-24g" and entry["parameters"]["h2d_pinned"] == 24e9


@pytest.mark.slow
def test_the_same_again_to_the_digit(place: SimulatedPlace) -> None:
    setting = Setting(TINY, None, steps=2)
    strategy = chosen(["diffusers.group_leaf_stream"])[0]

    def once() -> dict[str, Any]:
        return measure(place, strategy, setting, TIGHT, run_baseline(place, setting))

    first, second = once(), once()
    for key in ("samples", "peak_vram", "pinned_ram", "bytes_h2d", "host_syncs", "allocations"):
        assert first[key] == second[key], key


@pytest.mark.parametrize("name", names())
def test_two_builds_have_equal_weights(name: str) -> None:
    first, second = (find(name).build(tiny=True).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
    largest = max(first.values(), key=lambda tensor: tensor.numel())
    assert largest.float().std() > 0


def test_real_sizes_cost_no_memory_until_they_are_filled() -> None:
    module = find("flux1-cut").build(values=False)
    nbytes = sum(p.numel() * p.element_size() for p in module.parameters())
    assert nbytes == 5_109_999_744 or nbytes > 4 << 30
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * 4096
    assert resident < 2 << 30
