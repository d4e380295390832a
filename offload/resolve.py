"""Invariant: resolving is a pure function of policy, machine and working set, and every value says where it is from.

Fit comes first: in auto a run that fits resolves to none, whatever the profile says. Only the user outranks the fit
rule, by asking for what none cannot do: a high mark under a component, low = 0, an always entry that matches, or
before_decode = free_all. Then auto resolves to balanced, which does what was asked and keeps the rest resident.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from .memory import RamInfo, pinned_budget
from .names import match
from .policy import (
    ComponentInfo,
    Machine,
    OffloadMode,
    OffloadPolicy,
    OffloadPolicyWarning,
    ResolvedPolicy,
    WorkingSet,
    read_gc_threshold,
)
from .profiles import Profile, profile_for
from .sizes import ReadSize, SizeKind, format_size, read_size


@dataclass
class _Notes:
    """Collects, on the way, the source of every value and what the user should hear."""

    sources: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Fit:
    """The figures of the fit rule, bytes."""

    weights: int
    activations: int
    activation_words: str
    available: int

    @property
    def fits(self) -> bool:
        return self.weights + self.activations <= self.available


@dataclass(frozen=True)
class _Lists:
    never: frozenset[str]
    always: frozenset[str]


def resolve(policy: OffloadPolicy, machine: Machine, working_set: WorkingSet) -> ResolvedPolicy:
    """What `policy` means on `machine` for `working_set`; see OffloadPolicy.resolve."""
    notes = _Notes()
    total = machine.vram_total
    profile = profile_for(total)

    reserve = _in_card(policy, "reserve", read_size("reserve", policy.reserve, auto=False), total, notes) or 0
    notes.sources["reserve"] = "user" if reserve else "default"
    user_high = _in_card(policy, "high", read_size("high", policy.high), total, notes)
    low_read = read_size("low", policy.low)
    user_low = _in_card(policy, "low", low_read, total, notes)
    headroom = _in_card(policy, "headroom", read_size("headroom", policy.headroom), total, notes)
    prefetch = _in_card(policy, "prefetch", read_size("prefetch", policy.prefetch, share=False), total, notes)
    notes.sources["prefetch"] = "default" if prefetch is None else "user"

    fit = _fit(machine, working_set, reserve, headroom, notes)
    lists = _user_lists(policy, working_set, notes)
    capped = _largest_over(working_set, user_high)
    asks = _asks(policy, lists, capped, user_high, low_read.is_zero)
    mode = _mode(policy, machine, profile, fit, bool(asks), notes)
    if mode is OffloadMode.NONE:
        notes.notices += [f"mode none keeps everything resident: {ask} has no effect" for ask in asks]
    lists = _with_profile_never(policy, profile, mode, lists, working_set, notes)

    high = _high(policy, machine, profile, mode, fit, user_high, capped is not None, notes)
    low, high = _low(profile, total, user_low, high, notes)
    gc_threshold = read_gc_threshold(policy.gc_threshold)
    notes.sources["gc_threshold"] = "profile" if gc_threshold is None else "user"
    _pass_through(policy, notes)
    pinned = _pinned(policy, machine, notes)
    _warn_of_shortage(machine, working_set, mode, lists, fit, notes)

    return ResolvedPolicy(
        mode=mode,
        high=high,
        low=low,
        low_always=low_read.is_zero and mode is not OffloadMode.NONE,
        never=lists.never,
        always=lists.always,
        vae_tiling=policy.vae_tiling if policy.vae_tiling != "auto" else profile.vae_tiling,
        before_decode=policy.before_decode,
        on_oom=policy.on_oom,
        headroom=headroom,
        reserve=reserve,
        pinned_ram=pinned,
        gc_threshold=profile.gc_threshold if gc_threshold is None else gc_threshold,
        prefetch=prefetch,
        fit_aware=policy.fit_aware,
        fits=fit.fits,
        available=fit.available,
        profile=profile.name,
        sources=notes.sources,
        notices=tuple(notes.notices),
        sentence=_sentence(policy, machine, profile, mode, high, fit, asks, notes.sources["mode"]),
        use_core_dynamic=policy.use_core_dynamic,
        weight_bytes=fit.weights,
        activation_peak=fit.activations,
    )


def _in_card(policy: OffloadPolicy, name: str, read: ReadSize, total: int, notes: _Notes) -> int | None:
    """A written size in bytes of this card, clamped to it with a notice."""
    size = read.to_bytes(name, total)
    if size is None or size <= total:
        return size
    notes.notices.append(f"{name}: {getattr(policy, name)} is more than this card has, {format_size(total)} is used")
    return total


def _fit(machine: Machine, working_set: WorkingSet, reserve: int, headroom: int | None, notes: _Notes) -> _Fit:
    if machine.others is None:
        notes.notices.append("what other programs hold on the card is unknown and counted as nothing")
    available = max(0, machine.vram_total - (machine.others or 0) - reserve)
    source = working_set.activation_source
    if source == "learned":
        activations, words, origin = working_set.activation_peak, "learned", "learned"
    elif headroom is not None:
        activations, words, origin = headroom, "your headroom", "user"
    else:
        activations, words, origin = working_set.activation_peak, "estimated", "default"
    notes.sources["activation_peak"] = origin
    notes.sources["headroom"] = "user" if headroom is not None else origin
    return _Fit(working_set.weight_bytes, activations, words, available)


def _largest_over(working_set: WorkingSet, high: int | None) -> ComponentInfo | None:
    """The largest component over the user's high mark, None when the mark splits nothing."""
    if high is None or not working_set.components:
        return None
    largest = max(working_set.components, key=lambda component: component.weight_bytes)
    return largest if largest.weight_bytes > high else None


