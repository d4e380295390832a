"""One recorded run per prompt of the host. Invariant: whatever a prompt does, its run is closed once, with the host's
own word on how it ended, and nothing of ours outlives it.

A run opens with the first `touch` (a patcher's load, a node of ours, or the host's first node where we only observe)
and closes on the worker thread when the prompt's loop ends (comfyui_runs_host.py); where that cannot be had, by the
watcher or by the next prompt's first touch. Errors are known once the prompt is in /history: the watcher amends then.

Locks, in this order: the queue's, then `lock`. The ledger is driven by the worker alone; the watcher only reads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

from ..policy import OffloadPolicy
from ..session import Session
from . import comfyui_host
from . import comfyui_runs_host as host
from .comfyui_run import LOADERS, Run
from .comfyui_runs_live import Live
from .comfyui_runs_nodes import NodeTrack, Opener
from .comfyui_runs_report import RunReport, tell, text_of
from .comfyui_store import ROWS, ReportStore, write
from .hinting import Advice

OPEN_S, SAMPLE_S, SLOW_S, IDLE_S = 0.025, 0.25, 0.5, 1.0  # how often the watcher looks
LINGER_S = 60.0  # of looking now and then after a prompt, for what dies with the host's caches
EXPECT_S = 2.0  # a prompt is announced before it is checked and queued
HISTORY_ROWS = 50  # of each list of the record in /history, which the host keeps for thousands of prompts

_log = logging.getLogger(__name__)


class PromptRuns:
    """The runs of this process; any thread, except that `touch` and `note` are the worker's.

    Args:
        session: the session of the host's device, None where nothing was attached; asked anew whenever it matters.
    """

    def __init__(self, session: Callable[[], Session | None] | None = None, store: ReportStore | None = None) -> None:
        self.lock = threading.RLock()
        self.store = store or ReportStore()
        self._session = session or device_session
        self._run: Run | None = None
        self._unsettled: list[Run] = []  # ended; the host has not said how, or the file is not written
        self._pending_notes: list[tuple[str, str]] = []
        self._advice = Advice()
        self._on_close: list[Callable[[dict[str, Any]], None]] = [tell]
        self._on_idle: list[Callable[[], None]] = []
        self._on_sample: list[tuple[Callable[[dict[str, Any]], None], Callable[[], bool]]] = []
        self._live = Live()
        self._expected = 0.0  # a prompt was queued: look for it, until then at least
        self._restored = False
        self._last_end = perf_counter()
        self._wake = threading.Event()
        self._watcher: threading.Thread | None = None

    # ------------------------------------------------------------------ what patchers and nodes call
    def touch(self, world: str, policy: OffloadPolicy | None = None) -> None:
        """The executing prompt uses us, in this world: its run opens, and the one before it closes. Cheap when open."""
        prompt_id = comfyui_host.executing().prompt_id
        run = self._run
        if run is not None and run.prompt_id == prompt_id and run.knows(world, policy):
            return
        if prompt_id is not None:
            self._touch(prompt_id, world, policy)

    def note(self, kind: str, text: str) -> None:
        """A notice that belongs into the report of the executing prompt; before its run opens it waits for it."""
        prompt_id = comfyui_host.executing().prompt_id
        run = self._run
        if run is not None and not run.closed and prompt_id in (None, run.prompt_id):
            run.note(kind, text)
        elif len(self._pending_notes) < 20:
            self._pending_notes.append((kind, text))

    def show(self, node: str | None = None) -> dict[str, Any]:
        """The executing prompt's record as known now, for its `ui`. It is completed in place when the prompt ends.

        Raises:
            RuntimeError: outside of a prompt.
        """
        self.touch("observe")
        with self.lock:
            run = self._run
            if run is None or run.prompt_id != comfyui_host.executing().prompt_id:
                raise RuntimeError("VRAM Report: no prompt of the host executes on this thread, so there is no run.")
            run.wants_file = True
            record = run.now().report(cap=HISTORY_ROWS)
            run.shown.append((node, record))
            return record

    def ask_file(self) -> None:
        """The executing prompt has a node that reports: its file is written even if that node is never reached."""
        self.touch("observe")
        run = self._run
        if run is not None and run.prompt_id == comfyui_host.executing().prompt_id:
            run.wants_file = True

    # ------------------------------------------------------------------ what routes and tests read
    def report(self, prompt_id: str) -> dict[str, Any] | None:
        """The report of a prompt, one that still runs included (`ended` false); None where nothing is known of it."""
        run = self._of(prompt_id)
        if run is None:
            return self.store.get(prompt_id)
        with run.lock:
            found = run.result
            return (run.now(ask=False) if found is None else found).report(cap=ROWS)

    def recent(self, limit: int = 20) -> list[dict[str, Any]]:
        """The reports of the last prompts, the newest first."""
        return [report for prompt_id in self.ids(limit) if (report := self.report(prompt_id)) is not None]

    def ids(self, limit: int) -> list[str]:
        """Ids of the last prompts that have a report, the newest first."""
        with self.lock:
            ended = [run.prompt_id for run in reversed(self._unsettled)]
        return list(dict.fromkeys([*ended, *self.store.recent(limit)]))[:limit]

    def live(self) -> dict[str, Any]:
        """The telemetry of now, as the watcher last took it: asks the device for nothing."""
        return self._live.now(self._run)

    def _of(self, prompt_id: str) -> Run | None:
        with self.lock:
            runs = [*self._unsettled, *([self._run] if self._run is not None else [])]
        return next((run for run in runs if run.prompt_id == prompt_id), None)

    # ------------------------------------------------------------------ who wants to be told
    def on_close(self, callback: Callable[[dict[str, Any]], None]) -> None:
        """Call with the report whenever a prompt's is final. On the watcher's thread."""
        self._on_close.append(callback)

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call where the host is in the middle of nothing, `/free` included, so that what is let go of may die: at a
        prompt's end, and about once a second while the worker waits for the next one."""
        if callback not in self._on_idle:
            self._on_idle.append(callback)

    def on_sample(self, callback: Callable[[dict[str, Any]], None], wanted: Callable[[], bool]) -> None:
        """Call with `live()` four times a second while a run is open and it is `wanted`, on the watcher's thread."""
        self._on_sample.append((callback, wanted))

    def expect(self) -> None:
        """A prompt was queued. Where none of our nodes is in it, it is observed all the same."""
        self._expected = perf_counter() + EXPECT_S
        self._watch()

    # ------------------------------------------------------------------ opening
    def _touch(self, prompt_id: str, world: str, policy: OffloadPolicy | None) -> None:
        entered = perf_counter()
        with self.lock:
            before, run = self._run, self._run
        if before is not None and before.prompt_id != prompt_id:
            self._close(before)
            run = None
        if run is None:
            run = self._open(prompt_id)
        elif run.closed:
            return  # its loop has ended: what runs now is nobody's
        run.add(world, policy, self._session())
        run.overhead_s += perf_counter() - entered

    def _open(self, prompt_id: str) -> Run:
        run = Run(prompt_id, self._session() or self._soon(prompt_id))
        run.closely = run.track.closely = any(wanted() for _, wanted in self._on_sample)
        with self.lock:
            notes, self._pending_notes = self._pending_notes, []
            self._run = run
        for kind, text in notes:
            run.note(kind, text)
        host.watch_nodes(prompt_id, run.track)
        run.track.met_before()
        run.hooked = host.at_prompt_end(lambda: self._end(run))
        self._restore(run)
        self._watch()
        return run

    def _soon(self, prompt_id: str) -> Session | None:
        """The session that a loader of this prompt is about to make, now: so that the run is recorded from its start.

        Where the host pages its models itself, most prompts never make one.
        """
        if comfyui_host.dynamic_vram() or not LOADERS & host.node_types(prompt_id):
            return None
        with host.logged("opening the device"):
            made: Session | None = _device_module().open_device_session()
            return made
        return None

    def _restore(self, run: Run) -> None:
        """The setting "Restore stock behaviour", looked at once per prompt."""
        wanted = host.stock_wanted()
        if wanted != self._restored:
            with host.logged("restoring the stock host"):
                _device_module().restore_stock(on=wanted)
        if wanted:
            run.note("stock", f'"Restore stock behaviour" is on ({host.RESTORE}): everything was detached.')
        self._restored = wanted

    # ------------------------------------------------------------------ closing
    def _close(self, run: Run) -> None:
        """The prompt is over: take its figures, and complete what was shown of it."""
        run.finish()  # waits for the device, so before any lock
        with self.lock:
            mine, run.closed = not run.closed, True
        if not mine:  # another thread does the rest
            return
        run.advise(self._advice)
        with host.queue_lock(), self.lock:
            if self._run is run:
                self._run = None
            self._unsettled.append(run)
            run.amend(host.ending(run.prompt_id))
            self._complete(run)
        self._live.take(None)
        self._last_end = perf_counter()
        self._watch()

    def _complete(self, run: Run) -> None:
        """What is in /history becomes what is known now. One `update` of a plain dict: a reader sees all or nothing."""
        result = run.result
        if result is None or not run.shown:
            return
        entered = perf_counter()
        made = result.report(cap=HISTORY_ROWS)
        if not run.made:  # what it cost on the prompt's own time
            run.spent(perf_counter() - entered)
            made["overhead_ms"] += (perf_counter() - entered) * 1e3
        run.made = made
        for _, record in run.shown:
            record.update(made)

    def _retell(self, run: Run) -> None:
        """The node's text in /history: no object that could be completed, so it is put in its place."""
        for node, record in run.shown:
            if node is not None:
                host.rewrite_text(run.prompt_id, node, text_of(record))

    def _settle(self, run: Run) -> bool:
        """The host's word on the end, the file, and everybody who wants to know; False while the host is silent."""
        with host.queue_lock(), self.lock:
            ending = host.ending(run.prompt_id)
            if ending is None and run.prompt_id in host.running():
                return False
            if run.amend(ending):
                self._complete(run)
                self._advice.forget(run.prompt_id)
            self._retell(run)
        assert run.result is not None
        self._publish(run, run.result)
        return True

    def _publish(self, run: Run, result: RunReport) -> None:
        if run.wants_file and not run.written:
            self._write(run, result)
        self.store.put(run.prompt_id, run.result or result)
        with self.lock:
            self._unsettled.remove(run)
        report = run.made or result.report(cap=HISTORY_ROWS)
        for callback in self._on_close:
            with host.logged("a report's receiver"):
                callback({**report, "client_id": run.client_id})

    def _write(self, run: Run, result: RunReport) -> None:
        """The file, from the watcher's thread: a slow disk must not hold the next prompt."""
        whole = run.made if run.made and result.rows <= HISTORY_ROWS else result.report(full=True)
        failed = write(whole, host.output_folder(), run.file["filename"])
        run.written = True
        if failed is not None:
            with host.queue_lock(), self.lock:
                run.no_file(failed)
                self._complete(run)
                self._retell(run)
            _log.warning("Balanced Offload: %s was not written: %s", run.file["filename"], failed)

    # ------------------------------------------------------------------ the watcher
    def _watch(self) -> None:
        with self.lock:
            if self._watcher is None or not self._watcher.is_alive():
                self._watcher = threading.Thread(target=self._look, name="balanced-offload-runs", daemon=True)
                self._watcher.start()
        self._wake.set()

    def _look(self) -> None:
        sampled = idled = 0.0
        while True:
            with host.logged("the watcher"):
                now = perf_counter()
                run = self._run
                if run is not None and now - sampled >= SAMPLE_S:
                    sampled = now
                    self._sample(run)
                self._ended(run)
                for done in list(self._unsettled):
                    self._settle(done)
                if self._expected:
                    self._meet(now)
                if self._run is None and now - idled >= IDLE_S:
                    idled = now
                    with host.queue_lock():
                        if host.worker_waits():
                            self._keep_house()
            self._wake.wait(self._pause())
            self._wake.clear()

    def _pause(self) -> float | None:
        run = self._run
        if run is not None and run.hooked and not self._unsettled:  # its end wakes us: no need to look for it
            return SAMPLE_S if run.closely else SLOW_S
        if run is not None or self._unsettled or self._expected:
            return OPEN_S
        recent = perf_counter() - self._last_end < LINGER_S
        return IDLE_S if self._on_idle and (recent or _holding()) else None

    def _ended(self, run: Run | None) -> None:
        """A run whose end was told by nobody: its prompt does not execute any more."""
        if run is None or (host.queue() is None and run.hooked):
            return
        with host.queue_lock():
            if run.prompt_id in host.running():
                return
            self._close(run)

    def _sample(self, run: Run) -> None:
        told = [callback for callback, wanted in self._on_sample if wanted()]
        self._live.take(run, wanted=bool(told))
        for callback in told:
            with host.logged("a telemetry receiver"):
                callback(self._live.figures)

    def _meet(self, now: float) -> None:
        """Have the progress registry tell us of a prompt that none of our nodes has touched."""
        with host.queue_lock():
            prompts = host.running()
            if now > self._expected and not host.busy():
                self._expected = 0.0
        for prompt_id in prompts:
            if self._of(prompt_id) is None:
                found = host.registry(prompt_id)
                if found is not None and "webui" in getattr(found, "handlers", {}):  # the host has set it up
                    host.watch_nodes(prompt_id, Opener(prompt_id, self._observe))

    def _observe(self, prompt_id: str) -> NodeTrack | None:
        """The track of a prompt that was met by its nodes alone. On the worker's thread."""
        run = self._run
        if run is None or run.prompt_id != prompt_id:
            self._touch(prompt_id, "observe", None)
            run = self._run
        return run.track if run is not None and run.prompt_id == prompt_id else None

    def _end(self, run: Run) -> None:
        """The prompt's loop ends, on the worker's thread."""
        self._close(run)
        self._keep_house()

    def _keep_house(self) -> None:
        for callback in self._on_idle:
            with host.logged("housekeeping"):
                callback()


# ---------------------------------------------------------------------- the one of this process
_lock = threading.Lock()
_runs: PromptRuns | None = None


def runs() -> PromptRuns:
    """The runs of this process."""
    global _runs
    if _runs is None:
        with _lock:
            if _runs is None:
                _runs = PromptRuns()
    return _runs


def _device_module() -> Any:
    from . import comfyui_device  # here: patchers below it import this file

    return comfyui_device


def device_session() -> Session | None:
    """The session of the host's device, None where nothing was attached yet."""
    return _device_module().device_session()  # type: ignore[no-any-return]


def _holding() -> bool:
    """Whether anything of the host's is held by us."""
    with contextlib.suppress(Exception):
        return bool(_device_module().hosted() or getattr(device_session(), "components", None))
    return False
