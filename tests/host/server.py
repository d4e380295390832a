"""Invariant: a host started here listens on loopback only, writes below its own folder, and ends with the test.

One process and a small client; no more of the host is known here than its command line and its API.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
READY = 120.0
"""Seconds that a host may take until it answers; some 10 on two free cores."""
PROMPT = 120.0


class HostError(AssertionError):
    """The host did not do what was asked of it; the message carries the end of its log."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """In the child, before it becomes the host: a test run that is killed leaves no server behind."""
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    prctl(set_death_signal, signal.SIGTERM)


class HostServer:
    """One ComfyUI process, and a small client for its API.

    Args:
        host: the checkout of ComfyUI.
        base: an empty folder for its input, output, user and custom_nodes.
        models: a `models` folder, linked into `base`.
        checkout: the pack, linked into custom_nodes; None leaves it out.
        arguments: more of the command line.
        packs: folders of other packs, linked into custom_nodes under their own names.
        environment: variables for the process.
    """

    def __init__(
        self,
        host: Path,
        base: Path,
        models: Path,
        checkout: Path | None,
        arguments: tuple[str, ...] = (),
        packs: tuple[Path, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.host, self.base, self.arguments, self.environment = host, base, arguments, environment or {}
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.log_file = base / "server.log"
        for folder in ("custom_nodes", "user", "input", "output", "temp"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "models").symlink_to(models, target_is_directory=True)
        linked = [HERE / "packs" / "test_nodes", *packs]
        for pack in linked:
            (base / "custom_nodes" / pack.name).symlink_to(pack, target_is_directory=True)
        if checkout is not None:
            (base / "custom_nodes" / "balanced_offload").symlink_to(checkout, target_is_directory=True)

    # ------------------------------------------------------------------ process
    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.port = free_port()
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--use-pytorch-cross-attention", "--disable-auto-launch", *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        paths = [str(HERE / "shim"), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.setdefault(name, "1")
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.host,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform.startswith("linux") else None,
            )
        until = time.monotonic() + READY
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise HostError(f"the host ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats", timeout=2)
                return
            time.sleep(0.1)
        self.stop()
        raise HostError(f"the host did not answer within {READY:g} s:\n{self.log()[-4000:]}")

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        self.process = None

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    # ------------------------------------------------------------------ HTTP
    def get(self, path: str, timeout: float = 30) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def post(self, path: str, body: Any = None, timeout: float = 30) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps({} if body is None else body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            content = answer.read()
        try:
            return json.loads(content) if content else None
        except ValueError:
            return content.decode()

    def status_of(self, path: str) -> int:
        """The HTTP status of a GET."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    # ------------------------------------------------------------------ prompts
    def queue(self, prompt: dict[str, Any], client: str | None = None) -> str:
        """Puts an API-format graph into the queue -> its prompt_id. Raises HostError with the validation's words."""
        body: dict[str, Any] = {"prompt": prompt}
        if client:
            body["client_id"] = client
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            raise HostError(f"the prompt was refused: {error.read().decode()}") from None
        return str(answer["prompt_id"])

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        found = self.get(f"/history/{prompt_id}")
        return found.get(prompt_id) if found else None

    def wait(self, prompt_id: str, timeout: float = PROMPT) -> dict[str, Any]:
        """The history of a prompt, once it has ended, well or not."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            entry = self.history(prompt_id)
            if entry is not None and "status" in entry:
                return entry
            if not self.alive():
                raise HostError(f"the host is gone:\n{self.log()[-4000:]}")
            time.sleep(0.01)
        raise HostError(f"prompt {prompt_id} did not end within {timeout:g} s:\n{self.log()[-4000:]}")

    def run(self, prompt: dict[str, Any], timeout: float = PROMPT) -> dict[str, Any]:
        """Queues and waits -> outputs of the nodes, {node id: ui}. Raises HostError if the prompt failed."""
        entry = self.wait(self.queue(prompt), timeout)
        if entry["status"]["status_str"] != "success":
            raise HostError(f"the prompt failed: {json.dumps(entry['status'])[:3000]}\n{self.log()[-3000:]}")
        outputs: dict[str, Any] = entry["outputs"]
        return outputs

    @staticmethod
    def error_of(entry: dict[str, Any]) -> str:
        """The message on the node that failed, "" where none did."""
        errors = [data for name, data in entry["status"]["messages"] if name == "execution_error"]
        return "".join(f"{data['exception_type']}: {data['exception_message']}" for data in errors)

    def digests(self, prompt: dict[str, Any]) -> list[str]:
        """Queues and waits -> what the graph's `TestDigest` nodes wrote, in the order of their ids."""
        outputs = self.run(prompt)
        return [outputs[node]["digest"][0] for node in sorted(outputs, key=int) if "digest" in outputs[node]]

    def interrupt(self) -> None:
        self.post("/interrupt")

    def free(self, unload_models: bool = True) -> None:
        """As `POST /free`; the host does it between two prompts."""
        self.post("/free", {"unload_models": unload_models, "free_memory": True})

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/object_info/{node}" if node else "/object_info")
        return found

    # ------------------------------------------------------------------ what the test packs tell
    def rss(self) -> int:
        return int(self.get("/test/process")["rss"])

    def opened(self) -> list[str]:
        """Model files that the process opened since the last call, by name."""
        return [Path(path).name for path in self.get("/test/process")["opened"]]

    def counters(self) -> dict[str, Any]:
        """Of the simulated device: bytes allocated, peak, copies. Only with the pack `simulated_device`."""
        found: dict[str, Any] = self.get("/simulated/counters")
        return found

    def reset_counters(self) -> None:
        self.post("/simulated/reset")

    # ------------------------------------------------------------------ websocket
    def listen(self, client: str | None = None) -> Listener:
        """A websocket that collects every event until it is closed."""
        return Listener(self.port, client or uuid.uuid4().hex)


class Listener:
    """Collects a websocket's JSON events in a thread: [(seconds, type, data)], and its binary `frames`. Use it as a
    context."""

    def __init__(self, port: int, client: str) -> None:
        self.port, self.client = port, client
        self.events: list[tuple[float, str, dict[str, Any]]] = []
        self.frames: list[tuple[float, bytes]] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._send: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        if not self._ready.wait(10):
            raise HostError("the websocket did not open")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def send(self, message: dict[str, Any]) -> None:
        self._send.append(message)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for _, name, data in list(self.events) if name == kind]

    def wait_for(self, kind: str, timeout: float = 30, **fields: Any) -> dict[str, Any]:
        """The first event of this type whose data has these values."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            for data in self.of(kind):
                if all(data.get(name, fields) == value for name, value in fields.items()):
                    return data
            time.sleep(0.01)
        seen = sorted({name for _, name, _ in self.events})
        raise HostError(f"no {kind} with {fields} within {timeout:g} s; events seen: {seen}")

    def _main(self) -> None:
        import asyncio

        asyncio.run(self._collect())

    async def _collect(self) -> None:
        import asyncio

        import aiohttp

        url = f"http://127.0.0.1:{self.port}/ws?clientId={self.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket_:
            self._ready.set()
            while not self._stop.is_set():
                while self._send:
                    await socket_.send_json(self._send.pop(0))
                try:
                    message = await socket_.receive(timeout=0.05)
                except asyncio.TimeoutError:
                    continue
                if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSING):
                    return
                if message.type == aiohttp.WSMsgType.BINARY:
                    self.frames.append((time.monotonic(), message.data))
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    self.events.append((time.monotonic(), event.get("type", ""), event.get("data") or {}))
