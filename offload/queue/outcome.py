"""Guards: a row says what the host and the report say, each figure from one source, and null where neither knows.

`/history/{id}` of both hosts: `{"prompt": [...], "outputs": {node: {kind: [...]}}, "status": {"status_str",
"completed", "messages": [[event, {"timestamp": ms, ...}]]}, "meta"}`. Unknown fields and kinds are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

REPORT_KEY = "vram_report"
FINE = "success"
STATUSES = (FINE, "error", "oom", "interrupted", "timeout", "refused", "lost")
_BAD_VERDICTS = ("oom", "error")
_OOM = ("outofmemory", "out of memory")


@dataclass
class Outcome:
    """What became of one prompt. `seconds`: from its start to its end by the host's clock."""

    status: str
    error: str | None = None
    images: list[str] = field(default_factory=list)
    seconds: float | None = None
    cached: bool | None = None
    report: dict[str, Any] | None = None

    @property
    def verdict(self) -> str | None:
        """The report's verdict."""
        return _verdict(self.report)

    @property
    def fine(self) -> bool:
        """Whether this item counts as done well."""
        return is_fine(self.status, self.verdict)


def is_fine(status: str, verdict: str | None) -> bool:
    """Ended well for the host, and neither out of memory nor failed for the report."""
    return status == FINE and verdict not in _BAD_VERDICTS


def read_entry(entry: Mapping[str, Any], prompt_id: str) -> Outcome:
    """What a record of the history says. The report in it counts only if it is this prompt's.

    A node whose result was cached shows what it put out the last time, an earlier prompt's report included.
    """
    messages = list(_messages(entry))
    outputs = entry.get("outputs")
    outputs = outputs if isinstance(outputs, dict) else {}
    status, error = _status(entry, messages)
    images, makers = [], set()
    for node, kinds in outputs.items():
        found = list(_files(kinds))
        images += found
        makers |= {str(node)} if found else set()
    reused = {str(node) for event, told in messages if event == "execution_cached" for node in _list(told.get("nodes"))}
    return Outcome(
        status=status,
        error=error,
        images=list(dict.fromkeys(images)),
        seconds=_seconds(messages),
        cached=makers <= reused if makers else None,
        report=report_of(outputs, prompt_id),
    )


def report_of(outputs: Mapping[str, Any], prompt_id: str) -> dict[str, Any] | None:
    """This prompt's report among the outputs: an object, a list of one, or either as a JSON text."""
    for kinds in outputs.values():
        held = kinds.get(REPORT_KEY) if isinstance(kinds, dict) else None
        for candidate in held if isinstance(held, list) else [held]:
            if isinstance(candidate, str):
                try:
                    candidate = json.loads(candidate)
                except ValueError:
                    continue
            if isinstance(candidate, dict) and candidate.get("prompt_id") == prompt_id:
                return candidate
    return None


def is_final(report: Mapping[str, Any] | None, status: str) -> bool:
    """Whether it is the report of a run that is over, and tells of a bad end where the host tells of one."""
    if not report:
        return False
    totals = report.get("totals")
    ended = report.get("ended", isinstance(totals, dict) and totals.get("wall_s") is not None)
    return bool(ended) and (status == FINE or report.get("verdict") in _BAD_VERDICTS)


def with_report(outcome: Outcome, report: dict[str, Any] | None) -> Outcome:
    """The outcome with this report, and `oom` where the report knows that an error was one."""
    outcome.report = report
    if outcome.status == "error" and outcome.verdict == "oom":
        outcome.status = "oom"
    return outcome


def figures(report: Mapping[str, Any] | None) -> dict[str, Any]:
    """The few figures of a report that a table has. Sizes are bytes, times seconds; None is not known."""

    def of(section: str, name: str) -> Any:
        held = (report or {}).get(section)
        found = held.get(name) if isinstance(held, dict) else None
        return found if isinstance(found, (int, float, str)) else None

    def number(section: str, name: str) -> Any:
        found = of(section, name)
        return None if isinstance(found, str) else found

    down, up = number("totals", "bytes_h2d"), number("totals", "bytes_d2h")
    peaks = [peak for name in ("peak_device", "peak_torch", "peak_noted") if (peak := number("vram", name))]
    hints = _list((report or {}).get("hints"))
    return {
        "verdict": _verdict(report),
        "mode": of("resolved", "mode"),
        "fits": (report or {}).get("fits"),
        "wall_s": number("totals", "wall_s"),
        "peak_vram": max(peaks, default=None),
        "moved_bytes": None if down is None else down + (up or 0),
        "onload_s": number("totals", "onload_s"),
        "stall_s": number("totals", "stall_s"),
        "hints": [str(hint.get("code")) for hint in hints if isinstance(hint, dict)],
    }


def live_step(status: Mapping[str, Any] | None, prompt_id: str) -> str:
    """ "step 3/20" where the pack's status tells it of this prompt, else "". It may lie a level or two down."""
    waiting: list[Any] = [status]
    for held in waiting:
        if not isinstance(held, dict) or len(waiting) > 50:
            continue
        step, steps = held.get("step"), held.get("steps")
        if held.get("prompt_id") == prompt_id and isinstance(step, int) and isinstance(steps, int) and steps > 0:
            return f"step {step}/{steps}"
        waiting += held.values()
    return ""


def _verdict(report: Mapping[str, Any] | None) -> str | None:
    verdict = (report or {}).get("verdict")
    return str(verdict) if verdict is not None else None


def _list(held: Any) -> list[Any]:
    return held if isinstance(held, list) else []


def _messages(entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    status = entry.get("status")
    for message in _list(status.get("messages") if isinstance(status, dict) else None):
        if isinstance(message, (list, tuple)) and len(message) == 2 and isinstance(message[1], dict):
            yield str(message[0]), message[1]


def _status(entry: Mapping[str, Any], messages: list[tuple[str, dict[str, Any]]]) -> tuple[str, str | None]:
    for event, told in messages:
        if event == "execution_interrupted":
            return "interrupted", f"interrupted at node {told.get('node_id')} ({told.get('node_type')})"
        if event == "execution_error":
            kind, said = str(told.get("exception_type", "")), str(told.get("exception_message", "")).strip()
            text = f"node {told.get('node_id')} ({told.get('node_type')}): {kind}: {said}"
            oom = any(word in f"{kind} {said}".lower() for word in _OOM)
            return "oom" if oom else "error", text
    status = entry.get("status")
    if isinstance(status, dict) and status.get("status_str", FINE) != FINE:
        return "error", f"the host says {status.get('status_str')!r} and no reason"
    return FINE, None


def _seconds(messages: list[tuple[str, dict[str, Any]]]) -> float | None:
    stamps = [told["timestamp"] for _, told in messages if isinstance(told.get("timestamp"), (int, float))]
    return (max(stamps) - min(stamps)) / 1000 if len(stamps) >= 2 else None


def _files(kinds: Any) -> Iterator[str]:
    """The names of files among a node's outputs: subfolder/name, with [temp] where it is a preview."""
    if not isinstance(kinds, dict):
        return
    for held in kinds.values():
        for told in _list(held):
            if isinstance(told, dict) and isinstance(told.get("filename"), str):
                folder, kind = str(told.get("subfolder") or ""), told.get("type", "output")
                name = f"{folder}/{told['filename']}" if folder else told["filename"]
                yield name.replace("\\", "/") + ("" if kind == "output" else f" [{kind}]")