def _asks(
    policy: OffloadPolicy, lists: _Lists, capped: ComponentInfo | None, high: int | None, low_zero: bool
) -> list[str]:
    """What the user asks for that mode none cannot do, each as words."""
    asks: list[str] = []
    if capped is not None:
        asks.append(f"high = {format_size(high)} ({capped.name} weighs {format_size(capped.weight_bytes)})")
    if low_zero:
        asks.append("low = 0 (always evict at a stage change)")
    if lists.always:
        asks.append(f"always = {', '.join(sorted(lists.always))}")
    if policy.before_decode == "free_all":
        asks.append("before_decode = free_all")
    return asks


def _mode(
    policy: OffloadPolicy, machine: Machine, profile: Profile, fit: _Fit, asks: bool, notes: _Notes
) -> OffloadMode:
    if _shares_memory(machine):
        mode, source = OffloadMode.NONE, "device"
    elif policy.mode is not OffloadMode.AUTO:
        mode, source = policy.mode, "user"
    elif not fit.fits or not policy.fit_aware:
        mode, source = profile.mode, "profile"
    elif asks:
        mode, source = OffloadMode.BALANCED, "user"
    else:
        mode, source = OffloadMode.NONE, "fit"
    notes.sources["mode"] = source
    if source == "device" and policy.mode not in (OffloadMode.AUTO, OffloadMode.NONE):
        notes.notices.append(f"mode {policy.mode.value} becomes none: {machine.name} shares its memory with the host")
    return mode


def _high(
    policy: OffloadPolicy,
    machine: Machine,
    profile: Profile,
    mode: OffloadMode,
    fit: _Fit,
    user_high: int | None,
    caps: bool,
    notes: _Notes,
) -> int | None:
    """The most that one component's weights may occupy, None for no mark."""
    sources = notes.sources
    if _shares_memory(machine):
        sources["high"] = "device"
        return None
    if user_high is not None and not (caps and mode is OffloadMode.NONE):
        sources["high"] = "user"
        return user_high
    if user_high is None and fit.fits and policy.fit_aware:
        sources["high"] = "fit"
        return None
    if mode in (OffloadMode.NONE, OffloadMode.MODEL):
        # Both hold a component whole or not at all; a profile does not turn them into another mode.
        sources["high"] = "default"
        return None
    sources["high"] = "profile"
    return read_size("high", profile.high).to_bytes("high", machine.vram_total)


def _low(profile: Profile, total: int, user_low: int | None, high: int | None, notes: _Notes) -> tuple[int, int | None]:
    """The low mark and the high mark again: where the two cross, the profile's value yields to the user's."""
    sources = notes.sources
    if user_low is None:
        sources["low"] = "profile"
        low = read_size("low", profile.low).to_bytes("low", total) or 0
        return (low if high is None else min(low, high)), high
    sources["low"] = "user"
    if high is None or user_low <= high:
        return user_low, high
    if sources["high"] == "user":
        # One written in bytes and one as a share: legal on the writer's card, crossed on this one.
        notes.notices.append(f"low ({format_size(user_low)}) is over high on this card: {format_size(high)} is used")
        return high, high
    notes.notices.append(f"low ({format_size(user_low)}) is over the profile's high, which is raised to it")
    return user_low, user_low


def _user_lists(policy: OffloadPolicy, working_set: WorkingSet, notes: _Notes) -> _Lists:
    found: dict[str, frozenset[str]] = {}
    for name in ("never", "always"):
        matches = match(getattr(policy, name), working_set.components)
        found[name] = matches.names
        if not working_set.components:
            continue  # nothing is known about the run yet, so nothing is known to be wrong
        for entry, near in matches.unmatched:
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {_some(working_set)}"
            text = f"{name}: {entry!r} matches no component of this run; {hint}"
            notes.notices.append(text)
            # Attributed to whoever called OffloadPolicy.resolve.
            warnings.warn(text, OffloadPolicyWarning, stacklevel=4)
    both = found["never"] & found["always"]
    if both:
        notes.notices.append(f"never and always both name {', '.join(sorted(both))}: never wins")
    notes.sources["never"] = "user" if policy.never else "default"
    notes.sources["always"] = "user" if policy.always else "default"
    return _Lists(found["never"], found["always"] - found["never"])


