"""Guards: every item ends in one row, whether the host or this command is restarted meanwhile, and the host gets no
prompt twice unless nobody can know whether it ran; then the row says so.

A prompt is lost when it is neither in the host's queue nor, asked afterwards, in its history: the host moves it from
the one to the other in one step. A few prompts at a time are with the host, so that it never waits and others get in.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

from .items import Batch, Item
from .journal import Journal
from .outcome import Outcome, is_final, is_fine, live_step, read_entry, with_report
from .progress import Progress
from .results import Results, line_of, make_row
from .server import Away, NotTheHost, Refused, Server

T = TypeVar("T")
AHEAD = 2
MOST_ATTEMPTS = 3
"""An item that was lost that often may be what takes the host down: it gets a row and is not sent again."""
QUEUE_EVERY_S = 2.0
REPORT_WAIT_S = 3.0
NO_REPORT_WAIT_S = 0.3
STOP_WAIT_S = 30.0
SLOWEST_POLL_S = 1.0
FASTEST_POLL_S = 0.05
AT_ONCE = float("-inf")


class GaveUp(Exception):
    """The host was away for longer than it may be."""


@dataclass(frozen=True)
class Options:
    """timeout_s: an item's, from when it runs. wait_s: how long the host may be away. limit: items of this call."""

    timeout_s: float | None = None
    wait_s: float = 300.0
    keep_going: bool = False
    limit: int | None = None
    ahead: int = AHEAD


@dataclass
class Flight:
    """An item that is with the host. `outcome`: it has ended, and its report may still come until `report_until`."""

    item: Item
    prompt_id: str
    missed: int = 0
    running_since: float | None = None
    stopped_at: float | None = None
    outcome: Outcome | None = None
    report_until: float | None = None


