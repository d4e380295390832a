"""Invariant: every call of the pipeline is one record, whichever way it was called and however it ended."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from balanced_offload.offload import OffloadPolicy
from balanced_offload.offload.adapters.diffusers import UnfinishedRunError, offload
from balanced_offload.offload.report import validate
from balanced_offload.offload.summary import line

from .conftest import EXAMPLES, MODES, Example, policy_fields
from .toy import build_toy

TOY = Example(build_toy)
STREAMING = OffloadPolicy(mode="balanced", high="2KiB")


def handed(run: str, handle: Any) -> Any:
    """What to call: the offloaded pipeline, or the pipeline itself."""
    return handle if run == "handle" else handle.pipe


@pytest.mark.parametrize("run", ["handle", "pipe"])
@pytest.mark.parametrize("mode", MODES)
def test_the_report_of_a_run(sim: ModuleType, mode: str, run: str) -> None:
    pipe = EXAMPLES["sd"].build()
    with offload(pipe, OffloadPolicy(**policy_fields(mode)), device="vram") as handle:
        EXAMPLES["sd"].draw(handed(run, handle))
        report = handle.report()
        validate(report)
        assert handle.summary() == line(report) and len(handle.summary()) <= 200
        assert report["world"] == "pipeline" and report["rung"] == "simulated"
        assert report["policy"]["mode"] == mode and report["output_neutral"] is True
        assert report["complete"] is True and report["error"] is None
        assert [stage["component"] for stage in report["stages"]] == ["text_encoder", "unet", "vae"]
        assert len(report["steps"]) == EXAMPLES["sd"].call["num_inference_steps"]
        totals = report["totals"]
        parts = ("encode", "denoise", "decode", "preview", "onload", "stall", "evict", "other")
        assert sum(totals[f"{part}_s"] for part in parts) == pytest.approx(totals["wall_s"])
        assert report["vram"]["peak_torch"] > 0 and report["vram"]["total"] == 8 << 30


def test_the_report_counts_what_the_device_counts(sim: ModuleType) -> None:
    with offload(build_toy(), STREAMING, device="vram") as handle:
        for run in ("handle", "pipe", "handle"):
            before = sim.copy_totals()
            TOY.draw(handed(run, handle))
            after = sim.copy_totals()
            totals = handle.report()["totals"]
            # the scheduler-free toy moves nothing up but weights, and one picture down
            assert totals["bytes_h2d"] == after["h2d_bytes"] - before["h2d_bytes"] > 0
            assert totals["bytes_d2h"] == 0


def test_before_the_first_run(sim: ModuleType) -> None:
    with offload(build_toy(), device="vram") as handle:
        assert handle.record is None
        report = handle.report()
        validate(report)
        assert report["complete"] is False and report["totals"]["wall_s"] is None
        assert report["error"]["message"] == "no run was recorded yet"


def test_each_run_is_a_record_of_its_own(sim: ModuleType) -> None:
    with offload(build_toy(), STREAMING, device="vram") as handle:
        records = []
        for run in ("handle", "pipe", "pipe", "handle"):
            TOY.draw(handed(run, handle))
            records.append(handle.record)
            assert not handle.session.ledger.active
        assert len({id(record) for record in records}) == 4
        assert [len(record.steps) for record in records] == [4, 4, 4, 4]
        kept = handle.report()["vram"]["peak_torch"]
        handle.session.backend.reset_peak()
        handle.session.stages.peak_allocated = 0
        assert handle.report()["vram"]["peak_torch"] == kept, "figures are taken when the run ends"


class Interrupt(BaseException):
    """As a host's: no Exception."""


