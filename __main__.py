"""Invariant: `python -m balanced_offload` and the console script `balanced-offload` run the same function."""

from __future__ import annotations

import sys

from .offload.cli import main

if __name__ == "__main__":
    sys.exit(main())
