"""Invariant: measured rates are the machine's, and neither a broken file nor a full card or disk ends a run.

The simulated card's link is known exactly, so what is measured on it is held against its parameters.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch

from balanced_offload.offload import measure as measuring
from balanced_offload.offload import rates as rating
from balanced_offload.offload.backend import Backend, CpuBackend, open_backend
from balanced_offload.offload.backend.link import driver_version, pci_link
from balanced_offload.offload.measure import ASSUMED, measure
from balanced_offload.offload.rates import RateBook, rate_book, rates_for, state_folder
from balanced_offload.offload.schedule import Rates

MIB = 1 << 20
CARDS = ("gtx1650-4g-pcie3", "rtx4060-8g-pcie4x8", "rtx4080-16g", "rtx5090-32g-pcie5")
MEASURED = Rates(24e9, 8e9, 8e-6, source="measured")


@pytest.fixture
def backend(sim: ModuleType) -> Backend:
    return open_backend("vram")


@pytest.fixture
def steady_warnings() -> Iterator[None]:
    """Every warning is an error: what is fine says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---------------------------------------------------------------------- measuring
@pytest.mark.parametrize("key", CARDS)
def test_measured_is_what_the_card_has(key: str, backend: Backend, sim: ModuleType) -> None:
    card = sim.use_card(key)
    found = measure(backend)
    assert found.h2d == pytest.approx(card.h2d_pinned, rel=0.02)
    assert found.h2d_pageable == pytest.approx(card.h2d_pageable, rel=0.02)
    assert found.copy_latency == pytest.approx(card.copy_lat, rel=0.02)
    assert (found.source, found.hook) == ("measured", 0.0)
    assert sim.memory_allocated() == 0 and sim.counters()["pinned"] == 0


def test_python_that_takes_its_time_is_not_in_the_rates(backend: Backend, sim: ModuleType) -> None:
    sim.configure(python_time=1, python_scale=3.0, h2d_pinned=48e9, copy_lat=6e-6)
    found = measure(backend)
    assert found.h2d == pytest.approx(48e9, rel=0.02)
    assert found.copy_latency == pytest.approx(6e-6, rel=0.02)


def test_measuring_runs_behind_and_beside_what_is_queued(backend: Backend, sim: ModuleType) -> None:
    sim.configure(h2d_pinned=12e9)
    busy = torch.ones(MIB, device=backend.device)
    for _ in range(200):
        busy.mul_(1)
    found = measure(backend)
    busy.mul_(3)
    assert found.h2d == pytest.approx(12e9, rel=0.02)
    assert float(busy[0]) == 3


def test_measuring_on_ghosts(backend: Backend, sim: ModuleType) -> None:
    sim.configure(ghost=MIB)
    assert measure(backend).h2d == pytest.approx(sim.configuration()["h2d_pinned"], rel=0.02)


def test_a_full_card_is_no_error_and_nothing_stays(backend: Backend, sim: ModuleType) -> None:
    sim.set_memory_cap(8 * MIB)
    assert measure(backend) == ASSUMED
    assert sim.memory_reserved() == 0 and sim.counters()["pinned"] == 0


def test_without_page_locked_memory_all_copies_are_pageable(
    backend: Backend, sim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring.Pinner, "slab", lambda self, nbytes: None)
    found = measure(backend)
    assert found.h2d == found.h2d_pageable == pytest.approx(sim.configuration()["h2d_pageable"], rel=0.02)


