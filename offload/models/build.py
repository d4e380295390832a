"""Invariant: a model of real size costs no RAM: its parameters are memory that nobody has written to.

What is real is the structure: classes, shapes, dtypes, ties, and buffers that are computed from the configuration.
Values are undefined, so these models are for counting bytes and time (the simulator's ghost mode). `tiny` builds the
same pipeline classes with small widths and real random weights, for all that compares values. Nothing is downloaded.

The JSON files beside this module hold per component the class, its configuration, what the tiny twin changes in it, and
the parameter count of the published model, which the tests compare.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .tokens import toy_tokenizer

FOLDER = Path(__file__).parent
NAMES: tuple[str, ...] = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
_DENOISERS = ("transformer", "unet")
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace}
# Between the largest buffer that these models compute (512 positions) and the weights that matter (16 M elements).
_SMALL = 1 << 16
# Above the tables that are computed anew in each process (4096 x 64), below those that are stored (22 M).
_LARGE = 1 << 22


class _LargeOnMeta(TorchFunctionMode):
    """Tensors made under it hold no data above `_SMALL` elements; the small ones are real, buffers among them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None:
            sketch = func(*args, **{**kwargs, "device": "meta"})
            if sketch.numel() > _SMALL:
                return sketch
        # A table of positions (SD3's has 90 M elements) starts as an outer product; it is stored with the weights.
        if func is torch.outer and args[0].numel() * args[1].numel() > _LARGE:
            args = tuple(vector.to("meta") for vector in args)
        return func(*args, **kwargs)


