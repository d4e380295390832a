"""One prompt while it is recorded. Invariant: the ledger's run that it opened is the one that it closes, or it says so.

With a session the run is the session's own. Without one (stock models, models that the host pages) a ledger of its own
keeps the time line, on the host's device, where nothing is moved by us.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from time import perf_counter
from typing import Any

from ..backend import Backend, CpuBackend, DeviceMemory, open_backend
from ..ledger import Ledger, RunRecord
from ..policy import OffloadPolicy
from ..session import Session
from . import comfyui_host
from . import comfyui_runs_host as host
from .comfyui_runs_host import Ending
from .comfyui_runs_nodes import NodeTrack
from .comfyui_runs_report import RunReport, so_far, take
from .comfyui_store import file_name
from .comfyui_workload import workload_of
from .hinting import Advice

NOTES = 50  # per run
LOADERS = frozenset({"ModelLoaderWithOffload", "ApplyOffloadPolicy", "PipelineLoaderWithOffload"})
SAMPLE_S, SELDOM_S = 0.25, 1.0  # between two looks at the device's memory, while somebody watches and while not

_log = logging.getLogger(__name__)
_backends: dict[str, Backend] = {}


class Run:
    """What is known of one prompt. `result` is set when it has ended, and amended when the host says how."""

    def __init__(self, prompt_id: str, session: Session | None) -> None:
        self.prompt_id = prompt_id
        self.lock = threading.RLock()
        self.opened = perf_counter()
        self.client_id = host.client_of(prompt_id)
        self.workload = workload_of(prompt_id)
        self.worlds: list[str] = []
        self.policy: OffloadPolicy | None = None
        self.notes: list[tuple[str, str]] = []
        self.notice: str | None = None
        self.shown: list[tuple[str | None, dict[str, Any]]] = []  # (node, its record in /history)
        self.made: dict[str, Any] = {}  # what the records in /history were completed with
        self.wants_file = self.written = False
        self.file: dict[str, Any] = {"filename": file_name(prompt_id), "subfolder": "", "type": "output"}
        self.hooked = self.closed = False
        self.overhead_s = 0.0
        self.peak_device: int | None = None
        self.result: RunReport | None = None
        self.memory: DeviceMemory | None = None  # as this thread saw it last
        self.closely = False  # somebody watches: look at the memory often
        self._sampled = self.opened - SELDOM_S + SAMPLE_S
        self._open(session)
        self.track = NodeTrack(prompt_id, self.ledger, self.sample)
        if session is None:
            self.sample(now=True)
            self.others_start = None if self.memory is None else self.memory.others
        else:  # as its last stage found it
            self.others_start = session.machine.others

    def _open(self, session: Session | None) -> None:
        self.session = session
        self.backend: Backend = watched_backend() if session is None else session.backend
        self.ledger = Ledger(self.backend) if session is None else session.ledger
        if session is None:
            self.backend.reset_peak()
            self.ledger.open_run(self.prompt_id)
        else:
            session.open_run(self.prompt_id)
        self._number = self.ledger._run

    @property
    def open(self) -> bool:
        """Whether the ledger still records the run that we opened."""
        return self.ledger.active and self.ledger._run == self._number

    # ------------------------------------------------------------------ while it runs
    def sample(self, now: bool = False) -> None:
        """Look at the device's memory, seldom, or four times a second while somebody watches. By the thread that drives
        the device: allocators of some devices must not be asked by another one while this one allocates."""
        at = perf_counter()
        if not now and at - self._sampled < (SAMPLE_S if self.closely else SELDOM_S):
            return
        self._sampled = at
        if self.backend.shared_memory:
            return
        try:
            self.memory = self.backend.memory()
        except RuntimeError:  # a device in error state: its last figures have to do
            return
        self.peak_device = max(self.memory.total - self.memory.free, self.peak_device or 0)

    def knows(self, world: str, policy: OffloadPolicy | None) -> bool:
        """Whether a touch says nothing new."""
        same = policy is None or policy is self.policy or policy == self.policy
        return same and world in self.worlds and (self.session is not None or world in ("dynamic", "observe"))

    def add(self, world: str, policy: OffloadPolicy | None, session: Session | None) -> None:
        """A touch: one more world, another policy, or the session that there was not yet when the run opened."""
        if session is not None and self.session is None:
            self._adopt(session)
        if world not in self.worlds:
            self.worlds.append(world)
        if policy is not None and policy != self.policy:
            if self.policy is not None:
                self.note(
                    "policy",
                    f"More than one policy in this run: mode {self.policy.mode.value}, then {policy.mode.value}. Each "
                    "model goes by its own; `policy` and `resolved` are the last one's.",
                )
            self.policy = policy

    def _adopt(self, session: Session) -> None:
        """Go on in the session's ledger: nothing of the session's can have run before it was made."""
        late = perf_counter() - self.opened
        self._open(session)
        self.track.follow(self.ledger)
        for kind, text in self.notes:
            self.ledger.event(kind, text)
        if late > 0.01:
            self.note("late", f"Recorded from {late:.2f} s after the prompt's start, when its first model was taken.")

    def note(self, kind: str, text: str) -> None:
        """A notice of the run, each once; one of kind "world" is the record's `notice`, the last one wins."""
        if kind == "world":
            self.notice = text
            return
        if (kind, text) in self.notes or len(self.notes) >= NOTES:
            return
        self.notes.append((kind, text))
        if self.open:
            self.ledger.event(kind, text)

    def now(self, *, ask: bool = True) -> RunReport:
        """The figures so far. ask: the device too; only on the thread that drives it."""
        if ask:
            self.ledger.drain()
        return self._take(so_far(self.ledger._record), ended=False, ask=ask)

    # ------------------------------------------------------------------ its end
    def finish(self) -> None:
        """Close the ledger's run and take the figures; waits for the device once. Never raises."""
        with self.lock:
            if self.result is not None:
                return
            record = self._closed()
            entered = perf_counter()
            if (node := self.track.unfinished) is not None and record.error_type is None:
                kind = self.track.rows[node].type or "?"
                text = f"node {node} ({kind}) did not finish"
                record = dataclasses.replace(record, complete=False, error_type="Error", error_text=text)
            self.result = self._take(record, ended=True)
            self.spent(perf_counter() - entered + self.overhead_s + self.track.overhead_s)

    def spent(self, seconds: float) -> None:
        """Host seconds that the record itself cost."""
        assert self.result is not None
        self.result = dataclasses.replace(self.result, overhead_s=self.result.overhead_s + seconds)

    def _closed(self) -> RunRecord:
        if not self.open:
            why = "another run was opened on the device before this one had ended"
            return RunRecord(self.prompt_id, self.ledger._record.created, "none", cap=2000, clock_error=why)
        try:
            if self.session is None:
                return self.ledger.close_run()
            record = self.session.close_run()
        except Exception as error:  # a device in error state; what the host says of the prompt comes with its ending
            _log.warning("Balanced Offload: the run could not be closed: %s", error)
            record = self.ledger.last_record
        if record is None or record.prompt_id != self.prompt_id:
            return RunRecord(self.prompt_id, self.ledger._record.created, "none", cap=2000, clock_error="not closed")
        return record

    def amend(self, ending: Ending | None) -> bool:
        """Take over what the host says of the end; whether that changed anything."""
        with self.lock:
            result = self.result
            if ending is None or result is None:
                return False
            self.result = result.amended(ending)
            return self.result.record != result.record

    def advise(self, advice: Advice) -> None:
        """Have the run compared with those before it."""
        with self.lock:
            if self.result is not None:
                entered = perf_counter()
                hints, note = advice.look(self.result.report(lists=False))
                self.result = dataclasses.replace(self.result, hints=hints, hint_note=note)
                self.spent(perf_counter() - entered)

    def no_file(self, why: str) -> None:
        """The file could not be written: the record says so."""
        self.file["error"] = why
        with self.lock:
            if self.result is not None:
                self.result = dataclasses.replace(self.result, file=dict(self.file))

    def _take(self, record: RunRecord, *, ended: bool, ask: bool = True) -> RunReport:
        return take(
            record,
            self.worlds,
            self.backend,
            session=self.session,
            policy=self.policy,
            nodes=self.track.table(record, moves_known=self._ours) if ended else [],
            notice=self.notice,
            peak_device=self.peak_device,
            others_start=self.others_start,
            file=dict(self.file) if self.wants_file else None,
            workload=self.workload,
            ended=ended,
            ask=ask,
        )

    @property
    def _ours(self) -> bool:
        return self.session is not None and any(world in ("static", "pipeline") for world in self.worlds)


def watched_backend() -> Backend:
    """The host's device, only to be watched; the host's clock where it cannot be had. Kept: a device is opened once."""
    try:
        device = comfyui_host.load_device()
        key = str(device)
        if key not in _backends:
            _backends[key] = open_backend(device)
        return _backends[key]
    except Exception:  # no host, or a device that torch cannot open
        return _backends.setdefault("cpu", CpuBackend())
