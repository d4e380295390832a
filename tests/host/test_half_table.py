"""Invariant: docs/hosts.md says what half the weights give, ours and stock, and this measures it on each host.

Where it fails it prints the rows to put there. Simulated: bytes and peaks are real, a cap raises torch's own error.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from . import hosts, tiny
from .conftest import ROOT, Host
from .inprocess import load_model, sample, under

MIB = 1 << 20
PROMPTS = 3
NAMES = ("stock", "auto", "balanced", "sequential")
NEAR = 0.02
"""Shares by which a figure may differ from the written one: rounding, and the allocator's padding."""


class Row(NamedTuple):
    """`up`: MiB copied to the device in one prompt, the last; None where it did not run."""

    name: str
    ran: str
    peak: float
    up: float | None

    def text(self, version: str) -> str:
        up = "" if self.up is None else f"{self.up:.1f}"
        return f"| {version} | {self.name} | {self.ran} | {self.peak:.1f} | {up} |"


@pytest.fixture
def closing(sim_host: Any, pack: Callable[[str], ModuleType]) -> Iterator[None]:
    yield
    sim_host.management.unload_all_models()
    gc.collect()
    pack("offload.adapters.comfyui_device").close_device_session()


def measure(name: str, models: Path, sim_host: Any, cap: Callable[[int], None]) -> tuple[Row, int]:
    stock = load_model(models, "sd15")
    whole = stock.model_size()
    wanted = sample(stock, "sd15")
    sim_host.management.unload_all_models()
    gc.collect()
    model = stock if name == "stock" else under({"mode": name}, stock)
    cap(whole // 2)
    sim_host.peak()
    ran, up = "yes, equal", None
    try:
        for _ in range(PROMPTS):
            sim_host.moved()
            found = sample(model, "sd15")
            if not torch.equal(found, wanted):
                close = (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
                ran = "yes, rounded otherwise" if close else "yes, wrong"
        up = sim_host.moved().get("h2d_bytes", 0) / MIB
    except torch.OutOfMemoryError:
        ran = "out of memory"
    return Row(name, ran, sim_host.peak() / MIB, up), whole


def written(version: str) -> dict[str, Row]:
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    found = re.findall(
        rf"^\| {re.escape(version)} \| (\w+) \| ([\w, ]+) \| ([\d.]+) \| *([\d.]*) *\|$", page, re.MULTILINE
    )
    return {n: Row(n, ran, float(peak), float(up) if up else None) for n, ran, peak, up in found}


@pytest.mark.parametrize("name", NAMES)
def test_half_the_weights_as_it_is_written(
    name: str, host: Host, sim_host: Any, models: Path, cap: Any, closing: None
) -> None:
    tiny.make(models, "diffusion_models/tiny_sd15")
    row, whole = measure(name, models, sim_host, cap)
    version = hosts.version(host.path)
    if name != "stock":
        assert row.ran == "yes, equal" and row.peak * MIB <= whole // 2
    listed = written(version).get(name)
    if not written(version):
        pytest.skip(f"docs/hosts.md has no table for ComfyUI {version}")
    assert listed is not None and listed.ran == row.ran, row.text(version)
    assert row.peak == pytest.approx(listed.peak, rel=NEAR), row.text(version)
    assert (row.up is None) == (listed.up is None), row.text(version)
    if row.up is not None:
        assert row.up == pytest.approx(listed.up, rel=NEAR), row.text(version)
