"""Invariant: on a real device, as on the simulated one, a mode decides where weights are and never what comes out."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from balanced_offload.offload import OffloadPolicy

SHARE = 0.4  # of the weights that the budget has room for
MODES = ("auto", "none", "balanced", "model", "sequential")


def policy_for(accelerator: Any, pipeline: Any, mode: str, **fields: Any) -> Any:
    """Less room than the weights need; all of them for none, the largest component for model."""
    share = {"none": 1.1, "model": 1.1}.get(mode, SHARE)
    budget = accelerator.budget(share, pipeline.weights)
    if mode not in ("none", "model"):
        assert budget < pipeline.weights, "the budget must be smaller than the weights, or nothing is shown"
    return accelerator.policy(mode, budget, **fields)


@pytest.mark.parametrize("mode", MODES)
def test_first_and_third_run_equal_none(accelerator: Any, pipeline: Any, mode: str) -> None:
    expected = [pipeline.reference(seed) for seed in (1, 2, 3)]
    with pipeline.session(policy_for(accelerator, pipeline, mode)) as session:
        for seed, picture in zip((1, 2, 3), expected, strict=True):
            with session.run():
                drawn = pipeline.generate(seed=seed)
            assert torch.equal(drawn, picture), f"run {seed} differs"
        assert session.record is not None and session.record.complete
    assert not torch.equal(expected[0], expected[1]), "the pictures do not depend on the input, and prove nothing"
    assert torch.equal(pipeline.reference(1), expected[0]), "the weights are no longer what they were"


@pytest.mark.parametrize("mode", ["auto", "balanced", "sequential"])
def test_peak_stays_within_a_budget_smaller_than_the_weights(accelerator: Any, pipeline: Any, mode: str) -> None:
    budget = accelerator.budget(SHARE, pipeline.weights)
    before = accelerator.allocated()
    with pipeline.session(policy_for(accelerator, pipeline, mode)) as session:
        for _ in range(3):
            with session.run():
                pipeline.generate()
            peak = session.stages.peak_allocated - before
            assert peak <= budget, f"{peak} bytes at most, {budget} allowed"
        assert session.stages.high_crossings == 0
        if mode == "balanced":
            assert session.stages.resident_peak >= 0.85 * SHARE * pipeline.weights


@pytest.mark.parametrize("mode", ["balanced", "model", "sequential"])
def test_weights_never_come_down(accelerator: Any, pipeline: Any, mode: str) -> None:
    with pipeline.session(policy_for(accelerator, pipeline, mode)) as session:
        for _ in range(2):
            with session.run():
                pipeline.generate()
            session.free()
        assert session.ledger.total_bytes_h2d >= 2 * pipeline.weights
        assert session.ledger.total_bytes_d2h == 0


def test_the_ledger_equals_what_the_device_copied(accelerator: Any, pipeline: Any, tmp_path: Path) -> None:
    with pipeline.session(policy_for(accelerator, pipeline, "sequential")) as session:
        pipeline.generate()
        before = session.ledger.total_bytes_h2d
        copied = copies_during(accelerator, pipeline.generate, tmp_path)
        ours = session.ledger.total_bytes_h2d - before
    sizes = accelerator.sizes
    tokens = sizes.tokens * sizes.width * sizes.dtype.itemsize
    picture = 3 * 64 * 64 * sizes.dtype.itemsize
    assert copied == {"h2d": ours + tokens, "d2h": picture}


def copies_during(accelerator: Any, work: Any, folder: Path) -> dict[str, int]:
    """Bytes that were copied in each direction, by somebody else's account: the simulator's log, or CUPTI's."""
    accelerator.backend.synchronize()
    if accelerator.simulated:
        accelerator.module.clear_copy_log()
        work()
        totals = accelerator.module.copy_totals()
        return {"h2d": totals["h2d_bytes"], "d2h": totals["d2h_bytes"]}
    if accelerator.device.type != "cuda":
        pytest.skip(f"torch's profiler records no copies on {accelerator.device.type}")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        work()
        accelerator.backend.synchronize()
    watched.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    found = [event for event in events if event.get("cat") == "gpu_memcpy"]
    if not found:
        pytest.skip("the profiler saw no copy at all: CUPTI is not permitted here")
    return {
        way: sum(int(e["args"]["bytes"]) for e in found if name in e["name"])
        for way, name in (("h2d", "HtoD"), ("d2h", "DtoH"))
    }