def test_the_time_it_takes_has_an_end(backend: Backend) -> None:
    # one take of each kind at least, whatever the limit: three of pinned, two of pageable, one warm copy of each
    copies: list[int] = []
    real = torch.Tensor.copy_

    def counted(self: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        copies.append(self.numel())
        return real(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", counted)
        measure(backend, limit_s=0.0)
    assert sum(copies) < 160 * MIB and len(copies) < 30


def test_a_device_that_shares_memory_has_no_link() -> None:
    assert measure(CpuBackend()) == ASSUMED
    assert rates_for(CpuBackend(), RateBook(Path("nowhere"))) == ASSUMED


@pytest.mark.parametrize(
    ("less", "more", "rate", "latency"),
    [
        ((4 * MIB, 1e-3), (16 * MIB, 4e-3), 4 * MIB / 1e-3, 0.0),
        ((4 * MIB, 1e-3 + 5e-6), (16 * MIB, 4e-3 + 5e-6), 4 * MIB / 1e-3, 5e-6),
        ((4 * MIB, 4e-3), (16 * MIB, 4e-3), 16 * MIB / 4e-3, measuring.MOST_LATENCY_S),  # noise: no slope
        ((4 * MIB, 3.9e-3), (16 * MIB, 4e-3), 32 * MIB / 4e-3, measuring.MOST_LATENCY_S),  # noise: too steep
    ],
)
def test_the_fit_stays_within_what_can_be(
    less: tuple[int, float], more: tuple[int, float], rate: float, latency: float
) -> None:
    found = measuring._fit(less, more, less)
    assert found == (pytest.approx(rate), pytest.approx(latency))


# ---------------------------------------------------------------------- the book
class Card(CpuBackend):
    """A card that is not here: what the book asks of a device, and no more."""

    def __init__(self, name: str = "Card 0") -> None:
        super().__init__()
        self.name, self.kind, self.rung, self.shared_memory = name, "xpu", "gpu", False

    def link(self) -> str | None:
        return "16.0 GT/s PCIe x8"

    def memory(self) -> Any:
        return SimpleNamespace(total=8 << 30, reserved=0)


def test_measured_once_and_stored_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path, steady_warnings: None
) -> None:
    calls: list[Backend] = []
    monkeypatch.setattr(rating, "measure", lambda backend: calls.append(backend) or MEASURED)
    card, book = Card(), RateBook(tmp_path / "new" / "folder")
    assert rates_for(card, book) == MEASURED
    assert rates_for(card, book) == MEASURED and len(calls) == 1
    document = json.loads(book.file.read_text(encoding="utf-8"))
    schema = json.loads((root / "offload" / "schemas" / "offload-rates-1.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, schema)
    assert document["machines"] == {
        f"Card 0, 8589934592 bytes, 16.0 GT/s PCIe x8, torch {torch.__version__}": {
            "h2d": 24e9,
            "h2d_pageable": 8e9,
            "copy_latency": 8e-6,
        }
    }
    assert [name.name for name in book.file.parent.iterdir()] == ["rates.json"], "a temporary file was left"
    again = rates_for(Card(), RateBook(tmp_path / "new" / "folder"))
    assert again == Rates(24e9, 8e9, 8e-6, source="stored") and len(calls) == 1
    rates_for(Card("Card 1"), RateBook(tmp_path / "new" / "folder"))
    assert len(calls) == 2, "another card, other rates"


def test_two_books_of_one_file_keep_each_others_machines(tmp_path: Path) -> None:
    first, second = RateBook(tmp_path), RateBook(tmp_path)
    assert first.get(Card("a")) is None and second.get(Card("b")) is None
    first.put(Card("a"), MEASURED)
    second.put(Card("b"), MEASURED)
    third = RateBook(tmp_path)
    assert third.get(Card("a")) is not None and third.get(Card("b")) is not None


def test_what_was_not_measured_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rating, "measure", lambda backend: ASSUMED)
    book = RateBook(tmp_path)
    assert rates_for(Card(), book) == ASSUMED and not book.file.exists()
    monkeypatch.setattr(rating, "measure", lambda backend: MEASURED)
    assert rates_for(Card(), book, keep=False) == MEASURED and not book.file.exists()
    assert rates_for(Card(), book) == MEASURED and book.file.exists()


GOOD = {"h2d": 24e9, "h2d_pageable": 8e9, "copy_latency": 8e-6}
KEY = f"Card 0, 8589934592 bytes, 16.0 GT/s PCIe x8, torch {torch.__version__}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\x00\xff",
        "[]",
        "null",
        json.dumps({"schema": "offload-rates/2", "machines": {KEY: GOOD}}),
        json.dumps({"schema": "offload-rates/1"}),
        json.dumps({"schema": "offload-rates/1", "machines": [GOOD]}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: 3}}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: {**GOOD, "h2d": 0}}}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: {**GOOD, "h2d": -1.0}}}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: {**GOOD, "h2d": float("nan")}}}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: {**GOOD, "h2d": 10**400}}}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: {**GOOD, "h2d_pageable": "8e9"}}}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: {**GOOD, "h2d_pageable": True}}}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: {**GOOD, "copy_latency": 5}}}),
        json.dumps({"schema": "offload-rates/1", "machines": {KEY: {"h2d": 24e9}}}),
    ],
)
def test_a_broken_or_foreign_file_is_a_warning(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rating, "measure", lambda backend: MEASURED)
    (tmp_path / "rates.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"rates\.json.*BALANCED_OFFLOAD_STATE"):
        assert rates_for(Card(), RateBook(tmp_path)) == MEASURED
    assert rates_for(Card(), RateBook(tmp_path)) == Rates(24e9, 8e9, 8e-6, source="stored"), "not mended"


def test_good_entries_beside_a_bad_one_are_read(tmp_path: Path) -> None:
    document = {"schema": "offload-rates/1", "machines": {KEY: {**GOOD, "more": 1}, "other": 7}, "more": 2}
    (tmp_path / "rates.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.warns(UserWarning, match="1 entries that are no rates"):
        assert RateBook(tmp_path).get(Card()) == Rates(24e9, 8e9, 8e-6, source="stored")


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rating, "measure", lambda backend: MEASURED)
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    book = RateBook(tmp_path / "file")
    with pytest.warns(UserWarning) as seen:
        assert rates_for(Card(), book) == MEASURED
        book.put(Card("Card 1"), MEASURED)
    assert len(seen) == 1
    assert book.get(Card()) == MEASURED, "memory serves where the disk does not"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="cannot be written"):
        RateBook(tmp_path).put(Card(), MEASURED)


