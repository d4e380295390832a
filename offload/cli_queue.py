"""`balanced-offload queue`. Guards: a bad option is one sentence and exit code 2 before the host is asked for anything.

0: every item of the batch that is done is fine. 1: an item failed or ran out of memory. 2: asked wrongly. 3: the host
could not be reached, or is none. 130: stopped by Ctrl+C. torch is never imported.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .queue.items import Batch
    from .queue.runner import Runner
    from .queue.server import Server

DONE, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
HOST = "http://127.0.0.1:8188"
ON_INTERRUPT = ("cancel", "leave")


def add_queue(commands: Any) -> None:
    """Add the sub-parser to the command line's."""
    queue = commands.add_parser(
        "queue",
        help="run a ComfyUI workflow with many values through the host's API; a row with its report per item",
        description="Queues a workflow in API format on a ComfyUI host once per combination of values, waits, and "
        "writes a row per item: status, verdict, times, peak VRAM, bytes moved, image names. The same command again "
        "goes on where it ended. Exit code: 0 all fine, 1 an item failed or ran out of memory, 2 asked wrongly, "
        "3 the host is not reachable, 130 interrupted.",
    )
    queue.add_argument("workflow", type=Path, metavar="WORKFLOW.json", help='as "Export (API)" writes it')
    queue.add_argument("--host", default=HOST, metavar="URL", help="http or https (%(default)s)")
    queue.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="NODE.INPUT=VALUE",
        help="a value, a range (1..20, 1..20:5), or a .csv or .txt file; NODE is an id, or a title or class if only "
        "one node has it; may be given more than once",
    )
    queue.add_argument(
        "--combine",
        default="product",
        metavar="HOW",
        help="several --set: product (every combination, the last one fastest) or zip (side by side) (%(default)s)",
    )
    queue.add_argument("--output", type=Path, metavar="FILE", help=".csv or .jsonl (WORKFLOW-results.csv, here)")
    queue.add_argument("--resume", type=Path, metavar="FILE", help="what a restart needs (the output's name + .resume)")
    queue.add_argument("--dry-run", action="store_true", help="print the items and do nothing else")
    queue.add_argument("--limit", type=int, metavar="N", help="at most N items now; the same command then goes on")
    queue.add_argument("--timeout", type=float, metavar="SECONDS", help="stop an item that runs longer")
    queue.add_argument(
        "--wait",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="give up when the host is away for longer (%(default)g)",
    )
    queue.add_argument("--keep-going", action="store_true", help="go on after an item that failed")
    queue.add_argument("--ahead", type=int, default=2, metavar="N", help="items with the host at a time (%(default)s)")
    queue.add_argument(
        "--on-interrupt",
        default="cancel",
        metavar="HOW",
        help="Ctrl+C: cancel (our waiting prompts and our running one) or leave them to the host (%(default)s)",
    )
    queue.set_defaults(run=run_queue)


def run_queue(arguments: argparse.Namespace) -> int:
    """`balanced-offload queue`."""
    from .queue.items import make_batch
    from .queue.server import Server
    from .queue.workflow import Asked, load_workflow

    try:
        _check(arguments)
        batch = make_batch(load_workflow(arguments.workflow), arguments.settings, arguments.combine)
        if arguments.dry_run:
            return _print_items(batch, arguments.limit)
        server = Server(arguments.host)
    except Asked as error:
        return _complain(str(error))
    try:
        return _run(arguments, batch, server)
    except Asked as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"the results could not be written ({error}); the same command goes on from here", FAILED)
    finally:
        server.close()


