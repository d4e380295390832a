"""Invariant: a node's text goes to a page that can show it and has nothing better, and to nobody else.

The fallback for pages in which the pack's own script does not run: the host's progress text, in binary frames. It goes
to the client that queued the prompt, where that has an open socket, announced that it tells kinds of binary frames
apart (`supports_preview_metadata`, which front ends send when they connect and scripts do not), is no `?page=` client
and did not ask for telemetry. A script may take every binary frame for a picture, as a host's own example does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Any

from ..offload.adapters import comfyui_host
from ..offload.adapters.comfyui_runs_nodes import in_short
from ..offload.summary import seconds, size

PERIOD = 1.0  # seconds between two texts while a node runs
LEAST_S, LEAST_SHARE = 0.25, 0.05  # of a node's time that moves must take to be worth a word
FLAG = "supports_preview_metadata"


class ProgressText:
    """Texts of the prompt that runs. `known`: whether a client shows our figures by itself."""

    def __init__(
        self,
        known: Callable[[str], bool],
        clock: Callable[[], float] = monotonic,
        server: Callable[[], Any] = comfyui_host.server,
    ) -> None:
        self._known = known
        self._clock = clock
        self._server = server
        self._due = float("-inf")
        self._prompt: str | None = None
        self._shown: dict[str, str] = {}  # node -> the last text that it was given in this prompt
        self._ended: dict[str, Mapping[str, Any]] = {}  # node -> what those of it that ended came to, all in all

    # ------------------------------------------------------------------ who can show it
    def wanted(self) -> bool:
        """Whether the client of the prompt that runs is to be told."""
        return self._client(getattr(self._server(), "client_id", None)) is not None

    def _client(self, client_id: Any) -> str | None:
        """The client, if a text is of use to it; None else."""
        server = self._server()
        if not isinstance(client_id, str) or not client_id or client_id not in (getattr(server, "sockets", None) or ()):
            return None
        metadata = getattr(server, "sockets_metadata", None)
        of_client = metadata.get(client_id) if isinstance(metadata, dict) else None
        flags = of_client.get("feature_flags") if isinstance(of_client, dict) else None
        can = isinstance(flags, dict) and flags.get(FLAG) is True
        return client_id if can and not self._known(client_id) and _sender(server) is not None else None

    # ------------------------------------------------------------------ what it is told
    def sample(self, figures: Mapping[str, Any]) -> None:
        """The figures of now. On the watcher's thread."""
        client = self._client(getattr(self._server(), "client_id", None))
        prompt_id = figures.get("prompt_id")
        if client is None or prompt_id is None:
            return
        self._meet(prompt_id)
        ended = {row["display"]: self._add(row) for row in figures.get("ended") or ()}
        for row in ended.values():
            self._conclude(client, row)
        node, now = figures.get("node"), self._clock()
        if node is None or not figures.get("steps") or now < self._due:
            return
        self._due = now + PERIOD
        self._tell(client, node, live_text(figures))

    def closed(self, report: Mapping[str, Any]) -> None:
        """A prompt has ended: what its nodes came to, where that was not said yet."""
        client = self._client(report.get("client_id"))
        if client is None:
            return
        self._meet(report["prompt_id"])
        self._ended = {}  # the report has all of them
        for entry in report.get("nodes") or ():
            if not entry["cached"]:
                self._add(in_short(entry))
        for row in self._ended.values():
            self._conclude(client, row)

    def _meet(self, prompt_id: str) -> None:
        if prompt_id != self._prompt:
            self._prompt, self._shown, self._ended, self._due = prompt_id, {}, {}, float("-inf")

    def _add(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A node is done; the sum of those that the user sees as one, which had the device one after another."""
        node = row["display"]
        rows = [self._ended[node], row] if node in self._ended else [row]
        peak = max((one["peak"] for one in rows if one["peak"] is not None), default=None)
        made = {"display": node, "wall_s": _sum(rows, "wall_s"), "moves_s": _sum(rows, "moves_s"), "peak": peak}
        self._ended[node] = made
        return made

    def _conclude(self, client: str, row: Mapping[str, Any]) -> None:
        """A node is done: said where its moves count, and where a text of a moment ago would stay for ever."""
        node = row["display"]
        text = short_text(row["wall_s"], row["moves_s"], row["peak"])
        if not text and node in self._shown:
            text = short_text(row["wall_s"], None, row["peak"], always=True)
        self._tell(client, node, text)

    def _tell(self, client: str, node: str, text: str) -> None:
        send = _sender(self._server())
        if text and self._shown.get(node) != text and send is not None:
            self._shown[node] = text
            send(text, node, client, self._prompt)


def live_text(figures: Mapping[str, Any]) -> str:
    """ "VRAM 9.8 / 16.0 GiB, peak 11.2, step 3/20 1.48 s, moves 0.12 s"; what is not known is left out."""
    vram = figures["vram"]
    free, total, peak = vram["free"], vram["total"], vram["peak"]
    parts = []
    if total:
        unit = size(total).split()[1]

        def bare(nbytes: int) -> str:
            return size(nbytes, unit).removesuffix(f" {unit}")

        if free is not None:
            parts.append(f"VRAM {bare(total - free)} / {size(total, unit)}")
        if peak is not None:
            parts.append(f"peak {bare(peak)}" if free is not None else f"VRAM peak {bare(peak)} / {size(total, unit)}")
    step = f"step {figures['step']}/{figures['steps']}"
    if figures["step_ms"] is not None:
        step += f" {seconds(figures['step_ms'] / 1e3)}"
    parts.append(step)
    if figures["stall_ms"]:
        parts.append(f"moves {seconds(figures['stall_ms'] / 1e3)}")
    return ", ".join(parts)


def short_text(wall: float | None, moves: float | None, peak: int | None, always: bool = False) -> str:
    """ "12.4 s, moves 1.5 s, peak 9.8 GiB" where moves took 0.25 s or 5 %, else "". always: without moves too."""
    if wall is None:
        return ""
    counts = moves is not None and moves > 0 and (moves >= LEAST_S or moves >= LEAST_SHARE * wall)
    if not counts and not always:
        return ""
    parts = [seconds(wall)]
    if counts:
        parts.append(f"moves {seconds(moves)}")
    if peak is not None:
        parts.append(f"peak {size(peak)}")
    return ", ".join(parts)


def _sum(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows]
    return None if None in values else sum(values)


def _sender(server: Any) -> Callable[[str, str, str, str | None], None] | None:
    """The host's own way to send a text to one client, None where it has none; newer ones want the prompt as well."""
    send = getattr(server, "send_progress_text", None)
    try:
        parameters = inspect.signature(send).parameters if callable(send) else {}
    except (TypeError, ValueError):
        return None
    if "sid" not in parameters:  # it would go to everybody
        return None

    def to_one(text: str, node: str, client: str, prompt_id: str | None) -> None:
        more = {"prompt_id": prompt_id} if "prompt_id" in parameters else {}
        send(text, node, sid=client, **more)

    return to_one
