"""A pipeline's steps on the host's progress bar. Invariant: watching changes no picture, and its cost is counted.

A preview is drawn by the host's own table that turns latents to colours, on the CPU; a decoder that would have to be
loaded for it is not. It shows what the pipeline has in hand after the step, which is noisier than the host's own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ledger import Ledger
from . import comfyui_host

# (latent channels, scaling factor of the VAE) -> the host's name of that space
_SPACES = {(4, 0.18215): "SD15", (4, 0.13025): "SDXL", (16, 1.5305): "SD3", (16, 0.3611): "Flux"}


class Progress:
    """Steps on the host's bar, a picture beside them where it costs little, and the host's interrupt.

    Args:
        pipe: the pipeline that is about to be called.
        steps: as asked for; what the pipeline says during the run counts.
        size: height and width of the picture, pixels.
        ledger: takes the time that previews cost.
    """

    def __init__(self, pipe: Any, steps: int, size: tuple[int, int], ledger: Ledger) -> None:
        import comfy.utils

        self._bar = comfy.utils.ProgressBar(steps)
        self._steps = steps
        self._size = size
        self._ledger = ledger
        self._draw = _previewer(pipe)

    @contextlib.contextmanager
    def watching(self, pipe: Any) -> Iterator[dict[str, Any]]:
        """Arguments to add to the pipeline's call; for one that does not call back, its own bar is listened to."""
        taken = inspect.signature(type(pipe).__call__).parameters
        if "callback_on_step_end" in taken:
            arguments: dict[str, Any] = {"callback_on_step_end": self._step_end}
            if "callback_on_step_end_tensor_inputs" in taken:
                known = getattr(pipe, "_callback_tensor_inputs", ())
                arguments["callback_on_step_end_tensor_inputs"] = ["latents"] if self._draws(known) else []
            yield arguments
            return
        pipe.__dict__["progress_bar"] = self._listening(pipe.progress_bar)
        try:
            yield {}
        finally:
            del pipe.__dict__["progress_bar"]

    def _draws(self, known: Any) -> bool:
        return self._draw is not None and "latents" in known

    def _step_end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        comfyui_host.throw_if_interrupted()
        total = getattr(pipe, "num_timesteps", None) or self._steps  # image-to-image leaves the first ones out
        self._bar.update_absolute(index + 1, int(total), self._picture(pipe, tensors.get("latents")))
        return tensors

    def _picture(self, pipe: Any, latents: torch.Tensor | None) -> Any:
        if latents is None or self._draw is None:
            return None
        with self._ledger.span("preview"):
            try:
                return self._draw(_as_picture(pipe, latents[:1], self._size).to("cpu", torch.float32))
            except (RuntimeError, ValueError, TypeError, AttributeError):
                self._draw = None  # latents of a shape that the host's table does not know
                return None

    def _listening(self, bar: Callable[..., Any]) -> Callable[..., Any]:
        def progress_bar(iterable: Any = None, total: int | None = None) -> Any:
            shown = bar(iterable=iterable, total=total)
            if iterable is not None:
                return self._each(shown)
            update = shown.update

            def advance(n: float | None = 1) -> Any:
                comfyui_host.throw_if_interrupted()
                done = update(n)
                self._bar.update_absolute(int(shown.n), int(shown.total or self._steps))
                return done

            shown.update = advance
            return shown

        return progress_bar

    def _each(self, shown: Any) -> Iterator[Any]:
        for done, item in enumerate(shown):
            comfyui_host.throw_if_interrupted()
            self._bar.update_absolute(done, int(shown.total or self._steps))
            yield item
        self._bar.update_absolute(self._steps, self._steps)


def _previewer(pipe: Any) -> Callable[[torch.Tensor], Any] | None:
    """Latents [1, C, h, w] on the CPU -> what the host's bar takes; None where none is wanted or none is cheap."""
    try:
        import comfy.latent_formats
        import latent_preview
        from comfy.cli_args import args
    except ImportError:
        return None
    method = getattr(args, "preview_method", None)
    kind = getattr(latent_preview, "Latent2RGBPreviewer", None)
    space = getattr(comfy.latent_formats, _space(pipe) or "", None)
    if method is None or getattr(method, "value", "none") == "none" or kind is None or space is None:
        return None
    factors = space()
    previewer = kind(factors.latent_rgb_factors, getattr(factors, "latent_rgb_factors_bias", None))

    def draw(latents: torch.Tensor) -> Any:
        return previewer.decode_latent_to_preview_image("JPEG", latents)

    return draw


def _space(pipe: Any) -> str | None:
    config = getattr(getattr(pipe, "vae", None), "config", None)
    channels, factor = getattr(config, "latent_channels", None), getattr(config, "scaling_factor", None)
    near = (name for (c, f), name in _SPACES.items() if c == channels and factor and abs(f - factor) < 1e-3)
    return next(near, None)


def _as_picture(pipe: Any, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Latents [1, C, h, w]; those that a pipeline packs into a row of patches are unpacked as it does."""
    if latents.ndim != 3:
        return latents
    unpacked = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    return unpacked if isinstance(unpacked, torch.Tensor) else latents
