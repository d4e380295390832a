"""Guards: progress goes to standard error alone, and no character of a prompt can break the terminal or the run.

A terminal gets a bar that is redrawn in place; a file or a pipe gets one line per item.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

WIDTH = 24
REDRAW_S = 0.1
CLEAR = "\r\033[K"


class Progress:
    """Items done, speed, the time that is left, and what runs now."""

    def __init__(
        self,
        total: int,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total, done: of the whole batch; speed and time left count from `done` on."""
        self._stream = sys.stderr if stream is None else stream
        self.live = self._stream.isatty()
        self._clock = clock
        self._total, self._done, self._before = total, done, done
        self._begun = clock()
        self._drawn = float("-inf")
        self._now = ""

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write((CLEAR if self.live else "") + printable(text) + "\n")
        self._draw(force=True)

    def item_done(self, text: str) -> None:
        """One more item is done; `text` says which and how it went."""
        self._done += 1
        self.say(f"[{self._done}/{self._total}] {text}")

    def show(self, now: str) -> None:
        """What runs now. Only a terminal shows it."""
        changed, self._now = now != self._now, now
        self._draw(force=changed)

    def close(self) -> None:
        """Take the bar away."""
        if self.live:
            self._write(CLEAR)
        self.live = False

    def line(self) -> str:
        """The bar as text."""
        filled = int(WIDTH * self._done / max(1, self._total))
        parts = [f"[{'#' * filled}{'.' * (WIDTH - filled)}] {self._done}/{self._total}"]
        fresh, spent = self._done - self._before, self._clock() - self._begun
        if fresh and spent > 0:
            rate = fresh / spent
            parts += [f"{rate:.3g} it/s", f"ETA {duration((self._total - self._done) / rate)}"]
        return "  ".join([*parts, self._now] if self._now else parts)

    def _draw(self, force: bool = False) -> None:
        now = self._clock()
        if not self.live or (now - self._drawn < REDRAW_S and not force):
            return
        self._drawn = now
        room = shutil.get_terminal_size().columns - 1
        self._write(CLEAR + printable(self.line())[:room])

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        self._stream.flush()


def printable(text: str) -> str:
    """A text without control characters: line breaks as spaces, the rest escaped."""
    return "".join(
        letter if letter.isprintable() else " " if letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text.strip()
    )


def duration(seconds: float) -> str:
    """0:07, 12:30, 3:02:11."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
