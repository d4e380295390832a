"""Invariant: what an Offload Policy node means on this card is said by the resolver that the run will go by, and no
device is asked: the machine is as it was last known.

With a session that has models the answer is for these; else for a run larger than the card, since marks count only
there, and the sentence says both.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..offload.adapters import comfyui_host
from ..offload.names import match
from ..offload.policy import Machine, OffloadPolicy, ResolvedPolicy, WorkingSet
from ..offload.session import Session
from .summary import NO_ACCELERATOR, cannot_hold, describe, last_known, over_sized
from .widgets import POLICY_WIDGETS, read_policy

UNKNOWN = "The card is not known yet: run a prompt once."
LONGEST = 2000  # characters of a query
_SWITCHES = {"true": True, "false": False}
_FIGURES = ("total", "available", "high", "low", "low_always", "mode", "fits", "components", "sources", "sentence")


def marks(query: Mapping[str, str], session: Session | None) -> dict[str, Any]:
    """`/offload/marks`: {total, available, high, low, low_always, mode, fits, components, sources, sentence, error}.

    Bytes; null where unknown and where there is no mark. components: the present run's, empty where none is known.
    """
    answer: dict[str, Any] = {**dict.fromkeys(_FIGURES), "components": [], "sources": {}, "sentence": "", "error": None}
    machine = session.machine if session is not None else known_machine()
    try:
        policy = read_query(query)
    except (ValueError, TypeError) as error:
        return answer | {"error": str(error)}
    if machine is None:
        return answer | {"sentence": UNKNOWN}
    if machine.kind == "cpu":
        return answer | {"mode": "none", "sentence": NO_ACCELERATOR}
    answer["total"] = machine.vram_total
    refused = cannot_hold(policy, machine)
    if refused is not None:
        return answer | {"error": refused}
    used = _working_set(session)
    resolved = resolve_here(policy, machine, used, _reserve(session))
    return answer | {
        "available": resolved.available,
        "high": resolved.high,
        "low": resolved.low,
        "low_always": resolved.low_always,
        "mode": resolved.mode.value,
        "fits": resolved.fits if used.components else None,
        "components": [component.name for component in used.components],
        "sources": resolved.sources,
        "sentence": resolved.sentence if used.components else describe(policy, machine),
    }


def read_query(query: Mapping[str, str]) -> OffloadPolicy:
    """The policy that the query spells, by the names and the values of the node's inputs.

    Raises:
        ValueError: as the node's own validation says it, or an input that the node has not.
    """
    values: dict[str, Any] = {}
    kinds = {widget.name: widget.kind for widget in POLICY_WIDGETS}
    for name, text in query.items():
        if name not in kinds:
            raise ValueError(f"{name[:40]!r} is no input of Offload Policy; allowed: {', '.join(kinds)}")
        values[name] = _SWITCHES.get(text.strip().lower(), text) if kinds[name] == "switch" else text
    return read_policy(values)


def resolve_here(policy: OffloadPolicy, machine: Machine, used: WorkingSet, reserve: int) -> ResolvedPolicy:
    """The policy in bytes. used: the present run, or nothing; reserve: what the host's own flags keep free, bytes."""
    if reserve:
        given = policy.resolve(machine, WorkingSet(())).reserve
        policy = replace(policy, reserve=given + reserve)
    # Entries that match nothing would raise warnings, which are the run's to give: another graph may be meant.
    lists = {name: _matching(getattr(policy, name), used) for name in ("never", "always")}
    policy = replace(policy, **lists)  # type: ignore[arg-type]
    return policy.resolve(machine, used if used.components else over_sized(machine))


def _matching(entries: tuple[str, ...], used: WorkingSet) -> tuple[str, ...]:
    strangers = {entry for entry, _ in match(entries, used.components).unmatched}
    return tuple(entry for entry in entries if entry not in strangers)


def _working_set(session: Session | None) -> WorkingSet:
    """The models of the present run; none while the worker changes them, and without a session."""
    if session is not None:
        with contextlib.suppress(RuntimeError):
            return session._working_set()
    return WorkingSet(())


def _reserve(session: Session | None) -> int:
    return comfyui_host.reserve() if session is None else int(getattr(session, "_reserve", 0))


# ---------------------------------------------------------------------- the machine
def known_machine() -> Machine | None:
    """The machine as a policy was last resolved on it; else by the host's own count; None where nobody counted."""
    known = last_known()
    if known is not None:
        return known
    management = sys.modules.get("comfy.model_management")
    total = getattr(management, "total_vram", None)  # MiB
    state = str(getattr(getattr(management, "cpu_state", None), "name", "")).lower()
    if not isinstance(total, (int, float)) or total <= 0:
        return None
    kind = {"cpu": "cpu", "mps": "mps"}.get(state, "cuda")
    return Machine("this card", kind, round(total * 2**20), shared_memory=kind != "cuda")
