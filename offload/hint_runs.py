"""Hints about whole runs. Invariant: as in `hint_rules.py`, whose words and measures these are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .hint_actions import action
from .hint_digest import Digest, Stage, StepDown, short
from .hint_fit import decodes, everything_fits, spare
from .hint_rules import NOTHING, Found, Hint, alike, latest, same_run, worth
from .summary import seconds, size

# ---------------------------------------------------------------------- NO_OFFLOAD_FASTER


def no_offload_faster(now: Digest, before: Sequence[Digest]) -> Found:
    """The user's mode, or mark, moves weights though everything fits."""
    last = latest(now, before)
    changes = _to_auto(now)
    if last is None or changes is None or not (everything_fits(now) and everything_fits(last)):
        return NOTHING
    if now.blocked_s is None or last.blocked_s is None:
        return NOTHING
    saved = min(now.blocked_s, last.blocked_s)
    if not worth(saved, now):
        return NOTHING
    what = f"a high mark of {size(now.high)}" if now.mode == "balanced" else f"mode {now.mode}"
    sentence = (
        f"Everything fits with {size(spare(now))} to spare ({size(now.weights)} of weights and "
        f"{size(now.activations)} of activations in {size(now.available)}), but {what} moved weights in 2 of 2 runs: "
        f"{seconds(saved)} a run."
    )
    return Found(Hint("NO_OFFLOAD_FASTER", sentence, saved, action(changes)))


def _to_auto(run: Digest) -> dict[str, Any] | None:
    """What to change for nothing to move; None where something else in the policy asks for evictions."""
    policy = run.policy
    if run.low_always or policy.get("always") or policy.get("before_decode") == "free_all":
        return None
    largest = max((row.weight for row in run.rows if row.weight is not None), default=0)
    capped = run.sources.get("high") == "user" and run.high is not None and run.high < largest
    asked = policy.get("mode")
    by_mode = asked in ("model", "sequential") and run.mode == asked
    if not by_mode and not (capped and run.mode == "balanced" and asked in ("auto", "balanced")):
        return None
    changes: dict[str, Any] = {} if asked == "auto" else {"mode": "auto"}
    if capped:
        changes["high"] = "auto"
    if policy.get("fit_aware") is False:
        changes["fit_aware"] = True
    return changes


# ---------------------------------------------------------------------- DECODE_PEAK


def decode_peak(now: Digest, before: Sequence[Digest]) -> Found:
    """The decode ran out of memory and was begun again, in both runs."""
    last = latest(now, before)
    if last is None:
        return NOTHING
    tries, earlier = _failed(now), _failed(last)
    if not tries or not earlier:
        return NOTHING
    steps = [step for _, step in tries]
    change = _before_decode(now, steps)
    spared = tries[:1] if change is not None and "before_decode" in change and set(steps) != {"evict"} else tries
    saved = min(sum(took for took, _ in spared), sum(took for took, _ in earlier))
    if not worth(saved, now):
        return NOTHING
    known = [_STEPS.get(step, short(step)) for step in steps if step is not None]
    did = f" (then it was tried with: {', '.join(known)})" if known else ""
    count = "once" if len(tries) == 1 else f"{len(tries)} times"
    sentence = f"The decode ran out of memory {count}{did} and was begun again, in 2 of 2 runs: {seconds(saved)} a run."
    if change is None:
        sentence += " A larger headroom in the policy, or a smaller picture, leaves it the room."
    return Found(Hint("DECODE_PEAK", sentence, saved, action(change)))


_STEPS = {
    "evict": "the other components evicted",
    "shrink": "less of its weights",
    "tile": "tiles",
    "sequential": "its layers one by one",
}


def _failed(run: Digest) -> list[tuple[float, str | None]]:
    """Seconds of each decode that ran out of memory, from its stage's begin, and the step that was taken then."""
    stages, found = decodes(run), []
    for event in sorted(run.step_downs, key=lambda event: event.t):
        stage = next((stage for stage in stages if _within(stage, event)), None)
        if stage is not None and stage.t0 is not None:
            stages.remove(stage)  # a stage fails once: what follows is another
            found.append((event.t - stage.t0, event.step))
    return found


def _within(stage: Stage, event: StepDown) -> bool:
    return stage.t0 is not None and stage.t0 <= event.t and (stage.t1 is None or event.t <= stage.t1)


def _before_decode(run: Digest, steps: Sequence[str | None]) -> dict[str, Any] | None:
    """What would have spared the tries: the steps that the runs went on with, taken beforehand."""
    if "tile" in steps and run.policy.get("vae_tiling", "auto") == "auto":
        return {"vae_tiling": "on"}  # it was tiled anyway
    if steps[0] == "evict" and run.policy.get("before_decode") != "free_all" and run.mode in ("balanced", "none"):
        return {"before_decode": "free_all"}
    return None


# ---------------------------------------------------------------------- CORE_DEFAULT_BEST

_HOSTS = ("dynamic", "observe")  # worlds in which the host places the weights


def core_default_best(now: Digest, before: Sequence[Digest]) -> Found:
    """The host's own way, or mode auto, took less for the same work."""
    last = next((run for run in reversed(before) if alike(now, run) and _same_work(now, run)), None)
    if last is None or now.wall_s is None or last.wall_s is None:
        return NOTHING
    wanted = {"mode": "auto", "use_core_dynamic": "auto"}
    changes = {key: value for key, value in wanted.items() if now.policy.get(key) != value}
    if not changes:
        return NOTHING
    after = {**now.policy, **changes}
    others = [run for run in before if same_run(now, run) and _same_work(now, run)]
    default = [run for run in others if run.policy == after or _hosts_own(run, after)]
    walls = [run.wall_s for run in default if run.wall_s is not None]
    if not default or len(walls) < len(default):
        return NOTHING
    ours, theirs = min(now.wall_s, last.wall_s), max(walls)
    saved = ours - theirs
    if not worth(saved, now):
        return NOTHING
    own = all(run.world in _HOSTS for run in default)
    way = "ComfyUI's own memory management" if own else "mode auto"
    runs = "a run" if len(walls) == 1 else f"each of {len(walls)} runs"
    sentence = (
        f"The same graph took at most {seconds(theirs)} in {runs} under {way}, and at least {seconds(ours)} in two "
        f"runs with this policy: {seconds(saved)} a run."
    )
    return Found(Hint("CORE_DEFAULT_BEST", sentence, saved, action(changes)))


def _same_work(a: Digest, b: Digest) -> bool:
    """Nothing was taken from the host's cache in one that ran in the other."""
    if a.ran is not None or b.ran is not None:
        return a.ran == b.ran
    stages = [stage.name for stage in a.stages]
    return a.world == b.world and bool(stages) and stages == [stage.name for stage in b.stages]


def _hosts_own(run: Digest, after: dict[str, Any]) -> bool:
    """The host paged the models itself, and would under the policy `after`, which asks for nothing beyond its pager."""
    if run.world not in _HOSTS or not run.host_pages:
        return False
    if run.policy and (run.policy.get("mode") != "auto" or run.policy.get("use_core_dynamic") == "bypass"):
        return False
    asks = after.get("always") or after.get("fit_aware") is False or after.get("high") != "auto"
    return not asks and after.get("low") == "auto"
