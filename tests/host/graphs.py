"""Invariant: two graphs that are compared differ in the loaders alone: seeds, sizes, samplers and prompts are one.

Graphs in the host's API format: {node id: {"class_type": ..., "inputs": {...}}}.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

Graph = dict[str, Any]
Link = list[Any]
MODES = ("auto", "none", "balanced", "model", "sequential")


class Builder:
    """Puts nodes into a graph one after another; their ids count up from 1."""

    def __init__(self) -> None:
        self.graph: Graph = {}
        self._ids = itertools.count(1)

    def add(self, class_type: str, **inputs: Any) -> str:
        node = str(next(self._ids))
        self.graph[node] = {"class_type": class_type, "inputs": inputs}
        return node


def stock_loaders(build: Builder) -> tuple[Link, Link, Link]:
    """Tiny SD3, its text encoder and TAESD by the host's loaders -> model, clip, vae."""
    model = build.add("UNETLoader", unet_name="tiny_sd3.safetensors", weight_dtype="default")
    clip = build.add("CLIPLoader", clip_name="tiny_clip.safetensors", type="sd3")
    vae = build.add("VAELoader", vae_name="taesd3")
    return [model, 0], [clip, 0], [vae, 0]


def policy_node(build: Builder, fields: dict[str, Any]) -> Link:
    """An OffloadPolicy with these fields; what is left out has its default."""
    return [build.add("OffloadPolicy", **{"mode": "auto", **fields}), 0]


def our_loaders(build: Builder, fields: dict[str, Any]) -> tuple[Link, Link, Link]:
    """The same files by ModelLoaderWithOffload."""
    loader = build.add(
        "ModelLoaderWithOffload",
        policy=policy_node(build, fields),
        checkpoint="none",
        diffusion_model="tiny_sd3.safetensors",
        text_encoder="tiny_clip.safetensors",
        text_encoder_2="none",
        text_encoder_3="none",
        clip_type="sd3",
        vae="taesd3",
        weight_dtype="default",
    )
    return [loader, 0], [loader, 1], [loader, 2]


def applied(build: Builder, fields: dict[str, Any]) -> tuple[Link, Link, Link]:
    """The host's loaders with ApplyOffloadPolicy behind them."""
    model, clip, vae = stock_loaders(build)
    node = build.add("ApplyOffloadPolicy", policy=policy_node(build, fields), model=model, clip=clip, vae=vae)
    return [node, 0], [node, 1], [node, 2]


def draw(
    build: Builder,
    model: Link,
    clip: Link,
    vae: Link,
    *,
    prompt: str = "a cat",
    seed: int = 5,
    lora: str | None = None,
    image: str | None = None,
    steps: int = 3,
    size: int = 64,
    batch: int = 1,
    save: bool = False,
) -> Graph:
    """txt2img, or img2img from the input file `image`, with digests of the latent and the picture."""
    if lora is not None:
        node = build.add("LoraLoader", model=model, clip=clip, lora_name=lora, strength_model=0.8, strength_clip=0.0)
        model, clip = [node, 0], [node, 1]
    positive = build.add("CLIPTextEncode", text=prompt, clip=clip)
    negative = build.add("CLIPTextEncode", text="blurry", clip=clip)
    if image is None:
        latent = [build.add("EmptySD3LatentImage", width=size, height=size, batch_size=batch), 0]
    else:
        pixels = build.add("LoadImage", image=image)
        latent = [build.add("VAEEncode", pixels=[pixels, 0], vae=vae), 0]
    sampled = build.add(
        "KSampler",
        model=model,
        positive=[positive, 0],
        negative=[negative, 0],
        latent_image=latent,
        seed=seed,
        steps=steps,
        cfg=2.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0 if image is None else 0.6,
    )
    picture = build.add("VAEDecode", samples=[sampled, 0], vae=vae)
    build.add("TestDigest", value=[sampled, 0])
    build.add("TestDigest", value=[picture, 0])
    if save:
        build.add("SaveImage", images=[picture, 0], filename_prefix="test")
    return build.graph


def stock(**options: Any) -> Graph:
    """The whole graph with the host's loaders."""
    build = Builder()
    return draw(build, *stock_loaders(build), **options)


def ours(fields: dict[str, Any] | None = None, **options: Any) -> Graph:
    """The whole graph with ModelLoaderWithOffload under a policy."""
    build = Builder()
    return draw(build, *our_loaders(build, fields or {}), **options)


def ours_applied(fields: dict[str, Any] | None = None, **options: Any) -> Graph:
    """The whole graph with ApplyOffloadPolicy behind the host's loaders."""
    build = Builder()
    return draw(build, *applied(build, fields or {}), **options)


def changed(graph: Graph, class_type: str, **inputs: Any) -> Graph:
    """A copy with other inputs of the first node of this class."""
    graph = copy.deepcopy(graph)
    node = next(node for node in graph.values() if node["class_type"] == class_type)
    node["inputs"].update(inputs)
    return graph