def load_spec(name: str) -> dict[str, Any]:
    """The JSON document of one model.

    Raises:
        ValueError: no such model; names the ones there are.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model: {name!r} is not known, allowed: {', '.join(NAMES)}{hint}")
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return document


def build_model(name: str, dtype: torch.dtype = torch.bfloat16, pinned: bool = False) -> dict[str, nn.Module]:
    """Component name -> module in evaluation mode, every parameter on the CPU in `dtype` with undefined values.

    pinned: page-locked parameters; torch needs an accelerator for that, the simulated one will do.
    Costs under 1 GiB of RAM whatever the model's size, as long as nobody writes to the parameters.

    Raises:
        ValueError: no such model.
        ImportError: diffusers or transformers is not installed.
    """
    components: dict[str, nn.Module] = {}
    for component, entry in load_spec(name)["components"].items():
        with _LargeOnMeta():
            module = _construct(entry, entry["config"])
        components[component] = _give_untouched_memory(module, dtype, pinned)
    return components


def build_pipeline(name: str, dtype: torch.dtype = torch.bfloat16, pinned: bool = False) -> Any:
    """The diffusers pipeline of real size around `build_model`'s components: toy tokenizers, the real scheduler."""
    return _assemble(load_spec(name), build_model(name, dtype, pinned), tiny_sizes=False)


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The same pipeline with tiny widths and weights drawn from `seed`; torch's global generator is left alone."""
    spec = load_spec(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components = {
            # nn.Module's own `to`: one dtype throughout, where diffusers warns about parts that it would keep in fp32.
            component: nn.Module.to(_construct(entry, _merged(entry["config"], entry["tiny"])), dtype)
            for component, entry in spec["components"].items()
        }
    return _assemble(spec, components, tiny_sizes=True)


def denoiser_name(name: str) -> str:
    """Which component of the model is run in every step: "transformer" or "unet"."""
    components: dict[str, Any] = load_spec(name)["components"]
    return next(component for component in components if component in _DENOISERS)


def build_denoiser(
    name: str, dtype: torch.dtype = torch.bfloat16, tiny: bool = False, seed: int = 0, pinned: bool = False
) -> nn.Module:
    """The model that is run in every step alone, in evaluation mode; the other components are not built.

    Of real size (on the CPU, values undefined, page-locked if `pinned`), or with `tiny` the twin's widths and random
    weights drawn from `seed`, which are others than `tiny(name, seed=seed)` draws for it.

    Raises:
        ValueError: no such model.
        ImportError: diffusers is not installed.
    """
    entry = load_spec(name)["components"][denoiser_name(name)]
    if tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = nn.Module.to(_construct(entry, _merged(entry["config"], entry["tiny"])), dtype)
        return _pinned(module) if pinned else module
    with _LargeOnMeta():
        module = _construct(entry, entry["config"])
    return _give_untouched_memory(module, dtype, pinned)


def meta_denoiser(name: str, dtype: torch.dtype = torch.bfloat16, tiny: bool = False) -> nn.Module:
    """The denoiser on the meta device: shapes and dtypes, no memory at all."""
    entry = load_spec(name)["components"][denoiser_name(name)]
    with torch.device("meta"):
        module = _construct(entry, _merged(entry["config"], entry["tiny"]) if tiny else entry["config"])
    return nn.Module.to(module, dtype)


def call_arguments(name: str, tiny_sizes: bool = False) -> dict[str, Any]:
    """How the pipeline is usually called: pixels, steps, guidance, and a prompt. The caller adds a generator."""
    arguments: dict[str, Any] = load_spec(name)["tiny_call" if tiny_sizes else "call"]
    return {"prompt": "a photo of a cat", **arguments}


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`config` with `changes`, key by key also where both hold an object."""
    return {
        **config,
        **{
            key: _merged(config[key], value) if isinstance(value, dict) and isinstance(config.get(key), dict) else value
            for key, value in changes.items()
        },
    }


def _pinned(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.pin_memory()
    return module


def _construct(entry: dict[str, Any], config: dict[str, Any]) -> nn.Module:
    kind = getattr(importlib.import_module(entry["library"]), entry["class"])
    module = kind(kind.config_class(**config)) if entry["library"] == "transformers" else kind(**config)
    assert isinstance(module, nn.Module)
    return module.eval().requires_grad_(False)


def _give_untouched_memory(module: nn.Module, dtype: torch.dtype, pinned: bool) -> nn.Module:
    """Replace every parameter, and every large buffer that is stored with them, by untouched memory.

    What several modules share stays shared.
    """
    fresh: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old one, so that its id is not given out again
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fresh:
                kind = dtype if parameter.is_floating_point() else parameter.dtype
                memory = torch.empty(parameter.shape, dtype=kind, device="cpu", pin_memory=pinned)
                fresh[id(parameter)] = parameter, nn.Parameter(memory, requires_grad=False)
            owner._parameters[key] = fresh[id(parameter)][1]
        for key, buffer in owner._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta:
                if key in owner._non_persistent_buffers_set:
                    raise ValueError(
                        f"{type(owner).__name__}.{key}: a buffer of {buffer.numel()} elements is not computed"
                    )
                owner._buffers[key] = torch.empty(buffer.shape, dtype=dtype, device="cpu", pin_memory=pinned)
                continue
            real = buffer.to(dtype) if buffer.is_floating_point() else buffer
            owner._buffers[key] = real.pin_memory() if pinned else real
    return module


def _assemble(spec: dict[str, Any], components: dict[str, nn.Module], tiny_sizes: bool) -> Any:
    diffusers = importlib.import_module("diffusers")
    vocabulary = {key: getattr(module, "config", None) for key, module in components.items()}
    tokenizers = {
        key: toy_tokenizer(vocabulary[key.replace("tokenizer", "text_encoder")], longest)
        for key, longest in spec["tokenizers"].items()
    }
    scheduler = getattr(diffusers, spec["scheduler"]["class"])(**spec["scheduler"]["config"])
    pipe = getattr(diffusers, spec["pipeline"])(**components, **tokenizers, scheduler=scheduler, **spec["arguments"])
    if "{}" in getattr(pipe, "prompt_template_encode", ""):
        # The tokens ahead of the prompt are dropped by number: the toy's start token, and one for each character.
        pipe.prompt_template_encode_start_idx = 1 + pipe.prompt_template_encode.index("{}")
    pipe.set_progress_bar_config(disable=True)
    return pipe
