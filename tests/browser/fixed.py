"""Invariant: what never changes in the stub's answers is data in one place; it is of our own writing.

The routes that a front end asks at its start, the settings that keep its tours and dialogs away, and an empty page with
the host's CSS variables for parts that need no front end.
"""

from __future__ import annotations

from typing import Any

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
FIXED: dict[str, Any] = {
    "/users": {"storage": "server", "migrated": True},
    "/queue": {"queue_running": [], "queue_pending": []},
    "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False}},
    "/system_stats": {
        "system": {
            **{"os": "linux", "ram_total": 64 << 30, "ram_free": 48 << 30, "comfyui_version": "0.33.0"},
            **{"python_version": "3.12", "pytorch_version": "2.13.0", "embedded_python": False, "argv": []},
            "installed_templates_version": None,
        },
        "devices": [],
    },
    **{path: [] for path in ("/experiment/models", "/embeddings", "/userdata", "/v2/userdata", "/assets")},
    **{
        path: {}
        for path in ("/features", "/global_subgraphs", "/workflow_templates", "/history", "/internal/folder_paths")
    },
    "/history_v2": {"history": []},
    "/prompt": {"exec_info": {"queue_remaining": 0}},
}

VARIABLES = (
    "fg-color bg-color comfy-menu-bg comfy-menu-secondary-bg comfy-input-bg input-text descrip-text border-color"
)
VARIABLES += " drag-text error-text tr-even-bg-color tr-odd-bg-color content-bg content-fg content-hover-bg"
COLOURS = {
    "dark": "#fff #202020 #171718 #303030 #222 #ddd #999 #4e4e4e #ccc #f44 #222 #353535 #4e4e4e #fff #222",
    "light": "#222 #ddd #f5f5f5 #eee #c9c9c9 #222 #444 #888 #555 #c00 #f9f9f9 #fff #e0e0e0 #222 #adadad",
}
"""The host's variables that extensions use, as its two usual palettes have them."""


def plain(theme: str) -> str:
    """An empty page in one of the host's two usual palettes."""
    pairs = zip(VARIABLES.split(), COLOURS[theme].split(), strict=True)
    values = ";".join(f"--{name}:{value}" for name, value in pairs)
    dark = "dark-theme" if theme == "dark" else ""
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>plain</title>
<link rel="icon" href="data:,">
<style>:root{{{values}}} body{{margin:16px;background:var(--comfy-menu-bg);color:var(--fg-color);
font:14px Arial,sans-serif}}</style></head><body class="{dark}"><main></main></body></html>"""
