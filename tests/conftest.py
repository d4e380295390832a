"""Invariant: tests see this checkout as `balanced_offload`, never the network, and leave the simulated device empty.

The root `__init__.py` makes the repo a package under any folder name; it is registered here, so that `pytest` works
without an install and an installed copy of another version is never tested by mistake.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

# Before torch is imported: small tests on many workers are faster on one thread each, and sums come out in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "balanced_offload"

torch.set_num_threads(1)


def _register_checkout() -> None:
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


if PACKAGE not in sys.modules:
    _register_checkout()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's top folder."""
    return ROOT
