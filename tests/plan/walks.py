"""Walks for the planner's tests: random ones, adversarial ones, and the layer shapes of well-known models."""

from __future__ import annotations

import random
from collections.abc import Callable

from balanced_offload.offload.schedule import Piece, Rates

GB = 1e9
GIB = 1 << 30
ALIGN = 512


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def random_walk(rng: random.Random, count: int, *, host: bool = False, pageable: bool = False) -> list[Piece]:
    """`count` units of 1 to 200 MB, some equal, some giants, some without compute."""
    common = rng.randrange(1, 100) << 20
    walk = []
    for i in range(count):
        size = rng.choice([common, rng.randrange(1, 200) << 20, rng.randrange(1, 2000) << 10, 512])
        compute = rng.choice([0.0, rng.uniform(0, 5e-3), size / 20e9, size / 80e9])
        own = rng.choice([None, compute, compute * rng.random()])
        launch = rng.choice([0.0, 20e-6, rng.uniform(0, 2e-3)]) if host else 0.0
        walk.append(Piece(size, compute, i, launch, not (pageable and rng.random() < 0.4), own))
    return walk


def close_walk(rng: random.Random, count: int, rates: Rates) -> list[Piece]:
    """Units of like size whose copies take about as long as all compute: where placement and ring decide."""
    sizes = [rng.randrange(20, 100) << 20 for _ in range(count)]
    compute = [rng.choice([0.0, rng.random(), 3 * rng.random()]) for _ in range(count)]
    stretch = rng.uniform(0.2, 1.2) * sum(sizes) / rates.h2d / (sum(compute) or 1.0)
    shares = [rng.choice([1.0, rng.random()]) for _ in range(count)]
    return [
        Piece(n, c * stretch, i, own_s=c * stretch * share)
        for i, (n, c, share) in enumerate(zip(sizes, compute, shares, strict=True))
    ]


def random_rates(rng: random.Random, *, hook: bool = False) -> Rates:
    h2d = rng.choice([6, 12, 24, 50]) * GB
    return Rates(h2d, h2d / rng.uniform(1.2, 4), rng.choice([0.0, 8e-6, 1e-4]), rng.choice([0, 5e-5]) if hook else 0.0)


Walk = list[Piece]


class Builder:
    """Linear layers at the speed of a card of `tflops` (of 1e12 FLOP/s), in bf16."""

    def __init__(self, tflops: float) -> None:
        self.rate = tflops * 1e12
        self.walk: Walk = []

    def linear(self, inner: int, outer: int, tokens: int, weightless: float = 0.0) -> None:
        """A layer with bias; `weightless` FLOP follow it before the next one."""
        own = 2 * tokens * inner * outer / self.rate
        nbytes = aligned(2 * inner * outer) + aligned(2 * outer)
        self.walk.append(Piece(nbytes, own + weightless / self.rate, len(self.walk), own_s=own, tensors=2))

    def small(self, width: int) -> None:
        """The weight of a norm."""
        self.walk.append(Piece(aligned(2 * width), 0.0, len(self.walk)))


def flux(tflops: float, tokens: int = 4096, text: int = 512) -> Walk:
    b, d, both = Builder(tflops), 3072, tokens + text
    attention = 4.0 * both * both * d
    b.linear(64, d, tokens)
    b.linear(4096, d, text)
    for _ in range(19):
        b.linear(d, 6 * d, 1)
        b.linear(d, 6 * d, 1)
        for n in (tokens, tokens, tokens, text, text):
            b.linear(d, d, n)
        b.linear(d, d, text, attention)
        for _ in range(4):
            b.small(128)
        for n in (tokens, text):
            b.linear(d, d, n)
        for n in (tokens, text):
            b.linear(d, 4 * d, n)
            b.linear(4 * d, d, n)
    for _ in range(38):
        b.linear(d, 3 * d, 1)
        b.linear(d, 4 * d, both)
        b.linear(d, d, both)
        b.linear(d, d, both)
        b.small(128)
        b.small(128)
        b.linear(d, d, both, attention)
        b.linear(5 * d, d, both)
    b.linear(d, 2 * d, 1)
    b.linear(d, 64, tokens)
    return b.walk


