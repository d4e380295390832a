"""Guards: requests go to the one host that was named, to its documented paths, and nowhere else: no redirect, no proxy.

What the host says comes back as plain JSON types. `Away` means that it cannot be reached now and may come back,
`NotTheHost` that something else answers there, `Refused` that it understood and said no.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from .workflow import Asked, Prompt

TIMEOUT_S = 30.0
MOST_BYTES = 256 << 20
_AWAY_CODES = (502, 503, 504)  # what a proxy says when nobody is behind it
_NEEDED = ("/queue", "/history", "/interrupt")  # nothing goes on without them, so a fault of theirs is waited out


class Away(Exception):
    """No answer. `delivered` is False only where the request cannot have reached the host."""

    def __init__(self, text: str, delivered: bool = True) -> None:
        super().__init__(text)
        self.delivered = delivered


class NotTheHost(Exception):
    """An answer that no ComfyUI gives."""


class Refused(Exception):
    """The host's no: a sentence, and one line per node that it complains about."""

    def __init__(self, text: str, nodes: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.nodes = list(nodes)


@dataclass(frozen=True)
class Queued:
    """A prompt that the host took. `warnings`: outputs that it leaves out, a line each."""

    prompt_id: str
    warnings: list[str]


class Server:
    """The API of one host. Not for several threads."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        """Raises Asked on a URL that is not http(s)://NAME[:PORT][/PATH]."""
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        try:
            port = parts.port
        except ValueError as error:
            raise Asked(f"--host: got {url!r}: {error}") from None
        plain = not (parts.query or parts.fragment or parts.username or parts.password)
        if parts.scheme not in ("http", "https") or not _is_name(parts.hostname) or not plain or not url.isprintable():
            raise Asked(f"--host: got {url!r}, allowed: http://NAME:PORT or https://NAME[:PORT][/PATH], no user name")
        self._secure = parts.scheme == "https"
        self._name, self._port = str(parts.hostname), port
        self._path = quote(parts.path.rstrip("/"), safe="/%")
        self._timeout_s = timeout_s
        shown = f"[{self._name}]" if ":" in self._name else self._name
        self.url = f"{parts.scheme}://{shown}{f':{port}' if port else ''}{self._path}"
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        """Let the connection go; the next request opens one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def queue(self) -> tuple[list[str], list[str]]:
        """The ids of the prompts that run and of those that wait, in no order."""
        answer = self._json("GET", "/queue")
        try:
            running, waiting = ([str(entry[1]) for entry in answer[f"queue_{kind}"]] for kind in ("running", "pending"))
        except (KeyError, TypeError, IndexError):
            raise NotTheHost(f"{self.url}/queue: the answer has no queue_running and queue_pending") from None
        return running, waiting

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The record of a prompt that has ended, else None."""
        answer = self._json("GET", f"/history/{quote(prompt_id, safe='')}")
        if not isinstance(answer, dict):
            raise NotTheHost(f"{self.url}/history: the answer is no JSON object")
        entry = answer.get(prompt_id)
        return entry if isinstance(entry, dict) else None

    def submit(self, prompt: Prompt, prompt_id: str) -> Queued:
        """Queue a graph under an id of ours; the id that the host says it has (an old one makes its own).

        Raises:
            Refused: the graph does not validate.
        """
        status, answer = self._request("POST", "/prompt", {"prompt": prompt, "prompt_id": prompt_id})
        if status != 200 or not isinstance(answer, dict) or "prompt_id" not in answer:
            raise Refused(*_complaints(status, answer))
        warnings = _complaints(status, answer)[1]
        return Queued(str(answer["prompt_id"]), warnings)

    def delete_waiting(self, prompt_ids: Sequence[str]) -> None:
        """Take these prompts out of the queue; unknown ids and running ones are left as they are."""
        if prompt_ids:
            self._done("/queue", {"delete": list(prompt_ids)})

    def interrupt(self, prompt_id: str) -> None:
        """Stop this prompt if it runs. Asked only when it does: an old host stops whatever runs."""
        if prompt_id in self.queue()[0]:
            self._done("/interrupt", {"prompt_id": prompt_id})

    def report(self, prompt_id: str) -> dict[str, Any] | None:
        """The pack's report of a run that is over, None where it has none."""
        status, answer = self._request("GET", f"/offload/report/{quote(prompt_id, safe='')}")
        return answer if status == 200 and isinstance(answer, dict) else None

    def status(self) -> dict[str, Any] | None:
        """What the pack shows live, None where the host does not have the pack."""
        status, answer = self._request("GET", "/offload/status")
        return answer if status == 200 and isinstance(answer, dict) else None

    def input_type(self, node_class: str, name: str) -> str | None:
        """The type of a node's input ("INT", "FLOAT", ...), None where the host does not say."""
        status, answer = self._request("GET", f"/object_info/{quote(node_class, safe='')}")
        try:
            inputs = answer[node_class]["input"] if status == 200 else {}
            for group in ("required", "optional"):
                if name in inputs.get(group, {}):
                    kind = inputs[group][name][0]
                    return kind if isinstance(kind, str) else None
        except (KeyError, TypeError, IndexError, AttributeError):
            pass
        return None

    def _done(self, path: str, body: Mapping[str, Any]) -> None:
        status, _ = self._request("POST", path, body)
        if status != 200:
            raise NotTheHost(f"{self.url}{path}: status {status}")

    def _json(self, method: str, path: str) -> Any:
        status, answer = self._request(method, path)
        if status != 200 or answer is None:
            raise NotTheHost(f"{self.url}{path}: status {status}{'' if answer is not None else ', no JSON'}")
        return answer

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of the answer (None where it is none)."""
        data = None if body is None else json.dumps(body).encode("ascii")
        headers = {"Accept": "application/json"} | ({} if data is None else {"Content-Type": "application/json"})
        status, location, raw = self._exchange(method, self._path + path, data, headers)
        if 300 <= status < 400:
            raise NotTheHost(f"{self.url}{path}: redirects to {location}, which is not followed; give that as --host")
        if status in _AWAY_CODES or (status >= 500 and path.startswith(_NEEDED)):
            raise Away(f"status {status} from {path}")
        try:
            # NaN and Infinity are no JSON, though Python writes them: not known, as far as a row goes
            return status, json.loads(raw, parse_constant=lambda _: None) if raw else None
        except (ValueError, RecursionError):
            return status, None

    def _exchange(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        # A kept connection may have been closed by the host in the meantime. Asking again is safe for a GET alone: a
        # POST may have been read before that, so it goes out on a connection that was just used or on a new one.
        reused = self._connection is not None
        if reused and method != "GET":
            self.close()
            reused = False
        try:
            return self._once(method, path, data, headers)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if not reused:
                raise Away(_said(error)) from None
        try:
            return self._once(method, path, data, headers)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Away(_said(error)) from None

    def _once(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        if self._connection is None:
            self._connection = self._connect()
        # Anything that breaks off here, Ctrl+C too, leaves half an exchange on the connection.
        with contextlib.ExitStack() as unless_done:
            unless_done.callback(self.close)
            self._connection.request(method, path, data, headers)
            answer = self._connection.getresponse()
            raw = answer.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise NotTheHost(f"{self.url}{path}: an answer of more than {MOST_BYTES >> 20} MiB")
            unless_done.pop_all()
        return answer.status, answer.headers.get("Location", "?"), raw

    def _connect(self) -> http.client.HTTPConnection:
        made: http.client.HTTPConnection
        if self._secure:
            context = ssl.create_default_context()
            made = http.client.HTTPSConnection(self._name, self._port, timeout=self._timeout_s, context=context)
        else:
            made = http.client.HTTPConnection(self._name, self._port, timeout=self._timeout_s)
        try:
            made.connect()
        except ssl.SSLCertVerificationError as error:
            raise NotTheHost(f"{self.url}: its certificate does not hold ({error.verify_message})") from None
        except ssl.SSLEOFError as error:
            raise Away(_said(error), delivered=False) from None
        except ssl.SSLError as error:
            raise NotTheHost(f"{self.url}: speaks no https ({error.reason}); give --host http://...") from None
        except socket.gaierror as error:
            raise Away(f"no such name: {error.strerror}", delivered=False) from None
        except (OSError, http.client.HTTPException) as error:
            raise Away(_said(error), delivered=False) from None
        return made


def _is_name(name: str | None) -> bool:
    """Whether it can be the name or the address of a machine."""
    try:
        return bool(name) and " " not in str(name) and bool(str(name).encode("idna"))
    except UnicodeError:
        return False


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _complaints(status: int, answer: Any) -> tuple[str, list[str]]:
    """A sentence, and a line per node, from `{"error": {...} or text, "node_errors": {id: {...}}}`."""
    if not isinstance(answer, dict):
        return f"status {status} without a reason (the host's log has it)", []
    error, nodes = answer.get("error"), answer.get("node_errors")
    if isinstance(error, dict):
        texts = [str(error[key]) for key in ("message", "details") if error.get(key)]
        # the details repeat what the nodes say below
        text = (texts[0] if nodes else ": ".join(texts)) if texts else f"status {status}"
    else:
        text = str(error) if error else f"status {status}"
    return text, list(_node_lines(nodes)) if isinstance(nodes, dict) else []


def _node_lines(nodes: Mapping[str, Any]) -> list[str]:
    lines = []
    for node, held in nodes.items():
        held = held if isinstance(held, dict) else {"errors": [held]}
        for error in held.get("errors") or ["no reason given"]:
            if isinstance(error, dict):
                error = ": ".join(str(error[key]) for key in ("message", "details") if error.get(key))
            lines.append(f"node {node} ({held.get('class_type', '?')}): {error}")
    return lines
