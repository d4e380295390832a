"""`balanced-offload bench`. Guards: a bad option is one sentence and exit code 2, before anything is loaded or built.

0: done; 1: a check failed (outputs of ours differ, ours races, a mode that must run did not); 2: asked wrongly.
torch is imported when it runs, not for its help.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

DONE, FAILED, USAGE = 0, 1, 2
STDOUT = "-"


def add_bench(commands: Any) -> None:
    """Add the sub-parser to the command line's."""
    bench = commands.add_parser(
        "bench",
        help="ours and the real libraries side by side: step time, memory, copies, outputs compared bit for bit",
        description="Runs denoisers of real size under VRAM caps with each of our modes and with the offloaders of "
        "diffusers and accelerate themselves: same weights, inputs and clock. On the simulated accelerator large "
        "arithmetic is left out, and outputs are compared on a tiny twin. Exit code 1 if a check of ours fails.",
    )
    bench.add_argument("--suite", default="peers", help="peers, or peers-small (a cut FLUX; a minute) (%(default)s)")
    bench.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write offload-bench/1 to FILE, or to standard output, which gets nothing else",
    )
    bench.add_argument("--device", default="vram", help="vram (the simulated accelerator), or cuda (%(default)s)")
    bench.add_argument("--model", nargs="+", metavar="NAME", help="only these models")
    bench.add_argument("--cap", nargs="+", metavar="SIZE", help='VRAM that a run may use ("12GiB"), one or more')
    bench.add_argument("--card", metavar="KEY", help="the card whose rates the simulated accelerator takes")
    bench.add_argument("--resolution", nargs="+", metavar="WxH", help='of the picture ("512x512", or 512 for short)')
    bench.add_argument("--steps", type=int, default=3, metavar="N", help="timed steps per strategy (%(default)s)")
    bench.add_argument("--rounds", type=int, metavar="N", help="set-ups of each strategy (1; on a GPU 2)")
    bench.add_argument("--only", nargs="+", metavar="NAME", help="only these strategies, or families (ours diffusers)")
    bench.add_argument("--python-time", action="store_true", help="a second step time with Python's CPU time counted")
    bench.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.md and bench.png")
    bench.add_argument("--resume", action="store_true", help="keep what the JSON file has already, run the rest")
    bench.add_argument("--limit", type=float, metavar="SECONDS", help="begin nothing more after that; --resume goes on")
    bench.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> int:
    """Run it; the exit code."""
    target = None if arguments.json in (None, STDOUT) else Path(arguments.json)
    if arguments.resume and target is None:
        return _complain("--resume: got no --json FILE to resume from; name the file of the earlier run")
    if arguments.steps < 1:
        return _complain(f"--steps: got {arguments.steps}, allowed: 1 or more")
    if arguments.limit is not None and not arguments.limit > 0:
        return _complain(f"--limit: got {arguments.limit:g}, allowed: seconds above zero")
    if arguments.rounds is not None and arguments.rounds < 1:
        return _complain(f"--rounds: got {arguments.rounds}, allowed: 1 or more")
    for option, folder in (("--json", target.parent if target else None), ("--out", arguments.out)):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                return _complain(f"{option}: {error}")
    try:
        document = _run(arguments, target)
    except (ValueError, OSError) as error:
        return _complain(str(error))
    except ImportError as error:
        return _complain(f"bench needs diffusers, accelerate and matplotlib ({error}); install balanced-offload[demo]")
    if arguments.json == STDOUT:
        from .cli import write_json

        write_json(document, STDOUT)
    for text in document["failures"]:
        print(f"FAILED  {text}", file=sys.stderr)
    return FAILED if document["failures"] else DONE


def _run(arguments: argparse.Namespace, target: Path | None) -> dict[str, Any]:
    from .bench.cases import cases_of
    from .bench.chart import chart_png
    from .bench.places import open_place
    from .bench.run import Options, run_suite
    from .bench.strategies import chosen
    from .bench.tables import closing_text, write_markdown

    people = sys.stderr if arguments.json == STDOUT else sys.stdout

    def say(text: str) -> None:
        print(text, file=people, flush=True)

    simulated = arguments.device == "vram"
    cases = cases_of(arguments.suite, simulated, arguments.model, arguments.cap, arguments.card, arguments.resolution)
    strategies = chosen(arguments.only)
    place = open_place(arguments.device)
    options = Options(
        suite=arguments.suite,
        cases=cases,
        strategies=strategies,
        steps=arguments.steps,
        rounds=arguments.rounds or (1 if simulated else 2),
        python_time=arguments.python_time,
        resume=arguments.resume,
        path=target,
        limit_s=arguments.limit,
    )
    document = run_suite(place, options, say)
    say(closing_text(document))
    if not document["complete"]:
        say(f"\nNot complete: stopped after {arguments.limit:g} s. The same with --resume goes on.")
    if arguments.out is not None:
        files = [write_markdown(document, arguments.out / "bench.md"), chart_png(document, arguments.out / "bench.png")]
        say(f"\nWritten to {arguments.out}: {', '.join(path.name for path in files)}.")
    return document


def _complain(text: str) -> int:
    print(f"balanced-offload: {text}", file=sys.stderr)
    return USAGE