@pytest.mark.parametrize("run", ["handle", "pipe"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, Interrupt, ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize("mode", MODES)
def test_an_error_inside_a_model(sim: ModuleType, mode: str, kind: type[BaseException], run: str) -> None:
    pipe = build_toy()
    fields = {"mode": mode, "high": "2KiB"} if mode == "balanced" else {"mode": mode}
    with offload(pipe, OffloadPolicy(**fields, on_oom="stop"), device="vram") as handle:
        armed = [True]

        def fail(module: Any, args: Any, output: Any) -> None:
            if armed:
                raise kind("as the test wants it")

        hook = pipe.transformer.tied.register_forward_hook(fail)
        TOY_calls = handed(run, handle)
        with pytest.raises(kind):
            TOY.draw(TOY_calls)
        assert not handle.session.ledger.active
        assert handle.record.error_type == kind.__name__ and not handle.record.complete
        assert handle.report()["verdict"] == ("oom" if kind is torch.OutOfMemoryError else "error")
        armed.clear()
        for again in ("handle", "pipe"):
            assert torch.equal(TOY.draw(handed(again, handle)), TOY.expected)
        assert handle.record.error_type is None
        hook.remove()


@pytest.mark.parametrize("run", ["handle", "pipe"])
@pytest.mark.parametrize("mode", MODES)
def test_an_error_between_two_models(sim: ModuleType, mode: str, run: str) -> None:
    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    fields = {"mode": mode, "high": "2KiB"} if mode == "balanced" else {"mode": mode}
    with offload(build_toy(), OffloadPolicy(**fields), device="vram") as handle:
        with pytest.raises(KeyboardInterrupt):
            handed(run, handle)(callback=interrupt)
        if run == "handle":
            assert handle.record.error_type == "KeyboardInterrupt"
        else:
            assert handle.session.ledger.active, "nothing of ours saw the error"
            unfinished = []
            handle.pipe(callback=lambda step: unfinished.append(handle.session.record))
            assert unfinished[0].error_type == UnfinishedRunError.__name__ and len(unfinished[0].steps) == 1
        assert torch.equal(TOY.draw(handle), TOY.expected)
        assert handle.record.complete and len(handle.record.steps) == 4


def test_wrong_arguments_leave_no_run_open(sim: ModuleType) -> None:
    with offload(build_toy(), STREAMING, device="vram") as handle:
        for call in (handle, handle.pipe):
            with pytest.raises(ValueError, match="steps"):
                call(steps=0)
            assert not handle.session.ledger.active
        assert torch.equal(TOY.draw(handle.pipe), TOY.expected)
        assert handle.record.complete


def test_a_pipeline_without_check_inputs(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build_toy()
    monkeypatch.delattr(type(pipe), "check_inputs")
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *a, **k: call(_Unchecked(self), *a, **k))
    with offload(pipe, STREAMING, device="vram") as handle:
        for run in ("pipe", "handle", "pipe"):
            before = handle.record
            assert torch.equal(TOY.draw(handed(run, handle)), TOY.expected)
            assert handle.record is not before and handle.record.complete and len(handle.record.steps) == 4
        handle.policy = OffloadPolicy(mode="none")
        assert torch.equal(TOY.draw(handle), TOY.expected) and handle.record.complete
        assert torch.equal(TOY.draw(pipe), TOY.expected)
        report = handle.report()
        validate(report)
        assert report["complete"] is False and "not recorded" in report["error"]["message"]
        assert report["totals"]["wall_s"] is None and "totals.wall_s" in report["unknown"]


class _Unchecked:
    """The toy's call asks for check_inputs; this answers it without the pipeline having one."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def check_inputs(self, steps: int) -> None:
        """Accept anything."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def test_a_run_in_one_pipeline_is_not_reported_by_another(sim: ModuleType) -> None:
    one, two = build_toy(), build_toy(two=False)
    with offload(one, STREAMING, device="vram") as first, offload(two, session=first.session) as second:
        TOY.draw(first)
        mine = first.record
        second.pipe(steps=2)
        assert first.record is mine and len(second.record.steps) == 2
        first.pipe(steps=3)
        assert len(first.record.steps) == 3 and len(second.record.steps) == 2


def test_between_runs_mode_none_leaves_nothing_on_the_models(sim: ModuleType) -> None:
    pipe = build_toy()
    with offload(pipe, OffloadPolicy(mode="none"), device="vram") as handle:
        for run in ("handle", "pipe"):
            TOY.draw(handed(run, handle))
            with pytest.raises(ValueError, match="steps"):
                handed(run, handle)(steps=0)
            for part in (pipe.transformer, pipe.text_encoder):
                assert not {"forward", "_apply", "get_text_features", "_hf_hook"} & part.__dict__.keys()