def test_copies_hide_behind_compute(accelerator: Any, pipeline: Any) -> None:
    """A step is shorter than its copies and its compute in a row, by a quarter of the shorter of the two at least."""
    if accelerator.simulated:  # as long to compute as to copy, as on a card that is worth streaming to
        accelerator.module.configure(flops32=1.25e12)
    sizes, device = accelerator.sizes, accelerator.device
    x = torch.zeros(sizes.tokens, sizes.width, dtype=sizes.dtype, device=device)
    with accelerator.session(policy_for(accelerator, pipeline, "none")) as session:
        session.add("denoiser", pipeline.denoiser)
        compute = accelerator.seconds(lambda: pipeline.denoiser(x))
    with accelerator.session(policy_for(accelerator, pipeline, "balanced")) as session:
        managed = session.add("denoiser", pipeline.denoiser)
        for _ in range(3):  # the order is recorded, the activation peak learned, the ring full
            pipeline.denoiser(x)
        assert managed.plan is not None and managed.plan.streams
        assert managed.weights.pinned >= managed.plan.streamed_bytes, "masters are not pinned: nothing can overlap"
        step = accelerator.seconds(lambda: pipeline.denoiser(x))
        with session.run():
            pipeline.denoiser(x)
        assert session.record is not None
        moved = session.record.bytes_h2d
        assert session.record.overlapped_s is not None and session.record.overlapped_s > 0
    source = torch.empty(sizes.layer, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(sizes.layer, dtype=torch.uint8, device=device)
    copies = round(moved / sizes.layer)
    copy = accelerator.seconds(lambda: [target.copy_(source, non_blocking=True) for _ in range(copies)])
    assert step <= compute + copy - 0.25 * min(compute, copy), f"step {step}, compute {compute}, copies {copy}"


@pytest.mark.parametrize("late", ["compute", "copies"])
def test_the_ring_is_ordered_by_events_not_by_luck(accelerator: Any, pipeline: Any, late: str) -> None:
    """One stream is far behind: copies must not overwrite what kernels still read, kernels not read what is to come."""
    expected = pipeline.reference()
    hog = torch.ones(sizes := 1024, sizes, device=accelerator.device)
    block = torch.empty(4 << 20, dtype=torch.uint8, pin_memory=True)
    sink = torch.empty(4 << 20, dtype=torch.uint8, device=accelerator.device)
    with pipeline.session(policy_for(accelerator, pipeline, "sequential")) as session:
        pipeline.generate()
        accelerator.backend.synchronize()
        if late == "compute":
            for _ in range(4 if accelerator.simulated else 200):
                hog = hog @ hog * (1 / sizes)
        else:
            copy_stream = session._copy_stream
            copy_stream.wait_event(accelerator.backend.record(accelerator.backend.current_stream()))
            with accelerator.backend.on_stream(copy_stream):
                for _ in range(4 if accelerator.simulated else 200):
                    sink.copy_(block, non_blocking=True)
        assert torch.equal(pipeline.generate(), expected)
        accelerator.backend.synchronize()


def test_out_of_memory_steps_down(accelerator: Any, pipeline: Any) -> None:
    """Somebody takes the rest of the card; a buffer that nobody expected then does not fit beside all the weights."""
    denoiser, device = pipeline.denoiser, accelerator.device
    x = torch.ones(8, accelerator.sizes.width, dtype=accelerator.sizes.dtype, device=device)
    denoiser.to(device)
    expected = denoiser(x).cpu()
    denoiser.to("cpu")
    accelerator.allocated()
    now = accelerator.backend.memory()
    beyond = accelerator.budget(0, 0) - accelerator.sizes.headroom + accelerator.sizes.headroom // 4  # slack, and a bit
    weights = sum(t.numel() * t.element_size() for t in denoiser.parameters())
    hog = accelerator.backend.empty(now.free - int(1.02 * weights) - beyond)
    denoiser.spike = beyond + int(0.4 * weights)
    policy = OffloadPolicy(mode="balanced", headroom=0, high="100%")
    with accelerator.session(policy) as session:
        session.add("denoiser", denoiser)
        with session.run():
            assert torch.equal(denoiser(x).cpu(), expected)
        assert session.record is not None
        steps = [event["data"]["step"] for event in session.record.events if event["kind"] == "oom"]
        assert steps, "nothing ran out of memory: the test shows nothing"
        assert torch.equal(denoiser(x).cpu(), expected)
    del hog
    gc.collect()


@pytest.mark.parametrize("mode", ["balanced", "model", "sequential"])
def test_an_interrupt_leaves_it_clean(accelerator: Any, pipeline: Any, mode: str) -> None:
    expected = pipeline.reference()
    with pipeline.session(policy_for(accelerator, pipeline, mode)) as session:
        pipeline.generate()
        for _ in range(2):
            pipeline.denoiser.interrupt = True
            with pytest.raises(KeyboardInterrupt), session.run():
                pipeline.generate()
            assert session.record is not None and not session.record.complete
            assert torch.equal(pipeline.generate(), expected)


def test_fifty_cycles_give_all_memory_back(accelerator: Any, pipeline: Any) -> None:
    before = accelerator.allocated()
    with pipeline.session(policy_for(accelerator, pipeline, "balanced")) as session:
        for cycle in range(50):
            pipeline.generate(steps=1)
            assert sum(session.device_bytes.values()) > 0
            session.free()
            accelerator.backend.synchronize()
            assert accelerator.backend.memory().allocated == before, f"cycle {cycle}"


def test_switching_modes_reloads_and_changes_nothing(accelerator: Any, pipeline: Any) -> None:
    expected = pipeline.reference()
    with pipeline.session(policy_for(accelerator, pipeline, "balanced")) as session:
        for mode in ("sequential", "none", "balanced", "model", "sequential", "auto"):
            session.policy = policy_for(accelerator, pipeline, mode)
            assert torch.equal(pipeline.generate(), expected), mode
        assert session.ledger.total_bytes_d2h == 0