def two_streams(
    tflops: float, blocks: int, d: int, tokens: int, text: int, batch: int = 1, modulation: int = 6
) -> Walk:
    """Blocks with a picture and a text branch, as in SD3.5 and Qwen-Image."""
    b, both = Builder(tflops), tokens + text
    attention = 4.0 * batch * both * both * d
    for _ in range(blocks):
        b.linear(d, modulation * d, batch)
        b.linear(d, modulation * d, batch)
        for n in (tokens, tokens, tokens, text, text):
            b.linear(d, d, batch * n)
        b.linear(d, d, batch * text, attention)
        for _ in range(4):
            b.small(128)
        for n in (tokens, text):
            b.linear(d, d, batch * n)
        for n in (tokens, text):
            b.linear(d, 4 * d, batch * n)
            b.linear(4 * d, d, batch * n)
    return b.walk


def sd35_large(tflops: float) -> Walk:
    return two_streams(tflops, 38, 2432, 4096, 154 + 77, batch=2)


def qwen_image(tflops: float) -> Walk:
    return two_streams(tflops, 60, 3072, 4096, 256)


def wan14b(tflops: float, tokens: int = 21 * 30 * 52, text: int = 512) -> Walk:
    b, d, ffn = Builder(tflops), 5120, 13824
    for _ in range(40):
        for _ in range(2):
            b.linear(d, d, tokens)
        b.linear(d, d, tokens, 4.0 * tokens * tokens * d)
        b.linear(d, d, tokens)
        b.linear(d, d, tokens)
        b.linear(d, d, text)
        b.linear(d, d, text, 4.0 * tokens * text * d)
        b.linear(d, d, tokens)
        b.linear(d, ffn, tokens)
        b.linear(ffn, d, tokens)
    return b.walk


def sdxl(tflops: float, batch: int = 2) -> Walk:
    """A rough list of the U-Net's layers: convolutions as matrices of the same bytes and work."""
    b = Builder(tflops)

    def resnet(inner: int, outer: int, pixels: int) -> None:
        b.linear(9 * inner, outer, batch * pixels)
        b.linear(1280, outer, batch)
        b.linear(9 * outer, outer, batch * pixels)
        if inner != outer:
            b.linear(inner, outer, batch * pixels)

    def transformer(d: int, pixels: int, depth: int) -> None:
        n = batch * pixels
        b.linear(d, d, n)
        for _ in range(depth):
            for _ in range(2):
                b.linear(d, d, n)
            b.linear(d, d, n, 4.0 * n * pixels * d)
            b.linear(d, d, n)
            b.small(d)
            b.linear(d, d, n)
            b.linear(2048, d, batch * 77)
            b.linear(2048, d, batch * 77, 4.0 * n * 77 * d)
            b.linear(d, d, n)
            b.linear(d, 8 * d, n)
            b.linear(4 * d, d, n)
        b.linear(d, d, n)

    large, middle, low = 128 * 128, 64 * 64, 32 * 32
    b.linear(36, 320, batch * large)
    for _ in range(2):
        resnet(320, 320, large)
    resnet(320, 640, middle)
    transformer(640, middle, 2)
    resnet(640, 640, middle)
    transformer(640, middle, 2)
    resnet(640, 1280, low)
    transformer(1280, low, 10)
    resnet(1280, 1280, low)
    transformer(1280, low, 10)
    resnet(1280, 1280, low)
    transformer(1280, low, 10)
    resnet(1280, 1280, low)
    for inner in (2560, 2560, 1920):
        resnet(inner, 1280, low)
        transformer(1280, low, 10)
    for inner in (1920, 1280, 960):
        resnet(inner, 640, middle)
        transformer(640, middle, 2)
    for inner in (960, 640, 640):
        resnet(inner, 320, large)
    b.linear(9 * 320, 4, batch * large)
    return b.walk


MODELS: dict[str, Callable[[float], Walk]] = {
    "sdxl": sdxl,
    "sd35-large": sd35_large,
    "flux-1024": flux,
    "flux-512": lambda tflops: flux(tflops, 1024),
    "qwen-image": qwen_image,
    "wan14b-480p": wan14b,
}

# GiB of the card, of which the activations: TFLOP/s at 60 % of the tensor peak, as in the published table.
CARDS: dict[str, tuple[int, float]] = {
    "8G": (8, 24.0),
    "12G": (12, 35.0),
    "16G": (16, 58.0),
    "24G": (24, 99.0),
    "32G": (32, 125.0),
}
ACTIVATIONS = {
    "sdxl": 2.0 * GB,
    "sd35-large": 2.0 * GB,
    "flux-1024": 2.0 * GB,
    "flux-512": 1.5 * GB,
    "qwen-image": 2.0 * GB,
    "wan14b-480p": 3.5 * GB,
}


def weights_budget(model: str, card: str) -> int:
    """What the card leaves for weights: its memory less 1 GB of context and less the activations, bytes."""
    return int(CARDS[card][0] * GIB - 1.0 * GB - ACTIVATIONS[model])
