"""Invariant: what was asked on the command line becomes figures with a source each, or one sentence that says why not.

Explicit figures win over a named card's, those over this machine's own, those over assumptions, which are called so.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .sizes import GIB, bad_value, format_size, read_size

CONTEXT = 1_000_000_000  # bytes of a card that the driver's context, its libraries and fragmentation take
LEAST_ACTIVATIONS = 2 * GIB  # workspaces and the decoder's start, beside what the denoiser's results take
ASSUMED_TFLOPS = 15.0  # an RTX 3060's class: where nothing is known, better too careful than too bold
MATMUL_SHARE = 0.8  # of a large matrix product's rate: what a whole step of a denoiser reaches
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_RATE = re.compile(r"(.*?)\s*(?:/\s*s|ps)\s*", re.IGNORECASE)
_TFLOPS = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(?:tflops?(?:/s)?|tf(?:/s)?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """The options as written; None where they were left out."""

    model: str
    vram: str | None = None
    bandwidth: str | None = None
    tflops: str | None = None
    resolution: str | None = None
    dtype: str | None = None
    activations: str | None = None
    card: str | None = None
    pageable: str | None = None
    reserve: str | None = None


@dataclass(frozen=True)
class Figures:
    """The card that is planned for. Bytes, bytes/s, TFLOP/s; `hbm` is None where the arithmetic alone counts.

    `sources` says for each whether it was given, or is a card's, measured, stored or assumed.
    """

    name: str
    vram: int
    bandwidth: float
    pageable: float
    tflops: float
    hbm: float | None
    copy_latency: float
    reserve: int = 0
    sources: dict[str, str] = field(default_factory=dict)


def read_rate(option: str, written: str) -> float:
    """Bytes per second of "24GB/s" or "12 GiB/s".

    Raises:
        ValueError: names the option, what was given, what is allowed and what to write.
    """
    allowed = 'a rate with a unit ("24GB/s", "12GiB/s")'
    match = _RATE.fullmatch(written.strip())
    size = match[1] if match else written.strip()
    if re.fullmatch(r"[0-9.]+", size):
        raise bad_value(option, written, allowed, f'did you mean "{size}GB/s"?')
    try:
        rate = float(read_size(option, size, auto=False, share=False).to_bytes(option, None) or 0)
    except ValueError as error:
        raise bad_value(option, written, allowed, 'write for example "24GB/s"') from error
    if not 1e6 <= rate <= 1e13:
        raise bad_value(option, written, allowed, "between 1 MB/s and 10 TB/s")
    return rate


def read_tflops(written: str) -> float:
    """TFLOP/s of "58" or "58 TFLOPS"."""
    allowed = "TFLOP/s that the card reaches in a denoiser, a number over 0 and up to 100000"
    match = _TFLOPS.fullmatch(written.strip())
    value = float(match[1]) if match else math.nan
    if not 0 < value <= 100_000:
        raise bad_value("--tflops", written, allowed, 'write for example "58": about 60 % of the data sheet')
    return value


def read_bytes(option: str, written: str, *, least: int = 0) -> int:
    """Bytes of a written size.

    Raises:
        ValueError: it is none, a share, or less than `least`.
    """
    if "%" in written:
        raise bad_value(option, written, 'a size with a unit ("16GiB")', "a share has no meaning here; write bytes")
    size = read_size(option, written, auto=False, share=False).to_bytes(option, None) or 0
    if size < least:
        raise bad_value(option, written, f"at least {format_size(least)}", f'write for example "{8 * GIB >> 30}GiB"')
    return size


def figures_of(asked: Asked) -> Figures:
    """The card that `asked` means.

    Raises:
        ValueError: a value that cannot be read, an unknown card, or no card and no size of its VRAM.
    """
    base = _card(asked.card) if asked.card is not None else _here(asked)
    sources = dict(base.sources)
    values: dict[str, Any] = {"vram": base.vram, "bandwidth": base.bandwidth, "tflops": base.tflops, "hbm": base.hbm}
    values["pageable"] = base.pageable
    if asked.vram is not None:
        values["vram"], sources["vram"] = read_bytes("--vram", asked.vram, least=GIB), "given"
    if asked.bandwidth is not None:
        values["bandwidth"], sources["bandwidth"] = read_rate("--bandwidth", asked.bandwidth), "given"
    if asked.tflops is not None:
        # A rate over a whole step, in which the time of memory-bound work is contained already.
        values["tflops"], values["hbm"], sources["tflops"] = read_tflops(asked.tflops), None, "given"
    if asked.pageable is not None:
        values["pageable"], sources["pageable"] = read_rate("--pageable", asked.pageable), "given"
    elif values["pageable"] > values["bandwidth"]:
        values["pageable"] = values["bandwidth"]  # nothing pageable is faster than the link
    reserve = 0 if asked.reserve is None else read_bytes("--reserve", asked.reserve)
    if values["pageable"] > values["bandwidth"]:
        raise bad_value(
            "--pageable", asked.pageable, f"at most --bandwidth ({values['bandwidth'] / 1e9:g} GB/s)", "write less"
        )
    return Figures(base.name, copy_latency=base.copy_latency, reserve=reserve, sources=sources, **values)


def _card(key: str) -> Figures:
    """A card of the simulator's table: rounded, published or estimated figures of its class."""
    try:
        from .simulator.cards import CARDS
    except ImportError as error:
        remedy = "give --vram, --bandwidth and --tflops, or install balanced-offload from the package index"
        raise bad_value("--card", key, "none: this package is without the table of cards", remedy) from error

    if key not in CARDS:
        near = [known for known in CARDS if key.lower().replace(" ", "") in known]
        hint = f"did you mean {near[0]!r}?" if near else "name one of them, or give --vram, --bandwidth and --tflops"
        raise bad_value("--card", key, ", ".join(CARDS), hint)
    card = CARDS[key]
    sources = dict.fromkeys(("vram", "bandwidth", "tflops", "pageable"), f"card {key}")
    return Figures(
        card.name,
        card.vram,
        card.h2d_pinned,
        card.h2d_pageable,
        card.flops16 / 1e12,
        card.hbm,
        card.copy_lat,
        sources=sources,
    )


