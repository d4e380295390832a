"""Invariant: the node translates widgets to OffloadPolicy and nothing else; the core judges the values.

Imported only when a ComfyUI host asks for the nodes (see extension.py), since it needs `comfy_api`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from .summary import cannot_hold, describe_here
from .widgets import POLICY_WIDGETS, Widget, read_policy

PolicySocket = io.Custom("OFFLOAD_POLICY")


def known_to_host(make: Callable[..., Any], **options: Any) -> Any:
    """Call `make` with those of `options` that this host's version takes: older ones lack `advanced`, for example."""
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return make(**options)
    return make(**{name: value for name, value in options.items() if name in parameters})


def _input(widget: Widget) -> Any:
    kinds = {"choice": io.Combo, "text": io.String, "switch": io.Boolean}
    options: dict[str, Any] = {
        "id": widget.name,
        "display_name": widget.label,
        "tooltip": widget.tooltip,
        "default": widget.default,
        # A script may leave out what it does not care about, and fields to come break no saved workflow.
        "optional": widget.name != "mode",
        "advanced": widget.advanced,
    }
    if widget.kind == "choice":
        options["options"] = list(widget.options)
    return known_to_host(kinds[widget.kind].Input, **options)


class OffloadPolicyNode(io.ComfyNode):
    """Says how much VRAM a model may use; every node of this pack that loads or samples takes the result."""

    @classmethod
    def define_schema(cls) -> Any:
        return known_to_host(
            io.Schema,
            node_id="OffloadPolicy",
            display_name="Offload Policy",
            category="Offload",
            description="How much VRAM a model may use: what fits stays resident, the rest streams behind the compute.",
            search_aliases=["vram", "lowvram", "offload", "block swap", "memory", "oom", "unload", "purge"],
            inputs=[_input(widget) for widget in POLICY_WIDGETS],
            outputs=[
                PolicySocket.Output(
                    "policy", display_name="policy", tooltip="For the nodes of this pack that load or sample a model."
                ),
                io.String.Output(
                    "summary", display_name="summary", tooltip="What the policy resolves to on this machine."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, **widgets: Any) -> bool | str:
        """Before the run, for what is no link (a link arrives as None): what no machine or not this one can hold."""
        try:
            policy = read_policy({name: value for name, value in widgets.items() if value is not None})
        except (ValueError, TypeError) as error:
            return str(error)
        return cannot_hold(policy) or True

    @classmethod
    def execute(cls, **widgets: Any) -> Any:
        policy = read_policy(widgets)
        return io.NodeOutput(policy, describe_here(policy))
