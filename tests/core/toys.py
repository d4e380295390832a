"""Small models that break offloaders, one per habit of real ones, and the means to look at them from outside.

Every model is built from a seed, so that a test compares an offloaded copy with an untouched one. Sizes are bytes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from balanced_offload.offload import OffloadPolicy, Session

MIB = 1 << 20
GIB = 1 << 30
DEVICE = "vram"
MODES = ("none", "balanced", "model", "sequential", "auto")


def policy(mode: str, **fields: Any) -> OffloadPolicy:
    """Balanced with a mark that every toy exceeds, so that it streams; the other modes as they come."""
    if mode == "balanced" and "high" not in fields:
        fields["high"] = "24KiB"
    return OffloadPolicy(mode=mode, **fields)


# ---------------------------------------------------------------------- nets
class Chain(nn.Module):
    """`depth` linear layers in a row: the plain case. `after` is called with the index of each layer that ran."""

    def __init__(self, depth: int = 6, width: int = 64, bias: bool = True, **kind: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bias, **kind) for _ in range(depth))
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.body = Chain(3)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))


class TiedViews(nn.Module):
    """Two parameters that are different views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(2, 64, 64)
        self.a = nn.Linear(64, 64, bias=False)
        self.b = nn.Linear(64, 64, bias=False)
        self.a.weight = nn.Parameter(whole[0])
        self.b.weight = nn.Parameter(whole[1].t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Attention(nn.Module):
    """nn.MultiheadAttention reads out_proj.weight without calling out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.outward = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inward(x)
        return self.outward(x + self.attention(x, x, x, need_weights=False)[0])


class Functional(nn.Module):
    """A parent that uses its child's weight and a buffer of another child."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Chain(3)
        self.table = nn.Embedding(16, 64)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        x = x + self.table.weight[: x.shape[1]]
        return F.linear(x, self.table.weight) + self.norm.running_mean[:16]


class Encoder(nn.Module):
    """The fused path of torch's encoder layer, in evaluation mode, which a hook would switch off."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.inward(x))


class Backwards(Chain):
    """Called in another order than it was built in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        return x


class Twice(Chain):
    """A layer that runs twice in a forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](super().forward(x))


class Skips(Chain):
    """Every other call leaves a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        for i, layer in enumerate(self.layers):
            if i != 2 or self.count % 2:
                x = torch.tanh(layer(x))
        return x


class LateCall(Chain):
    """A layer that is called for the first time in the fourth forward."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(64, 64)
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = super().forward(x)
        return self.late(x) if self.count >= 4 else x


class LateWeight(LateCall):
    """A weight that is used, past its module, for the first time in the fourth forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = Chain.forward(self, x)
        return F.linear(x, self.late.weight) if self.count >= 4 else x


class TurnsToWeight(LateCall):
    """A layer that is called in the first three forwards; from then on its weight is used past it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = Chain.forward(self, x)
        return F.linear(x, self.late.weight) if self.count >= 4 else self.late(x)


class OwnTensors(nn.Module):
    """Parameters on modules that have children, at two depths, and on the root."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(64))
            self.inner = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x * self.scale) * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(8, 64))
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return x


class Counter(Chain):
    """Writes into a buffer of its own in each forward, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.tally = nn.Module()
        self.tally.register_buffer("sum", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        x = super().forward(x)
        self.tally.sum.add_(x.detach().flatten()[:64])
        return x * self.calls + self.tally.sum


class Replaces(Chain):
    """Replaces a buffer by another tensor in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


class Statistics(nn.Module):
    """Batch norm in training mode: a kernel writes into its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(8)
        self.outward = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outward(self.norm.train()(self.inward(x)))


class Convs(nn.Module):
    """Convolutions with channels_last weights."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x


class Nested(Chain):
    """A leaf that calls another leaf, which is registered elsewhere, between two uses of its own weight."""

    class Outer(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(super().forward(x))
            x = torch.tanh(self.friend[0](x))
            return torch.tanh(super().forward(x))

    def __init__(self) -> None:
        super().__init__()
        outer = self.Outer(64, 64)
        outer.friend = [self.layers[3]]
        self.layers[2] = outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            if i != 3:
                x = torch.tanh(layer(x))
        return x


class Noisy(Chain):
    """Draws random numbers on the device and on the host."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.randn(x.shape, device=x.device) + torch.randn(x.shape).to(x.device)
        return super().forward(x)


class Containers(nn.Module):
    """Takes and hands on containers; `seen` is what arrived, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor, states: Any = None, *, extra: Any = None) -> Any:
        self.seen = [x, states, extra]
        return {"out": self.second(torch.tanh(self.first(x))), "states": states, "extra": extra}


