"""Invariant: the walk has the units, order, bytes, FLOP and seconds of a forward that really runs."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch
from torch import nn

from balanced_offload.offload.models import NAMES, build_denoiser, denoiser_inputs, pieces, walk
from balanced_offload.offload.simulator.cards import CARDS
from balanced_offload.offload.units import build_component

TERA = 1e12


@pytest.mark.parametrize("name", NAMES)
def test_units_are_the_ones_that_are_moved(name: str) -> None:
    component = build_component("denoiser", build_denoiser(name))
    walked = walk(name)
    found = {u.index: (u.name, u.nbytes, u.tensors) for u in (*walked.units, *walked.unused)}
    expected = {u.index: (u.name, u.slot_bytes, len(u.storages)) for u in component.units}
    assert {i: v[1:] for i, v in found.items()} == {i: v[1:] for i, v in expected.items()}
    assert all(found[i][0] == expected[i][0] for i in found if expected[i][0] != "denoiser")  # the root's own tensors
    assert walked.weights == component.device_bytes
    assert walked.unused == ()


@pytest.mark.parametrize("name", NAMES)
def test_order_is_that_of_a_real_forward(name: str) -> None:
    module = build_denoiser(name, torch.float32, tiny=True)
    units = {id(u.module): u.index for u in build_component("denoiser", module).units}
    order: list[int] = []
    handles = [
        child.register_forward_pre_hook(lambda m, _: order.append(units[id(m)]))
        for child in module.modules()
        if id(child) in units
    ]
    with torch.inference_mode():
        module(**denoiser_inputs(name, dtype=torch.float32, device="cpu", tiny=True))
    for handle in handles:
        handle.remove()
    assert [u.index for u in walk(name, tiny=True).units] == order


# TFLOP of one call, published or counted by hand elsewhere: the same shapes, independent arithmetic.
KNOWN = {
    ("sd35-large", None): 62.3,
    ("flux1-dev", None): 74.4,
    ("flux1-dev", "512x512"): 21.5,
    ("qwen-image", None): 70.6,
    ("wan21-14b", None): 1678.0,
}


@pytest.mark.parametrize(("name", "resolution"), KNOWN)
def test_known_arithmetic(name: str, resolution: str | None) -> None:
    assert walk(name, resolution).flops / TERA == pytest.approx(KNOWN[name, resolution], rel=2e-3)


def test_the_arithmetic_of_sdxl_without_attention_is_the_published_figure() -> None:
    """12.0 TFLOP for both halves of guidance counts matrices and convolutions; attention itself adds 1.57."""
    walked = walk("sdxl")
    assert (walked.flops / TERA) == pytest.approx(12.0 + 1.57, rel=5e-3)


CLOCKED = [
    ("flux1-dev", "rtx4080-16g"),
    ("sdxl", "gtx1650-4g-pcie3"),
    *(
        pytest.param(name, card, marks=pytest.mark.slow)
        for name in NAMES
        for card in ("rtx4080-16g", "gtx1650-4g-pcie3")
        if (name, card) not in (("flux1-dev", "rtx4080-16g"), ("sdxl", "gtx1650-4g-pcie3"))
    ),
]


@pytest.mark.parametrize(("name", "card"), CLOCKED)
def test_seconds_and_flop_of_the_simulated_clock(sim: ModuleType, name: str, card: str) -> None:
    """All resident, one step: what the walk predicts is what the virtual clock shows, within 2 %."""
    sim.use_card(card)
    sim.set_memory_cap(80 << 30)
    sim.configure(ghost=1 << 20)
    module = build_denoiser(name, pinned=True).to("vram")
    inputs = denoiser_inputs(name, dtype=torch.bfloat16, device="vram")
    with torch.no_grad():
        module(**inputs)
        sim.synchronize()
        sim.reset_clock()
        before, held = sim.counters()["flops"], sim.memory_allocated()
        sim.reset_peak_memory_stats()
        module(**inputs)
        sim.synchronize()
        peak = sim.max_memory_allocated() - held
    seconds, flops = sim.clock(), sim.counters()["flops"] - before
    forget_positions(module)
    del module, inputs
    walked = walk(name)
    predicted = sum(piece.compute_s for piece in pieces(walked, CARDS[card].flops16 / TERA, CARDS[card].hbm))
    assert walked.flops == pytest.approx(flops, rel=1e-9)
    assert predicted == pytest.approx(seconds, rel=0.02)
    assert walked.activations == pytest.approx(peak, rel=0.01)


def forget_positions(module: nn.Module) -> None:
    """Qwen-Image's table of positions keeps what it put on a device for as long as the process lives."""
    for child in module.modules():
        for method in ("_get_device_freqs", "_compute_video_freqs"):
            if hasattr(child, method):
                cached = inspect.getclosurevars(getattr(type(child), method)).nonlocals.values()
                for function in cached:
                    if hasattr(function, "cache_clear"):
                        function.cache_clear()


