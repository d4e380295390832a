"""Schema, inputs and outputs as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Input:
    id: str
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    lazy: bool | None = None
    default: Any = None
    advanced: bool | None = None


@dataclass
class ComboInput(Input):
    options: list[str] = field(default_factory=list)


@dataclass
class Output:
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    io_type: str = ""


class Combo:
    io_type = "COMBO"
    Input = ComboInput


class Boolean:
    io_type = "BOOLEAN"

    class Input(Input):
        pass


class String:
    io_type = "STRING"

    class Input(Input):
        pass

    class Output(Output):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, io_type="STRING")


def Custom(io_type: str) -> type:
    class CustomOutput(Output):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, io_type=io_type)

    return type(io_type, (), {"io_type": io_type, "Input": Input, "Output": CustomOutput})


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_output_node: bool = False


class NodeOutput:
    def __init__(self, *results: Any, ui: dict[str, Any] | None = None) -> None:
        self.result = results
        self.ui = ui


class ComfyNode:
    pass


class ComfyExtension:
    pass
