"""What the recorder of runs asks of the host. Invariant: a touchpoint that this host lacks means "not known", never an
error: a prompt must not fail because nobody could watch it.

- The prompt's end has no hook. But hosts execute a prompt by `asyncio.run`, which cancels what is left of its loop's
  tasks at its end: a task that waits for ever ends there, on the worker thread, after the last node and before the
  prompt is put into /history. So figures are taken on the thread that drives the device, with nothing running.
- Errors are told by /history only, once the prompt is in it.
- Nodes are told by the progress registry, which is new with every prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from . import comfyui_host

HANDLER = comfyui_host.KEY  # of our progress handler
RESTORE = "BalancedOffload.RestoreStock"  # the setting "Restore stock behaviour"
RESTORE_ENV = "BALANCED_OFFLOAD_RESTORE_STOCK"

_log = logging.getLogger(__name__)
_waiting: set[asyncio.Task[None]] = set()
_NO_LOCK: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class Ending(NamedTuple):
    """How the host says that a prompt ended. type, text, node: of the error; None after success."""

    ok: bool
    type: str | None = None
    text: str | None = None
    node: str | None = None

    @property
    def oom(self) -> bool:
        """Whether memory ran out, by the words that torch and the libraries below it use."""
        words = f"{self.type} {self.text}".casefold()
        return not self.ok and ("outofmemory" in words or "out of memory" in words or "alloc_failed" in words)


class NodeWatch(Protocol):
    """Who is told of the nodes of a prompt, on the thread that executes them."""

    def started(self, node_id: str, prompt_id: str) -> None: ...
    def progressed(self, node_id: str, value: float, most: float) -> None: ...
    def finished(self, node_id: str) -> None: ...


@contextlib.contextmanager
def logged(what: str) -> Iterator[None]:
    """Nothing that watches may end a prompt, or the watcher."""
    try:
        yield
    except Exception:
        _log.warning("Balanced Offload: %s failed", what, exc_info=True)


# ---------------------------------------------------------------------- the queue
def queue() -> Any:
    """The host's prompt queue, None where no server runs."""
    return getattr(comfyui_host.server(), "prompt_queue", None)


def queue_lock() -> contextlib.AbstractContextManager[Any]:
    """The queue's lock: under it no prompt begins or ends, and /history is read by nobody. Taken before any of ours."""
    lock = getattr(queue(), "mutex", None)
    return _NO_LOCK if lock is None else lock


def _items() -> list[Any]:
    running = getattr(queue(), "currently_running", None)
    return list(running.values()) if isinstance(running, dict) else []


def worker_waits() -> bool:
    """Whether the host's worker waits for the next prompt; asked under the queue's lock, which keeps it there.

    That no prompt executes would not do: the worker carries out `/free`, and collects garbage, between two prompts.
    Where it cannot be seen (the condition's list of waiters is Python's own affair), it is never taken to wait.
    """
    return bool(getattr(getattr(queue(), "not_empty", None), "_waiters", None))


def running() -> set[str]:
    """Ids of the prompts that execute; empty where nobody says."""
    with contextlib.suppress(Exception):
        return {str(item[1]) for item in _items()}
    return set()


def busy() -> bool:
    """Whether a prompt executes or waits."""
    return bool(_items() or getattr(queue(), "queue", None))


def client_of(prompt_id: str) -> str | None:
    """The websocket client that queued a running prompt."""
    with contextlib.suppress(Exception):
        for item in _items():
            if item[1] == prompt_id:
                client = item[3].get("client_id")
                return None if client is None else str(client)
    return None


def ending(prompt_id: str) -> Ending | None:
    """How the prompt ended by /history, None while it is not in there. Call it under `queue_lock`."""
    history = getattr(queue(), "history", None)
    entry = history.get(prompt_id) if isinstance(history, dict) else None
    if not isinstance(entry, dict):
        return None
    status = entry.get("status") or {}
    return read_status(status if isinstance(status, dict) else {})


def rewrite_text(prompt_id: str, node_id: str, text: str) -> bool:
    """Put `text` in place of what a node said in /history while its prompt still ran. Under `queue_lock`."""
    with contextlib.suppress(Exception):
        shown = queue().history[prompt_id]["outputs"][node_id]["text"]
        shown[:] = [text] * len(shown)
        return True
    return False


def read_status(status: dict[str, Any]) -> Ending:
    """The `status` of a /history entry: {status_str, completed, messages [(event, data)]}."""
    for event, data in reversed([tuple(message) for message in status.get("messages") or () if len(message) == 2]):
        if event == "execution_interrupted":
            return Ending(False, "Interrupted", "the prompt was interrupted", _text(data.get("node_id")))
        if event == "execution_error":
            name = str(data.get("exception_type") or "Error").rsplit(".", 1)[-1]
            return Ending(False, name, _text(data.get("exception_message")) or "", _text(data.get("node_id")))
    if status.get("status_str") == "error" or status.get("completed") is False:
        return Ending(False, "Error", "the host gives no message", None)
    return Ending(True)


def _text(value: Any) -> str | None:
    return None if value is None else str(value).strip()