class Low(Chain):
    """Half precision, with a buffer of integers and an odd number of bytes."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.to(dtype)
        self.register_buffer("flags", torch.arange(13, dtype=torch.uint8))
        self.register_buffer("positions", torch.arange(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x.to(self.layers[0].weight.dtype))
        return x + self.positions[:, None].to(x) + self.flags.sum().to(x)


def tokens(seed: int = 1, **kind: Any) -> torch.Tensor:
    return torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(seed), **kind)


def words(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(seed))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "chain": (Chain, tokens),
    "tied": (Tied, words),
    "tied views": (TiedViews, tokens),
    "attention": (Attention, tokens),
    "functional": (Functional, tokens),
    "encoder layer": (Encoder, tokens),
    "backwards": (Backwards, tokens),
    "twice": (Twice, tokens),
    "skips": (Skips, tokens),
    "late call": (LateCall, tokens),
    "own tensors": (OwnTensors, tokens),
    "counter": (Counter, tokens),
    "channels last": (Convs, picture),
    "nested": (Nested, tokens),
    "bfloat16": (Low, tokens),
    "float16": (lambda: Low(torch.float16), tokens),
}


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The net from its seed, in evaluation mode, without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        for module in net.modules():  # an initialisation of zeros would hide a missing bias
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    nn.init.normal_(parameter)
    return net.eval().requires_grad_(False)


def results(net: nn.Module, inputs: Callable[[int], torch.Tensor], runs: int, device: str) -> list[torch.Tensor]:
    """What `runs` calls give, each with an input of its own, on the host."""
    return [net(inputs(seed).to(device)).cpu() for seed in range(runs)]


# ---------------------------------------------------------------------- looking from outside
def storages(module: nn.Module) -> dict[int, int]:
    """Storage pointer -> bytes of everything a module holds."""
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all storages, each once."""
    return sum(storages(module).values())


def hooks(module: nn.Module) -> list[str]:
    """Paths of all modules that carry a hook of any kind."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [path for path, child in module.named_modules() if any(getattr(child, kind) for kind in kinds)]


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything about a module tree that offloading could leave behind; compare with ==."""
    found: dict[str, Any] = {}
    for path, child in module.named_modules():
        found[f"{path}:class"] = type(child)
        found[f"{path}:attributes"] = sorted(child.__dict__)
        found[f"{path}:forward"] = child.__dict__.get("forward")
        found[f"{path}:hooks"] = tuple(
            (key, len(value))
            for key, value in sorted(child.__dict__.items())
            if "hook" in key and hasattr(value, "keys")
        )
    first: dict[int, int] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for path, tensor in named:
        storage = tensor.untyped_storage()
        place = first.setdefault(storage.data_ptr(), len(first))
        found[f"{path}:tensor"] = (
            id(tensor),
            type(tensor),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.storage_offset(),
            storage.nbytes(),
            place,  # ties: the same number for the same storage
            tensor.device.type,
            tensor.requires_grad,
            tensor.is_inference(),
            tensor.is_leaf,
        )
    return found


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def same_values(before: dict[str, torch.Tensor], module: nn.Module) -> bool:
    after = values_of(module)
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def device_bytes(sim: Any) -> int:
    """Bytes of living device tensors, after everything that can go is gone."""
    gc.collect()
    sim.synchronize()
    sim.empty_cache()
    return int(sim.memory_allocated())


@contextlib.contextmanager
def must_work() -> Iterator[None]:
    """An error in the block fails the test without the traceback, which would keep device memory alive beyond it."""
    failure = None
    try:
        yield
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)
        failure = str(error)
    assert failure is None, failure


def copied(sim: Any, work: Callable[[], Any]) -> dict[str, int]:
    """What the device saw move while `work` ran: copies and bytes by direction."""
    sim.synchronize()
    sim.clear_copy_log()
    work()
    sim.synchronize()
    return dict(sim.copy_totals())


def weights_up(sim: Any, session: Session) -> Iterator[Any]:
    """The copies in the log that come from a master, by host address."""
    spans = [
        (master.data_ptr(), master.data_ptr() + master.numel())
        for managed in session.components.values()
        for master in managed.weights.masters
    ]
    for entry in sim.copy_log():
        if entry.direction == "h2d" and any(a <= entry.host_ptr < b for a, b in spans):
            yield entry


def clone(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)