class Runner:
    """Submits, watches and records. One call of `run`."""

    def __init__(
        self,
        server: Server,
        batch: Batch,
        journal: Journal,
        results: Results,
        progress: Progress,
        options: Options,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.server, self.batch, self.journal, self.results = server, batch, journal, results
        self.progress, self.options, self._clock, self._sleep = progress, options, clock, sleep
        self.flights: dict[int, Flight] = {}
        self._waiting: deque[Item] = deque()
        self._stopping = self._taken_back = False
        self._has_pack: bool | None = None
        self._queue_due = AT_ONCE
        self._away_since: float | None = None
        self._usual_s = 1.0
        self._warned: set[str] = set()

    def run(self) -> None:
        """Until every item of this call has its row, or one failed and the batch does not go on.

        Raises:
            GaveUp, NotTheHost: nobody to talk to. KeyboardInterrupt: see `cancel`.
        """
        left = [item for item in self.batch.items if item.number not in self.journal.done]
        for item in left[: self.options.limit]:
            sent = self.journal.sent.get(item.number)
            if sent is not None and sent.open is not None:
                self.flights[item.number] = Flight(item, sent.open)
            else:
                self._waiting.append(item)
        if left:
            self.ask(Server.queue)
        while self.flights or self._waiting:
            try:
                self._step()
                self._away_since = None
            except Away as away:
                self._wait_for_host(str(away))

    def ask(self, question: Callable[[Server], T]) -> T:
        """An answer, waited for as long as the host may be away."""
        while True:
            try:
                answer = question(self.server)
            except Away as away:
                self._wait_for_host(str(away))
            else:
                self._away_since = None
                return answer

    def cancel(self) -> int:
        """Take our waiting prompts out of the host's queue and stop our running one; how many. Nobody else's."""
        ours = {flight.prompt_id: flight for flight in self.flights.values() if flight.outcome is None}
        if not ours:
            return 0
        self.server.delete_waiting(list(ours))
        running = [prompt_id for prompt_id in self.server.queue()[0] if prompt_id in ours]
        for prompt_id in running:
            self.server.interrupt(prompt_id)
        taken = 0
        for prompt_id, flight in ours.items():
            entry = self.server.history(prompt_id)
            if entry is None or read_entry(entry, prompt_id).status == "interrupted":
                # Not ended, or ended by us: the next start sends it again. Else it is taken as it ended.
                tell = self.journal.lost if prompt_id in running else self.journal.void
                tell(flight.item.number, prompt_id)
                taken += 1
        return taken

    def failed(self) -> list[dict[str, Any]]:
        """The rows of the batch that are not fine."""
        return [row for row in self.journal.done.values() if not is_fine(row["status"], row["verdict"])]

    # ------------------------------------------------------------------ one round
    def _step(self) -> None:
        if self._stopping and not self._taken_back:
            self._take_back()
        self._submit()
        for flight in reversed(list(self.flights.values())):  # the last first: where it has ended, the others have too
            self._look(flight)
        if self.flights and self._clock() >= self._queue_due:
            self._look_at_queue()
        for flight in list(self.flights.values()):
            self._check_time(flight)
            if flight.outcome is not None and not self._settled(flight, flight.outcome):
                break  # rows come in the order in which the host runs
        if self.flights:
            self._show()
            self._sleep(self._pause())

    def _submit(self) -> None:
        while self._waiting and sum(one.outcome is None for one in self.flights.values()) < self.options.ahead:
            item = self._waiting[0]
            again = self.journal.attempts(item.number)
            # What may have taken the host down goes alone, so that its neighbours do not fall with it.
            if self.flights and (again or any(self.journal.attempts(number) > 1 for number in self.flights)):
                return
            self._waiting.popleft()
            if again >= MOST_ATTEMPTS:
                text = f"the host forgot it {again} times while it waited or ran, by a restart or a cleared queue"
                self._record(item, Outcome("lost", text), "")
            else:
                self._send(item)

    def _send(self, item: Item) -> None:
        asked_id = str(uuid.uuid4())
        flight = self.flights[item.number] = Flight(item, asked_id)
        self.journal.send(item.number, asked_id)
        try:
            queued = self.server.submit(self.batch.prompt_of(item), asked_id)
        except Refused as error:
            for line in error.nodes:
                self.progress.say(f"  {line}")
            self._record(item, Outcome("refused", "; ".join([str(error), *error.nodes])), asked_id)
            return
        except (Away, NotTheHost) as error:
            if isinstance(error, NotTheHost) or not error.delivered:
                self._withdraw(flight)
            self._queue_due = AT_ONCE
            raise
        if any(queued.prompt_id == other.prompt_id for other in self.flights.values() if other is not flight):
            self._withdraw(flight)
            raise NotTheHost(f"{self.server.url}: gave one id, {queued.prompt_id}, to two prompts")
        self.journal.queued(item.number, queued.prompt_id, asked_id)
        flight.prompt_id = queued.prompt_id
        for warning in queued.warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self.progress.say(f"  left out by the host: {warning}")

    def _withdraw(self, flight: Flight) -> None:
        """It never got there: back to the front, not counted."""
        self.journal.void(flight.item.number, flight.prompt_id)
        del self.flights[flight.item.number]
        self._waiting.appendleft(flight.item)

    def _look(self, flight: Flight) -> bool:
        """Ask the history for it; whether it has ended."""
        if flight.outcome is None:
            entry = self.server.history(flight.prompt_id)
            if entry is None:
                return False
            flight.outcome = read_entry(entry, flight.prompt_id)
            if flight.stopped_at is not None and flight.outcome.status == "interrupted":
                flight.outcome.status, flight.outcome.error = "timeout", self._timeout_text()
        return True

    def _settled(self, flight: Flight, outcome: Outcome) -> bool:
        """Record it once its report is final: it is finished a moment after the prompt is in the history."""
        if not is_final(outcome.report, outcome.status):
            if self._has_pack is None:
                self._has_pack = self.server.status() is not None
            found = self.server.report(flight.prompt_id) if self._has_pack else None
            outcome.report = found or outcome.report
            if flight.report_until is None:
                wait = REPORT_WAIT_S if outcome.report is not None else NO_REPORT_WAIT_S
                flight.report_until = self._clock() + (wait if self._has_pack else 0)
            if not is_final(outcome.report, outcome.status) and self._clock() < flight.report_until:
                return False
        self._record(flight.item, with_report(outcome, outcome.report), flight.prompt_id)
        return True

    def _look_at_queue(self) -> None:
        """Find out what runs, and what the host has forgotten."""
        begun = self._clock()
        running, waiting = self.server.queue()
        lost: list[Flight] = []
        for flight in list(self.flights.values()):
            if flight.outcome is not None:
                continue
            if flight.prompt_id in running and flight.running_since is None:
                flight.running_since = begun
            if flight.prompt_id in running or flight.prompt_id in waiting:
                flight.missed = 0
            elif not self._look(flight):
                flight.missed += 1
                if flight.missed >= 2:
                    lost.append(flight)
        for flight in reversed(lost):
            self.journal.lost(flight.item.number, flight.prompt_id)
            del self.flights[flight.item.number]
            if not self._stopping:
                self._waiting.appendleft(flight.item)
        if lost:
            numbers = ", ".join(str(flight.item.number) for flight in lost)
            self.progress.say(f"The host has forgotten item {numbers}{'' if self._stopping else ': sent again'}.")
        self._queue_due = self._next_look(self._clock() - begun)

    def _next_look(self, took: float) -> float:
        if any(flight.missed for flight in self.flights.values()):
            return AT_ONCE
        # Others' graphs are in the answer too: the larger it is, the less often it is asked for.
        limit = self.options.timeout_s
        return self._clock() + max(QUEUE_EVERY_S if limit is None else min(QUEUE_EVERY_S, limit / 4), 20 * took)

    def _check_time(self, flight: Flight) -> None:
        limit = self.options.timeout_s
        if limit is None or flight.running_since is None or flight.outcome is not None:
            return
        now = self._clock()
        if flight.stopped_at is None and now - flight.running_since > limit:
            self.server.interrupt(flight.prompt_id)
            flight.stopped_at = now
        elif flight.stopped_at is not None and now - flight.stopped_at > STOP_WAIT_S:
            text = f"{self._timeout_text()}, and it did not stop when asked to"
            self._record(flight.item, Outcome("timeout", text), flight.prompt_id)

    def _timeout_text(self) -> str:
        return f"stopped after --timeout {self.options.timeout_s:g} s"

    def _record(self, item: Item, outcome: Outcome, prompt_id: str) -> None:
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = make_row(item, outcome, prompt_id, self.journal.attempts(item.number), finished)
        row = self.results.kept(row)
        self.journal.finish(item.number, row)
        self.flights.pop(item.number, None)
        self.results.append(row)
        if outcome.seconds is not None:
            self._usual_s = outcome.seconds
        self.progress.item_done(line_of(item, row))
        if not outcome.fine and not self.options.keep_going:
            if not self._stopping and len(self.journal.done) < len(self.batch.items):
                self.progress.say("Stops at a failed item (--keep-going goes on); what runs is waited for.")
            self._stopping = True
            self._waiting.clear()

    def _take_back(self) -> None:
        """Take back what waits; what runs gets its row."""
        left = [flight for flight in self.flights.values() if flight.outcome is None]
        if left:
            self.server.delete_waiting([flight.prompt_id for flight in left])
            running, waiting = self.server.queue()
            for flight in left:
                with_host = flight.prompt_id in running or flight.prompt_id in waiting
                if not with_host and self.server.history(flight.prompt_id) is None:
                    self.journal.void(flight.item.number, flight.prompt_id)
                    del self.flights[flight.item.number]
        self._taken_back = True

    # ------------------------------------------------------------------ waiting
    def _wait_for_host(self, why: str) -> None:
        """Ask with growing pauses until it answers.

        Raises:
            GaveUp: no round of work got through within `wait_s`.
        """
        if self._away_since is None:
            self._away_since = self._clock()
            self.progress.say(f"{self.server.url}: {why}; waiting up to {self.options.wait_s:g} s for it.")
        self.progress.show("waiting for the host")
        for pause in _pauses():
            left = self._away_since + self.options.wait_s - self._clock()
            if left <= 0:
                raise GaveUp(f"{self.server.url}: {why}; not back within {self.options.wait_s:g} s")
            self._sleep(min(pause, left))
            try:
                self.server.queue()
            except Away as away:
                why = str(away)
            else:
                break
        self._has_pack = None
        self._queue_due = AT_ONCE

    def _pause(self) -> float:
        if any(flight.outcome is not None or flight.missed for flight in self.flights.values()):
            return FASTEST_POLL_S
        return min(SLOWEST_POLL_S, max(FASTEST_POLL_S, self._usual_s / 20))

    def _show(self) -> None:
        flight = next(iter(self.flights.values()))
        step = ""
        if self.progress.live:
            if self._has_pack is None:
                self._has_pack = self.server.status() is not None
            step = live_step(self.server.status(), flight.prompt_id) if self._has_pack else ""
        self.progress.show(f"item {flight.item.number}  {step or flight.item}")


def _pauses() -> Iterator[float]:
    pause = 0.25
    while True:
        yield pause
        pause = min(10.0, pause * 1.6)
