"""Schema, inputs and outputs as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar


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
    io_type: ClassVar[str] = "COMBO"
    options: list[str] = field(default_factory=list)


@dataclass
class Output:
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    io_type: str = ""


@dataclass
class NumberInput(Input):
    min: float | None = None
    max: float | None = None
    step: float | None = None
    control_after_generate: bool | None = None


@dataclass
class TextInput(Input):
    multiline: bool = False


class Hidden(str, Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


class Combo:
    io_type = "COMBO"
    Input = ComboInput


class Boolean:
    io_type = "BOOLEAN"

    class Input(Input):
        io_type = "BOOLEAN"


def Custom(io_type: str, input_type: type = Input) -> type:
    class CustomOutput(Output):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, io_type=io_type)

    # As the real ones: an input knows what its socket is called.
    typed_input = type(f"{io_type}Input", (input_type,), {"io_type": io_type})
    return type(io_type, (), {"io_type": io_type, "Input": typed_input, "Output": CustomOutput})


String = Custom("STRING", TextInput)
Float = Custom("FLOAT", NumberInput)
Int = Custom("INT", NumberInput)
Model, Clip, Vae, Image = Custom("MODEL"), Custom("CLIP"), Custom("VAE"), Custom("IMAGE")
AnyType = Custom("*")


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
    hidden = SimpleNamespace(unique_id=None, prompt=None)


class ComfyExtension:
    pass
