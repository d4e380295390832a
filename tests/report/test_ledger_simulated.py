"""The same promises on a device with streams: the simulated one, whose clock is exact. Skips where it is absent."""

from __future__ import annotations

import pytest
import torch

from balanced_offload.offload import simulator
from balanced_offload.offload.backend import open_backend
from balanced_offload.offload.ledger import Ledger


def test_copies_behind_compute_on_a_second_stream() -> None:
    possible, reason = simulator.available()
    if not possible:
        pytest.skip(reason)
    simulator.load("vram")
    backend = open_backend()
    ledger = Ledger(backend)
    stream = backend.new_stream()
    host = torch.zeros(16 << 20, dtype=torch.uint8, pin_memory=True)
    device = backend.empty(16 << 20)
    x = torch.randn(512, 512).to(backend.device)
    backend.synchronize()
    ledger.open_run()
    ledger.begin("denoise")
    for step in range(3):
        ledger.step_begin(step)
        with backend.on_stream(stream):
            start = backend.record(stream, timed=True)
            device.copy_(host, non_blocking=True)
            end = backend.record(stream, timed=True)
        ledger.move("unet", "h2d", host.numel(), "forward", copy_start=start, copy_end=end, overlapped=True)
        x = x @ x
        with ledger.wait("stall"):
            backend.current_stream().wait_event(end)
        x = x @ x
        stream.wait_stream(backend.current_stream())
        ledger.step_end()
    record = ledger.close_run()
    parts = [record.seconds[name] or 0.0 for name in record.seconds]
    assert record.clock_error is None
    assert record.wall_s == pytest.approx(sum(parts), rel=1e-12)
    assert record.seconds["stall"] == pytest.approx(sum(step.stall_s or 0.0 for step in record.steps), rel=1e-12)
    for step, move in zip(record.steps, record.moves, strict=True):
        assert step.t0 is not None and step.t1 is not None
        assert step.compute_s and step.stall_s and step.overlapped_s and move.dur_s
        assert step.compute_s + step.stall_s == pytest.approx(step.t1 - step.t0, rel=1e-9)
        # the copy starts with the step: a part of it lies behind the first product, for the rest the second one waits
        assert step.overlapped_s + step.stall_s == pytest.approx(move.dur_s, rel=1e-9)
        assert step.bytes_h2d == 16 << 20