class Toy(nn.Module):
    """Two leaves and a scale of its own; the second leaf runs first and twice, the third never."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8)])
        self.spare = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[1](x * self.scale)
        x = nn.functional.gelu(self.blocks[0](x))
        return nn.functional.scaled_dot_product_attention(x, x, x) + self.blocks[1](x)


def test_every_operation_counts_to_the_unit_before_it() -> None:
    module, x = Toy(), torch.zeros(1, 2, 4, 8)
    walked = walk(module, inputs={"x": x})
    linear, row = 2 * 8 * 8 * 8, 4 * 8 * 8  # 8 rows of 8: FLOP of a matrix, bytes of an fp32 activation
    assert [(u.name, u.block) for u in walked.units] == [
        ("Toy", None),
        ("blocks.1", "blocks.1"),
        ("blocks.0", "blocks.0"),
        ("blocks.1", "blocks.1"),
    ]
    assert [u.index for u in walked.units] == [0, 2, 1, 2]
    assert [u.name for u in walked.unused] == ["spare"]
    assert [u.nbytes for u in walked.units] == [512, 512 + 512, 512, 512 + 512]
    assert [u.tensors for u in walked.units] == [1, 2, 1, 2]
    assert [u.flows for u in walked.units] == [False, False, True, False]  # the root's own, twice, once, twice
    assert walked.weights == 512 + 512 + 1024 + 1024
    attention = 2 * (2 * 2 * 4 * 4 * 8)
    assert [u.flops for u in walked.units] == [0, linear, linear + attention, linear]
    # x * scale; matrix; matrix, gelu, attention with q = k = v and its sums of rows; matrix and sum
    assert [u.traffic_bytes for u in walked.units] == [
        2 * row + 32,
        2 * row + 4 * 64 + 32,
        (2 * row + 4 * 64) + 2 * row + (2 * row + 4 * 8),
        (2 * row + 4 * 64 + 32) + 3 * row,
    ]
    assert [(len(u.operations), u.own_operations) for u in walked.units] == [(1, 1), (1, 1), (3, 1), (2, 1)]
    assert not module._forward_hooks and not module.scale.is_meta


def test_pieces_take_the_slower_of_arithmetic_and_memory() -> None:
    walked = walk(Toy(), inputs={"x": torch.zeros(1, 2, 4, 8)})
    slow = pieces(walked, 1e-9, 1e3, launch=1e-3)  # 1 kFLOP/s, 1 kB/s
    by_hand = [sum(max(f / 1e3, b / 1e3, 2e-6) for f, b in u.operations) for u in walked.units]
    assert [p.compute_s for p in slow] == pytest.approx(by_hand)
    assert [p.host_s for p in slow] == [1e-3, 1e-3, 3e-3, 2e-3]
    assert slow[2].own_s == pytest.approx(1.024) and slow[2].own_s < slow[2].compute_s
    assert [p.compute_s for p in pieces(walked, 1e-9)] == pytest.approx([u.flops / 1e3 for u in walked.units])
    assert [(p.index, p.nbytes, p.tensors) for p in slow] == [(u.index, u.nbytes, u.tensors) for u in walked.units]


def test_a_real_module_is_left_as_it_is() -> None:
    module = build_denoiser("flux1-dev", torch.float32, tiny=True)
    kept = {key: (id(p), p.clone()) for key, p in module.named_parameters()}
    walked = walk(module, inputs=denoiser_inputs("flux1-dev", dtype=torch.float32, device="cpu", tiny=True))
    assert [u.operations for u in walked.units] == [
        u.operations for u in walk("flux1-dev", dtype=torch.float32, tiny=True).units
    ]
    for key, parameter in module.named_parameters():
        assert id(parameter) == kept[key][0] and torch.equal(parameter, kept[key][1])
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_what_cannot_be_walked() -> None:
    with pytest.raises(ValueError, match="inputs: got none"):
        walk(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="without weights"):
        walk(nn.Identity(), inputs={"input": torch.zeros(1)})
    with pytest.raises(ValueError, match="'flux' is not known, allowed: flux1-dev"):
        walk("flux")
