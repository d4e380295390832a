"""The catalogue of hints. Invariant: a rule speaks only of what two comparable runs measured, and never overstates it.

Each rule takes the run that has just ended and the ones before it (oldest first), and gives a Found: a hint, a note why
there is none although something moved, or nothing. Where a saving can only be bounded, it is the lower bound. The rules
about what a component kept waiting are here; those about whole runs in `hint_runs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .hint_actions import action, keeping, merged
from .hint_digest import Digest, Row, short
from .hint_fit import beside_decodes, decode_alone, decode_needed, everything_fits
from .profiles import profile_for
from .sizes import read_size
from .summary import seconds, size

LEAST_S = 0.3
LEAST_SHARE = 0.05  # of the run's wall time

_SPARED = ("low", "always", "policy")  # evictions that a fitting run could have done without
_NEEDLESS = (*_SPARED, "external")  # those after which the ledger calls the way back avoidable


@dataclass(frozen=True)
class Hint:
    """What to change. `sentence`: what was measured; `saving_s`: seconds a run; `action`: {"set", "label"}, or None."""

    code: str
    sentence: str
    saving_s: float
    action: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """As in the report's `hints`."""
        changes = None if self.action is None else {"set": dict(self.action["set"]), "label": self.action["label"]}
        return {"code": self.code, "sentence": self.sentence, "saving_s": self.saving_s, "action": changes}


@dataclass(frozen=True)
class Found:
    """At most one hint; `note` says why nothing is said of what was moved, or could have stayed."""

    hint: Hint | None = None
    note: str | None = None


NOTHING = Found()


def worth(saving_s: float | None, run: Digest) -> bool:
    """Whether it is enough to speak of: 0.3 s, or 5 % of the run."""
    if saving_s is None or saving_s <= 0:
        return False
    return saving_s >= LEAST_S or (run.wall_s is not None and saving_s >= LEAST_SHARE * run.wall_s)


def same_run(a: Digest, b: Digest) -> bool:
    """The same work on the same device by the same kind of evidence, both to the end, each under one policy."""
    if not (a.complete and b.complete) or a.workload is None or a.rung is None or a.mixed or b.mixed:
        return False
    return (a.workload, a.gpu, a.rung) == (b.workload, b.gpu, b.rung)


def alike(a: Digest, b: Digest) -> bool:
    """The same run in the same world under the same policy: what one moved, the other could have."""
    return same_run(a, b) and a.world is not None and a.world == b.world and bool(a.policy) and a.policy == b.policy


def latest(now: Digest, before: Sequence[Digest]) -> Digest | None:
    """The last run that is like this one."""
    return next((run for run in reversed(before) if alike(now, run)), None)


# ---------------------------------------------------------------------- FITS_BUT_MOVED


def fits_but_moved(now: Digest, before: Sequence[Digest]) -> Found:
    """A component left and came back although the run fits."""
    last = _just_before(now, before)
    if last is None:
        return NOTHING
    moved = [row for row in now.rows if row.bytes_h2d and _left(last, row.component, (*_SPARED, "need"))]
    needed = objection(now, last) or _too_much(now, last)
    if needed is not None:
        waited = [row for row in moved if worth(row.onload_s, now)]
        if not waited:
            return NOTHING
        worst = max(waited, key=lambda row: row.onload_s or 0.0)
        return Found(note=f"{_weighs(worst)} was moved out and in again ({seconds(worst.onload_s)}), and {needed}.")
    if not (everything_fits(now) and everything_fits(last)):
        return NOTHING
    savings: dict[str, float] = {}
    changes: list[dict[str, Any]] = []
    for row in now.rows:
        cures = _cures(now, last, row)
        saved = _avoidable_s(now, last, row, tuple(cures))
        if saved is not None and saved > 0:
            savings[row.component] = saved
            changes += cures.values()
    total = sum(savings.values())
    if not savings or not worth(total, now):
        return NOTHING
    largest = max(savings, key=lambda name: (_weight(now, name), savings[name]))
    runs = _in_a_row(now, before)
    times = sum(1 for run in runs if (found := run.row(largest)) and (found.avoidable or _left(run, largest, _SPARED)))
    others = f", and {len(savings) - 1} more with it," if len(savings) > 1 else ""
    budget = f"{size(now.weights)} of weights in all, {size(now.activations)} of activations"
    sentence = (
        f"{_weighs(now.row(largest))} fits the budget of {size(now.available)} with everything else ({budget}), but "
        f"was moved out and in again{others} in {times} of {len(runs)} runs: {seconds(total)} a run."
    )
    return Found(Hint("FITS_BUT_MOVED", sentence, total, action(merged(changes))))


def objection(now: Digest, last: Digest) -> str | None:
    """Why nothing more may be kept in VRAM: in one of the two it was the decode for which something had to go."""
    for run, which in ((now, "this run"), (last, "the run before")):
        room = decode_alone(run)
        if room is not None:
            return (
                f"the decode of {which} needed the room: it took {size(room.least)}, which with the other weights "
                f"({size(room.others)}) is more than the {size(run.available)} available"
            )
    return None