def _some(working_set: WorkingSet) -> str:
    names = [component.name for component in working_set.components]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _with_profile_never(
    policy: OffloadPolicy,
    profile: Profile,
    mode: OffloadMode,
    lists: _Lists,
    working_set: WorkingSet,
    notes: _Notes,
) -> _Lists:
    """Add the profile's never list where it applies: in balanced, and only if the user wrote none."""
    if mode is not OffloadMode.BALANCED or policy.never or not profile.never:
        return lists
    notes.sources["never"] = "profile"
    # What the user wants evicted is not pinned by a profile. Entries that match nothing are the profile's affair.
    return _Lists(match(profile.never, working_set.components).names - lists.always, lists.always)


def _pass_through(policy: OffloadPolicy, notes: _Notes) -> None:
    defaults = OffloadPolicy()
    for name in ("before_decode", "on_oom", "fit_aware", "use_core_dynamic"):
        notes.sources[name] = "user" if getattr(policy, name) != getattr(defaults, name) else "default"
    notes.sources["vae_tiling"] = "user" if policy.vae_tiling != "auto" else "profile"


def _pinned(policy: OffloadPolicy, machine: Machine, notes: _Notes) -> int:
    read = read_size("pinned_ram", policy.pinned_ram)
    notes.sources["pinned_ram"] = "default" if read.kind is SizeKind.AUTO else "user"
    host = RamInfo(machine.ram_total, None, machine.ram_limit, None, None)
    budget = pinned_budget(policy.pinned_ram, host, memlock=machine.memlock, os=machine.os)
    if budget is None:
        notes.notices.append("the size of RAM is unknown, so nothing is pinned; write pinned_ram in bytes to pin")
        return 0
    unlocked = pinned_budget(policy.pinned_ram, host, os=machine.os)
    if unlocked is not None and budget < unlocked:
        notes.notices.append(f"pinned_ram: memlock allows {format_size(budget)} of {format_size(unlocked)}")
    elif read.kind is SizeKind.BYTES and budget < int(read.amount):
        notes.notices.append(
            f"pinned_ram: {policy.pinned_ram} is more RAM than there is, {format_size(budget)} is used"
        )
    return budget


def _warn_of_shortage(
    machine: Machine, working_set: WorkingSet, mode: OffloadMode, lists: _Lists, fit: _Fit, notes: _Notes
) -> None:
    """Say beforehand what will run out of memory; the policy stands as asked."""
    available = format_size(fit.available)
    if mode is OffloadMode.NONE and not fit.fits:
        need = format_size(fit.weights + fit.activations)
        notes.notices.append(f"mode none does not fit: the run needs {need}, {available} are available")
    if mode is OffloadMode.MODEL:
        largest = _largest_over(working_set, fit.available)
        if largest is not None:
            notes.notices.append(
                f"mode model holds a component whole: {largest.name} ({format_size(largest.weight_bytes)}) is over "
                f"the {available} available"
            )
    pinned_down = sum(c.weight_bytes for c in working_set.components if c.name in lists.never)
    if mode is not OffloadMode.NONE and lists.never and pinned_down + fit.activations > fit.available:
        notes.notices.append(
            f"never holds {format_size(pinned_down)} of the {available} available, which leaves no room for activations"
        )


def _shares_memory(machine: Machine) -> bool:
    return machine.shared_memory or machine.kind == "mps"


def _sentence(
    policy: OffloadPolicy,
    machine: Machine,
    profile: Profile,
    mode: OffloadMode,
    high: int | None,
    fit: _Fit,
    asks: list[str],
    source: str,
) -> str:
    """One sentence: the mode, the figures of the fit rule, and why."""
    figures = (
        f"the run needs {format_size(fit.weights + fit.activations)} ({format_size(fit.weights)} weights + "
        f"{format_size(fit.activations)} activations, {fit.activation_words}) and {format_size(fit.available)} of "
        f"{format_size(machine.vram_total)} are available"
    )
    verdict = "fits" if fit.fits else "does not fit"
    cap = f"; one component may hold {format_size(high)}" if high is not None and mode is not OffloadMode.NONE else ""
    if source == "device":
        why = f"{machine.name} shares its memory with the host, so offloading would free nothing; {figures}"
    elif source == "fit":
        why = f"{figures}, so it fits and everything stays resident"
    elif policy.mode is not OffloadMode.AUTO:
        why = f"as asked; {figures}, so it {verdict}{cap}"
    elif source == "user":
        why = f"{figures}, so it fits, but you asked for {' and '.join(asks)}{cap}"
    elif not policy.fit_aware:
        why = f"{figures}; the fit rule is off and profile {profile.name} applies as {profile.reason}{cap}"
    else:
        why = f"{figures}, so it does not fit and profile {profile.name} applies as {profile.reason}{cap}"
    return f"{mode.value}: {why}."
