"""Guards: a probe looks and changes nothing, works with torch alone, and its block names no user and no path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

import torch

from . import memory
from .backend import Backend, CpuBackend, NoAcceleratorError, driver_version, open_backend
from .policy import ComponentInfo, OffloadPolicy, WorkingSet
from .profiles import profile_for
from .rates import rates_for
from .sizes import format_size
from .version import version

SCHEMA = "offload-probe/1"
PACKAGES = ("accelerate", "diffusers", "matplotlib", "nvidia-ml-py", "psutil", "safetensors", "transformers")

TYPICAL = WorkingSet(
    # Published parameter counts, two bytes each; the peak is the order of one picture of 1024 x 1024.
    (
        ComponentInfo("text_encoder", "CLIPTextModel", "text_encoder", 2 * 123_060_480),
        ComponentInfo("text_encoder_2", "CLIPTextModelWithProjection", "text_encoder", 2 * 694_659_840),
        ComponentInfo("unet", "UNet2DConditionModel", "denoiser", 2 * 2_567_463_684),
        ComponentInfo("vae", "AutoencoderKL", "vae", 2 * 83_653_863),
    ),
    activation_peak=2 << 30,
)
TYPICAL_NAME = "SDXL in fp16, one picture of 1024 x 1024"

# Slashes between words stay: a path starts at a space, a quote or the start, and has a separator after that.
_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][^\s'\":,;]+)+")


def probe() -> dict[str, Any]:
    """The document `offload-probe/1`: sizes in bytes, null for what is not known. Touches one accelerator at most."""
    try:
        backend: Backend = open_backend()
        reason = None
    except NoAcceleratorError as error:
        backend, reason = CpuBackend(), str(error)
    machine = memory.machine(backend)
    host = memory.ram()
    now = backend.memory()
    found = backend.rung != "cpu"
    resolved = OffloadPolicy().resolve(machine, TYPICAL)
    profile = profile_for(machine.vram_total)
    cpu_only = "there is no accelerator, so no profile applies and everything runs from system memory (mode none)"
    return {
        "schema": SCHEMA,
        "versions": {
            "balanced_offload": version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": getattr(torch.version, "hip", None),
        },
        "os": platform.platform(),
        "cpus": os.cpu_count(),
        "accelerator": {
            "name": backend.name,
            "kind": backend.kind,
            "rung": backend.rung,
            "driver": driver_version(),
            "shared_memory": backend.shared_memory,
            "total": now.total,
            "free": now.free,
            "others": machine.others,
        }
        if found
        else None,
        "rates": _rates(backend),
        "no_accelerator": clean(reason) if reason else None,
        "other_accelerators": list(backend.others),
        "ram": {
            "total": host.total,
            "available": host.available,
            "limit": host.limit,
            "pinned_budget": resolved.pinned_ram,
        },
        "simulator": _simulator(),
        "packages": {name: _package(name) for name in PACKAGES},
        "profile": {
            "name": profile.name if found else None,
            "why": profile.reason if found else cpu_only,
            "working_set": TYPICAL_NAME,
            "mode": resolved.mode.value,
            "sentence": clean(resolved.sentence) if found else cpu_only,
            "notices": [clean(text) for text in resolved.notices] if found else [],
        },
    }


def probe_text(document: Mapping[str, Any]) -> str:
    """The document for people, with a fenced block for a bug report."""
    profile = document["profile"]
    lines = [*_machine_lines(document), ""]
    if profile["name"] is None:
        lines.append(f"Profile: none; {profile['why']}.")
    else:
        lines.append(f"Profile: {profile['name']}, as {profile['why']}.")
        lines.append(f"For {profile['working_set']} that means {profile['sentence']}")
        lines += [f"Note: {text}." for text in profile["notices"]]
    lines += ["", "For a bug report, paste this block:", "", "```text", *_block(document), "```"]
    return "\n".join(lines)


def _machine_lines(document: Mapping[str, Any]) -> list[str]:
    versions, card, ram = document["versions"], document["accelerator"], document["ram"]
    lines = [
        f"balanced-offload {versions['balanced_offload']}, Python {versions['python']}, torch {versions['torch']}",
        f"{document['os']}, {document['cpus']} CPUs",
    ]
    if card is None:
        lines.append(f"Accelerator: none. {document['no_accelerator']}")
    else:
        lines.append(
            f"Accelerator: {card['name']} ({card['kind']}), {format_size(card['free'])} free of "
            f"{format_size(card['total'])}, {format_size(card['others'])} used by other programs and the driver"
        )
        if card["rung"] == "simulated":
            lines.append("It is simulated: its bytes are exact, its times are not those of a card.")
        rates = document["rates"]
        if rates is not None:
            lines.append(f"Copies to it: {_rates_text(rates)}")
        if card["shared_memory"]:
            lines.append("It shares its memory with the host, so every mode becomes none.")
    if document["other_accelerators"]:
        lines.append(f"Not used: {', '.join(document['other_accelerators'])}")
    limit = "no cgroup limit" if ram["limit"] is None else f"cgroup limit {format_size(ram['limit'])}"
    lines.append(
        f"RAM: {format_size(ram['available'])} available of {format_size(ram['total'])}, {limit}; "
        f"up to {format_size(ram['pinned_budget'])} for page-locked weights"
    )
    simulator = document["simulator"]
    lines.append(
        f"Simulated accelerator: {'available' if simulator['available'] else 'not available'}, {simulator['reason']}"
    )
    packages = (f"{name} {found or 'not installed'}" for name, found in document["packages"].items())
    lines.append(f"Packages: {', '.join(packages)}")
    return lines


def _rates(backend: Backend) -> dict[str, Any] | None:
    """Rates in bytes/s and seconds; None where nothing is copied. Measured ones are told, and not written down."""
    if backend.shared_memory:
        return None
    found = rates_for(backend, keep=False)
    return {
        "h2d": found.h2d,
        "h2d_pageable": found.h2d_pageable,
        "copy_latency": found.copy_latency,
        "source": found.source,
        "link": backend.link(),
    }


def _rates_text(rates: Mapping[str, Any]) -> str:
    source = {"measured": "measured now", "stored": "as stored", "assumed": "assumed: they could not be measured"}
    return (
        f"{rates['h2d'] / 1e9:.1f} GB/s from page-locked memory, {rates['h2d_pageable'] / 1e9:.1f} GB/s from pageable, "
        f"{rates['copy_latency'] * 1e6:.1f} us for each ({source[rates['source']]}; "
        f"link: {rates['link'] or 'not known'})"
    )


def _block(document: Mapping[str, Any]) -> list[str]:
    profile = document["profile"]
    return [*_machine_lines(document), f"Profile: {profile['name'] or 'none'}; {profile['sentence']}"]


def clean(text: str) -> str:
    """`text` with every path cut down to its last part: a bug report must not tell who or where someone is."""
    return _PATH.sub(lambda found: re.split(r"[/\\]", found.group().rstrip("/\\"))[-1], text)


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _simulator() -> dict[str, Any]:
    """Whether the simulated accelerator can be had, and why or why not. Builds nothing."""
    try:
        from . import simulator
    except ImportError:
        return {"available": False, "reason": "this package comes without it (the repository has it)"}
    possible, reason = simulator.available()
    return {"available": possible, "reason": clean(reason)}
