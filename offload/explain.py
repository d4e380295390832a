"""A plan in one sentence. Invariant: every figure in it is the plan's own, in one unit, rounded once."""

from __future__ import annotations

from .schedule import StepTime
from .sizes import GIB, KIB, MIB, format_size

HAIR = 0.01  # relative: times that read the same


def plan_sentence(
    name: str,
    needs: int,
    budget: int | None,
    activations: int | None,
    keeps: int,
    streams: int,
    ring: int,
    step: StepTime | None,
) -> str:
    """What a plan does and why, for people: sizes in bytes, None where not known.

    For example "unet: needs 22.2 GiB, 13.7 free after 2.0 for activations: keeps 13.1, streams 9.1 through 0.5;
    predicted 0.78 it/s = compute bound".
    """
    unit = next((u for u in (GIB, MIB, KIB) if needs >= u), 1)

    def short(nbytes: int) -> str:
        if 0 < nbytes < unit / 20:
            return format_size(nbytes)
        return f"{nbytes / unit:.1f}" if unit > 1 else str(nbytes)

    free = ""
    if budget is not None:
        free = f", {short(max(budget, 0))} free"
        if activations is not None:
            free += f" after {short(activations)} for activations"
    keeping = f"keeps {short(keeps)}, " if keeps else ""
    text = f"{name}: needs {format_size(needs)}{free}: {keeping}streams {short(streams)} through {short(ring)}"
    return text if step is None else f"{text}; {predicted(step)}"


def predicted(step: StepTime) -> str:
    """A predicted step for people: "predicted 0.78 it/s = compute bound"."""
    if step.step_s <= 0.0:
        return "predicted no time at all"
    rate = f"predicted {1 / step.step_s:.3g} it/s"
    if step.step_s <= step.compute_s * (1 + HAIR):
        return f"{rate} = compute bound"
    if step.step_s <= step.bound_s * (1 + HAIR):
        return f"{rate} = transfer bound"
    return f"{rate}, {step.step_s / step.bound_s - 1:.1%} over the bound" if step.bound_s > 0 else rate