def _here(asked: Asked) -> Figures:
    """This machine: what is stored of it or can be measured, where the options leave something open."""
    from .measure import ASSUMED

    sources = dict.fromkeys(("bandwidth", "tflops", "pageable"), "assumed")
    found = Figures(
        "a card", 0, ASSUMED.h2d, ASSUMED.h2d_pageable, ASSUMED_TFLOPS, None, ASSUMED.copy_latency, sources=sources
    )
    if asked.pageable is None and asked.bandwidth is not None:
        found = Figures("a card", 0, found.bandwidth, 8e9, found.tflops, None, found.copy_latency, sources=sources)
    if asked.vram is not None and asked.bandwidth is not None and asked.tflops is not None:
        return found
    machine = _machine(asked)
    if machine is not None:
        return machine
    if asked.vram is None:
        raise ValueError(
            "--vram: got nothing, and torch sees no accelerator here; allowed: a size; "
            "write for example --vram 16GiB, or --card with one of the known cards"
        )
    return found


def _machine(asked: Asked) -> Figures | None:
    """The accelerator of this machine, None where there is none."""
    from .backend import NoAcceleratorError, open_backend
    from .rates import rates_for

    try:
        backend = open_backend()
    except NoAcceleratorError:
        return None
    if backend.kind == "cpu":
        return None
    rates = rates_for(backend)
    tflops = _matmul_tflops(backend) if asked.tflops is None else None
    sources = {
        "vram": f"this machine's {backend.name}",
        "bandwidth": rates.source,
        "pageable": rates.source,
        "tflops": "assumed" if tflops is None else "measured",
    }
    return Figures(
        backend.name,
        backend.memory().total,
        rates.h2d,
        rates.h2d_pageable,
        tflops or ASSUMED_TFLOPS,
        None,
        rates.copy_latency,
        sources=sources,
    )


def _matmul_tflops(backend: Any, side: int = 4096, rounds: int = 5) -> float | None:
    """TFLOP/s that a denoiser reaches here, from the fastest of a few bf16 matrix products; None where none runs."""
    import torch

    from .backend import is_out_of_memory

    try:
        with torch.no_grad():
            left = torch.zeros(side, side, dtype=torch.bfloat16, device=backend.device)
            seconds = math.inf
            for _ in range(rounds):
                start = backend.mark()
                torch.mm(left, left)
                end = backend.mark()
                backend.synchronize()
                seconds = min(seconds, backend.seconds(start, end))
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    return MATMUL_SHARE * 2 * side**3 / seconds / 1e12 if seconds > 0 else None


def is_path(model: str) -> bool:
    """Whether `model` is meant as a file or folder, and not as a name."""
    return "/" in model or "\\" in model or model.endswith(".safetensors") or Path(model).exists()
