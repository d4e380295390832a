"""Invariant: streams and events work alike whichever class or call they come from, as those of `torch.cuda` do."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

DEVICE = "vram"
UNIT = dict(launch=0, copy_lat=0, sync_lat=0, query_lat=0, kernel_min=1, hbm=1e30)
"""Every kernel takes one second."""

STREAMS: dict[str, Callable[[ModuleType], torch.Stream]] = {
    "vram.Stream()": lambda vram: vram.Stream(),
    "vram.Stream(device=, priority=)": lambda vram: vram.Stream(device=DEVICE, priority=-1),
    "torch.Stream(device)": lambda vram: torch.Stream(DEVICE),
    "torch.Stream()": lambda vram: torch.Stream(),
    "current_stream()": lambda vram: vram.current_stream(),
    "accelerator": lambda vram: torch.accelerator.current_stream(),
    "default_stream()": lambda vram: vram.default_stream(),
}

EVENTS: dict[str, Callable[[ModuleType], torch.Event]] = {
    "vram.Event()": lambda vram: vram.Event(),
    "vram.Event(enable_timing=)": lambda vram: vram.Event(enable_timing=True),
    "vram.Event(blocking=)": lambda vram: vram.Event(enable_timing=True, blocking=True, interprocess=False),
    "torch.Event(device)": lambda vram: torch.Event(DEVICE, enable_timing=True),
    "torch.Event(device=)": lambda vram: torch.Event(device=torch.device(DEVICE, 0), enable_timing=True),
    "torch.Event()": lambda vram: torch.Event(enable_timing=True),
}


@pytest.mark.parametrize("make_event", EVENTS)
@pytest.mark.parametrize("make_stream", STREAMS)
def test_all_calls_on_all_classes(vram: ModuleType, make_stream: str, make_event: str) -> None:
    stream = STREAMS[make_stream](vram)
    begin, end = EVENTS[make_event](vram), EVENTS[make_event](vram)
    vram.configure(**UNIT)
    other = vram.Stream()
    with vram.stream(stream):
        begin.record()
        x = torch.zeros(4, device=DEVICE)
        x.add_(1)
        end.record(stream)
    x.record_stream(stream)
    x.record_stream(other)
    assert isinstance(end, torch.Event) and isinstance(stream, torch.Stream)
    assert not end.query() and not stream.query()
    end.wait(other)
    with vram.stream(other):
        x.add_(1)
    own = stream.record_event()
    recorded = stream.record_event(EVENTS[make_event](vram))
    other.wait_event(recorded)
    stream.wait_event(other.record_event())
    stream.wait_stream(other)
    end.synchronize()
    assert vram.host_clock() == 2
    assert end.query() and own.query()
    stream.synchronize()
    assert vram.host_clock() == 3 and stream.query()
    assert begin.elapsed_time(end) == 2000
    assert vram.races() == 0


@pytest.mark.parametrize("late", EVENTS)
@pytest.mark.parametrize("early", EVENTS)
def test_elapsed_time_mixes(vram: ModuleType, early: str, late: str) -> None:
    vram.configure(**UNIT)
    x, begin, end = torch.zeros(4, device=DEVICE), EVENTS[early](vram), EVENTS[late](vram)
    begin.record(vram.current_stream())
    x.add_(1)
    end.record()
    vram.synchronize()
    assert begin.elapsed_time(end) == 1000


@pytest.mark.parametrize("make", [s for s in STREAMS if "efault" not in s and "ccel" not in s and "urrent" not in s])
def test_streams_are_contexts(vram: ModuleType, make: str) -> None:
    stream = STREAMS[make](vram)
    for block in (stream, vram.stream(stream)):
        with block:
            assert vram.current_stream() == stream == torch.accelerator.current_stream()
        assert vram.current_stream() == vram.default_stream() != stream


def test_an_untimed_event_orders_as_well(vram: ModuleType) -> None:
    vram.configure(**UNIT)
    event, side = torch.Event(DEVICE), vram.Stream()
    x = torch.zeros(4, device=DEVICE)
    event.record()
    side.wait_event(event)
    with vram.stream(side):
        x.add_(1)
    vram.synchronize()
    assert vram.clock() == 2 and vram.races() == 0


def test_an_event_is_recorded_again_and_again(vram: ModuleType) -> None:
    """A wait means the newest record before it: an event per slot needs no new object per step."""
    vram.configure(**UNIT)
    event, side = vram.Event(), vram.Stream()
    x = torch.zeros(4, device=DEVICE)
    for _ in range(3):
        x.add_(1)
        event.record()
        side.wait_event(event)
        with vram.stream(side):
            x.add_(1)
        event.record(side)
        vram.current_stream().wait_event(event)
    vram.synchronize()
    assert vram.clock() == 7 and vram.races() == 0
