"""The host's device and what of the host lives there by us. Invariant: one session per process, and a module is
managed exactly as long as somebody holds a patcher of ours for it.

The session holds modules strongly, the host's caches decide how long a model lives: so patchers hold `Hosted`, and when
the last of them dies its component is taken out of the session at the next safe moment (`sweep`), never from inside the
garbage collector, which may run in the middle of anything.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backend import open_backend
from ..hosting import Freed, HostSession
from ..managed import Managed
from ..policy import OffloadPolicy, Role
from ..sizes import format_size
from ..units import ComponentError
from . import comfyui_host as host
from .comfyui_lora import Patches

ENTRIES: dict[Role, tuple[str, ...]] = {
    "denoiser": ("forward",),
    "text_encoder": ("encode_token_weights", "encode", "generate", "forward"),
    "vae": ("encode", "decode", "forward"),
}


class Marks:
    """What a model of the host carries because of us: weight patches, and that the host counts it as loaded.

    Outlives the `Hosted`, and holds neither it nor the model.
    """

    def __init__(self) -> None:
        self.patching = Patches()
        self._model: weakref.ref[Any] | None = None
        self._home: torch.device | None = None

    def count(self, model: Any, home: torch.device) -> None:
        """The host takes `model` for loaded from here on; its place in RAM is `home`."""
        self._model, self._home = weakref.ref(model), home

    def uncount(self) -> None:
        """The host has taken note that it is not loaded."""
        self._model = None

    def clear(self) -> None:
        """The module is the host's again, and not on the device: have it load the model when it is wanted next."""
        self.patching.remove()
        model = self._model() if self._model is not None else None
        self._model = None
        if model is not None:
            model.device = self._home
            model.model_loaded_weight_memory = 0
            model.current_weight_patches_uuid = None


class Hosted:
    """A module of the host under the device's session, shared by all patchers of ours for it."""

    def __init__(self, module: nn.Module, name: str, role: Role, policy: OffloadPolicy, world: str) -> None:
        self.module = module
        self.name = name
        self.role: Role = role
        self.policy = policy
        self.world = world
        self.entries = ENTRIES.get(role, ("forward",))
        self.asked: set[OffloadPolicy] = set()  # policies under which it was loaded in the run `asked_in`
        self.asked_in: str | None = None
        self.marks = Marks()

    @property
    def managed(self) -> Managed | None:
        """The component, None while the session does not manage it."""
        session = device_session()
        return None if session is None else session.components.get(self.name)

    @property
    def device_bytes(self) -> int:
        """Device bytes of its weights, the ring included."""
        managed = self.managed
        return 0 if managed is None else managed.engine.device_bytes

    def attach(self) -> Managed:
        """Have the session manage it, by its policy.

        Raises:
            ComponentError: weights that cannot be rebound. The module is as it was.
        """
        session = open_device_session()
        sweep()
        managed = session.components.get(self.name)
        if managed is None:
            count_writes(self.module)
            managed = session.host(self.name, self.module, self.policy, role=self.role, entries=self.entries)
        else:
            session.set_policy(self.name, self.policy)
        managed.engine.hold(_asked_for_their_device(managed))
        managed.on_placed = self.marks.patching.placed
        managed.on_foreign = _weakly(self.release) if self.world == "static" else None
        return managed

    def load(self, activations: int | None) -> None:
        """It will run: place it. Raises torch.OutOfMemoryError with the figures."""
        self.attach()
        used_in_this_run(self.name)
        open_device_session().prepare(self.name, activations)

    def evict(self, nbytes: int | None) -> int:
        """Give device memory back; the bytes that came free."""
        session = device_session()
        return 0 if session is None or self.managed is None else session.evict(self.name, nbytes)

    def release(self) -> None:
        """Give the module back to the host, as it was: weights in RAM, no hook, no shadowed method."""
        session = device_session()
        if session is not None and self.name in session.components:
            managed = session.components[self.name]
            managed.on_placed = managed.on_foreign = None
            session.remove(self.name)
        self.marks.clear()


def _asked_for_their_device(managed: Managed) -> set[int]:
    """Units whose weight an older host asks where to compute: the embeddings of its text encoders."""
    asked: set[int] = set()
    for part in managed.module.modules():
        find = getattr(getattr(part, "transformer", None), "get_input_embeddings", None)
        if find is not None and not hasattr(part, "execution_device"):
            embeddings = find()
            asked |= {unit.index for unit in managed.component.units if unit.module is embeddings}
    return asked


def count_writes(module: nn.Module) -> None:
    """Have torch count what is written to the buffers of a model that was loaded in inference mode, as a host does.

    Without a count we would have to bring a buffer down to see whether its model wrote to it. Parameters stay: nobody
    writes to those in a forward.
    """
    known: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_inference() and type(buffer) is torch.Tensor:
                    part._buffers[name] = known.setdefault(id(buffer), buffer.clone())


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """`method`, without keeping its object alive; where that is gone, what it left is swept."""
    found = weakref.WeakMethod(method)

    def call() -> None:
        alive = found()
        if alive is not None:
            alive()
        else:
            sweep()

    return call


_lock = threading.RLock()
_session: HostSession | None = None
_hosted: dict[int, weakref.ref[Hosted]] = {}
_orphans: deque[tuple[int, str, Marks]] = deque()
_restored = False
_runs: deque[tuple[str | None, set[str]]] = deque([(None, set())], maxlen=2)


def device_session() -> HostSession | None:
    """The session of the host's device, None where nothing was attached yet."""
    return _session


def open_device_session() -> HostSession:
    """The session of the host's device; made when it is first asked for."""
    global _session
    with _lock:
        if _session is None:
            backend = open_backend(host.load_device())
            _session = HostSession(backend, reserve=host.reserve(), ask_host=_ask_host)
            _session.in_run = _in_run
        return _session


