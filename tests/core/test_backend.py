"""Invariant: a backend asks each device only what that device can answer, and what it answers has one meaning.

Devices that are not at hand are stand-ins which refuse what the real ones refuse (as read in torch's sources).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from balanced_offload.offload import backend as backends
from balanced_offload.offload.backend.generic import AcceleratorBackend
from balanced_offload.offload.backend.mps import MpsBackend
from balanced_offload.offload.ledger import Ledger

GIB = 1 << 30


class FakeCard:
    """What `torch.cuda` and `torch.xpu` offer, without a device behind it."""

    def __init__(self, count: int = 1, **properties: Any) -> None:
        self.properties = SimpleNamespace(total_memory=8 * GIB, **properties)
        self.count = count
        self.asked = 0
        self.refuses = False

    def current_device(self) -> int:
        return 0

    def set_stream(self, stream: Any) -> None:
        self.stream = stream

    def device_count(self) -> int:
        return self.count

    def get_device_name(self, device: Any) -> str:
        return f"Card {device if isinstance(device, int) else device.index}"

    def get_device_properties(self, device: torch.device) -> Any:
        return self.properties

    def memory_allocated(self, device: torch.device) -> int:
        return 1 * GIB

    def memory_reserved(self, device: torch.device) -> int:
        return 3 * GIB

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self.asked += 1
        if self.refuses:
            raise RuntimeError("The device doesn't support querying the available free memory.")
        return 4 * GIB, 8 * GIB

    def current_stream(self, device: torch.device) -> str:
        return f"stream of {device}"


def use(monkeypatch: pytest.MonkeyPatch, module: Any, accelerator: str | None = None) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)
    known = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: known)


# ---------------------------------------------------------------------- choosing
def test_no_accelerator_is_an_error_that_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"requires an accelerator.*device='cpu'"):
        backends.open_backend()


def test_other_cards_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeCard(count=3))
    backend = AcceleratorBackend(torch.device("cuda", 1))
    assert backend.others == ("cuda:0 Card 0", "cuda:2 Card 2")
    assert (backend.name, backend.kind, backend.rung) == ("Card 1", "cuda", "gpu")


@pytest.mark.parametrize(
    ("properties", "shared"),
    [({}, False), ({"is_integrated": 0}, False), ({"is_integrated": 1}, True), ({"is_integrated_gpu": True}, True)],
)
def test_integrated_devices_share_memory(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], shared: bool
) -> None:
    use(monkeypatch, FakeCard(**properties))
    assert AcceleratorBackend(torch.device("xpu", 0)).shared_memory is shared


# ---------------------------------------------------------------------- memory
def test_memory_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeCard())
    now = AcceleratorBackend(torch.device("cuda", 0)).memory()
    assert (now.free, now.total, now.allocated, now.reserved) == (4 * GIB, 8 * GIB, 1 * GIB, 3 * GIB)
    assert (now.others, now.reclaimable) == (1 * GIB, 2 * GIB)


def test_a_driver_that_cannot_tell_free_memory_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard()
    card.refuses = True
    use(monkeypatch, card)
    backend = AcceleratorBackend(torch.device("xpu", 0))
    for _ in range(3):
        now = backend.memory()
        assert (now.free, now.total) == (5 * GIB, 8 * GIB)
    assert card.asked == 1


# ---------------------------------------------------------------------- streams
def test_the_devices_own_module_is_asked_where_torch_counts_on_another_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, FakeCard(), accelerator="mtia")
    assert AcceleratorBackend(torch.device("cuda", 0)).current_stream() == "stream of cuda:0"


def test_streams_and_events_of_both_kinds_work_together(sim: ModuleType) -> None:
    backend = AcceleratorBackend(torch.device("vram", 0))
    copies = backend.new_stream()
    assert isinstance(copies, sim.Stream)
    plain = torch.Stream(device=backend.device)
    before = backend.current_stream()
    weights = torch.arange(1 << 16, dtype=torch.float32).pin_memory()
    buffer = torch.empty_like(weights, device=backend.device)
    allocated = backend.record(before)
    with backend.on_stream(copies):
        assert backend.current_stream() == copies
        copies.wait_event(allocated)
        buffer.copy_(weights, non_blocking=True)
    assert backend.current_stream() == before
    plain.wait_event(backend.record(copies, timed=True))
    before.wait_event(backend.record(plain))
    assert torch.equal(buffer.cpu(), weights)


def test_the_stream_is_put_back_after_an_exception(sim: ModuleType) -> None:
    backend = AcceleratorBackend(torch.device("vram", 0))
    before = backend.current_stream()
    with pytest.raises(KeyboardInterrupt), backend.on_stream(backend.new_stream()):
        raise KeyboardInterrupt
    assert backend.current_stream() == before


def test_marks_never_block_and_have_a_sign(sim: ModuleType) -> None:
    backend = AcceleratorBackend(torch.device("vram", 0))
    first = backend.mark()
    tensor = torch.ones(1 << 20, device=backend.device)
    for _ in range(10):
        tensor = tensor * 1
    second = backend.mark()
    at = sim.host_clock()
    assert not backend.ready(second)
    assert sim.host_clock() - at < sim.clock() - at, "looking at a mark waited for it"
    backend.synchronize()
    assert backend.ready(first) and backend.ready(second)
    assert backend.seconds(first, second) > 0
    assert backend.seconds(second, first) == -backend.seconds(first, second)
    assert backend.seconds(first, first) == 0


def test_an_event_is_recorded_again_and_a_wait_keeps_to_the_record_that_it_saw(sim: ModuleType) -> None:
    backend = AcceleratorBackend(torch.device("vram", 0))
    compute, copies = backend.current_stream(), backend.new_stream()
    work = torch.ones(1 << 20, device=backend.device)
    done, end = backend.event(), backend.event(timed=True)
    start = backend.mark()
    done.record(compute)
    copies.wait_event(done)
    work.mul_(2)
    done.record(compute)
    end.record(copies)
    backend.synchronize()
    assert backend.ready(end) and backend.seconds(start, end) == 0, "the copy stream waited for the later record"
    copies.wait_event(done)
    end.record(copies)
    backend.synchronize()
    assert backend.seconds(start, end) > 0


def test_the_current_stream_is_set_without_a_block(sim: ModuleType) -> None:
    backend = AcceleratorBackend(torch.device("vram", 0))
    before, copies = backend.current_stream(), backend.new_stream()
    backend.set_stream(copies)
    try:
        assert backend.current_stream() == copies
    finally:
        backend.set_stream(before)
    assert backend.current_stream() == before


def test_only_cuda_and_the_simulator_register_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard()
    use(monkeypatch, card)
    assert not AcceleratorBackend(torch.device("xpu", 0)).can_register
    card.cudart = object()  # type: ignore[attr-defined]
    assert AcceleratorBackend(torch.device("cuda", 0)).can_register
    assert not AcceleratorBackend(torch.device("xpu", 0)).can_register
    assert not AcceleratorBackend(torch.device("xpu", 0)).register(1 << 20, 4096)
    assert not backends.open_backend("cpu").can_register


def test_a_registration_is_of_our_card_and_its_end_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCard(count=2)
    calls: list[str] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            calls.append(str(device))

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def refuse(*_: object) -> int:
        raise RuntimeError("driver shutting down")

    card.device = Guard  # type: ignore[attr-defined]
    card.cudart = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        cudaHostRegister=lambda *given: calls.append(repr(given)) or 0, cudaHostUnregister=refuse
    )
    use(monkeypatch, card)
    backend = AcceleratorBackend(torch.device("cuda", 1))
    assert backend.register(1 << 20, 4096)
    assert calls == ["cuda:1", "(1048576, 4096, 1)"]
    backend.unregister(1 << 20)  # a stand-in without `synchronize`, too


def test_pinned_memory_or_none(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = AcceleratorBackend(torch.device("vram", 0))
    pinned = backend.pinned_empty(4096)
    assert pinned is not None and pinned.is_pinned() and pinned.numel() == 4096

    def refused(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refused)
    assert backend.pinned_empty(4096) is None


def test_random_numbers_repeat_from_a_captured_state(sim: ModuleType) -> None:
    backend = AcceleratorBackend(torch.device("vram", 0))
    restore = backend.rng_state()
    drawn = [torch.rand(5), torch.rand(5, device=backend.device).cpu()]
    restore()
    again = [torch.rand(5), torch.rand(5, device=backend.device).cpu()]
    assert torch.equal(drawn[0], again[0]) and torch.equal(drawn[1], again[1])


# ---------------------------------------------------------------------- MPS
class FakeMps:
    """`torch.mps` with the manners of its events: see MPSEventPool::elapsedTime."""

    def __init__(self) -> None:
        self.now = 0.0  # device milliseconds
        self.queued: list[FakeMpsEvent] = []
        self.asked_between_syncs = 0
        module = self

        class Event(FakeMpsEvent):
            def __init__(self, enable_timing: bool = False) -> None:
                super().__init__(module, enable_timing)

        self.Event = Event

    def synchronize(self) -> None:
        for event in self.queued:
            event.done = True
        self.queued.clear()

    def recommended_max_memory(self) -> int:
        return 8 * GIB

    def current_allocated_memory(self) -> int:
        return 1 * GIB

    def driver_allocated_memory(self) -> int:
        return 2 * GIB


class FakeMpsEvent:
    def __init__(self, module: FakeMps, timed: bool) -> None:
        self.module, self.timed, self.done, self.was_end, self.at = module, timed, False, False, -1.0

    def record(self) -> None:
        self.module.now += 1.0  # every command buffer takes time
        self.at = self.module.now
        self.module.queued.append(self)

    def elapsed_time(self, end: FakeMpsEvent) -> float:
        if not (self.done and end.done):
            self.module.asked_between_syncs += 1
            self.module.synchronize()
        if end.was_end:
            raise AssertionError("the real call waits for ever when the same event is asked for again as the end")
        end.was_end = True
        if not (self.timed and end.timed) or end.at <= self.at:
            raise RuntimeError("End event was not recorded after start event")
        return end.at - self.at


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MpsBackend, FakeMps]]:
    module = FakeMps()
    use(monkeypatch, module)
    backend = backends.open_backend("mps")
    assert isinstance(backend, MpsBackend)
    yield backend, module


def test_mps_resolves_to_shared_memory(mps: tuple[MpsBackend, FakeMps]) -> None:
    backend, _ = mps
    assert backend.shared_memory and backend.kind == "mps" and backend.rung == "gpu"
    now = backend.memory()
    assert (now.free, now.total, now.allocated, now.reserved) == (6 * GIB, 8 * GIB, 1 * GIB, 2 * GIB)
    assert backend.peak_allocated() == 1 * GIB
    assert backend.pinned_empty(64) is None


def test_mps_events_are_asked_once_after_a_synchronise_and_forwards(mps: tuple[MpsBackend, FakeMps]) -> None:
    backend, module = mps
    first = backend.mark()
    module.now += 9
    second = backend.mark()
    assert not backend.ready(first) and not backend.ready(second)
    backend.synchronize()
    assert backend.ready(first) and backend.ready(second)
    for _ in range(2):
        assert backend.seconds(first, second) == pytest.approx(0.010)
        assert backend.seconds(second, first) == pytest.approx(-0.010)
        assert backend.seconds(first, first) == 0
    assert module.asked_between_syncs == 0


def test_mps_events_are_recorded_again(mps: tuple[MpsBackend, FakeMps]) -> None:
    backend, module = mps
    start, end = backend.mark(), backend.event(timed=True)
    for _ in range(2):
        module.now += 9
        end.record(backend.current_stream())
        assert not backend.ready(end)
        backend.synchronize()
        assert backend.ready(end)
        took = backend.seconds(start, end)
    assert took == pytest.approx(0.020)
    backend.event().record(backend.current_stream())
    assert module.asked_between_syncs == 0


def test_a_ledger_runs_on_mps_without_waiting_for_the_device(mps: tuple[MpsBackend, FakeMps]) -> None:
    backend, module = mps
    ledger = Ledger(backend)
    for _ in range(2):
        ledger.open_run()
        ledger.stage_begin("denoise", "unet", need=None, have=None)
        start = backend.record(backend.new_stream(), timed=True)
        end = backend.record(backend.new_stream(), timed=True)
        ledger.move("unet", "h2d", 64, "stage", copy_start=start, copy_end=end)
        ledger.step_begin(0)
        with ledger.span("denoise"):
            module.now += 100
        ledger.step_end()
        ledger.stage_end(None)
        assert module.asked_between_syncs == 0
        record = ledger.close_run()
        assert record.clock_error is None and record.complete
        assert record.seconds["denoise"] == pytest.approx(0.101)
        assert record.wall_s is not None and record.wall_s == pytest.approx(
            sum(v or 0 for v in record.seconds.values())
        )


# ---------------------------------------------------------------------- the host
def test_the_host_is_always_ready() -> None:
    backend = backends.open_backend("cpu")
    first = backend.mark()
    time.sleep(0.001)
    second = backend.mark()
    assert backend.ready(second) and backend.seconds(first, second) > 0 > backend.seconds(second, first)


def test_an_event_of_the_host_is_recorded_again() -> None:
    backend = backends.open_backend("cpu")
    start, end = backend.mark(), backend.event(timed=True)
    end.record(backend.current_stream())
    first = backend.seconds(start, end)
    time.sleep(0.001)
    end.record(backend.current_stream())
    assert backend.ready(end) and backend.seconds(start, end) > first > 0
