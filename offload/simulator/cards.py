"""Parameters of well-known cards for the virtual clock.

Invariant: a figure here is a rounded, published or estimated class value, never a measurement of ours; results on
the simulated accelerator are quoted as simulated, with the card's key.

How they were chosen: compute is 60 % of the dense fp16 tensor peak with fp32 accumulation (the share that diffusion
models reach), fp32 half of the shader peak; memory bandwidth is 85 % of the data sheet. Pinned copies are what
PCIe benchmarks report (3.0 x16: 12 GB/s, 4.0 x8: 12.5, 4.0 x16: 24, 5.0 x16: 50); pageable copies are bound by one
CPU thread copying into a staging buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
GB_S = 1e9
TFLOP_S = 1e12
DEFAULT_CARD = "generic-8g"


@dataclass(frozen=True)
class Card:
    """One card on one link. Rates in bytes/s and FLOP/s, times in seconds, ``vram`` in bytes."""

    key: str
    name: str
    link: str
    vram: int
    h2d_pinned: float
    h2d_pageable: float
    d2h_pinned: float
    d2h_pageable: float
    hbm: float
    flops16: float
    flops32: float
    launch: float = 5e-6
    copy_lat: float = 8e-6

    @property
    def device_name(self) -> str:
        """What the device calls itself: nobody may take it for the card."""
        return self.name if self.key == DEFAULT_CARD else f"{self.name} (simulated)"

    def options(self) -> dict[str, float]:
        """The options of the virtual clock that the card sets."""
        return {
            "h2d_pinned": self.h2d_pinned,
            "h2d_pageable": self.h2d_pageable,
            "d2h_pinned": self.d2h_pinned,
            "d2h_pageable": self.d2h_pageable,
            "hbm": self.hbm,
            "flops16": self.flops16,
            "flops32": self.flops32,
            "launch": self.launch,
            "copy_lat": self.copy_lat,
        }


@dataclass(frozen=True)
class _Link:
    name: str
    pinned: float
    h2d_pageable: float
    d2h_pageable: float


_GENERIC = _Link("PCIe 4.0 x16", 25 * GB_S, 8 * GB_S, 6 * GB_S)
_PCIE3_X16 = _Link("PCIe 3.0 x16", 12 * GB_S, 6 * GB_S, 5 * GB_S)
_PCIE4_X8 = _Link("PCIe 4.0 x8", 12.5 * GB_S, 7 * GB_S, 6 * GB_S)
_PCIE4_X16 = _Link("PCIe 4.0 x16", 24 * GB_S, 8 * GB_S, 6 * GB_S)
_PCIE5_X16 = _Link("PCIe 5.0 x16", 50 * GB_S, 11 * GB_S, 9 * GB_S)


def _card(key: str, name: str, gib: int, link: _Link, memory_gb_s: float, tflops16: float, tflops32: float) -> Card:
    return Card(
        key=key,
        name=name,
        link=link.name,
        vram=gib * GIB,
        h2d_pinned=link.pinned,
        h2d_pageable=link.h2d_pageable,
        d2h_pinned=link.pinned,
        d2h_pageable=link.d2h_pageable,
        hbm=memory_gb_s * GB_S,
        flops16=tflops16 * TFLOP_S,
        flops32=tflops32 * TFLOP_S,
    )


CARDS: dict[str, Card] = {
    card.key: card
    for card in (
        _card(DEFAULT_CARD, "Simulated accelerator", 8, _GENERIC, 600, 60, 20),
        # No tensor cores: fp16 at twice the fp32 shader rate, 60 % of it.
        _card("gtx1650-4g-pcie3", "GeForce GTX 1650", 4, _PCIE3_X16, 109, 3.6, 1.5),
        _card("rtx2060-6g-pcie3", "GeForce RTX 2060", 6, _PCIE3_X16, 286, 15.5, 3.2),
        _card("rtx3060-12g-pcie4x16", "GeForce RTX 3060", 12, _PCIE4_X16, 306, 15.3, 6.4),
        _card("rtx3070-8g", "GeForce RTX 3070", 8, _PCIE4_X16, 381, 24, 10.2),
        _card("rtx4060-8g-pcie4x8", "GeForce RTX 4060", 8, _PCIE4_X8, 231, 18, 7.5),
        _card("rtx4070-12g", "GeForce RTX 4070", 12, _PCIE4_X16, 428, 35, 14.6),
        _card("rtx4080-16g", "GeForce RTX 4080", 16, _PCIE4_X16, 609, 58, 24.4),
        _card("rtx4090-24g", "GeForce RTX 4090", 24, _PCIE4_X16, 857, 99, 41.3),
        _card("rtx5090-32g-pcie5", "GeForce RTX 5090", 32, _PCIE5_X16, 1523, 125, 52.4),
    )
}
"""The cards by key. ``torch.vram.use_card(key)`` applies one; after loading it is the default one."""