def _check(arguments: argparse.Namespace) -> None:
    from .queue.workflow import Asked

    for name, least in (("limit", 1), ("ahead", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise Asked(f"--{name}: got {value}, allowed: {least} or more")
    for name in ("timeout", "wait"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise Asked(f"--{name}: got {value:g}, allowed: seconds above zero")
    if arguments.on_interrupt not in ON_INTERRUPT:
        raise Asked(f"--on-interrupt: got {arguments.on_interrupt!r}, allowed: {', '.join(ON_INTERRUPT)}")


def _print_items(batch: Batch, limit: int | None) -> int:
    from .queue.progress import printable

    encoding = sys.stdout.encoding or "utf-8"
    for item in batch.items[:limit]:
        line = printable(f"{item.number}/{len(batch.items)}  {item}")
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    print(batch.sentence, file=sys.stderr)
    return DONE


def _run(arguments: argparse.Namespace, batch: Batch, server: Server) -> int:
    from .queue.journal import Journal
    from .queue.progress import Progress
    from .queue.results import Results
    from .queue.runner import GaveUp, Options, Runner
    from .queue.server import NotTheHost
    from .queue.workflow import Asked

    output = arguments.output or Path(f"{arguments.workflow.stem}-results.csv")
    resume = arguments.resume or output.with_name(output.name + ".resume")
    results = Results(output, [str(target) for target in batch.targets])
    if resume.resolve() == output.resolve():
        raise Asked(f"--resume: {resume} is the output; name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    with Journal(resume, batch.fingerprint, len(batch.items), output) as journal:
        lacked = results.repair(journal.done)
        total = len(batch.items)
        left = total - len(journal.done)
        progress = Progress(len(journal.done) + min(left, arguments.limit or left), len(journal.done))
        progress.say(f"{batch.sentence}; results: {output}")
        if journal.resumed:
            more = f" ({lacked} rows put back into {output.name})" if lacked else ""
            progress.say(f"{len(journal.done)} of {total} were done before{more}; remove both files to begin anew.")
        options = Options(
            arguments.timeout, arguments.wait, arguments.keep_going, arguments.limit, max(1, arguments.ahead)
        )
        runner = Runner(server, batch, journal, results, progress, options)
        code = None
        try:
            with _Terminated():
                _check_types(batch, runner)
                runner.run()
        except KeyboardInterrupt:
            progress.close()
            code = INTERRUPTED
            _interrupted(arguments, runner)
        except (GaveUp, NotTheHost) as error:
            progress.close()
            code = _complain(f"{error}; the same command goes on from here", UNREACHABLE)
        progress.close()
        failed = runner.failed()
        left = total - len(journal.done)
        rerun = sum(bool(row["rerun"]) for row in journal.done.values())
        parts = [f"{len(journal.done)} of {total} items done", f"{len(failed)} not fine", f"{rerun} run again"]
        print(", ".join(parts) + (f", {left} left" if left else "") + f": {output}", file=sys.stderr)
        return code if code is not None else FAILED if failed else DONE


def _check_types(batch: Batch, runner: Runner) -> None:
    """A fraction for an input with a whole number in the workflow: right for a FLOAT, cut off silently for an INT."""
    from .queue.server import Server
    from .queue.workflow import Asked, class_of, value_of

    for target, value in batch.floats():
        question = partial(Server.input_type, node_class=class_of(batch.prompt, target.node), name=target.input)
        if runner.ask(question) == "INT":
            present = value_of(batch.prompt, target)
            raise Asked(f"--set {target}: got {value:g}, allowed: whole numbers (the workflow has {present})")


def _interrupted(arguments: argparse.Namespace, runner: Runner) -> None:
    from .queue.server import Away, NotTheHost

    if arguments.on_interrupt == "leave":
        print("\nbalanced-offload: interrupted; what was queued is left to the host", file=sys.stderr)
        return
    try:
        count = runner.cancel()
        print(f"\nbalanced-offload: interrupted; {count} of our prompts taken back", file=sys.stderr)
    except (Away, NotTheHost) as error:
        print(f"\nbalanced-offload: interrupted; our prompts could not be taken back ({error})", file=sys.stderr)


class _Terminated:
    """SIGTERM ends it as Ctrl+C does, while this is entered."""

    def __enter__(self) -> None:
        self._before: Any = None
        try:
            self._before = signal.signal(signal.SIGTERM, _raise)
        except ValueError:  # not the main thread: nobody may set it there
            self._before = None

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _complain(text: str, code: int = USAGE) -> int:
    print(f"balanced-offload: {text}", file=sys.stderr)
    return code
