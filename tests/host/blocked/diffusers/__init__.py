"""Invariant: where this folder comes first on the path, diffusers is not installed."""

raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
