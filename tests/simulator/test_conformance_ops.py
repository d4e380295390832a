"""Invariant: an operation on the device gives the CPU's result to the last bit, or fails as on CUDA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEVICE = "vram"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))


def assert_equal(on_device: Tensor, on_cpu: Tensor) -> None:
    assert on_device.device.type == DEVICE
    assert on_device.dtype == on_cpu.dtype
    assert torch.equal(on_device.cpu(), on_cpu)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "conv2d_grouped_strided": lambda: nn.Conv2d(8, 8, 3, stride=2, groups=4),
    "conv_transpose": lambda: nn.ConvTranspose2d(8, 4, 3),
    "linear": lambda: nn.Linear(16, 32),
    "linear_no_bias": lambda: nn.Linear(16, 32, bias=False),
    "layer_norm": lambda: nn.LayerNorm(16),
    "group_norm": lambda: nn.GroupNorm(4, 8),
    "batch_norm": lambda: nn.BatchNorm2d(8).eval(),
    "rms_norm": lambda: nn.RMSNorm(16),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": lambda t: F.group_norm(t, 4),
    "rms_norm": lambda t: F.rms_norm(t, (16,)),
    "interpolate_nearest": lambda t: F.interpolate(t, scale_factor=2.0, mode="nearest"),
    "interpolate_bilinear": lambda t: F.interpolate(t, scale_factor=2.0, mode="bilinear"),
    "pad_reflect": lambda t: F.pad(t, (1, 1, 1, 1), "reflect"),
    "gelu_silu_softmax": lambda t: F.softmax(F.silu(F.gelu(t)), -1),
    "einsum_bmm": lambda t: torch.einsum("bchw,bdhw->bcd", t, t),
    "fft": lambda t: torch.fft.fftn(t, dim=(-2, -1)).real,
    "cat_split_chunk": lambda t: torch.cat(t.chunk(2, 1)[::-1], 1),
    "stack": lambda t: torch.stack([t, t + 1]),
    "any_dims": lambda t: (t > 2).any(dim=(1, 2)),
    "all_dims": lambda t: (t > -2).all(dim=(1, 2)),
    "addr": lambda t: torch.addr(t[0, 0], t[0, 0, 0], t[0, 0, 1]),
    "vector_norm": lambda t: torch.linalg.vector_norm(t, 3),
    "sort": lambda t: t.sort(dim=-1).values,
    "topk": lambda t: t.topk(3).values,
    "cumsum": lambda t: t.cumsum(1),
    "scalar_cpu_tensor": lambda t: t * torch.tensor(2.0),
    "where": lambda t: torch.where(t > 0, t, -t),
    "to_half": lambda t: t.to(torch.float16),
    "unfold": lambda t: t.unfold(-1, 4, 2),
    "as_complex": lambda t: torch.view_as_real(torch.view_as_complex(t.reshape(2, 8, 16, 8, 2))),
    "expand_sum": lambda t: t[:, :1].expand(2, 8, 16, 16).sum(0),
    "channel_shuffle": lambda t: F.channel_shuffle(t, 4),
    "pixel_shuffle": lambda t: F.pixel_shuffle(t, 2),
    "sdpa": lambda t: F.scaled_dot_product_attention(t, t, t),
    "sdpa_causal": lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True),
    "sdpa_math_mask": lambda t: F.scaled_dot_product_attention(t, t, t, t[:1, :1] > 0),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_equals_cpu(vram: ModuleType, x: Tensor, name: str) -> None:
    module = MODULES[name]()
    expected = module(x)
    assert_equal(module.to(DEVICE)(x.to(DEVICE)), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_equals_cpu(vram: ModuleType, x: Tensor, name: str) -> None:
    assert_equal(FUNCTIONS[name](x.to(DEVICE)), FUNCTIONS[name](x))


def test_conv2d_channels_last_bf16_keeps_strides(vram: ModuleType, x: Tensor) -> None:
    conv = nn.Conv2d(8, 4, 3, padding=1).bfloat16().to(memory_format=torch.channels_last)
    y = x.bfloat16().to(memory_format=torch.channels_last)
    expected = conv(y)
    actual = conv.to(DEVICE)(y.to(DEVICE))
    assert actual.stride() == expected.stride()
    assert_equal(actual, expected)


def test_conv3d(vram: ModuleType) -> None:
    conv = nn.Conv3d(2, 4, 3)
    y = torch.randn(1, 2, 5, 8, 8)
    expected = conv(y)
    assert_equal(conv.to(DEVICE)(y.to(DEVICE)), expected)


def test_sdpa_with_float_mask(vram: ModuleType) -> None:
    q, mask = torch.randn(1, 4, 32, 16), torch.rand(1, 1, 32, 32)
    expected = F.scaled_dot_product_attention(q, q, q, mask)
    on_device = q.to(DEVICE)
    assert_equal(F.scaled_dot_product_attention(on_device, on_device, on_device, mask.to(DEVICE)), expected)


def test_embedding(vram: ModuleType) -> None:
    embedding, index = nn.Embedding(10, 4), torch.tensor([1, 2])
    expected = embedding(index)
    assert_equal(embedding.to(DEVICE)(index.to(DEVICE)), expected)


def test_autocast(vram: ModuleType, x: Tensor) -> None:
    linear = nn.Linear(16, 8)
    expected = copy.deepcopy(linear).bfloat16()(x.bfloat16())
    linear.to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = linear(x.to(DEVICE))
    assert_equal(actual, expected)


def test_inference_mode(vram: ModuleType, x: Tensor) -> None:
    with torch.inference_mode():
        linear = nn.Linear(16, 8)
        expected = linear(x)
        assert_equal(linear.to(DEVICE)(x.to(DEVICE)), expected)


def test_no_grad_with_parameters_that_require_grad(vram: ModuleType, x: Tensor) -> None:
    linear = nn.Linear(16, 8)
    expected = linear(x)
    linear.to(DEVICE)
    with torch.enable_grad(), torch.no_grad():
        assert_equal(linear(x.to(DEVICE)), expected)


def test_backward(vram: ModuleType) -> None:
    with torch.enable_grad():
        a = torch.randn(4, 4, requires_grad=True)
        (a @ a).relu().sum().backward()
        b = a.detach().to(DEVICE).requires_grad_()
        (b @ b).relu().sum().backward()
    assert a.grad is not None and b.grad is not None
    assert_equal(b.grad, a.grad)


def test_backward_of_conv_and_sdpa(vram: ModuleType, x: Tensor) -> None:
    def loss(conv: nn.Module, image: Tensor) -> Tensor:
        tokens = conv(image).flatten(2)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens).sum()

    with torch.enable_grad():
        on_cpu = nn.Conv2d(8, 8, 3)
        on_device = copy.deepcopy(on_cpu).to(DEVICE)
        loss(on_cpu, x).backward()
        loss(on_device, x.to(DEVICE)).backward()
    assert on_cpu.weight.grad is not None and on_device.weight.grad is not None
    assert torch.allclose(on_device.weight.grad.cpu(), on_cpu.weight.grad, rtol=1e-4, atol=1e-4)


def test_float8_storage(vram: ModuleType, x: Tensor) -> None:
    small = x.to(torch.float8_e4m3fn)
    on_device = small.to(DEVICE)
    assert torch.equal(on_device.cpu().float(), small.float())
    assert_equal(on_device.to(torch.bfloat16), small.to(torch.bfloat16))


def test_item(vram: ModuleType, x: Tensor) -> None:
    assert x.to(DEVICE).sum().item() == x.sum().item()


def test_tolist_repr_and_numpy_by_the_cpu(vram: ModuleType) -> None:
    t = torch.arange(3, device=DEVICE)
    assert t.tolist() == [0, 1, 2]
    assert "device='vram:0'" in repr(t)
    assert t.cpu().numpy().tolist() == [0, 1, 2]


def test_numpy_on_the_device_raises(vram: ModuleType) -> None:
    with pytest.raises(TypeError):
        torch.arange(3, device=DEVICE).numpy()


INDEXING: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "own_index": lambda t, own: t[own(torch.tensor([1, 0]))],
    "cpu_index": lambda t, own: t[torch.tensor([1, 0])],
    "slices": lambda t, own: t[:, 1:3, ::2],
    "bool_mask": lambda t, own: t[t > 0],
    "new_axis": lambda t, own: t[..., None],
    "gather": lambda t, own: t.gather(0, own(torch.zeros(1, 8, 16, 16, dtype=torch.long))),
    "index_select": lambda t, own: t.index_select(1, own(torch.tensor([3, 1]))),
}


@pytest.mark.parametrize("name", INDEXING)
def test_indexing(vram: ModuleType, x: Tensor, name: str) -> None:
    expected = INDEXING[name](x, lambda index: index)
    assert_equal(INDEXING[name](x.to(DEVICE), lambda index: index.to(DEVICE)), expected)


def test_in_place(vram: ModuleType, x: Tensor) -> None:
    def change(t: Tensor) -> Tensor:
        t.add_(1).mul_(2)
        t[:, 0] = 5
        t[t > 1] = 0
        t.masked_fill_(t < -3, 1.0)
        return t

    assert_equal(change(x.to(DEVICE)), change(x.clone()))


def test_in_place_through_views(vram: ModuleType, x: Tensor) -> None:
    t = x.to(DEVICE)
    row = t[:, 0]
    row.zero_()
    assert t.cpu()[:, 0].abs().sum() == 0
    t.view(-1)[3] = 7
    assert t.cpu().flatten()[3] == 7
    assert row.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()


def test_out_variants(vram: ModuleType, x: Tensor) -> None:
    t = x.to(DEVICE)
    grown = torch.empty(0, device=DEVICE)
    torch.add(t, 1, out=grown)
    assert_equal(grown, x + 1)
    given = torch.empty_like(t)
    address = given.data_ptr()
    torch.mul(t, 2, out=given)
    assert_equal(given, x * 2)
    assert given.data_ptr() == address


def test_devices_do_not_mix(vram: ModuleType, x: Tensor) -> None:
    calls: list[Callable[[], Any]] = [lambda: x.to(DEVICE) + x, lambda: nn.Linear(16, 4)(x.to(DEVICE))]
    for call in calls:
        with pytest.raises(RuntimeError, match="same device"):
            call()


def test_every_op_with_two_kernels_runs_the_cpu_one(vram: ModuleType) -> None:
    """Where torch has a composite kernel and a CPU kernel, the fallback would be passed over and the bits differ."""
    registrations = torch._C._dispatch_get_registrations_for_dispatch_key
    both = set(registrations("CPU")) & set(registrations("CompositeExplicitAutograd"))
    ours = set(registrations("PrivateUse1"))
    assert both, "torch no longer lists registrations: this test sees nothing"
    # copy_ on the CPU is the simulator's own entry, which calls the composite kernel (test_ghost_host.py)
    assert both - ours == {"aten::copy_"}
