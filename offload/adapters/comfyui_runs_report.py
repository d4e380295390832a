"""From a prompt's run to its report. Invariant: figures are taken when the run ends; what the host moved is null.

In the worlds "static" and "pipeline" the session moved the weights and knows every byte. In "dynamic" and "observe" the
host did: categories are the nodes' own times, with the host's moves inside them, and moves are not known.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .. import memory
from ..backend import Backend, driver_version
from ..ledger import CATEGORIES, RunRecord
from ..policy import Machine, OffloadPolicy
from ..report import build_report, derive_verdict
from ..session import Session
from ..summary import TEXT_MAX, hint_lines, line, report_text
from ..timers import timers
from . import comfyui_host
from .comfyui_runs_host import Ending, partly_loaded
from .comfyui_runs_nodes import place_steps
from .facts import env_facts, host_facts, predicted

_log = logging.getLogger(__name__)

WORLDS = ("static", "pipeline", "dynamic", "observe")  # the first of those that were met names the run
OURS = ("static", "pipeline")

NOTICES = {
    "static": "Static: this pack places the weights of the models under a policy, and knows every move.",
    "pipeline": "Pipeline: this pack places the weights of the pipeline's models, in the host's list of models.",
    "dynamic": "Dynamic: the host pages its models itself; a policy sets its limits, and its moves are not known here.",
    "observe": "Observe: stock models only; this pack moved nothing, and the host's moves are not known here.",
}

_MOVES = ("bytes_h2d", "bytes_d2h", "move_count", "bytes_dropped", "drop_count")
_MOVE_TIMES = ("onload_s", "stall_s", "evict_s", "overlapped_s")
_OF_NODES = "the nodes' own times, with the host's moves inside them"


@dataclass(frozen=True)
class RunReport:
    """All that the report of one prompt says, taken at its end. Sizes are bytes."""

    record: RunRecord
    worlds: tuple[str, ...]
    host: Mapping[str, Any]
    rung: str
    policy: Mapping[str, Any]
    resolved: Mapping[str, Any]
    vram: Mapping[str, Any]
    ram: Mapping[str, Any]
    nodes: Sequence[Mapping[str, Any]]
    notice: str
    prediction: Mapping[str, Any] = field(default_factory=dict)
    components: Sequence[Mapping[str, Any]] = ()
    file: Mapping[str, Any] | None = None
    overhead_s: float = 0.0  # ours beside the ledger's
    workload: str | None = None
    hints: Sequence[Mapping[str, Any]] = ()
    hint_note: str | None = None
    partial: bool | None = None  # the host's own account, where it places the weights
    ended: bool = True

    @property
    def rows(self) -> int:
        """Of the longest list that the report could have."""
        record = self.record
        return max(
            len(record.moves), len(record.marks.code), len(record.vram_at), len(record.steps), len(record.stages)
        )

    @property
    def ours(self) -> bool:
        """Whether the session moved the weights of this run."""
        return self.worlds[0] in OURS

    def report(self, *, cap: int | None = None, full: bool = False, lists: bool = True) -> dict[str, Any]:
        """`offload-report/1`. cap: rows of a list, the record's own where not given; full: no list is capped; lists:
        whether there are any of the long ones."""
        record = self.record if cap is None else dataclasses.replace(self.record, cap=cap)
        nodes = [dict(node) for node in self.nodes]
        report = build_report(
            record,
            host=self.host,
            env={**env_facts(), **_env()},
            policy_json=self.policy,
            resolved_json=self.resolved,
            vram=self.vram,
            ram=self.ram,
            rung=self.rung,
            world=self.worlds[0],
            output_neutral=self._neutral(),
            prediction=self.prediction,
            components=self.components,
            hints=self.hints,
            hint_note=self.hint_note,
            workload=self.workload,
            nodes=nodes,
            verdict=self._verdict(),
            sources=self._sources(),
            full=full,
            lists=lists,
        )
        report |= {
            "worlds": list(self.worlds),
            "notice": self.notice,
            "components": [dict(component) for component in self.components],
            "file": None if self.file is None else dict(self.file),
            "ended": self.ended,
        }
        report["overhead_ms"] += self.overhead_s * 1e3
        unknown = set(report["unknown"])
        if place_steps(report["steps"], nodes):
            unknown.discard("steps[].node")
        if not self.ours:
            report["fits"] = None
            report["totals"] |= dict.fromkeys((*_MOVES, *_MOVE_TIMES))
            report["by_component"] = []
            unknown |= {"fits", *(f"totals.{name}" for name in (*_MOVES, *_MOVE_TIMES))}
        report["unknown"] = sorted(unknown)
        report |= {"line": line(report), "timers": timers(report)}
        return report

    def amended(self, ending: Ending) -> RunReport:
        """The same run, with what the host says of its end."""
        record = self.record
        if ending.ok:
            record = dataclasses.replace(record, complete=record.clock_error is None, error_type=None, error_text=None)
            return dataclasses.replace(self, record=record)
        where = "" if ending.node is None else f" (node {ending.node})"
        record = dataclasses.replace(
            record,
            complete=False,
            oom=ending.oom,
            error_type=ending.type or "Error",
            error_text=f"{ending.text or ''}{where}".strip(),
        )
        return dataclasses.replace(self, record=record, hints=(), hint_note=None)

    def _verdict(self) -> str:
        record = self.record
        if not self.ended and record.error_type is None and not record.oom:  # so far
            record = dataclasses.replace(record, complete=True)
        found = derive_verdict(record, self.resolved)
        return "partial" if found == "resident" and self.partial else found

    def _neutral(self) -> bool | None:
        if not self.ours or not self.ended:
            return None
        return self.resolved.get("vae_tiling") != "on" and not any("til" in e["kind"] for e in self.record.events)

    def _sources(self) -> dict[str, str]:
        sources = {"vram.peak_device": "driver, looked at once a second, four times while telemetry is sent"}
        if self.ours:
            sources["bytes"] = "the ledger: storages of weights of the models under a policy, when the copy was issued"
            sources["verdict"] = "the ledger's moves"
        else:
            sources |= dict.fromkeys(("totals.encode_s", "totals.denoise_s", "totals.decode_s"), _OF_NODES)
            sources["verdict"] = "the host's account of its loaded models"
        if self.worlds[0] == "dynamic":
            sources["vram.peak_torch"] = "torch's allocator, without the weights in the host's pages"
        return sources


def take(
    record: RunRecord,
    worlds: Iterable[str],
    backend: Backend,
    *,
    session: Session | None,
    policy: OffloadPolicy | None,
    nodes: Sequence[Mapping[str, Any]],
    notice: str | None,
    peak_device: int | None,
    others_start: int | None,
    overhead_s: float = 0.0,
    file: Mapping[str, Any] | None = None,
    workload: str | None = None,
    ended: bool = True,
    ask: bool = True,
) -> RunReport:
    """The figures now. session: the one that recorded the run, None where the host's models are only watched.

    ask: whether the device may be asked; else what is known by now has to do.
    """
    met = set(worlds)
    found = tuple(world for world in WORLDS if world in met and world != "observe") or ("observe",)
    ours = found[0] in OURS and session is not None
    machine = session.machine if session is not None else machine_of(backend)
    resolved = _resolved(session, policy) if ours else _meant(policy)
    vram: dict[str, Any] = {
        "total": machine.vram_total,
        "available": resolved.get("available"),
        "peak_device": peak_device,
        "peak_torch": _peak(session, backend, ended, ask),
        "others_start": others_start,
        "high_crossings": session.stages.high_crossings if session is not None and ours else None,
    }
    pinned = None if session is None else sum(m.weights.pinned for m in list(session.components.values()))
    return RunReport(
        record,
        found,
        host={**host_facts(backend, machine), "driver": _driver(backend.kind)},
        rung=backend.rung,
        policy={} if policy is None else policy.to_json(),
        resolved=resolved,
        vram=vram,
        ram={"peak_rss": memory.peak_rss(), "pinned": pinned if ours else None},
        nodes=nodes,
        notice=notice or NOTICES.get(found[0], found[0]),
        prediction=predicted(session) if session is not None and ours else {},
        components=components(session) if session is not None and ours else (),
        file=file,
        overhead_s=overhead_s,
        workload=workload,
        partial=None if ours else partly_loaded(),
        ended=ended,
    )


def components(session: Session) -> list[dict[str, Any]]:
    """What the session manages: name, class, role, mode, weights and what of them is on the device, in bytes."""
    rows = []
    for name, managed in list(session.components.items()):
        policy = getattr(managed, "policy", None) or session.policy
        rows.append(
            {
                "name": name,
                "class": type(managed.module).__name__,
                "role": managed.role,
                "mode": policy.mode.value,
                "weight_bytes": managed.info.weight_bytes,
                "device_bytes": managed.engine.device_bytes,
            }
        )
    return rows


def so_far(record: RunRecord) -> RunRecord:
    """A run that is still being recorded, as a record of its own that can be reported: sums only, no lists."""
    marks = record.marks
    known = RunRecord(record.prompt_id, record.created, record.clock, record.cap)
    for name in _MOVES:
        setattr(known, name, getattr(record, name))
    known.seconds = dict(zip(CATEGORIES, list(marks.seconds), strict=True))
    known.wall_s = marks.t[-1] if len(marks.t) else None
    known.peak_allocated, known.peak_resident = record.peak_allocated, record.peak_resident
    known.moves.sums = list(record.moves.sums)
    known.events = [
        {"kind": event["kind"], "text": event["text"], "data": event["data"], "t": None} for event in record.events
    ]
    return known


def move_seconds(report: Mapping[str, Any]) -> float:
    """Seconds for which the run was blocked by moves; NaN where they are the host's, and not known."""
    parts = [report["totals"][name] for name in ("onload_s", "stall_s", "evict_s")]
    return float("nan") if None in parts else float(sum(parts))