def _too_much(now: Digest, last: Digest) -> str | None:
    """The same where it was no decode alone for which something had to go."""
    run = next((run for run in (now, last) if decode_needed(run) is not None), None)
    if run is None:
        return None
    had = size(run.available)
    return f"there was no room for all: the weights ({size(run.weights)}) are more than the {had} available"


def _just_before(now: Digest, before: Sequence[Digest]) -> Digest | None:
    """The last run that is like this one, where no other run has moved anything since: what it evicted was missing."""
    for run in reversed(before):
        if alike(now, run):
            return run
        if run.moved != 0:
            return None
    return None


def _in_a_row(now: Digest, before: Sequence[Digest]) -> list[Digest]:
    """This run and the ones like it before it, up to the first that is another."""
    runs = [now]
    for run in reversed(before):
        if alike(now, run):
            runs.append(run)
        elif run.moved != 0:
            break
    return runs


def _left(run: Digest, component: str, reasons: Sequence[str]) -> bool:
    row = run.row(component)
    return row is not None and any(row.dropped.get(reason) for reason in reasons)


def _avoidable_s(now: Digest, last: Digest, row: Row, cured: Sequence[str]) -> float | None:
    """Seconds that the run waited for copies of the component, and for evicting it, for the reasons that are cured."""
    outside, waited = row.outside_steps, _waited(now, row)
    if not cured or not row.avoidable or not outside or waited is None:
        return None
    twin, evicted = last.row(row.component), _bytes_for(row, cured)
    left = evicted + _bytes_for(twin, cured)
    rest = [reason for reason in _NEEDLESS if reason not in cured]
    others = _bytes_for(row, rest) + _bytes_for(twin, rest)  # which came back as well, and will again
    back = min(left, row.avoidable * left / max(1, left + others))  # more than left cannot have come back
    saved = waited * min(1.0, back / outside)
    if now.evict_s and now.dropped:
        saved += now.evict_s * min(1.0, evicted / now.dropped)
    return saved


def _bytes_for(row: Row | None, reasons: Sequence[str]) -> int:
    return 0 if row is None else sum(row.dropped.get(reason, 0) for reason in reasons)


def _waited(now: Digest, row: Row) -> float | None:
    """Onload of its own stages, and its share, by bytes, of those in which it takes turns with others."""
    if row.onload_s is None:
        return None
    waited = row.onload_s
    for stage in now.rows:
        names = stage.component.split("+")
        if len(names) < 2 or row.component not in names or not stage.onload_s:
            continue
        parts = [part.outside_steps or 0 for name in names if (part := now.row(name)) is not None]
        waited += stage.onload_s * (row.outside_steps or 0) / max(1, sum(parts))
    return waited


def _cures(now: Digest, last: Digest, row: Row) -> dict[str, dict[str, Any]]:
    """A change for each reason that evicted it in one of the two runs, by reason, most bytes first. Nothing where the
    run before neither evicted it needlessly nor brought it back so."""
    twin = last.row(row.component)
    if twin is None or not (_bytes_for(twin, _SPARED) or twin.avoidable):
        return {}
    nbytes = {reason: _bytes_for(row, [reason]) + _bytes_for(twin, [reason]) for reason in _SPARED}
    found = {}
    for reason in sorted(_SPARED, key=lambda reason: -nbytes[reason]):
        if nbytes[reason] and (change := keeping(now, row.component, reason)) is not None:
            found[reason] = change
    return found


def _weight(run: Digest, component: str) -> int:
    row = run.row(component)
    return 0 if row is None else row.weight or row.bytes_h2d or 0


def _weighs(row: Row | None) -> str:
    if row is None:
        return "n/a"
    return short(row.component) + ("" if row.weight is None else f" ({size(row.weight)})")


# ---------------------------------------------------------------------- HIGH_MARK_TOO_LOW


def high_mark_too_low(now: Digest, before: Sequence[Digest]) -> Found:
    """A high mark that the user wrote splits a component of which more could stay."""
    last = latest(now, before)
    if last is None or now.sources.get("high") != "user" or now.high is None or now.mode != "balanced":
        return NOTHING
    saved: dict[str, float] = {}
    for row in now.rows:
        twin = last.row(row.component)
        parts = [_stall_spared(now, row), None if twin is None else _stall_spared(last, twin)]
        if None not in parts:
            saved[row.component] = min(part for part in parts if part is not None)
    if not saved:
        return NOTHING
    worst = max(saved, key=lambda name: saved[name])
    most = now.row(worst)
    if most is None or not worth(saved[worst], now):
        return NOTHING
    sentence = (
        f"{_weighs(most)} may hold {size(now.high)} by the high mark, so the rest streams in every step and stalled it "
        f"for {seconds(most.stall_s)} a run; there is room for {size(_extra(now, most))} more, which saves at least "
        f"{seconds(saved[worst])}."
    )
    return Found(Hint("HIGH_MARK_TOO_LOW", sentence, saved[worst], action({"high": "auto"})))


