"""Guards: a command says what went wrong in one sentence and a number: 0 done, 1 a check failed, 2 asked wrongly, 130.

`balanced-offload demo | probe | plan | bench | queue`. With `--json` the document is all that standard output gets;
what people read goes to standard error then. torch is imported by a command, not by its help.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .version import version

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
STDOUT = "-"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from .cli_bench import add_bench  # which needs this module to write its document
    from .cli_queue import add_queue

    parser = argparse.ArgumentParser(
        prog="balanced-offload",
        description="Say how much VRAM a diffusion model may use: what fits stays resident, the rest streams.",
    )
    parser.add_argument("--version", action="version", version=f"balanced-offload {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_probe(commands)
    _add_plan(commands)
    add_bench(commands)
    add_queue(commands)
    return parser


def _add_json(parser: argparse.ArgumentParser, schema: str) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help=f"write {schema} to FILE, or to standard output, which gets nothing else",
    )


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="draw digits in every mode under a cap below the weights, and check every claim",
        description="Draws digits with a small text-to-image pipeline in every offload mode, on the GPU, else on the "
        "simulated accelerator, else on the plain CPU with a predicted table. Exit code 1 if any check fails.",
    )
    _add_json(demo, "offload-demo/1")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("balanced-offload-demo"),
        metavar="DIR",
        help="folder for the files (%(default)s)",
    )
    demo.add_argument(
        "--mode",
        nargs="+",
        action="extend",
        metavar="MODE",
        help="only these modes: none, balanced, model, sequential, auto (none always runs, as the reference)",
    )
    demo.add_argument("--cap", metavar="SIZE", help='VRAM that the run may use ("15MiB"; "80%%" is of its weights)')
    demo.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (the best there is), simulated, cuda or cpu",
    )
    demo.add_argument("--pictures", type=int, default=50, metavar="N", help="pictures to judge (%(default)s)")
    demo.add_argument("--card", metavar="KEY", help="the card whose clock the simulated accelerator takes")
    demo.set_defaults(run=run_demo)


def _add_probe(commands: Any) -> None:
    probe = commands.add_parser(
        "probe",
        help="this machine, the profile that applies and why, and a block for a bug report",
        description="Prints the machine, the profile that applies and why, and a block to paste into a bug report. "
        "Names no user and no path.",
    )
    _add_json(probe, "offload-probe/1")
    probe.set_defaults(run=run_probe)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what would I get on that card: the plan, it/s in every mode and with other libraries",
        description="Predicts the denoiser's step on a card that need not be here: the best plan, every mode, the "
        "bound, and the strategies of other libraries under the same rates. What is left out is this machine's, "
        "measured or stored, else assumed, and the output says which. Nothing is run and no weights are loaded.",
    )
    plan.add_argument(
        "--model",
        required=True,
        metavar="NAME|PATH",
        help="sdxl, sd35-large, flux1-dev, qwen-image, wan21-14b, or a .safetensors file or model folder",
    )
    plan.add_argument("--vram", metavar="SIZE", help='the card\'s memory ("16GiB")')
    plan.add_argument("--bandwidth", metavar="RATE", help='copies from pinned memory ("24GB/s")')
    plan.add_argument("--pageable", metavar="RATE", help='copies from pageable memory ("8GB/s")')
    plan.add_argument("--tflops", metavar="N", help="TFLOP/s reached over a whole step (some 60 %% of the data sheet)")
    plan.add_argument("--card", metavar="KEY", help="a known card for what is left out, for example rtx4080-16g")
    plan.add_argument("--resolution", metavar="WxH[xF]", help='"1024x1024", a video "832x480x81" (the model\'s usual)')
    plan.add_argument("--dtype", metavar="DTYPE", help="of the weights: bf16, fp16, fp32 (bf16; a file's own)")
    plan.add_argument("--activations", metavar="SIZE", help="what results take (counted, at least 2 GiB)")
    plan.add_argument("--reserve", metavar="SIZE", help="left to other programs (0)")
    _add_json(plan, "offload-plan/1")
    plan.set_defaults(run=run_plan)


def run_demo(arguments: argparse.Namespace) -> int:
    """`balanced-offload demo`."""
    from .demo.options import MODES, MissingExtras, Options
    from .demo.output import closing_text
    from .demo.places import CHOICES
    from .demo.run import run_demo

    modes = tuple(arguments.mode) if arguments.mode else MODES
    for mode in modes:
        if mode not in MODES:
            return complain(f"--mode: got {mode!r}, allowed: {', '.join(MODES)}")
    if arguments.device not in CHOICES:
        return complain(f"--device: got {arguments.device!r}, allowed: {', '.join(CHOICES)}")
    if arguments.pictures < 1:
        return complain(f"--pictures: got {arguments.pictures}, allowed: 1 or more")
    people = sys.stderr if arguments.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=people, flush=True)

    options = Options(modes, arguments.cap, arguments.device, arguments.card, arguments.pictures, arguments.out)
    try:
        demo = run_demo(options, say)
    except MissingExtras as error:
        return complain(str(error))
    except ValueError as error:
        return complain(str(error))
    except OSError as error:
        return complain(f"--out: {error}")
    for text in closing_text(demo.document, options.out, demo.files):
        say(text)
    for text in demo.failures:
        print(f"FAILED  {text}", file=sys.stderr)
    code = write_json(demo.document, arguments.json)
    return code or (FAILED if demo.failures else DONE)


def run_probe(arguments: argparse.Namespace) -> int:
    """`balanced-offload probe`."""
    from .probe import probe, probe_text

    document = probe()
    if not arguments.json:
        print(probe_text(document))
        return DONE
    return write_json(document, arguments.json)


def run_plan(arguments: argparse.Namespace) -> int:
    """`balanced-offload plan`."""
    from .advice_options import Asked
    from .advice_run import advise_asked
    from .advice_text import advice_text

    names = (
        "model",
        "vram",
        "bandwidth",
        "tflops",
        "resolution",
        "dtype",
        "activations",
        "card",
        "pageable",
        "reserve",
    )
    try:
        document = advise_asked(Asked(**{name: getattr(arguments, name) for name in names}))
    except ImportError as error:
        return complain(f"plan needs diffusers to know its models ({error}); install balanced-offload[demo]")
    except ValueError as error:
        return complain(str(error))
    print(advice_text(document), file=sys.stderr if arguments.json == STDOUT else sys.stdout, end="", flush=True)
    return write_json(document, arguments.json)


def write_json(document: Mapping[str, Any], target: str | None) -> int:
    """Write the document to standard output ("-") or a file; DONE, or USAGE where the file cannot be written."""
    if target is None:
        return DONE
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    if target == STDOUT:
        print(text, flush=True)
        return DONE
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        return complain(f"--json: {error}")
    return DONE


def complain(text: str) -> int:
    """One sentence on standard error; the exit code for it."""
    print(f"balanced-offload: {text}", file=sys.stderr)
    return USAGE


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; the exit code. argparse itself leaves with 2 on a bad command line."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("\nbalanced-offload: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
