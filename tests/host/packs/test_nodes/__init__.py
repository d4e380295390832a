"""Invariant: graphs of tiny models run on the host's own nodes; these only stand in for what no tiny model can give.

Test only: random conditioning, a text encoder of another width than the host expects, and a digest of any tensor, so
that bits can be compared through the API.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any, ClassVar

import torch

# kind -> (tokens, width, pooled width)
WIDTHS = {"wan": (8, 4096, 0), "sd3": (8, 4096, 1344), "sd15": (8, 768, 0)}
TINY_WIDTH = 64
CLIP_CONFIG = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}


def random_conditioning(kind: str, seed: int) -> list[Any]:
    tokens, width, pooled = WIDTHS[kind]
    generator = torch.Generator().manual_seed(seed)
    extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
    return [[torch.randn(1, tokens, width, generator=generator), extra]]


def accept_tiny_text_encoders() -> None:
    """The host tells a text encoder's kind from its file, but not its sizes: tell it those of the tiny one.

    Both of `comfy.sd`'s functions take them as options; loaders, stock or ours, never pass any.
    """
    import comfy.sd

    def is_tiny(state: dict[str, Any]) -> bool:
        return any(
            name.endswith("token_embedding.weight") and tuple(value.shape)[-1] == TINY_WIDTH
            for name, value in state.items()
        )

    def options_for(given: dict[str, Any] | None) -> dict[str, Any]:
        return {**(given or {}), "model_config": dict(CLIP_CONFIG)}

    encoders, checkpoints = comfy.sd.load_text_encoder_state_dicts, comfy.sd.load_state_dict_guess_config
    if getattr(encoders, "knows_tiny", False):
        return

    def load_text_encoder_state_dicts(state_dicts: Any = (), *rest: Any, **options: Any) -> Any:
        if any(map(is_tiny, state_dicts)):
            options["model_options"] = options_for(options.get("model_options"))
        return encoders(state_dicts, *rest, **options)

    def load_state_dict_guess_config(sd: Any, *rest: Any, **options: Any) -> Any:
        if is_tiny(sd):
            options["te_model_options"] = options_for(options.get("te_model_options"))
        return checkpoints(sd, *rest, **options)

    load_text_encoder_state_dicts.knows_tiny = True  # type: ignore[attr-defined]
    comfy.sd.load_text_encoder_state_dicts = load_text_encoder_state_dicts
    comfy.sd.load_state_dict_guess_config = load_state_dict_guess_config


def digest(value: Any) -> str:
    """SHA-256 over shape, type and bytes of every tensor in `value`."""
    sha = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().contiguous()
            sha.update(f"{tuple(item.shape)}{item.dtype}".encode())
            sha.update(item.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for part in item:
                add(part)

    add(value)
    return sha.hexdigest()


class AnyType(str):
    """Equal to every other type name, as the host compares them."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True


class Conditioning:
    """Random conditioning for a tiny model."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (sorted(WIDTHS),), "seed": ("INT", {"default": 1, "min": 0, "max": 1 << 30})}}

    def make(self, kind: str, seed: int) -> tuple[Any]:
        return (random_conditioning(kind, seed),)


class Digest:
    """Writes the SHA-256 of what it gets under `digest` in the history."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "make", "test", True
    INPUT: ClassVar[dict[str, Any]] = {"required": {"value": (AnyType("*"), {})}}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return cls.INPUT

    def make(self, value: Any) -> dict[str, Any]:
        return {"ui": {"digest": [digest(value)]}, "result": ()}


class OpenedFiles:
    """Which model files the process opened since the last look.

    Python's own `open` raises an audit event. The safetensors library opens files outside of Python: it gets one here.
    """

    def __init__(self) -> None:
        import safetensors
        import safetensors.torch

        self.paths: list[str] = []
        sys.addaudithook(self.see)
        real = safetensors.safe_open

        def safe_open(filename: Any, *rest: Any, **options: Any) -> Any:
            sys.audit("open", os.fspath(filename), "r", 0)
            return real(filename, *rest, **options)

        safetensors.safe_open = safetensors.torch.safe_open = safe_open

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith((".safetensors", ".sft")):
            self.paths.append(arguments[0])

    def take(self) -> list[str]:
        taken, self.paths = self.paths, []
        return taken


def routes() -> None:
    """What the tests ask the server's process about itself."""
    import psutil
    from aiohttp import web
    from server import PromptServer

    opened = OpenedFiles()

    @PromptServer.instance.routes.get("/test/process")
    async def process(request: Any) -> Any:
        return web.json_response({"rss": psutil.Process().memory_info().rss, "opened": opened.take()})


class ExpandedSampler:
    """Becomes a KSampler when it runs, as a loop or a subgraph of nodes' own making does."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import nodes

        described: dict[str, Any] = nodes.KSampler.INPUT_TYPES()
        return described

    def make(self, **inputs: Any) -> dict[str, Any]:
        from comfy_execution.graph_utils import GraphBuilder

        graph = GraphBuilder()
        sampler = graph.node("KSampler", **inputs)
        return {"result": (sampler.out(0),), "expand": graph.finalize()}


NODE_CLASS_MAPPINGS = {
    "TestConditioning": Conditioning,
    "TestDigest": Digest,
    "TestExpandedSampler": ExpandedSampler,
}

if "server" in sys.modules and getattr(getattr(sys.modules["server"], "PromptServer", None), "instance", None):
    accept_tiny_text_encoders()
    routes()