def _extra(run: Digest, row: Row) -> int:
    """Bytes of the component that high = auto would hold, and the user's mark does not."""
    if None in (run.high, run.available, run.activations, row.weight):
        return 0
    assert run.high is not None and run.available is not None and run.activations is not None and row.weight is not None
    staying = sum(other.weight or 0 for other in run.rows if other.component in run.never and other is not row)
    most = min(row.weight, run.available - run.activations - staying)
    beside = beside_decodes(run, row.component)
    most = most if beside is None else min(most, beside)
    if not (run.fits and run.policy.get("fit_aware") is not False):  # else auto sets no mark
        if not run.vram_total:
            return 0
        mark = read_size("high", profile_for(run.vram_total).high).to_bytes("high", run.vram_total)
        most = min(most, mark if mark is not None else most)
    return max(0, most - run.high)


def _stall_spared(run: Digest, row: Row) -> float | None:
    """At least so many seconds of stall go when more of it stays: a stall is not longer than its copies take, and
    those become shorter by the share that is not copied any more. Where other stages need the room, what stays is
    loaded once a run, which is counted against it."""
    extra = _extra(run, row)
    streamed = (row.ahead or 0) + (row.blocking or 0)
    if not extra or not row.stall_s or not streamed or not row.weight:
        return None
    each = streamed / run.steps if run.steps else row.weight  # what one step streams; not more than all of it
    spared = row.stall_s * min(1.0, extra / min(each, row.weight))
    if everything_fits(run):
        return spared
    copied, took_s = _ahead(run, row)
    if not copied or not took_s:
        copied, took_s = row.blocking, row.blocking_s
    return spared - extra * took_s / copied if copied and took_s else None


# ---------------------------------------------------------------------- RAM_PRESSURE


def ram_pressure(now: Digest, before: Sequence[Digest]) -> Found:
    """Streamed weights come from RAM that is not page-locked, and slower than those of the same run that are."""
    last = latest(now, before)
    if last is None or now.pinned_ram is None:
        return NOTHING
    found = [(row, saved) for row in now.rows if (saved := _slower_s(now, row)) and _streams_more(now, row)]
    earlier = sum(_slower_s(last, row) or 0.0 for row in last.rows)
    total = min(sum(saved for _, saved in found), earlier)
    if not found or not worth(total, now):
        return NOTHING
    worst = max(found, key=lambda pair: pair[1])[0]
    user = now.sources.get("pinned_ram") == "user"
    more = user and _asked_for_less(now)
    allowed = "Pinned RAM in the policy" if user else "this machine"
    sentence = (
        f"{short(worst.component)} streamed {size(worst.blocking)} a run from RAM that is not page-locked, at "
        f"{_rate(worst.blocking, worst.blocking_s)} in place of {_rate(*_ahead(now, worst))}, as {allowed} allows "
        f"{size(now.pinned_ram)}: {seconds(total)} a run."
    )
    if not more:
        higher = "" if objection(now, last) else ", or a higher high mark"
        sentence += f" More RAM or smaller weights would help{higher}."
    return Found(Hint("RAM_PRESSURE", sentence, total, action({"pinned_ram": "auto"}) if more else None))


def _streams_more(run: Digest, row: Row) -> bool:
    """The budget is what keeps it from being page-locked: where it has room for what is not, the cause is another."""
    if row.weight is None or run.pinned_ram is None or not row.blocking:
        return False
    if run.pinned is None or not run.steps:
        return run.pinned_ram < row.weight
    return run.pinned_ram - run.pinned < min(row.weight, row.blocking / run.steps)


def _asked_for_less(run: Digest) -> bool:
    """The user's figure is what binds, and the default share of RAM is more."""
    if run.pinned_ram is None or run.ram_total is None:
        return False
    try:
        written = read_size("pinned_ram", run.policy.get("pinned_ram")).to_bytes("pinned_ram", run.ram_total)
    except (ValueError, ArithmeticError):
        return False
    return written is not None and abs(written - run.pinned_ram) <= 1 << 20 and run.pinned_ram < 0.4 * run.ram_total


def _ahead(run: Digest, row: Row) -> tuple[int | None, float | None]:
    """Bytes and seconds of copies out of page-locked memory: its own, else those of the whole run."""
    if row.ahead and row.ahead_s:
        return row.ahead, row.ahead_s
    timed = [(other.ahead, other.ahead_s) for other in run.rows if other.ahead and other.ahead_s]
    return (sum(n for n, _ in timed), sum(s for _, s in timed)) if timed else (None, None)


def _slower_s(run: Digest, row: Row) -> float | None:
    """Seconds that the blocking copies took longer than they would have at the other rate; at most the stall."""
    ahead, ahead_s = _ahead(run, row)
    if not row.blocking or not row.blocking_s or not ahead or not ahead_s or not row.stall_s:
        return None
    return max(0.0, min(row.stall_s, row.blocking_s - row.blocking * ahead_s / ahead))


def _rate(nbytes: int | None, took_s: float | None) -> str:
    return "n/a" if not nbytes or not took_s else f"{size(int(nbytes / took_s))}/s"
