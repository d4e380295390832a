"""The command as a process of its own, with this checkout as `balanced_offload` and no help from the tests' process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import importlib.util, sys
root = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location(
    "balanced_offload", root + "/__init__.py", submodule_search_locations=[root]
)
module = sys.modules["balanced_offload"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from balanced_offload.offload.cli import main
code = main(sys.argv[1:])
AFTER
sys.exit(code)
"""


def start_command(*arguments: str, after: str = "") -> subprocess.Popen[str]:
    """`balanced-offload arguments`; both streams as text. `after`: a statement to run at its end."""
    code = CODE.replace("AFTER", after)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
