"""A diffusers pipeline under a policy. Invariant: after `detach` pipeline and models are as they were before.

    handle = offload(pipe, OffloadPolicy(high="60%"))
    image = handle("a lighthouse").images[0]
    print(handle.report()["resolved"]["sentence"])
    handle.detach()

Nothing of diffusers is patched: what we need sits on this pipeline's own instance and on its modules.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ..ledger import RunRecord
from ..policy import OffloadPolicy, always_resident
from ..session import Session
from ..summary import line
from .attachments import attachments_of
from .facts import NO_RUN, NOT_RECORDED, RunFacts, collect, unrecorded
from .guards import check_part, check_pipeline, refusals
from .hinting import Advice
from .loading import ModelFileError, load_pipeline
from .parts import modules_of, parts_of

__all__ = ["ModelFileError", "OffloadedPipeline", "UnfinishedRunError", "load_pipeline", "offload"]

_ABSENT = object()
_MARK = "_balanced_offload"
# Calls of the pipeline that take every `_hf_hook` off, or change what a model consists of.
_CHANGES = (
    "remove_all_hooks",
    "load_textual_inversion",
    "load_ip_adapter",
    "unload_ip_adapter",
    "load_lora_weights",
    "unload_lora_weights",
    "fuse_lora",
    "unfuse_lora",
    "set_adapters",
    "delete_adapters",
)


class UnfinishedRunError(RuntimeError):
    """A direct call of the pipeline ended between two models, by an error that no model saw."""


def offload(
    pipe: Any,
    policy: OffloadPolicy | None = None,
    *,
    device: str | torch.device | None = None,
    session: Session | None = None,
) -> OffloadedPipeline:
    """Place the models of a diffusers pipeline by `policy`; the pipeline itself is used as before.

    Args:
        pipe: any DiffusionPipeline, its models on the CPU or on the accelerator.
        policy: what the user wants; with `session` None keeps the session's.
        device: a torch device or its name; None takes the current accelerator. "cpu" runs all from system memory.
        session: of a pipeline that is attached already: models that both have stay one component.

    Raises:
        NoAcceleratorError: (a RuntimeError) no device was named and there is no accelerator.
        TypeError: not a diffusers pipeline.
        ComponentError: (a ValueError) a model whose weights cannot be placed.
        ValueError: a device map, another offloader, or a device other than the session's.
        RuntimeError: attached already.
        torch.OutOfMemoryError: mode none, and it does not fit.
    Whatever is raised, pipeline and models are as they were.
    """
    check_pipeline(pipe)
    if _MARK in pipe.__dict__:
        raise RuntimeError("This pipeline is offloaded already. Set the policy of that one, or call `detach()` first.")
    for part in parts_of(pipe):
        check_part(part)
    if session is None:
        session = Session(policy, device=device)
        policy = None
    elif device is not None and _other_device(session, torch.device(device)):
        raise ValueError(f"device: got {device}, allowed is the session's {session.backend.device}, or none")
    return OffloadedPipeline(pipe, session, policy)


def _other_device(session: Session, device: torch.device) -> bool:
    mine = session.backend.device
    return device.type != mine.type or device.index not in (None, mine.index)


class OffloadedPipeline:
    """A pipeline that is attached to a session. Made by `offload`; a context manager that detaches.

    pipe: the pipeline, to be called directly as well. session: what places its models.
    """

    def __init__(self, pipe: Any, session: Session, policy: OffloadPolicy | None = None) -> None:
        self.pipe = pipe
        self.session = session
        self._shared = attachments_of(session)
        self._facts: RunFacts | None = None
        self._advice = Advice()
        self._seen: RunRecord | None = session.record
        self._recording = 0  # depth of calls of ours in progress
        self._calling = False  # between the first and the last thing that a call of the pipeline does
        self._dtypes: dict[str, torch.dtype | None] = {}  # of the components, when the call began
        with contextlib.ExitStack() as failed, contextlib.ExitStack() as undo:
            if policy is not None:
                failed.callback(setattr, session, "policy", session.policy)
                session.policy = policy
            self._attach(undo)
            failed.pop_all()
            self._undo = undo.pop_all()
        self._attached = True

    def _attach(self, undo: contextlib.ExitStack) -> None:
        session, shared = self.session, self._shared
        shared.enter(session)
        undo.callback(shared.leave, session)
        for part in parts_of(self.pipe):
            name = shared.add(session, part)
            if name is not None:
                undo.callback(shared.drop, session, name)
        for module in modules_of(self.pipe).values():
            shared.hook(module)
            undo.callback(shared.unhook, module)
        for name, value in self._attributes().items():
            undo.callback(_put_back, self.pipe, name, self.pipe.__dict__.get(name, _ABSENT))
            self.pipe.__dict__[name] = value
        shared.sync(session)

    def _attributes(self) -> dict[str, Any]:
        """What sits on the pipeline's instance while it is attached."""
        pipe = self.pipe
        found: dict[str, Any] = {_MARK: True, **refusals(pipe)}
        if hasattr(pipe, "check_inputs"):
            found["check_inputs"] = self._beginning(pipe.check_inputs)
        found["maybe_free_model_hooks"] = _then(pipe.maybe_free_model_hooks, self._end)
        for name in _CHANGES:
            if hasattr(pipe, name):
                found[name] = _then(getattr(pipe, name), self._refresh, before=self._to_masters)
        return found

    # ------------------------------------------------------------------ policy
    @property
    def policy(self) -> OffloadPolicy:
        """What the user wants, as written. Setting it reloads nothing, and holds for every pipeline of the session."""
        return self.session.policy

    @policy.setter
    def policy(self, policy: OffloadPolicy) -> None:
        self._require_attached()
        self.session.policy = policy
        if self.session.resolved.vae_tiling != "on":
            self._shared.tiling.all_off()
        self._shared.sync(self.session)

    # ------------------------------------------------------------------ runs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline as one recorded run; arguments and result are the pipeline's own."""
        self._require_attached()
        self._begin()
        self._recording += 1
        try:
            with self.session.run():
                return self.pipe(*args, **kwargs)
        except BaseException:
            self._cast_back()
            raise
        finally:
            self._recording -= 1
            self._calling = False
            self._keep()

    @property
    def record(self) -> RunRecord | None:
        """What was measured in the last recorded run of this pipeline, None before the first."""
        self._keep()
        return self._facts.record if self._facts is not None else None

    def report(self, *, full: bool = False) -> dict[str, Any]:
        """`offload-report/1` of the last run, a direct call of the pipeline included. `full`: no list is capped."""
        if self.session.ledger.active and not self._calling and not self._recording:
            self._take_over()
            self.session.close_run()  # opened by a call of one of the models by hand
        self._keep()
        facts = self._facts or unrecorded(self.session, NO_RUN, output_neutral=None)
        return facts.report(self.session, full=full)

    def summary(self) -> str:
        """The last run in one line: where the time went, and what it took of VRAM and RAM."""
        return line(self.report())

    def _begin(self) -> None:
        """A call of the pipeline begins: directly (its `check_inputs` runs), or through us."""
        session = self.session
        if not self._recording:
            if session.ledger.active and not any(m.running for m in session.components.values()):
                unfinished = UnfinishedRunError("a call of the pipeline ended between two models")
                session.close_run(unfinished if self._calling else None)
            self._take_over()
            if self._calling:
                self._cast_back()
            self._dtypes = {name: m.component.dtype for name, m in self.session.components.items()}
        self._calling = True
        self._refresh()

    def _cast_back(self) -> None:
        """A call ended by an error: what it had cast for a stage of its own (SDXL's VAE) is as it was before."""
        for name, dtype in self._dtypes.items():
            managed = self.session.components.get(name)
            if managed is not None and dtype is not None and _dtype_of(managed.module) != dtype:
                managed.module.to(dtype)

    def _beginning(self, check_inputs: Callable[..., Any]) -> Callable[..., Any]:
        """The pipeline's `check_inputs`, which its call runs first."""

        @functools.wraps(check_inputs)
        def begin(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            if not self._recording and always_resident(self.session.resolved):
                self.session.open_run()  # elsewhere the first model opens it; in mode none nothing of ours is there
            try:
                return check_inputs(*args, **kwargs)
            except BaseException as error:
                if not self._recording:
                    self._calling = False
                    self.session.close_run(error)
                raise

        return begin

    def _take_over(self) -> None:
        """The run that comes, or is open, is this pipeline's; another one keeps what it has."""
        shared = self._shared
        if shared.owner is not None:
            shared.owner._keep()
        shared.owner = self
        self._seen = self.session.record

    def _end(self) -> None:
        """A call of the pipeline ends: diffusers calls `maybe_free_model_hooks` last."""
        if self._recording:
            return
        session = self.session
        self._calling = False
        if session.ledger.active:
            if self._shared.owner is not self:  # a pipeline without check_inputs
                self._take_over()
            session.close_run()
            self._keep()
        elif always_resident(session.resolved):
            self._facts = unrecorded(session, NOT_RECORDED, output_neutral=self._neutral)

    def _keep(self) -> None:
        """Take over the figures of a run of this pipeline that has ended since."""
        session = self.session
        record = session.record
        if self._shared.owner is self and record is not None and record is not self._seen:
            self._seen = record
            self._facts = collect(session, record, output_neutral=self._neutral).advised(session, self._advice)

    @property
    def _neutral(self) -> bool:
        return not self._shared.tiling.active

    def _to_masters(self) -> None:
        """Weights are about to be edited: let the edit reach the masters, which stay, and not copies that go."""
        self.session.free()

    def _refresh(self) -> None:
        """Find what changed behind our back: a hook taken off, adapters put into a model."""
        for managed in list(self.session.components.values()):
            refs = (ref for storage in managed.component.storages for ref in storage.refs if not ref.is_buffer)
            # buffers aside: some models put new ones in their place whenever they run
            if {id(ref.tensor) for ref in refs} != {id(p) for p in managed.module.parameters() if p.numel()}:
                self.session.refresh(managed.name)
        self._shared.sync(self.session)

    # ------------------------------------------------------------------ the end
    def detach(self) -> None:
        """Take everything off: pipeline and models as they were, models that no other pipeline uses given back.

        Raises:
            RuntimeError: in the middle of a call.
        """
        if not self._attached:
            return
        if any(managed.running for managed in self.session.components.values()):
            raise RuntimeError("detach: the pipeline is running. Call it after the run has ended.")
        if self._shared.owner in (self, None) or self._shared.pipelines == 1:
            self.session.close_run()
        self._keep()
        if self._shared.owner is self:
            self._shared.owner = None
        self._attached = False
        self._undo.close()

    def _require_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("This pipeline was detached. Call `offload(pipe, ...)` to attach it again.")

    def __enter__(self) -> OffloadedPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _dtype_of(module: torch.nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), None)


def _put_back(pipe: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        pipe.__dict__.pop(name, None)
    else:
        pipe.__dict__[name] = value


def _then(
    method: Callable[..., Any], after: Callable[[], None], *, before: Callable[[], None] | None = None
) -> Callable[..., Any]:
    """`method` with something done behind it, after errors too, and something before it."""

    @functools.wraps(method)
    def then(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        try:
            return method(*args, **kwargs)
        finally:
            after()

    return then
