"""What the pipelines of one session hold in common. Invariant: a component stays while one pipeline still uses it.

Pipelines share models (img2img after txt2img). Each attached pipeline counts the components that it uses; the last one
that leaves gives the module back. Components that somebody else added to the session are never taken from it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from ..policy import always_resident
from ..session import Session
from ..units import ComponentError
from .guards import ExecutionDevice
from .parts import Part, has_data, tensors_of
from .tiling import Tiling

_SESSIONS: WeakKeyDictionary[Session, Attachments] = WeakKeyDictionary()
_OWNERS: WeakKeyDictionary[nn.Module, ref[Session]] = WeakKeyDictionary()


def attachments_of(session: Session) -> Attachments:
    """The one object of this kind that belongs to `session`. It must not refer to the session."""
    found = _SESSIONS.get(session)
    if found is None:
        found = _SESSIONS[session] = Attachments()
    return found


class Attachments:
    """Counts of use, execution-device hooks, tiling and the runs that direct calls open, for one session."""

    def __init__(self) -> None:
        self.tiling = Tiling()
        self.pipelines = 0
        self.owner: Any = None  # the offloaded pipeline whose call began last
        self._users: Counter[str] = Counter()
        self._foreign: set[str] = set()  # components that were in the session before a pipeline used them
        self._hooked: Counter[nn.Module] = Counter()
        self._auto_runs = False
        self._tile: Any = None

    # ------------------------------------------------------------------ a pipeline comes and goes
    def enter(self, session: Session) -> None:
        """One more pipeline: direct calls open runs, and the step down may tile."""
        if not self.pipelines:
            self._auto_runs, self._tile = session.auto_runs, session.step_down.tile
            session.auto_runs = True
            session.step_down.tile = _Tile(self, session)
        self.pipelines += 1

    def leave(self, session: Session) -> None:
        """One pipeline less; behind the last one the session is as it was."""
        self.pipelines -= 1
        if not self.pipelines:
            session.auto_runs, session.step_down.tile = self._auto_runs, self._tile
            self.tiling.all_off()
            self.owner = None

    # ------------------------------------------------------------------ components
    def add(self, session: Session, part: Part) -> str | None:
        """Use a component; its name in the session, or None where it is a part of a component there.

        Raises:
            ComponentError: another session holds the module, or a part of it is a component here already.
        """
        for module in part.module.modules():
            holder = _OWNERS.get(module)
            other = holder() if holder is not None else None
            if other is not None and other is not session:
                raise ComponentError(
                    f"component '{part.name}' is managed by another session already. Pass `session=` of the pipeline "
                    "that has it, so that both share one copy, or call `detach()` on that one first."
                )
        for name, known in session.components.items():
            if known.module is part.module:
                if not self._users[name]:
                    self._foreign.add(name)
                self._users[name] += 1
                return name
        theirs = {id(m): name for name, known in session.components.items() for m in known.module.modules()}
        if id(part.module) in theirs:
            return None  # its owner's hooks take the calls
        _refuse_overlap(session, part)
        name = _free_name(part.name, session)
        session.add(name, part.module, role=part.role, entries=part.entries)
        self._users[name] += 1
        _OWNERS[part.module] = ref(session)
        return name

    def drop(self, session: Session, name: str) -> None:
        """Stop to use a component; the last user gives it back."""
        self._users[name] -= 1
        if self._users[name] > 0:
            return
        del self._users[name]
        self.tiling.off(name)
        if name in self._foreign:
            self._foreign.discard(name)
            return
        managed = session.components.get(name)
        if managed is not None:
            _OWNERS.pop(managed.module, None)
            session.remove(name)

    # ------------------------------------------------------------------ what follows from the policy
    def hook(self, module: nn.Module) -> None:
        """A pipeline asks this module where it runs."""
        self._hooked[module] += 1

    def unhook(self, module: nn.Module) -> None:
        """It no longer does."""
        self._hooked[module] -= 1
        if self._hooked[module] <= 0:
            del self._hooked[module]
            _take_hook(module)

    def sync(self, session: Session) -> None:
        """Bring execution-device hooks and tiling in line with the policy."""
        device = session.backend.device
        wanted = not always_resident(session.resolved) and device.type != "cpu"
        for module in self._hooked:
            if not wanted:
                _take_hook(module)
            elif "_hf_hook" not in module.__dict__:
                module.__dict__["_hf_hook"] = ExecutionDevice(device)
        if session.resolved.vae_tiling == "on":
            for name in self._users:
                self.tile(session, name)

    def tile(self, session: Session, name: str) -> bool:
        """Switch the VAE `name` to tiles, where it is one; whether that changed anything."""
        managed = session.components.get(name)
        return managed is not None and managed.role == "vae" and self.tiling.on(name, managed.module)


class _Tile:
    """What the session's step down calls; it dies with the session."""

    def __init__(self, attachments: Attachments, session: Session) -> None:
        self._attachments, self._session = attachments, ref(session)

    def __call__(self, name: str) -> bool:
        session = self._session()
        return session is not None and self._attachments.tile(session, name)


def _take_hook(module: nn.Module) -> None:
    if isinstance(module.__dict__.get("_hf_hook"), ExecutionDevice):
        del module.__dict__["_hf_hook"]


def _free_name(name: str, session: Session) -> str:
    """`name`, or with a number behind it where another module of the session has it."""
    number, free = 2, name
    while free in session.components:
        free, number = f"{name}:{number}", number + 1
    return free


def _refuse_overlap(session: Session, part: Part) -> None:
    mine = {id(tensor) for tensor in tensors_of(part.module) if has_data(tensor)}
    for name, known in session.components.items():
        if any(id(ref.tensor) in mine for storage in known.component.storages for ref in storage.refs):
            raise ComponentError(
                f"component '{part.name}' contains weights of '{name}', which this session manages apart. "
                "Detach the pipeline that has it and attach this one first: the part then goes with the whole."
            )
