"""Invariant: a policy is what the user wrote, validated and never rewritten; what it means here is a ResolvedPolicy.

Sizes stay as written ("60%"), so that a workflow shared between two cards means the same share on both. Every wrong
value is a ValueError that names the field, what was given and what is allowed. Resolving is a pure function of the
policy, the machine and the working set; it lives in `resolve.py`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Literal

from .sizes import Size, SizeKind, bad_value, read_size

SCHEMA = "offload-policy/1"

Role = Literal["denoiser", "text_encoder", "vae", "controlnet", "other"]
ActivationSource = Literal["learned", "estimated", "headroom"]


class OffloadMode(str, Enum):
    """How the weights of a run share the accelerator."""

    AUTO = "auto"
    NONE = "none"
    BALANCED = "balanced"
    MODEL = "model"
    SEQUENTIAL = "sequential"


class OffloadPolicyWarning(UserWarning):
    """A policy that is valid but does not do what its writer probably meant."""


CHOICES: dict[str, tuple[str, ...]] = {
    "vae_tiling": ("auto", "on", "off"),
    "before_decode": ("fit", "free_all", "keep"),
    "on_oom": ("step_down", "stop"),
    "use_core_dynamic": ("auto", "follow", "bypass"),
}


@dataclass(frozen=True)
class OffloadPolicy:
    """What the user wants. Sizes and the list entries are kept as written; lists become tuples, `mode` the enum.

    mode: auto, none, balanced, model or sequential (text is taken in any case).
    high: the most that one component's weights may occupy. Caps even a run that fits.
    low: under it nothing is offloaded. A user's 0 means: always evict at a stage change.
    never, always: class names, component names or aliases; a list, or text split at commas, semicolons and spaces.
    headroom: room held for activations while their peak is not learned.
    reserve: room left to other programs.
    pinned_ram: page-locked memory for CPU masters; a share is a share of RAM.
    gc_threshold: used / available above which cached blocks return to the driver; "profile" takes the profile's.
    prefetch: bytes of the ring that streamed units pass through.
    fit_aware: False keeps SD.Next's rule (percent in use > low evicts), for comparison.

    Raises ValueError (field, given, allowed, remedy) on any value outside the table in interfaces.md.
    """

    mode: OffloadMode = OffloadMode.AUTO
    high: Size = "auto"
    low: Size = "auto"
    never: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    vae_tiling: str = "auto"
    before_decode: str = "fit"
    on_oom: str = "step_down"
    headroom: Size = "auto"
    reserve: Size = 0
    pinned_ram: Size = "auto"
    gc_threshold: float | str | None = "profile"
    prefetch: Size = "auto"
    fit_aware: bool = True
    use_core_dynamic: str = "auto"

    def __post_init__(self) -> None:
        _set(self, "mode", _read_mode(self.mode))
        high = read_size("high", self.high)
        low = read_size("low", self.low)
        read_size("headroom", self.headroom)
        read_size("reserve", self.reserve, auto=False)
        read_size("pinned_ram", self.pinned_ram)
        read_size("prefetch", self.prefetch, share=False)
        if high.kind is low.kind and high.kind is not SizeKind.AUTO and low.amount > high.amount:
            raise bad_value(
                "low", self.low, f"at most high, which is {self.high!r}", "lower low, raise high, or leave one on auto"
            )
        _set(self, "never", _read_names("never", self.never))
        _set(self, "always", _read_names("always", self.always))
        for field in CHOICES:
            _set(self, field, _read_choice(field, getattr(self, field)))
        read_gc_threshold(self.gc_threshold)
        if not isinstance(self.fit_aware, bool):
            raise bad_value("fit_aware", self.fit_aware, "true or false", "leave it out for true")

    def to_json(self) -> dict[str, Any]:
        """The document `offload-policy/1`: every field as written; JSON types only."""
        document: dict[str, Any] = {"schema": SCHEMA}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, OffloadMode):
                value = value.value
            document[field.name] = list(value) if isinstance(value, tuple) else value
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any] | str) -> OffloadPolicy:
        """Read `offload-policy/1` from a mapping or from text; fields that are left out take their default.

        Raises ValueError for text that is no JSON, another schema, an unknown field (naming near ones), a bad value.
        """
        if isinstance(document, str):
            try:
                document = json.loads(document)
            except (ValueError, RecursionError) as error:  # the latter for brackets nested without end
                raise ValueError(f"policy: not JSON ({error}); allowed: one {SCHEMA} object") from error
        if not isinstance(document, Mapping):
            raise bad_value("policy", document, f"one {SCHEMA} object", "write { ... } around the fields")
        if document.get("schema") != SCHEMA:
            raise bad_value("schema", document.get("schema"), repr(SCHEMA), f'add "schema": "{SCHEMA}"')
        known = [field.name for field in fields(cls)]
        for key in document:
            if key != "schema" and key not in known:
                near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else "remove it"
                raise bad_value("policy field", key, ", ".join(known), hint)
        return cls(**{key: value for key, value in document.items() if key != "schema"})

    def resolve(self, machine: Machine, working_set: WorkingSet) -> ResolvedPolicy:
        """What this policy means on `machine` for `working_set`. Pure; under 10 ms for 2,000 components.

        Warns OffloadPolicyWarning for a list entry that matches no component.
        """
        from .resolve import resolve  # resolve.py needs the types of this file

        return resolve(self, machine, working_set)


@dataclass(frozen=True)
class Machine:
    """One accelerator and its host, in bytes; None where unknown or unlimited, never 0 for "could not find out".

    others: what programs other than us hold on the card. ram_limit: the smallest cgroup limit. memlock: the
    page-locking limit that binds this backend. os: "Linux", "Darwin" or "Windows", as platform.system() says.
    """

    name: str
    kind: str
    vram_total: int
    vram_free: int | None = None
    others: int | None = None
    ram_total: int | None = None
    ram_limit: int | None = None
    memlock: int | None = None
    shared_memory: bool = False
    os: str = "Linux"


@dataclass(frozen=True)
class ComponentInfo:
    """One component of a run as the policy sees it; `weight_bytes` counts each storage once (ties once)."""

    name: str
    class_name: str
    role: Role
    weight_bytes: int


@dataclass(frozen=True)
class WorkingSet:
    """All components of one run and the largest activation peak among its stages, in bytes."""

    components: tuple[ComponentInfo, ...]
    activation_peak: int = 0
    activation_source: ActivationSource = "estimated"

    @property
    def weight_bytes(self) -> int:
        return sum(component.weight_bytes for component in self.components)


@dataclass(frozen=True)
class ResolvedPolicy:
    """A policy in bytes on one machine for one working set; every value with its source, the whole in one sentence.

    mode: never AUTO. high: None means that no mark caps a component. low_always: a user's 0, always evict at a stage
    change. never, always: component names, disjoint. headroom: the user's bytes, None for "learned or estimated";
    activation_peak: what the fit rule counted. prefetch: None for "the planner decides". fits: by the fit rule alone,
    whatever the mode. available: card total - others - reserve. sources: field -> user, profile, fit, learned,
    default or device.
    """

    mode: OffloadMode
    high: int | None
    low: int
    low_always: bool
    never: frozenset[str]
    always: frozenset[str]
    vae_tiling: str
    before_decode: str
    on_oom: str
    headroom: int | None
    reserve: int
    pinned_ram: int
    gc_threshold: float
    prefetch: int | None
    fit_aware: bool
    fits: bool
    available: int
    profile: str
    sources: dict[str, str]
    notices: tuple[str, ...]
    sentence: str
    use_core_dynamic: str = "auto"
    weight_bytes: int = 0
    activation_peak: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON types only, for the report's `resolved`; names sorted so that equal policies print equally."""
        document: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, OffloadMode):
                value = value.value
            elif isinstance(value, frozenset):
                value = sorted(value)
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, dict):
                value = dict(value)
            document[field.name] = value
        return document


