"""VAE tiling on behalf of the policy. Invariant: a VAE that the user tiled, or did not, is found so afterwards.

Tiles change pixels. A VAE that works in tiles by our doing is named here, so that the report can say so.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_ABSENT = object()


class Tiling:
    """Which VAEs work in tiles by our doing, and what they were before."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[nn.Module, dict[str, Any]]] = {}

    @property
    def active(self) -> frozenset[str]:
        """Names of the VAEs that we switched to tiles."""
        return frozenset(self._before)

    def on(self, name: str, vae: nn.Module) -> bool:
        """Switch to tiles; False where it works in tiles already or cannot."""
        enable = getattr(vae, "enable_tiling", None)
        if enable is None or name in self._before or getattr(vae, "use_tiling", False):
            return False
        before = dict(vae.__dict__)
        try:
            enable()
        except NotImplementedError:
            return False
        changed = {k: before.get(k, _ABSENT) for k, v in vae.__dict__.items() if before.get(k, _ABSENT) is not v}
        if not changed:
            return False
        self._before[name] = vae, changed
        return True

    def off(self, name: str) -> None:
        """Put a VAE that we switched back to what it was."""
        vae, changed = self._before.pop(name, (None, {}))
        if vae is None:
            return
        for key, value in changed.items():
            if value is _ABSENT:
                vae.__dict__.pop(key, None)
            else:
                vae.__dict__[key] = value

    def all_off(self) -> None:
        """Put every VAE that we switched back."""
        for name in list(self._before):
            self.off(name)
