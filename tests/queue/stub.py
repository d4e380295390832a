"""A host's queue API over real HTTP, on loopback, in this process: what a test asks of it happens, in the host's order.

One worker takes prompts in turn. `/queue`, `/history`, `/prompt`, `/interrupt` answer with the shapes of the host:
`shape="new"` as 0.33 (queue entries of five, ids checked), "old" as 0.3.64. A restart forgets queue and history.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORKFLOW: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 7, "steps": 20, "cfg": 8.0, "denoise": 1, "model": ["4", 0], "positive": ["6", 0]},
        "_meta": {"title": "Sampler"},
    },
    "4": {"class_type": "Loader", "inputs": {"ckpt_name": "a.safetensors", "fast": False}, "_meta": {"title": "Load"}},
    "6": {"class_type": "Encode", "inputs": {"text": "a cat", "clip": ["4", 1]}, "_meta": {"title": "Positive"}},
    "7": {"class_type": "Encode", "inputs": {"text": "", "clip": ["4", 1]}, "_meta": {"title": "Negative"}},
    "9": {"class_type": "Save", "inputs": {"images": ["3", 0], "filename_prefix": "x"}, "_meta": {"title": "Save"}},
}
"""A small graph with every kind of input."""


class Host:
    """The stub. `seconds`: a prompt's run. Every POST /prompt that it took is in `taken` as (prompt_id, graph)."""

    def __init__(self, shape: str = "new", seconds: float = 0.02, pack: bool = False) -> None:
        self.shape, self.seconds, self.pack = shape, seconds, pack
        self.taken: list[tuple[str, dict[str, Any]]] = []
        self.ran: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str, Any]] = []
        self.own_ids = False
        self.left_out: dict[str, Any] = {}
        """node_errors of an answer that takes the prompt all the same."""
        self.refuse: Callable[[dict[str, Any]], tuple[int, Any] | None] = lambda graph: None
        self.end: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda prompt_id, graph: {}
        self.answer: Callable[[str, str], tuple[int, dict[str, str], bytes] | None] = lambda method, path: None
        self.dies_on: Callable[[dict[str, Any]], bool] = lambda graph: False
        self.swallow: Callable[[int], bool] = lambda count: False
        """Whether the count-th prompt is queued, and the connection cut before the answer."""
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin with nothing in queue and history."""
        self.lock = threading.Condition()
        self.pending: list[tuple[float, str, dict[str, Any]]] = []
        self.running: tuple[float, str, dict[str, Any]] | None = None
        self.history: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.stopped: set[str] = set()
        self.number = 0.0
        self._alive = threading.Event()
        self._alive.set()
        host = self

        class Handler(_Handler):
            stub = host

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._connections: list[Any] = []
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        threading.Thread(target=self._work, args=(self._alive,), daemon=True).start()

    def kill(self) -> None:
        """Gone at once: open connections are cut, the port refuses."""
        assert self._server is not None
        self._alive.clear()
        with self.lock:
            self.lock.notify_all()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(2)
        self._server = None

    def restart(self, away_s: float = 0.0) -> None:
        """Kill, stay away, and start on the same port, everything forgotten."""
        self.kill()
        time.sleep(away_s)
        self.start()

    def close(self) -> None:
        if self._server is not None:
            self.kill()

    def wait_until(self, true: Callable[[], Any], seconds: float = 20.0) -> None:
        until = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < until, "the host never got there"
            time.sleep(0.005)

    # ------------------------------------------------------------------ the worker
    def _work(self, alive: threading.Event) -> None:
        while alive.is_set():
            with self.lock:
                while alive.is_set() and not self.pending:
                    self.lock.wait(0.05)
                if not alive.is_set():
                    return
                self.pending.sort(key=lambda entry: entry[0])
                self.running = entry = self.pending.pop(0)
                self.ran.append(entry[2])
            number, prompt_id, graph = entry
            if self.dies_on(graph):
                threading.Thread(target=self.restart, args=(0.1,), daemon=True).start()
                return
            begun, until = time.time(), time.monotonic() + self.seconds
            while alive.is_set() and time.monotonic() < until and prompt_id not in self.stopped:
                time.sleep(0.002)
            if not alive.is_set():
                return
            with self.lock:
                self.history[prompt_id] = self._entry(number, prompt_id, graph, begun)
                self.running = None

    def _entry(self, number: float, prompt_id: str, graph: dict[str, Any], begun: float) -> dict[str, Any]:
        def message(event: str, at: float, **more: Any) -> list[Any]:
            return [event, {"prompt_id": prompt_id, **more, "timestamp": int(at * 1000)}]

        interrupted = prompt_id in self.stopped
        last = message("execution_success", begun + self.seconds)
        if interrupted:
            last = message("execution_interrupted", time.time(), node_id="3", node_type="KSampler", executed=[])
        name = f"out_{len(self.ran):05}_.png"
        entry: dict[str, Any] = {
            "prompt": [number, prompt_id, graph, {"create_time": 1}, ["9"]],
            "outputs": {} if interrupted else {"9": {"images": [_image(name)]}},
            "status": {
                "status_str": "error" if interrupted else "success",
                "completed": not interrupted,
                "messages": [
                    message("execution_start", begun),
                    message("execution_cached", begun, nodes=["4"]),
                    last,
                ],
            },
        }
        if self.shape == "new":
            entry["meta"] = {"9": {"node_id": "9", "display_node": "9", "parent_node": None, "real_node_id": "9"}}
        change = {} if interrupted else self.end(prompt_id, graph)
        if "report" in change:
            self.reports[prompt_id] = change.pop("report")
        entry["outputs"].update(change.pop("outputs", {}))
        entry.update(change)
        return entry


class _Handler(BaseHTTPRequestHandler):
    """The routes."""

    stub: Host
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.stub._connections.append(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # who asked is gone, or the stub was killed meanwhile
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET", None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve("POST", json.loads(body))

    def _serve(self, method: str, body: Any) -> None:
        host = self.stub
        host.asked.append((method, self.path, body))
        special = host.answer(method, self.path)
        if special is not None:
            return self._send(special[0], special[2], special[1])
        with host.lock:
            status, answer = self._answer(method, body)
        if status == 0:
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        return self._send(status, b"" if answer is None else json.dumps(answer).encode())

    def _answer(self, method: str, body: Any) -> tuple[int, Any]:
        host, path = self.stub, self.path
        if (method, path) == ("GET", "/queue"):
            running = [host.running] if host.running else []
            shown = [[[*entry, {}, ["9"]] for entry in entries] for entries in (running, host.pending)]
            return 200, {"queue_running": shown[0], "queue_pending": shown[1]}
        if method == "GET" and path.startswith("/history/"):
            prompt_id = path.removeprefix("/history/")
            return 200, {prompt_id: host.history[prompt_id]} if prompt_id in host.history else {}
        if (method, path) == ("POST", "/prompt"):
            return self._prompt(body)
        if (method, path) == ("POST", "/queue"):
            host.pending = [entry for entry in host.pending if entry[1] not in body.get("delete", [])]
            return 200, None
        if (method, path) == ("POST", "/interrupt"):
            if host.running and body.get("prompt_id", host.running[1]) == host.running[1]:
                host.stopped.add(host.running[1])
            return 200, None
        if host.pack and path == "/offload/status":
            return 200, {"v": 1, "prompt_id": host.running[1] if host.running else None, "step": 3, "steps": 20}
        if host.pack and path.startswith("/offload/report/"):
            report = host.reports.get(path.removeprefix("/offload/report/"))
            return (200, report) if report else (404, {"error": "no such run"})
        if path == "/object_info/KSampler":
            kinds = {"seed": ["INT", {}], "steps": ["INT", {}], "denoise": ["FLOAT", {}]}
            return 200, {"KSampler": {"input": {"required": kinds}}}
        return 404, None

    def _prompt(self, body: Any) -> tuple[int, Any]:
        host = self.stub
        prompt_id = str(uuid.uuid4()) if host.own_ids else body["prompt_id"]
        if host.shape == "new" and str(uuid.UUID(prompt_id)) != prompt_id:
            return 400, {"error": {"type": "invalid_prompt_id", "message": "no UUID"}, "node_errors": {}}
        refused = host.refuse(body["prompt"])
        if refused is not None:
            return refused
        host.number += 1
        host.pending.append((host.number, prompt_id, body["prompt"]))
        host.taken.append((prompt_id, body["prompt"]))
        host.lock.notify_all()
        if host.swallow(len(host.taken)):
            return 0, None
        return 200, {"prompt_id": prompt_id, "number": host.number, "node_errors": host.left_out}

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _image(name: str) -> dict[str, str]:
    return {"filename": name, "subfolder": "", "type": "output"}


def a_report(prompt_id: str, verdict: str = "streamed", **more: Any) -> dict[str, Any]:
    """The parts of `offload-report/1` that a row is made of."""
    return {
        "schema": "offload-report/1",
        "prompt_id": prompt_id,
        "ended": True,
        "resolved": {"mode": "balanced"},
        "vram": {"peak_device": None, "peak_torch": 3 << 30, "peak_noted": 2 << 30},
        "totals": {"wall_s": 1.25, "bytes_h2d": 5_000, "bytes_d2h": 0, "onload_s": 0.5, "stall_s": 0.25},
        "hints": [{"code": "raise-high", "sentence": "..."}],
        "verdict": verdict,
        "fits": False,
        **more,
    }
