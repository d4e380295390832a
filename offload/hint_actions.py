"""What to change, as fields of a policy. Invariant: an action removes the cause that the ledger named, and what would
take its place; or it is None.

`set` holds the fields as a policy takes them; `always` is text with commas, as its input is. `label` says the same in
the words of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .hint_digest import Digest
from .names import match
from .policy import ComponentInfo

# The names of the inputs of the Offload Policy node.
NAMES = {
    "mode": "Mode",
    "high": "High mark (VRAM)",
    "low": "Low mark (VRAM)",
    "always": "Always offload",
    "vae_tiling": "VAE tiling",
    "before_decode": "Before decode",
    "pinned_ram": "Pinned RAM",
    "fit_aware": "Fit-aware",
    "use_core_dynamic": "Core dynamic VRAM",
}


def action(changes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """{"set", "label"} for a button."""
    if not changes:
        return None
    parts = [_words(field, value) for field, value in changes.items()]
    text = " and ".join(parts)
    return {"set": dict(changes), "label": text[0].upper() + text[1:]}


def _words(field: str, value: Any) -> str:
    name = NAMES.get(field, field)
    if isinstance(value, bool):
        return f"turn {name} {'on' if value else 'off'}"
    return f"set {name} to {value}" if value != "" else f"empty {name}"


def keeping(run: Digest, component: str, reason: str) -> dict[str, Any] | None:
    """The change after which `component` is not evicted for `reason` any more; None where the cause is not known.

    At a stage change the list of always comes first, then a low mark of 0, free_all, SD.Next's rule: the first one
    that applies is noted as the reason, so that without it one behind it evicts in its place, and has to go as well.
    """
    policy, changes = run.policy, dict[str, Any]()
    always_low = run.low_always or _is_zero(policy.get("low"))
    free_all, by_use = policy.get("before_decode") == "free_all", policy.get("fit_aware") is False
    if reason == "always":
        kept = _without(run, component)
        if kept is None or run.mode == "none":  # where nothing else of it applies
            return kept
        changes |= kept
    elif not (always_low or by_use if reason == "low" else free_all and reason == "policy"):
        return None
    if always_low and reason != "policy":
        changes["low"] = "auto"
    if free_all and (always_low or reason != "low"):
        changes["before_decode"] = "fit"
    if by_use:
        changes["fit_aware"] = True
    return changes


def _is_zero(low: object) -> bool:
    return not isinstance(low, bool) and (
        low == 0 or (isinstance(low, str) and low.strip().rstrip("%") in ("0", "0.0"))
    )


def _without(run: Digest, component: str) -> dict[str, Any] | None:
    """`always` less the entries that name the component."""
    always = run.policy.get("always")
    entries = [entry for entry in always if isinstance(entry, str)] if isinstance(always, (list, tuple)) else []
    class_name, role = run.classes.get(component, ("", "other"))
    info = ComponentInfo(component, class_name, role, 0)  # type: ignore[arg-type]  # an unknown role matches nothing
    kept = [entry for entry in entries if not match([entry], [info]).names]
    return None if len(kept) == len(entries) else {"always": ", ".join(kept)}


def merged(changes: list[dict[str, Any]]) -> dict[str, Any]:
    """One change for several causes. Lists of `always` keep only what each of them keeps."""
    found: dict[str, Any] = {}
    for change in changes:
        if "always" in change and "always" in found:
            kept = [entry for entry in found["always"].split(", ") if entry in change["always"].split(", ")]
            change = {**change, "always": ", ".join(kept)}
        found |= change
    return found
