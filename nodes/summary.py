"""Invariant: the sentence says what the policy resolves to on this machine, whether a run fits or not."""

from __future__ import annotations

from dataclasses import replace

from ..offload.adapters.comfyui_host import host_device
from ..offload.backend import NoAcceleratorError, open_backend
from ..offload.memory import machine
from ..offload.policy import ComponentInfo, Machine, OffloadPolicy, ResolvedPolicy, WorkingSet
from ..offload.sizes import bad_value, format_size, read_size

NO_ACCELERATOR = "No accelerator was found: everything runs from system memory and nothing is moved."


def describe_here(policy: OffloadPolicy) -> str:
    """`describe` for the device on which the host computes, or that there is no accelerator."""
    here = _here()
    return NO_ACCELERATOR if here is None else describe(policy, here)


def _here() -> Machine | None:
    """The machine with the host's device, None where that is no accelerator."""
    global _known
    device = host_device()
    if device is not None and device.type == "cpu":
        return None
    try:
        _known = machine(open_backend(device))
    except NoAcceleratorError:
        return None
    return _known


_known: Machine | None = None


def last_known() -> Machine | None:
    """The machine as it was last asked about; asks nobody."""
    return _known


def cannot_hold(policy: OffloadPolicy, here: Machine | None = None) -> str | None:
    """Why no run can hold `policy` on this machine, with the field and the remedy; None where one could."""
    here = here or _here()
    if here is None:
        return None
    total = here.vram_total
    reserve = read_size("reserve", policy.reserve, auto=False).to_bytes("reserve", total) or 0
    if reserve >= total:
        allowed = f"less than the {format_size(total)} of {here.name}"
        return str(bad_value("reserve", policy.reserve, allowed, "lower it: nothing would be left for a model"))
    headroom = read_size("headroom", policy.headroom).to_bytes("headroom", total) or 0
    if headroom and reserve + headroom >= total:
        allowed = f"less than the {format_size(total - reserve)} of {here.name} that reserve leaves"
        return str(bad_value("headroom", policy.headroom, allowed, "lower it, or write auto"))
    return None


def describe(policy: OffloadPolicy, here: Machine) -> str:
    """One sentence. Which models will run is not known yet: an empty run and one larger than the card stand for all."""
    # The lists name components of a run; without one they would only raise warnings about names that match nothing.
    bare = replace(policy, never=(), always=())
    fitting, larger = bare.resolve(here, WorkingSet(())), bare.resolve(here, over_sized(here))
    card = f"On {here.name} ({format_size(here.vram_total)})"
    if fitting.mode is larger.mode:
        return f"{card}: {_terms(larger)}."
    return f"{card}: {_terms(fitting)} while the run fits, else {_terms(larger)}."


def over_sized(here: Machine) -> WorkingSet:
    """A run that does not fit, whatever the policy."""
    return WorkingSet((ComponentInfo("model", "model", "denoiser", weight_bytes=here.vram_total + 1),))


def _terms(resolved: ResolvedPolicy) -> str:
    """Mode and marks, as far as the mode uses them."""
    marks = []
    if resolved.mode.value == "balanced":
        if resolved.high is not None:
            marks.append(f"high {format_size(resolved.high)}")
        marks.append("always evict at a stage change" if resolved.low_always else f"low {format_size(resolved.low)}")
    if resolved.sources.get("mode") == "profile":
        marks.append(f"profile {resolved.profile}")
    return f"{resolved.mode.value} ({', '.join(marks)})" if marks else resolved.mode.value
