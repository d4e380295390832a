"""Guards: whatever moment the command dies at, its next start knows every prompt it sent and every item that is done.

A file of JSON lines, each one write that is on the disk before what it tells of happens (`send`) or right after
(`done`). One command at a time holds it. First `{"schema", "items", "output", "fingerprint"}`, then events:
send {item, prompt_id}, queued {item, prompt_id}, void {item, prompt_id} (it never reached the host, or was taken out
before it ran), lost {item, prompt_id} (the host forgot it; it may have run), done {item, row}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .results import Row, append_line
from .workflow import Asked

SCHEMA = "offload-queue/1"


@dataclass
class Sent:
    """The attempts at one item: the one whose end is not known yet, and how many others may have run."""

    open: str | None = None
    may_have_run: int = 0


class Journal:
    """The resume file. Use as a context manager: it is locked meanwhile."""

    def __init__(self, path: Path, fingerprint: str, items: int, output: Path) -> None:
        self.path = path
        self.done: dict[int, Row] = {}
        self.sent: dict[int, Sent] = {}
        self.resumed = False
        self._begun = False
        self._head = {"schema": SCHEMA, "items": items, "output": output.name, "fingerprint": fingerprint}
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        """Lock and read it.

        Raises:
            Asked: another command holds it, or it belongs to another batch.
        """
        try:
            self._lock = _locked(Path(f"{self.path}.lock"))
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()  # which unlocks it; the file stays, as removing it would let two in
            self._lock = None

    def send(self, item: int, prompt_id: str) -> None:
        """This id is about to be sent for this item."""
        self._write("send", item, prompt_id=prompt_id)

    def queued(self, item: int, prompt_id: str, asked_id: str) -> None:
        """The host has it, under an id that an old host chooses itself."""
        if prompt_id != asked_id:
            self._write("void", item, prompt_id=asked_id)
            self._write("send", item, prompt_id=prompt_id)
        self._write("queued", item, prompt_id=prompt_id)

    def void(self, item: int, prompt_id: str) -> None:
        """It did not run, and will not."""
        self._write("void", item, prompt_id=prompt_id)

    def lost(self, item: int, prompt_id: str) -> None:
        """The host knows it no more; nobody knows whether it ran."""
        self._write("lost", item, prompt_id=prompt_id)

    def finish(self, item: int, row: Row) -> None:
        """The item is done, with this row."""
        self._write("done", item, row=row)

    def attempts(self, item: int) -> int:
        """How often this item was or is being run, as far as anybody can know."""
        sent = self.sent.get(item, Sent())
        return sent.may_have_run + (sent.open is not None)

    def _write(self, event: str, item: int, **more: Any) -> None:
        told = {"event": event, "item": item, **more}
        # The first line comes with the first event: a command that is refused leaves no file behind.
        lines = [told] if self._begun else [self._head, told]
        append_line(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode("ascii"))
        self._begun = True
        self._take(told)

    def _take(self, told: dict[str, Any]) -> None:
        item = int(told["item"])
        sent = self.sent.setdefault(item, Sent())
        event = told["event"]
        if event == "send":
            sent.open = str(told["prompt_id"])
        elif event in ("void", "lost"):
            if told["prompt_id"] == sent.open:
                sent.open = None
                sent.may_have_run += event == "lost"
        elif event == "done":
            self.done.setdefault(item, told["row"])

    def _read(self) -> None:
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        lines = list(self._lines(whole))
        if not lines:
            return
        if not isinstance(lines[0], dict) or lines[0].get("schema") != SCHEMA:
            raise Asked(f"--resume: {self.path} is no {SCHEMA} file; name another one")
        for name, meant in self._head.items():
            if lines[0].get(name) != meant:
                raise Asked(self._other(name, lines[0].get(name), meant))
        try:
            for told in lines[1:]:
                self._take(told)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Asked(f"--resume: {self.path} is damaged ({type(error).__name__}: {error}); remove it") from None
        self.resumed = self._begun = True

    def _lines(self, whole: bytes) -> Iterator[Any]:
        for number, line in enumerate(whole.split(b"\n"), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise Asked(f"--resume: {self.path}, line {number}: not JSON ({error}); remove the file") from None

    def _other(self, name: str, has: object, meant: object) -> str:
        what = {
            "items": f"of a batch of {has} items, this one has {meant}",
            "output": f"of the results in {has!r}, --output is {meant!r}",
        }.get(name, "of another workflow or other values")
        return (
            f"--resume: {self.path} is {what}; to go on give the same options as before, to begin anew name another "
            "--output or remove both files"
        )


def _locked(path: Path) -> IO[bytes]:
    """The lock file, open and locked until it is closed or this process is gone."""
    try:
        file = path.open("ab")
    except OSError as error:
        raise Asked(f"--resume: {path}: {error.strerror or error}; give a folder that can be written to") from None
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (os_error("EACCES"), os_error("EAGAIN"), os_error("EDEADLK")):
            raise Asked(f"--resume: {path.with_suffix('')} is in use: another queue command runs this batch") from None
        raise Asked(f"--resume: {path} cannot be locked ({error.strerror}); name one on a local disk") from None
    return file


def os_error(name: str) -> int:
    """The number of an error that not every system has."""
    import errno

    return int(getattr(errno, name, -1))
