"""From a session to a report. Invariant: figures are taken when their run ends, so a later run cannot change them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .. import memory
from ..backend import Backend
from ..ledger import RunRecord
from ..policy import Machine
from ..report import build_report
from ..session import Session
from ..summary import line
from ..timers import timers
from ..version import version
from .hinting import Advice

NOT_RECORDED = (
    "this run was not recorded: in mode none a direct call of a pipeline that has no check_inputs meets nothing of "
    "ours; call the offloaded pipeline itself to record it"
)
NO_RUN = "no run was recorded yet"


@dataclass(frozen=True)
class RunFacts:
    """A record and all that a report says around it. Sizes are bytes."""

    record: RunRecord
    policy: dict[str, Any]
    resolved: dict[str, Any]
    vram: dict[str, Any]
    ram: dict[str, Any]
    output_neutral: bool | None
    prediction: dict[str, Any]
    components: tuple[dict[str, Any], ...] = ()
    workload: str | None = None
    hints: tuple[dict[str, Any], ...] = ()
    hint_note: str | None = None

    def report(
        self,
        session: Session,
        *,
        world: str = "pipeline",
        env: Mapping[str, Any] | None = None,
        nodes: Sequence[Mapping[str, Any]] = (),
        sources: Mapping[str, str] | None = None,
        full: bool = False,
        lists: bool = True,
    ) -> dict[str, Any]:
        """`offload-report/1` of this run. `env`: what a host adds to it; `nodes`: its nodes, where it has them."""
        report = build_report(
            self.record,
            host=host_facts(session.backend, session.machine),
            env={**env_facts(), **(env or {})},
            policy_json=self.policy,
            resolved_json=self.resolved,
            vram=self.vram,
            ram=self.ram,
            rung=session.backend.rung,
            world=world,
            output_neutral=self.output_neutral,
            prediction=self.prediction,
            nodes=nodes,
            components=self.components,
            workload=self.workload,
            hints=self.hints,
            hint_note=self.hint_note,
            sources=sources,
            full=full,
            lists=lists,
        )
        return report | {"line": line(report), "timers": timers(report)}

    def advised(self, session: Session, advice: Advice) -> RunFacts:
        """The same run, compared with those before it."""
        hints, note = advice.look(self.report(session, lists=False))
        return replace(self, hints=hints, hint_note=note)


def host_facts(backend: Backend, machine: Machine) -> dict[str, Any]:
    """The report's `host`."""
    return {
        "gpu": backend.name,
        "vram_total": machine.vram_total,
        "os": operating_system(),
        "ram_total": machine.ram_total,
        "other_accelerators": list(backend.others),
    }


def env_facts() -> dict[str, Any]:
    """The report's `env`, as far as no host is needed to know it."""
    return {"pack": _pack(), "torch": torch.__version__, "flags": []}


@cache
def _pack() -> str:
    """Kept: it is read from a file."""
    return version()


@cache
def operating_system() -> str:
    """Kept: asking the system's libraries takes milliseconds."""
    return platform.platform()


def collect(session: Session, record: RunRecord, *, output_neutral: bool | None) -> RunFacts:
    """The figures of the run that has just ended."""
    stages, resolved = session.stages, session.resolved
    return RunFacts(
        record,
        policy=session.policy.to_json(),
        resolved=resolved.to_json(),
        vram={
            "total": session.machine.vram_total,
            "available": resolved.available,
            "peak_torch": stages.peak_allocated,
            "others_start": session.machine.others,
            "high_crossings": stages.high_crossings,
        },
        ram={
            "peak_rss": memory.peak_rss(),
            "pinned": sum(managed.weights.pinned for managed in session.components.values()),
        },
        output_neutral=output_neutral,
        prediction=predicted(session),
        components=tuple(
            {"name": name, "weight_bytes": managed.info.weight_bytes} for name, managed in session.components.items()
        ),
        workload=_workload(session, record),
    )


def _workload(session: Session, record: RunRecord) -> str:
    """Equal for runs of the same models on inputs of the same shapes in as many steps, whatever their policy."""
    parts = [(m.info.name, m.info.class_name, m.info.weight_bytes, m.lead) for m in session.components.values()]
    return hashlib.sha256(repr((parts, len(record.steps))).encode()).hexdigest()[:16]


def predicted(session: Session) -> dict[str, Any]:
    """What the plan of the denoiser says of a step, once the times of its units are known."""
    plans = (m.plan for m in session.components.values() if m.role == "denoiser" and m.plan is not None)
    plan = next((plan for plan in plans if plan.step_s is not None), None)
    return {} if plan is None else {"step_s": plan.step_s, "bound_s": plan.bound_s}


def unrecorded(session: Session, why: str, *, output_neutral: bool | None) -> RunFacts:
    """A run that nobody watched: every figure unknown, and the reason as the error."""
    record = RunRecord(None, _now(), "none", cap=1, clock_error=why)
    known = collect(session, record, output_neutral=output_neutral)
    return RunFacts(
        record,
        policy=known.policy,
        resolved=known.resolved,
        vram={**known.vram, "peak_torch": None, "high_crossings": None},
        ram=known.ram,
        output_neutral=output_neutral,
        prediction={},
    )


def _now() -> str:
    import datetime

    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
