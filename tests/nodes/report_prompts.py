"""A host's prompts, in small: a queue with its lock, a worker thread that runs each prompt in a loop of its own,
progress for its nodes, /history. Invariant: the recorder sees it in the order in which the real hosts let it see it.

Real: the thread, the loop, the lock, the context variable. Pretended: that a node does anything but what a test gives.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

Work = Callable[[], Any]


class Interrupted(BaseException):
    """As newer hosts raise it: no Exception."""


class Context(NamedTuple):
    prompt_id: str
    node_id: str
    list_index: int | None = None


class Handler:
    def __init__(self, name: str) -> None:
        self.name, self.enabled = name, True


class Registry:
    def __init__(self, prompt_id: str, graph: dict[str, Any]) -> None:
        self.prompt_id = prompt_id
        self.nodes: dict[str, dict[str, Any]] = {}
        self.handlers: dict[str, Any] = {"webui": Handler("webui")}
        self.display: dict[str, str] = {}  # of a node that another one expanded into
        self.dynprompt = SimpleNamespace(
            original_prompt=graph,
            get_node=graph.__getitem__,
            get_display_node_id=lambda node: self.display.get(node, node),
        )

    def tell(self, method: str, node: str, state: str, *rest: Any) -> None:
        self.nodes[node] = {"state": state}
        for handler in self.handlers.values():
            if hasattr(handler, method):
                getattr(handler, method)(node, *rest, self.nodes[node], self.prompt_id)


class Queue:
    def __init__(self) -> None:
        self.mutex = threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self.currently_running: dict[int, Any] = {}
        self.queue: list[Any] = []
        self.history: dict[str, Any] = {}


class FakeServer:
    """What `PromptServer.instance` offers."""

    def __init__(self) -> None:
        self.prompt_queue = Queue()
        self.sockets: dict[str, Any] = {}
        self.sockets_metadata: dict[str, Any] = {}
        self.client_id: str | None = None  # who queued the prompt that runs, or that ran last
        self.sent: list[tuple[str, Any, str | None]] = []
        self.on_prompt_handlers: list[Any] = []
        self.loop = None

    def add_on_prompt_handler(self, handler: Any) -> None:
        self.on_prompt_handlers.append(handler)

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        self.sent.append((event, copy.deepcopy(data), sid))

    def sent_of(self, event: str) -> list[tuple[Any, str | None]]:
        return [(data, sid) for kind, data, sid in list(self.sent) if kind == event]


class Node(NamedTuple):
    """A node of a test's prompt. `work` None: its output is cached."""

    id: str
    type: str
    work: Work | None


class Prompts:
    """The host. `run` gives the /history entry of a prompt."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = FakeServer()
        self.context: contextvars.ContextVar[Context | None] = contextvars.ContextVar("executing", default=None)
        self.output, self.user = folder / "output", folder / "user"
        for path in (self.output, self.user / "default"):
            path.mkdir(parents=True)
        self.progress = ModuleType("comfy_execution.progress")
        self.progress.ProgressHandler, self.progress.global_progress_registry = Handler, None  # type: ignore[attr-defined]
        utils = ModuleType("comfy_execution.utils")
        utils.get_executing_context = self.context.get  # type: ignore[attr-defined]
        made = {
            "server": SimpleNamespace(PromptServer=SimpleNamespace(instance=self.server)),
            "comfy_execution": ModuleType("comfy_execution"),
            "comfy_execution.progress": self.progress,
            "comfy_execution.utils": utils,
            "folder_paths": SimpleNamespace(
                get_output_directory=lambda: str(self.output), get_user_directory=lambda: str(self.user)
            ),
        }
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)
        self._count = itertools.count()

    def run(
        self, *nodes: Node, prompt_id: str | None = None, client: str | None = None, starts: Work | None = None
    ) -> Any:
        """Execute a prompt on a thread of its own and wait. starts: called as its first node's `fingerprint_inputs`."""
        number = next(self._count)
        prompt_id = prompt_id or f"prompt-{number}"
        worker = threading.Thread(target=self._work, args=(number, prompt_id, nodes, client, starts))
        worker.start()
        worker.join(20)
        assert not worker.is_alive(), "the prompt hangs"
        return self.server.prompt_queue.history[prompt_id]

    def step(self, node: str, value: int, most: int) -> None:
        """What a sampler's progress bar says, inside a node's work."""
        self.progress.global_progress_registry.tell("update_handler", node, "running", value, most)

    def announce(self) -> None:
        """As POST /prompt does before it queues anything."""
        for handler in self.server.on_prompt_handlers:
            handler({"prompt": {}})

    def _work(self, number: int, prompt_id: str, nodes: tuple[Node, ...], client: str | None, starts: Any) -> None:
        queue = self.server.prompt_queue
        graph = {node.id: {"class_type": node.type} for node in nodes}
        with queue.mutex:
            queue.currently_running[number] = (number, prompt_id, graph, {"client_id": client} if client else {}, [])
        outputs: dict[str, Any] = {}
        messages: list[Any] = []
        self.server.client_id = client
        asyncio.run(self._execute(prompt_id, nodes, graph, starts, outputs, messages))
        ok = not messages
        with queue.mutex:
            del queue.currently_running[number]
            queue.history[prompt_id] = {
                "prompt": (number, prompt_id, graph),
                "outputs": outputs,
                "status": {"status_str": "success" if ok else "error", "completed": ok, "messages": messages},
            }

    async def _execute(
        self, prompt_id: str, nodes: tuple[Node, ...], graph: Any, starts: Any, outputs: Any, messages: Any
    ) -> None:
        registry = Registry(prompt_id, graph)
        self.progress.global_progress_registry = registry  # type: ignore[attr-defined]
        if starts is not None:
            self._within(prompt_id, nodes[0].id, starts)
        for node in nodes:
            if node.work is None:
                registry.tell("finish_handler", node.id, "finished")
                continue
            await asyncio.sleep(0)
            registry.tell("start_handler", node.id, "running")
            try:
                result = self._within(prompt_id, node.id, node.work)
            except (Exception, Interrupted) as error:
                messages.append(_message(error, node))
                return
            ui = getattr(result, "ui", None)
            if ui is not None:
                outputs[node.id] = {key: list(values) for key, values in ui.items()}  # new lists, the same items
            registry.tell("finish_handler", node.id, "finished")

    def _within(self, prompt_id: str, node: str, work: Work) -> Any:
        token = self.context.set(Context(prompt_id, node))
        try:
            return work()
        finally:
            self.context.reset(token)


def _message(error: BaseException, node: Node) -> tuple[str, dict[str, Any]]:
    if isinstance(error, Interrupted):
        return "execution_interrupted", {"node_id": node.id, "node_type": node.type}
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return "execution_error", {"node_id": node.id, "exception_type": name, "exception_message": f"{error}\n"}