def test_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(backend: Backend) -> Rates:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(rating, "measure", broken)
    with pytest.warns(UserWarning, match="unspecified launch failure"):
        assert rates_for(Card(), RateBook(tmp_path)) == ASSUMED


# ---------------------------------------------------------------------- refreshed by real moves
def test_large_copies_move_the_rate_to_their_median(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card, book = Card(), RateBook(tmp_path)
    book.put(card, MEASURED)
    nbytes = 64 * MIB
    for i in range(rating.OBSERVED):
        slow = 10 if i % 4 == 0 else 1  # every fourth was held up by something
        book.observe(card, nbytes, slow * nbytes / 12e9 + 8e-6, pinned=True)
    found = book.get(card)
    assert found is not None and found.h2d == pytest.approx(12e9) and found.h2d_pageable == 8e9
    for _ in range(rating.ENOUGH):
        book.observe(card, nbytes, nbytes / 6e9 + 8e-6, pinned=False)
    found = book.get(card)
    assert found is not None and found.h2d == pytest.approx(12e9) and found.h2d_pageable == pytest.approx(6e9)
    book.save()
    assert RateBook(tmp_path).get(card) == Rates(found.h2d, found.h2d_pageable, 8e-6, source="stored")


def test_small_impossible_and_few_copies_change_nothing(tmp_path: Path) -> None:
    card, book = Card(), RateBook(tmp_path)
    book.put(card, MEASURED)
    for _ in range(100):
        book.observe(card, rating.LEAST_OBSERVED - 1, 1.0, pinned=True)
        book.observe(card, 64 * MIB, 0.0, pinned=True)
        book.observe(card, 64 * MIB, -1.0, pinned=True)
        book.observe(card, 64 * MIB, float("nan"), pinned=True)
        book.observe(card, 64 * MIB, 1e-9, pinned=True)
    for _ in range(rating.ENOUGH - 1):
        book.observe(card, 64 * MIB, 1.0, pinned=True)
    assert book.get(card) == MEASURED


def test_noise_leaves_the_rate_and_the_file_alone(tmp_path: Path) -> None:
    card, book = Card(), RateBook(tmp_path)
    book.put(card, MEASURED)
    for i in range(200):
        book.observe(card, 64 * MIB, 64 * MIB / (24e9 * (1 + 0.02 * (-1) ** i)) + 8e-6, pinned=True)
    assert book.get(card) == MEASURED


def test_saved_at_most_once_a_minute_and_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(rating.time, "monotonic", lambda: now[0])
    written: list[float] = []
    monkeypatch.setattr(RateBook, "_write", lambda self, machines: written.append(now[0]))
    card, book = Card(), RateBook(tmp_path)
    book.put(card, MEASURED)
    for i in range(300):  # ever slower, one copy a second
        now[0] += 1.0
        book.observe(card, 64 * MIB, 64 * MIB / (24e9 / (1 + i / 20)) + 8e-6, pinned=True)
    assert written[0] == 1000.0 and 4 <= len(written) <= 6
    assert all(later - earlier >= 60 for earlier, later in pairwise(written))
    book.save()
    done = len(written)
    book.save()
    assert len(written) == done, "nothing had changed"


def test_threads_share_a_book(tmp_path: Path, steady_warnings: None) -> None:
    card, book = Card(), RateBook(tmp_path)
    errors: list[BaseException] = []

    def work(rate: float) -> None:
        try:
            for _ in range(50):
                book.observe(card, 64 * MIB, 64 * MIB / rate + 8e-6, pinned=True)
                book.put(card, Rates(rate, 8e9))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rate,)) for rate in (12e9, 24e9, 48e9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and RateBook(tmp_path).get(card) is not None


# ---------------------------------------------------------------------- the simulated card
def test_the_simulated_cards_own_figures_cost_no_copy(
    backend: Backend, sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(rating.FOLDER, raising=False)
    monkeypatch.setattr(rating, "state_folder", lambda: tmp_path)
    book = RateBook()
    for key in CARDS:
        card = sim.use_card(key)
        assert rates_for(backend, book) == Rates(card.h2d_pinned, card.h2d_pageable, card.copy_lat, source="stored")
    assert sim.copy_totals()["h2d"] == 0 and sim.host_clock() == 0
    book.put(backend, MEASURED)
    book.save()
    assert rates_for(backend, book) == MEASURED and not book.file.exists(), "kept in memory"
    sim.configure(h2d_pinned=13e9)
    assert rates_for(backend, book).h2d == 13e9, "another link is another machine"


def test_the_simulated_cards_rates_are_stored_where_a_folder_was_named(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rating.FOLDER, str(tmp_path / "named"))
    rate_book().put(backend, measure(backend))
    assert rate_book().file == tmp_path / "named" / "rates.json" and rate_book().file.exists()
    stored = RateBook().get(backend)
    assert stored is not None and stored.source == "stored"


# ---------------------------------------------------------------------- places and words
@pytest.mark.parametrize(
    ("platform", "environment", "ends"),
    [
        ("linux", {"XDG_STATE_HOME": "/state"}, "/state/balanced-offload"),
        ("linux", {"HOME": "/home/someone"}, "/home/someone/.local/state/balanced-offload"),
        ("darwin", {"HOME": "/Users/someone"}, "/Users/someone/Library/Caches/balanced-offload"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/balanced-offload"),
        ("linux", {"BALANCED_OFFLOAD_STATE": "/here", "XDG_STATE_HOME": "/state"}, "/here"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="the paths are written as elsewhere")
def test_the_state_folder(
    platform: str, environment: dict[str, str], ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BALANCED_OFFLOAD_STATE", "XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rating.sys, "platform", platform)
    assert str(state_folder()) == ends


def test_the_bus_is_read_from_the_system(tmp_path: Path) -> None:
    card = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x41, pci_device_id=0)
    folder = tmp_path / "0000:41:00.0"
    folder.mkdir()
    (folder / "max_link_speed").write_text("16.0 GT/s PCIe\n", encoding="ascii")
    (folder / "current_link_width").write_text("8\n", encoding="ascii")
    assert pci_link(card, tmp_path) == "16.0 GT/s PCIe x8"
    (folder / "max_link_speed").write_text("8.0 GT/s\n", encoding="ascii")  # as older kernels write it
    assert pci_link(card, tmp_path) == "8.0 GT/s PCIe x8"
    (folder / "max_link_speed").write_text("Unknown\n", encoding="ascii")
    assert pci_link(card, tmp_path) is None
    assert pci_link(SimpleNamespace(), tmp_path) is None
    assert pci_link(SimpleNamespace(pci_bus_id=0x42, pci_device_id=0), tmp_path) is None


def test_the_driver_is_read_from_the_kernel_where_no_library_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rating.sys.modules, "pynvml", None)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\nGCC\n", encoding="utf-8")
    assert driver_version(version) == "570.86.15"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", encoding="utf-8"
    )
    assert driver_version(version) == "580.65.06"
    version.write_text("something else", encoding="utf-8")
    assert driver_version(version) is None
    assert driver_version(tmp_path / "none") is None
