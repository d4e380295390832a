"""A device whose clock the test moves by hand. Invariant: times are binary fractions, so every sum is exact."""

from __future__ import annotations

from typing import Any

import pytest

from balanced_offload.offload.ledger import Ledger
from balanced_offload.offload.record import RunRecord

GIB = 1 << 30


class HandClock:
    """The part of a Backend that the ledger asks for. A mark is ready once it is not newer than `passed`."""

    kind = "fake"
    rung = "cpu"
    name = "Hand clock"

    def __init__(self) -> None:
        self.now = 0.0
        self.lag = 0.0  # the device reports marks ready this many seconds late, until it is synchronised
        self.marks = 0
        self.syncs = 0
        self.blind = False  # ready() says no: only synchronize() lets marks through
        self.broken: Exception | None = None

    def tick(self, seconds: float) -> None:
        self.now += seconds

    def mark(self) -> Any:
        self.marks += 1
        return [self.now]

    def at(self, t: float) -> Any:
        """A mark of the copy stream."""
        return [t]

    def ready(self, mark: Any) -> bool:
        return not self.blind and mark[0] <= self.now - self.lag

    def seconds(self, start: Any, end: Any) -> float:
        assert self.ready(start) and self.ready(end), "asked for the time of a mark that has not been passed"
        return float(end[0] - start[0])

    def synchronize(self) -> None:
        self.syncs += 1
        if self.broken is not None:
            raise self.broken
        self.blind, self.lag = False, 0.0


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def ledger(clock: HandClock) -> Ledger:
    return Ledger(clock)  # type: ignore[arg-type]


@pytest.fixture
def given() -> dict[str, Any]:
    """What a session hands to build_report, on a card with 16 GiB."""
    return {
        "host": {"gpu": "Card", "vram_total": 16 * GIB, "driver": "1.2", "os": "Linux", "ram_total": 64 * GIB},
        "env": {"pack": "0.1.0", "comfyui": None, "torch": "2.13", "dynamic_vram": False, "flags": []},
        "policy_json": {"schema": "offload-policy/1", "mode": "balanced", "gc_threshold": None},
        "resolved_json": {
            "mode": "balanced",
            "high": int(12.8 * GIB),
            "low": 0,
            "prefetch": None,
            "sources": {"mode": "user"},
            "sentence": "The run does not fit.",
            "fits": False,
        },
        "vram": {
            "total": 16 * GIB,
            "available": 15 * GIB,
            "peak_device": 11 * GIB,
            "peak_torch": int(9.8 * GIB),
            "others_start": GIB,
            "high_crossings": 0,
            "spill_suspected": False,
        },
        "ram": {"peak_rss": int(15.7 * GIB), "pinned": GIB},
        "prediction": {"step_s": 0.5, "bound_s": 0.4},
        "rung": "simulated",
        "world": "pipeline",
        "output_neutral": True,
    }


@pytest.fixture
def record(clock: HandClock, ledger: Ledger) -> RunRecord:
    """The run of the second seed, in small: encode, two steps with a stall each, decode, an eviction."""
    ledger.open_run("prompt-1")
    clock.tick(0.0625)
    ledger.note_vram(0, 0)
    ledger.stage_begin("encode", "text_encoder", need=3 * GIB, have=15 * GIB)
    with ledger.span("onload"):
        clock.tick(0.25)
        ledger.move("text_encoder", "h2d", 2 * GIB, "stage")
        ledger.note_vram(2 * GIB, 2 * GIB)
    ledger.begin("encode")
    clock.tick(0.75)
    ledger.stage_end(3 * GIB)
    ledger.stage_begin("denoise", "unet", need=9 * GIB, have=8 * GIB)
    with ledger.span("evict"):
        clock.tick(0.0625)
        ledger.move("text_encoder", "drop", 2 * GIB, "need", avoidable=True)
        ledger.note_vram(6 * GIB, 6 * GIB)
    ledger.begin("denoise")
    for step in range(2):
        ledger.step_begin(step)
        start = clock.now
        clock.tick(1.5)
        with ledger.wait("stall"):
            clock.tick(0.25)
        copy = {"copy_start": clock.at(start + 0.5), "copy_end": clock.at(start + 1.75), "overlapped": True}
        ledger.move("unet", "h2d", GIB, "forward", **copy)
        clock.tick(0.25)
        ledger.step_end()
    ledger.note_vram(int(9.8 * GIB), 7 * GIB)
    ledger.stage_end(int(9.8 * GIB))
    ledger.stage_begin("decode", "vae", need=GIB, have=2 * GIB)
    ledger.begin("decode")
    clock.tick(0.75)
    ledger.event("notice", "the picture was decoded whole", tiles=1)
    ledger.stage_end(8 * GIB)
    ledger.begin("other")
    clock.tick(0.0625)
    return ledger.close_run()