def peak_bytes(report: Mapping[str, Any]) -> int | None:
    """The highest VRAM figure of the report, None where there is none."""
    peak: int | None = report["vram"]["peak"]
    return peak


def machine_of(backend: Backend) -> Machine:
    """The machine of a backend; kept, since only its totals are used."""
    key = f"{backend.device} {backend.name}"
    if key not in _machines:
        _machines[key] = memory.machine(backend)
    return _machines[key]


_machines: dict[str, Machine] = {}


@cache
def _driver(kind: str) -> str | None:
    return driver_version() if kind == "cuda" else None


def _env() -> dict[str, Any]:
    facts = comfyui_host.facts()
    return {"comfyui": facts.version, "dynamic_vram": facts.dynamic_vram, "flags": list(facts.flags)}


def _peak(session: Session | None, backend: Backend, ended: bool, ask: bool) -> int | None:
    """The session notes the peak at every stage, and once more when the run is closed."""
    noted = None if session is None else session.stages.peak_allocated
    if not ask or (ended and noted is not None):
        return noted
    return max(backend.peak_allocated(), noted or 0)


def _resolved(session: Session | None, policy: OffloadPolicy | None) -> dict[str, Any]:
    assert session is not None
    if policy is None or policy == session.policy:
        return session.resolved.to_json()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warned when it was resolved for its own stage
        return policy.resolve(session.machine, session._working_set()).to_json()


