"""Stages: who is on the device while a component runs. Invariant: decided once per stage, and left alone inside it.

A stage begins when another component is called, or the same one with inputs that need more room. Components that
take turns within every step (a control net and its denoiser) share one placement, so that their turns cost nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable

from . import arbiter
from .activation import GRADIENT, ActivationPeaks, Signature
from .backend import Backend, DeviceMemory
from .calibration import Costs
from .ledger import Ledger
from .managed import STICKY_SHARE, Managed, Planned
from .plan import StagePlan, full_plan, grown_plan, sequential_plan, stream_plan
from .policy import OffloadMode, ResolvedPolicy, always_resident
from .schedule import Rates

GC_INTERVAL = 0.2  # seconds between two flushes of the allocator's cache
HISTORY = 64
WORTH_MOVING = 0.05  # share by which steps have to become shorter for other units to stay
WORTH_LOADING = 0.003  # and for more of them to


class Stages:
    """Decides and carries out placements. `components` is the session's own mapping; `resolve` its policy, now."""

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger,
        components: dict[str, Managed],
        resolve: Callable[[], ResolvedPolicy],
        rates: Callable[[], Rates],
    ) -> None:
        self.peaks = ActivationPeaks()
        self.peak_allocated = 0
        self.resident_peak = 0
        self.high_crossings = 0
        self._backend = backend
        self._ledger = ledger
        self._components = components
        self._resolve = resolve
        self._rates = rates
        self._policy: ResolvedPolicy | None = None
        self._active: Managed | None = None
        self._turn: frozenset[str] = frozenset()
        self._history: deque[tuple[str, int]] = deque(maxlen=HISTORY)
        self._known_turns: list[frozenset[str]] = []  # seen in this run or the one before
        self._used: set[str] = set()  # components that ran in this run
        self._first_use: list[str] = []
        self._base = 0
        self._last_gc = 0.0

    # ------------------------------------------------------------------ the way in
    def enter(self, managed: Managed, entry: str, sig: Signature) -> None:
        """The component is about to run. Returns at once while its placement holds."""
        active = self._active
        if managed.placed and sig in managed.accepted:
            if active is managed:
                return
            if managed.name in self._turn:
                self._history.append((active.name if active else "", 1))
                self._active = managed
                return
        headroom = self._policy.headroom if self._policy is not None else None
        need, _ = self.peaks.expect(managed.component, entry, sig, headroom)
        streams = managed.plan is not None and managed.plan.streams
        if active is managed and managed.placed and need <= managed.reserved and not (streams and GRADIENT in sig):
            managed.accepted.add(sig)
            return
        self._change(managed, entry, sig)

    def leave(self) -> None:
        """The stage that is open ends: learn its activation peak."""
        active, self._active = self._active, None
        self._turn = frozenset()
        if active is None:
            return
        peak, beside = self.note_peak(), active.engine.take_most_beside()  # beside: weights, not the plan's residents
        self.note(active, beside)
        active.most_calls = max(active.most_calls, active.calls)
        if active.placed and active.calls:
            grown = max(0, peak - self._base - beside)
            weights = sum(m.engine.device_bytes for m in self._components.values())
            for sig in active.leads:
                self.peaks.learn(active.name, sig, grown, max(grown, peak - weights - beside))
        self._history.append((active.name, active.calls))
        self._ledger.stage_end(peak)

    def abandon(self, managed: Managed) -> None:
        """A call of `managed` raised: nothing was learned, and its next call begins a stage of its own."""
        managed.engine.abort()
        managed.unplace()
        self._active = None
        self._turn = frozenset()
        self.note_peak()

    def forget(self, name: str) -> None:
        """A component went: nothing of it counts any more."""
        self.peaks.forget(name)
        self._known_turns = [turn for turn in self._known_turns if name not in turn]
        if name in self._first_use:
            self._first_use.remove(name)

    def begin_run(self) -> None:
        """A new run: peaks start again; turns that the last run did not take are not expected in this one."""
        self.leave()
        self._history.clear()
        self._known_turns = [turn for turn in self._known_turns if turn <= self._used]
        self._used.clear()
        self.peak_allocated = self.resident_peak = self.high_crossings = 0
        self._backend.reset_peak()
        if self._policy is not None:
            self.note()

    # ------------------------------------------------------------------ a stage
    def _change(self, managed: Managed, entry: str, sig: Signature) -> None:
        if self._active is not managed and not managed.retrying:
            managed.rungs.clear()
            managed.limit = None
        self.leave()
        self._used.add(managed.name)
        if managed.name not in self._first_use:
            self._first_use.append(managed.name)
        policy = self._policy = self._resolve()
        # in mode none the weights are the user's to convert; whatever evicts them finds out
        if not always_resident(policy) and managed.weights.foreign_change() is not None:
            managed.rebuild()
            self.peaks.forget(managed.name)
        activations, _ = self.peaks.expect(managed.component, entry, sig, policy.headroom)
        decoding = managed.category(entry) == "decode"
        now = self._backend.memory()
        have = self._have(now)
        if always_resident(policy):
            self._ledger.stage_begin(managed.category(entry), managed.name, need=activations, have=have)
            if self._backend.device.type != "cpu":  # a host may have asked for its memory
                managed.engine.apply(full_plan(managed.component), "external")
        else:
            self._turn = self._takes_turns(managed)
            plan = self._plan(managed, entry, sig, activations, decoding)
            need = managed.engine.missing_bytes(plan) + plan.held_bytes + activations
            running = "+".join(sorted(self._turn)) or managed.name
            self._ledger.stage_begin(managed.category(entry), running, need=need, have=have)
            gone = arbiter.at_stage_change(
                policy, self._evictable(managed), decoding=decoding, used=now.total - now.free
            )
            self.evict(gone)
            self._flush_cache()
            self._make_room(managed, plan, activations, decoding)
            managed.plan = plan
            managed.engine.apply(plan, "stage", avoidable=managed.left_needlessly(policy))
            managed.evicted_for = None
            self._hand_over(managed, plan, activations)
        managed.placed = True
        managed.reserved = activations
        managed.lead = sig
        managed.accepted = {sig}
        managed.calls = 0
        self._active = managed
        self.note()
        managed.engine.take_most_beside()
        self._backend.reset_peak()
        self._base = self._backend.memory().allocated

    def _hand_over(self, managed: Managed, plan: StagePlan, activations: int) -> None:
        """Use the room that this stage leaves to bring up what the next one wants, as the last run had it."""
        policy, follower = self._policy, self.follower(managed.name)
        assert policy is not None
        unwanted = policy.mode not in (OffloadMode.BALANCED, OffloadMode.NONE) or policy.low_always or self._turn
        if unwanted or follower is None or follower.plan is None:
            return
        if follower.running or follower.name in policy.always:
            return
        now = self._backend.memory()
        room = self._have(now) - activations - plan.held_bytes - self._slack(now.total)
        if room > 0:
            follower.engine.bring_early(follower.plan, room, follower.left_needlessly(policy))

    def follower(self, name: str | None = None) -> Managed | None:
        """The component that ran after `name` (the active one), in the order of first use."""
        name, order = name or (self._active.name if self._active else ""), self._first_use
        later = order[order.index(name) + 1 :] if name in order else []
        return self._components.get(later[0]) if later else None

    def _slack(self, total: int) -> int:
        """Room beyond the figures. A run that fits by the fit rule fits here: one inequality, not two."""
        assert self._policy is not None
        return 0 if self._policy.fits and self._policy.fit_aware else arbiter.slack(total)

    def _have(self, now: DeviceMemory) -> int:
        assert self._policy is not None
        return now.free + now.reclaimable - self._policy.reserve

    def _plan(self, managed: Managed, entry: str, sig: Signature | None, activations: int, decoding: bool) -> StagePlan:
        """The plan of a component for its stage. Where a gradient will be asked for, nothing should stream."""
        policy = self._policy
        assert policy is not None
        now = self._backend.memory()
        partners = [self._components[n] for n in self._turn if n != managed.name]
        keep = decoding and policy.before_decode == "keep"
        evictable = 0 if keep else sum(o.nbytes for o in self._evictable(managed) if o.name not in self._turn)
        activations = max([activations, *(p.reserved for p in partners)])
        own = sum(m.engine.device_bytes for m in (managed, *partners))
        room = self._have(now) + own + evictable - activations - self._slack(now.total)
        if partners:
            wishes = {m.name: m.component.device_bytes for m in (managed, *partners)}
            room = arbiter.shares(wishes, room)[managed.name]
        held = frozenset(managed.engine.held_units)
        if managed.most_calls == 1 and not partners and managed.limit is None:
            room = min(room, self._without_evicting(managed, room - evictable, held))
        whole = sig is not None and GRADIENT in sig
        if whole and managed.limit is None and managed.component.device_bytes <= room:
            return full_plan(managed.component)
        if managed.limit is not None:  # stepped down after running out of memory: whatever the mode says
            room = min(room, managed.limit)
            if "sequential" in managed.rungs:
                return sequential_plan(managed.component, held, policy.prefetch, room)
            return stream_plan(managed.component, room, held, policy.prefetch, managed.engine.order_of(entry))
        costs = managed.timing.expect(sig)
        if managed.plan is not None and self._still_good(managed, managed.plan, room, costs):
            return managed.plan
        plan = arbiter.choose_plan(
            policy,
            managed.component,
            room,
            held,
            managed.engine.order_of(entry),
            costs=costs,
            rates=None if costs is None else self._rates(),
            pageable=managed.weights.unpinnable(),
            activations=activations,
        )
        managed.planned = Planned(plan, room, costs, policy.mode, policy.high)
        return plan

    def _without_evicting(self, managed: Managed, room: int, held: frozenset[int]) -> int:
        """The room of a component that is called once in its stage: to stream it copies each byte once, as to load it
        does, and what leaves for it is copied once more. So it makes do with what is free, or what it needs to stream.
        """
        assert self._policy is not None
        least = sequential_plan(managed.component, held, self._policy.prefetch)
        return max(room, least.ring_bytes + least.held_bytes)

    def reconsider(self, managed: Managed, entry: str, sig: Signature) -> None:
        """The times of its units are known by now: plan the running stage again, where it is worth the moves."""
        plan, policy = managed.plan, self._policy
        if self._active is not managed or not managed.placed or plan is None or policy is None or not plan.streams:
            return
        if managed.limit is not None or self._turn or sig not in managed.accepted:
            return
        pageable = managed.weights.unpinnable()
        now = managed.timing.predict(plan, sig, managed.engine.held_units, self._rates(), pageable)
        if now is None:
            return
        # what its forwards took is known as well, where the stage was set by a guess
        taken = max(0, self.note_peak() - self._base - managed.engine.most_beside)
        managed.plan = None  # else it would be kept for being there
        better = self._plan(managed, entry, sig, taken if sig in managed.leads else managed.reserved, False)
        if better.streams and (better.step_s is None or better.step_s > (1 - WORTH_MOVING) * now.step_s):
            # nothing else would stream than does now, so that no other masters have to be page-locked
            better = grown_plan(managed.component, plan, better.device_bytes, managed.engine.order_of(entry))
            then = managed.timing.predict(better, sig, managed.engine.held_units, self._rates(), pageable)
            if then is not None and then.step_s > (1 - WORTH_LOADING) * now.step_s:
                better, then = plan, now
            assert then is not None
            better = dataclasses.replace(better, step_s=then.step_s, bound_s=then.bound_s, compute_s=then.compute_s)
        managed.plan = better
        if better.resident != plan.resident or better.ring_bytes != plan.ring_bytes:
            self.leave()  # the next stage goes by what this one has learned
            managed.unplace()

    def _still_good(self, managed: Managed, plan: StagePlan, room: int, costs: Costs | None) -> bool:
        """Whether a plan from before still fits, and a new one would hardly hold more."""
        policy = self._policy
        assert policy is not None
        margin = int(STICKY_SHARE * managed.component.device_bytes)
        if managed.planned is not None and managed.planned.holds(plan, room, costs, policy, margin):
            return True
        if policy.mode in (OffloadMode.MODEL, OffloadMode.SEQUENTIAL) or managed.name in policy.never:
            return False
        room = room if policy.high is None else min(room, policy.high)
        whole = managed.component.device_bytes
        if not plan.resident or plan.device_bytes > room:
            return False
        return not plan.streams or (whole > room and room - plan.device_bytes < margin)

    def _make_room(self, managed: Managed, plan: StagePlan, activations: int, decoding: bool) -> None:
        """Evict for what the plan still has to load and for the activations, by need, and no further."""
        policy = self._policy
        assert policy is not None
        for name in self._turn - {managed.name}:
            partner = self._components[name]
            if partner.running:
                continue
            share = self._plan(partner, "forward", partner.lead, partner.reserved, False)
            excess = partner.engine.device_bytes - share.device_bytes
            if excess > 0:
                partner.engine.apply(share.within(partner.engine.loaded), "need")
                partner.unplace()  # its ring and what it lacks come with its own turn
            partner.plan = share
        now = self._backend.memory()
        have = self._have(now) + managed.engine.surplus_bytes(plan)
        wanted = managed.engine.missing_bytes(plan) + plan.held_bytes + activations
        missing = wanted + self._slack(now.total) - have
        if missing > 0 and not (decoding and policy.before_decode == "keep"):
            self.evict(arbiter.for_need([o for o in self._evictable(managed) if o.name not in self._turn], missing))

    def _evictable(self, managed: Managed) -> list[arbiter.Other]:
        assert self._policy is not None
        return [
            arbiter.Other(m.name, m.engine.device_bytes, self._distance(managed.name, m.name))
            for m in self._components.values()
            if m is not managed and not m.running and m.name not in self._policy.never and m.engine.device_bytes
        ]

    def _distance(self, now: str, other: str) -> int:
        """Stages until `other` runs again, by the order of first use, which recurs from run to run."""
        order = self._first_use
        if other not in order:
            return len(order)
        return (order.index(other) - order.index(now)) % len(order)

    def _takes_turns(self, managed: Managed) -> frozenset[str]:
        assert self._policy is not None
        if self._policy.mode not in (OffloadMode.BALANCED, OffloadMode.NONE):
            return frozenset()
        turn = arbiter.in_turns(self._history, managed.name)
        if any(name in self._components and self._components[name].role in ("vae", "text_encoder") for name in turn):
            turn = frozenset()  # they frame the steps; what they alternate with is another run's, not another step's
        if turn:
            self._known_turns = [t for t in self._known_turns if managed.name not in t] + [turn]
        known = next((t for t in self._known_turns if managed.name in t), frozenset())
        return known if all(name in self._components for name in known) else frozenset()

    # ------------------------------------------------------------------ making room
    def evict(self, evictions: list[arbiter.Eviction]) -> int:
        """Carry out evictions; the device bytes that came free."""
        freed = 0
        for eviction in evictions:
            other = self._components[eviction.name]
            freed += other.engine.evict(eviction.nbytes, eviction.reason)
            other.unplace()
            other.evicted_for = eviction.reason
        return freed

    def free(self, nbytes: int | None) -> int:
        """Free at least `nbytes` for a host that asks (everything where None); the device bytes that came free."""
        self.leave()
        others = [
            arbiter.Other(m.name, m.engine.device_bytes, 0)
            for m in self._components.values()
            if not m.running and m.engine.device_bytes
        ]
        if nbytes is None:
            return self.evict([arbiter.Eviction(o.name, None, "external") for o in others])
        return self.evict([dataclasses.replace(e, reason="external") for e in arbiter.for_need(others, nbytes)])

    def _flush_cache(self) -> None:
        """Give cached blocks back to the driver where the policy's threshold says so, at most every 0.2 s."""
        assert self._policy is not None
        now = self._backend.memory()
        due = time.monotonic() - self._last_gc >= GC_INTERVAL
        if (
            due
            and now.reclaimable
            and now.total - now.free > self._policy.gc_threshold * max(1, self._policy.available)
        ):
            self._backend.empty_cache()
            self._last_gc = time.monotonic()

    # ------------------------------------------------------------------ figures
    def note_peak(self) -> int:
        """Take over the allocator's peak since it was last reset; bytes."""
        peak = self._backend.peak_allocated()
        self.peak_allocated = max(self.peak_allocated, peak)
        return peak

    def note(self, running: Managed | None = None, beside: int = 0) -> None:
        """Weights on the device have changed: keep the peaks, and count a component over the high mark.

        `beside` is what the running component held beyond its plan, device bytes.
        """
        sizes = {name: m.engine.device_bytes for name, m in self._components.items()}
        if running is not None:
            sizes[running.name] = running.engine.device_bytes + beside
        self.resident_peak = max(self.resident_peak, sum(sizes.values()))
        policy = self._policy
        if policy is not None and policy.high is not None:
            over = [n for n, size in sizes.items() if size > policy.high and n not in policy.never]
            self.high_crossings += len(over)
        self.note_peak()
        self._ledger.note_vram(self._backend.memory().allocated, sum(sizes.values()), sizes)