# ---------------------------------------------------------------------- the prompt that runs on this thread
def at_prompt_end(callback: Callable[[], None]) -> bool:
    """Call `callback` on this thread when the prompt that it executes ends; False where no prompt's loop runs here."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return False
    if loop is getattr(comfyui_host.server(), "loop", None):
        return False  # the server's own loop, which never ends

    async def wait() -> None:
        await loop.create_future()

    task = loop.create_task(wait())
    _waiting.add(task)  # a loop holds its tasks weakly, and nobody else knows of this one

    def ended(done: asyncio.Task[None]) -> None:
        _waiting.discard(done)
        callback()

    # A callback, not `finally` in the task: one that never got its first turn is cancelled without being entered.
    task.add_done_callback(ended)
    return True


def registry(prompt_id: str) -> Any:
    """The progress registry of this prompt, None where the host has none, or another prompt's."""
    module = sys.modules.get("comfy_execution.progress")
    found = getattr(module, "global_progress_registry", None)
    return found if getattr(found, "prompt_id", None) == prompt_id else None


def watch_nodes(prompt_id: str, watch: NodeWatch) -> bool:
    """Tell `watch` of this prompt's nodes from now on. From any thread."""
    found = registry(prompt_id)
    handlers = getattr(found, "handlers", None)
    if not isinstance(handlers, dict):
        return False
    if HANDLER in handlers:
        return True
    with contextlib.suppress(Exception):
        handler = _handler(watch)
        # A new table in place of the old one: the worker may be walking that. What is put into it meanwhile follows.
        table = {**handlers, HANDLER: handler}
        found.handlers = table
        for name in list(handlers):
            table.setdefault(name, handlers[name])
        return True
    return False


def _handler(watch: NodeWatch) -> Any:
    from comfy_execution.progress import ProgressHandler

    class Handler(ProgressHandler):  # type: ignore[misc]
        def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
            _told(watch.started, node_id, prompt_id)

        def update_handler(
            self, node_id: str, value: float, max_value: float, state: Any, prompt_id: str, image: Any = None
        ) -> None:
            _told(watch.progressed, node_id, value, max_value)

        def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
            _told(watch.finished, node_id)

    return Handler(HANDLER)


def _told(method: Callable[..., None], *arguments: Any) -> None:
    try:
        method(*arguments)
    except Exception as error:  # the node must not fail because nobody could watch it
        _log.debug("Balanced Offload: %s: %s", getattr(method, "__name__", method), error)


def node_type(prompt_id: str, node_id: str) -> str | None:
    """The class of a node of this prompt, None where the host does not say."""
    with contextlib.suppress(Exception):
        return str(registry(prompt_id).dynprompt.get_node(node_id)["class_type"])
    return None


def display_node(prompt_id: str, node_id: str) -> str:
    """The node that the user sees: of one that another node expanded into, that other one; else the node itself.

    Inside a subgraph it is the path there, "3:7" for node 7 in subgraph 3.
    """
    with contextlib.suppress(Exception):
        return str(registry(prompt_id).dynprompt.get_display_node_id(node_id))
    return node_id


def node_types(prompt_id: str) -> set[str]:
    """The classes of all nodes of this prompt as it was queued."""
    with contextlib.suppress(Exception):
        return {str(node["class_type"]) for node in registry(prompt_id).dynprompt.original_prompt.values()}
    return set()


def node_states(prompt_id: str) -> dict[str, str]:
    """Node id -> pending, running, finished or error, for the nodes that this prompt has met up to now."""
    with contextlib.suppress(Exception):
        nodes = registry(prompt_id).nodes
        return {str(key): str(getattr(nodes[key]["state"], "value", nodes[key]["state"])) for key in list(nodes)}
    return {}


def partly_loaded() -> bool | None:
    """Whether the host keeps a part of some loaded model off its accelerator, by its own account; None: unknown."""
    with contextlib.suppress(Exception):
        for loaded in list(comfyui_host.model_management().current_loaded_models):
            if loaded.model is None or loaded.device.type == "cpu":
                continue
            if loaded.model_loaded_memory() < loaded.model_memory():
                return True
        return False
    return None


# ---------------------------------------------------------------------- folders and settings
def output_folder() -> Path | None:
    """Where the host saves pictures."""
    folders = sys.modules.get("folder_paths")
    with contextlib.suppress(Exception):
        return Path(folders.get_output_directory()) if folders is not None else None
    return None


class _Setting:
    """One key of a settings file, read again only when the file has changed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._stamp: tuple[Any, ...] | None = None
        self._value: Any = None

    def read(self, paths: Iterable[Path]) -> Any:
        for path in paths:
            try:
                status = os.stat(path)
            except OSError:
                continue
            stamp = (path, status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                value = None
                with contextlib.suppress(OSError, ValueError):
                    document = json.loads(path.read_text(encoding="utf-8"))
                    value = document.get(self.name) if isinstance(document, dict) else None
                self._stamp, self._value = stamp, value
            return self._value
        return None


_restore = _Setting(RESTORE)


def stock_wanted() -> bool:
    """Whether the user asked for the stock host: the environment variable, else the setting that the host stores.

    A host with several users has no one setting; there only the environment variable counts.
    """
    given = os.environ.get(RESTORE_ENV, "").strip().casefold()
    if given:
        return given not in ("0", "false", "no", "off")
    return _restore.read(_settings_files()) is True


def _settings_files() -> list[Path]:
    args = getattr(sys.modules.get("comfy.cli_args"), "args", None)
    folders = sys.modules.get("folder_paths")
    if folders is None or getattr(args, "multi_user", False):
        return []
    with contextlib.suppress(Exception):
        return [Path(folders.get_user_directory()) / "default" / "comfy.settings.json"]
    return []
