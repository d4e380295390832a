"""Invariant: in this process diffusers is not installed: nothing finds it, as where it never was. Test only.

The host runs this file before it imports any pack.
"""

from __future__ import annotations

import sys
from typing import Any


class Without:
    """A finder of modules that does not find one of them."""

    def __init__(self, finder: Any, name: str) -> None:
        self.finder, self.name = finder, name

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] == self.name:
            return None
        return self.finder.find_spec(fullname, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder, "diffusers") for finder in sys.meta_path]