def close_device_session() -> None:
    """Give everything back and forget the device: for tests, and for a host that changed its device."""
    global _session
    with _lock:
        restore_stock()
        restore_stock(on=False)
        if _session is not None:
            _session.detach()
        _session = None
        _hosted.clear()
        _orphans.clear()


def host_module(module: nn.Module, role: Role, policy: OffloadPolicy, world: str, name: str | None = None) -> Hosted:
    """The `Hosted` of this module; the policy given last is the one that counts."""
    with _lock:
        sweep()
        known = _hosted.get(id(module))
        found = known() if known is not None else None
        if found is None:
            attached = next((m.name for m in _components() if m.module is module), None)
            found = Hosted(module, attached or _free_name(name or role), role, policy, world)
            _hosted[id(module)] = weakref.ref(found)
            if attached is None:  # else somebody else manages it, and will take it out: a pipeline
                weakref.finalize(found, _orphans.append, (id(module), found.name, found.marks)).atexit = False
        found.policy = policy
        return found


def _components() -> list[Managed]:
    return [] if _session is None else list(_session.components.values())


def _free_name(wanted: str) -> str:
    taken = {item.name for item in hosted()} | {name for _, name, _ in _orphans}
    if _session is not None:
        taken |= _session.components.keys()
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def hosted() -> list[Hosted]:
    """What lives in this process by us."""
    return [item for ref in list(_hosted.values()) if (item := ref()) is not None]


def sweep() -> None:
    """Take out of the session what nobody holds any more. Call it between calls of models, never inside one."""
    while _orphans:
        key, name, marks = _orphans.popleft()
        known = _hosted.get(key)
        if known is not None and known() is None:
            del _hosted[key]
        if _session is not None and name in _session.components:
            if _session.components[name].running:  # its last patcher died in its own call: later
                _orphans.append((key, name, marks))
                return
            managed = _session.components[name]
            managed.on_placed = managed.on_foreign = None
            _session.remove(name)
        marks.clear()


def restore_stock(on: bool = True) -> None:
    """Give every module back to the host; until it is switched off again, our patchers load as the host's own do."""
    global _restored
    with _lock:
        sweep()
        if on and not _restored:
            for item in hosted():
                if item.world != "pipeline":
                    item.release()
            from .comfyui_dynamic import release_all

            release_all()
        _restored = on


def restored() -> bool:
    """Whether stock behaviour was asked for."""
    return _restored


# ---------------------------------------------------------------------- runs
def used_in_this_run(name: str) -> None:
    """A component belongs to the run of the prompt that executes now."""
    prompt = host.executing().prompt_id
    if _runs[-1][0] != prompt:
        _runs.append((prompt, set()))
    _runs[-1][1].add(name)


def _in_run(name: str) -> bool:
    """Whether it was used in this prompt or the one before: the fit rule is about these."""
    return any(name in names for _, names in _runs)


# ---------------------------------------------------------------------- memory
def _ask_host(nbytes: int) -> int:
    """Have the host evict models of its own, for a pipeline: none of them is in use then. The bytes that came free."""
    running = [item for item in hosted() if item.managed is not None and item.managed.running]
    if not running or any(item.world != "pipeline" for item in running):
        return 0
    return free_stock_models(nbytes)


def free_stock_models(nbytes: int) -> int:
    """Have the host evict models that are not ours until `nbytes` more are free; the bytes that came free."""
    from .comfyui_static import OffloadModelPatcher

    management, device = host.model_management(), host.load_device()
    before = management.get_free_memory(device)
    ours = [m for m in management.current_loaded_models if isinstance(m.model, OffloadModelPatcher)]
    management.free_memory(before + nbytes, device, keep_loaded=ours)
    return max(0, int(management.get_free_memory(device) - before))


@dataclass(frozen=True)
class FreedHere:
    """What FreeVRAMToFit did. Bytes; `kept` by component."""

    need: int
    freed: int
    kept: tuple[tuple[str, int], ...]
    sentence: str


def free_to_fit(need: int | None) -> FreedHere:
    """Free what is missing to `need` bytes on the host's device, and say what stays.

    None asks for what the next stage wants.
    """
    if host.load_device().type == "cpu":
        return FreedHere(need or 0, 0, (), "This host computes on the CPU: there is no VRAM to free.")
    sweep()
    session = open_device_session()
    done: Freed = session.free_to_fit(need)
    freed = done.freed
    short = done.need - done.have - freed
    if short > 0:
        freed += free_stock_models(short)
    have = done.have + freed
    kept = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in done.kept) or "nothing of this pack"
    asked = "the next stage needs" if need is None else "asked for"
    what = f"Freed {format_size(freed)}" if freed or have < done.need else "Nothing had to go"
    sentence = f"{what}: {asked} {format_size(done.need)}, {format_size(have)} are free. Kept: {kept}."
    if have < done.need:
        sentence += f" {format_size(done.need - have)} are missing: other programs hold the rest."
    return FreedHere(done.need, freed, done.kept, sentence)


def part_patcher(module: nn.Module, name: str, role: Role, policy: OffloadPolicy) -> Any:
    """A heavy part of a pipeline as an entry for the host's list of models, so that each side can evict the other."""
    from .comfyui_static import PartPatcher

    item = host_module(module, role, policy, "pipeline", name)
    return PartPatcher.of(item)


__all__ = [
    "ComponentError",
    "FreedHere",
    "Hosted",
    "close_device_session",
    "count_writes",
    "device_session",
    "free_stock_models",
    "free_to_fit",
    "host_module",
    "hosted",
    "open_device_session",
    "part_patcher",
    "restore_stock",
    "restored",
    "sweep",
    "used_in_this_run",
]