def read_gc_threshold(value: object) -> float | None:
    """The threshold as a fraction of 1, None for the profile's. ValueError outside 0..1 (or 0%..100%)."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("profile", "auto")):
        return None
    allowed = 'a number from 0 to 1, a percentage ("70%") or "profile"'
    if isinstance(value, int) and not isinstance(value, bool):
        if value in (0, 1):
            return float(value)
        raise bad_value("gc_threshold", value, allowed, "0 flushes at every stage change, 1 never")
    if isinstance(value, str) and value.strip() in ("0", "1"):
        return float(value)
    try:
        read = read_size("gc_threshold", value, auto=False)
    except ValueError as error:
        raise bad_value("gc_threshold", value, allowed, "0 flushes at every stage change, 1 never") from error
    if read.kind is not SizeKind.SHARE:
        raise bad_value("gc_threshold", value, allowed, "it is a share, not a size")
    return float(read.amount)


def _set(policy: OffloadPolicy, field: str, value: object) -> None:
    object.__setattr__(policy, field, value)  # frozen for everyone else


def _read_mode(value: object) -> OffloadMode:
    if isinstance(value, OffloadMode):
        return value
    names = [mode.value for mode in OffloadMode]
    if isinstance(value, str) and value.strip().lower() in names:
        return OffloadMode(value.strip().lower())
    raise bad_value("mode", value, ", ".join(names), _did_you_mean(value, names))


def _read_choice(field: str, value: object) -> str:
    allowed = CHOICES[field]
    if isinstance(value, str) and value.strip().lower() in allowed:
        return value.strip().lower()
    raise bad_value(field, value, ", ".join(allowed), _did_you_mean(value, allowed))


def _did_you_mean(value: object, allowed: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(value.lower(), allowed, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f"did you mean {near[0]}?" if near else f"the default is {allowed[0]}"


def _read_names(field: str, value: object) -> tuple[str, ...]:
    allowed = "a list of component names, class names or aliases, or text with commas between them"
    if isinstance(value, str):
        entries: list[object] = list(re.split(r"[,;\s]+", value))
    elif isinstance(value, (list, tuple)):
        entries = list(value)
    else:
        raise bad_value(field, value, allowed, "leave it out for none")
    names: list[str] = []
    for entry in entries:
        if not isinstance(entry, str):
            raise bad_value(field, entry, allowed, "every entry is text")
        if entry.strip() and entry.strip() not in names:
            names.append(entry.strip())
    return tuple(names)


def always_resident(policy: ResolvedPolicy) -> bool:
    """Mode none by the user's word or the device's nature: no hook, no shadowed method, no decision."""
    return policy.mode is OffloadMode.NONE and policy.sources["mode"] != "fit"