def _meant(policy: OffloadPolicy | None) -> dict[str, Any]:
    """Where the host places the weights a policy resolves to no bytes of ours; `auto` is the host's default."""
    mode = None if policy is None or policy.mode.value == "auto" else policy.mode.value
    if policy is None:
        sentence = "No policy: the host's own memory management."
    elif mode is None:
        sentence = "auto: the host's default, within the limits that the policy writes down."
    else:
        sentence = f"{mode}, as far as the host's own paging can do it."
    return {"mode": mode, "sources": {} if policy is None else {"mode": "user"}, "sentence": sentence}


def text_of(report: Mapping[str, Any]) -> str:
    """What happened, for people, in at most 1,024 characters: the summary, the world, what should be known of it."""
    hints = hint_lines(report)
    lines = [line for line in report_text(report).split("\n") if line not in hints]
    if not report["ended"]:
        lines[0] = f"So far, before the prompt's end: {lines[0]}"
    told = [report["notice"]]
    file = report.get("file") or {}
    if file.get("error"):
        told.append(f"{file['filename']} was not written: {file['error']}")
    # of each kind the latest first: where two policies meet on one model, that is said when the second one is loaded
    said = sorted(reversed(report["events"]), key=lambda event: event["kind"] == "policy")
    told += [event["text"] for event in said if event["kind"] in _TOLD]
    lines[1:1] = hints + [text if len(text) <= 180 else text[:177] + "..." for text in told[:5]]
    text = "\n".join(lines)
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 3] + "..."


def tell(report: Mapping[str, Any]) -> None:
    """The generation line and the hint, in the log; of a prompt that uses nothing of ours, nothing."""
    if report["worlds"] == ["observe"] and not report["file"]:
        return
    _log.info("Balanced Offload: %s", report["line"])
    for hint in report["hints"]:
        label = (hint["action"] or {}).get("label", "")
        _log.info("Balanced Offload: hint: %s %s [%s]", hint["sentence"], f"{label}." if label else "", hint["code"])


_TOLD = ("policy", "foreign", "stock", "late", "free")
