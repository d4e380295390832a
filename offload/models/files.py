"""Invariant: a model file is judged by its header alone: nothing is loaded, nothing unpickled, no code of it is run.

The header gives names, shapes and dtypes, so bytes are exact. The order of execution and the arithmetic are not in it:
the order is guessed from the names, and a matrix is taken to see every token of the picture.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.loading import PICKLED, ModelFileError
from ..units import aligned
from .inputs import Resolution
from .walks import ModelWalk, UnitCost

ESTIMATED = "estimated from the shapes in the file: order by name, 2 FLOP per weight and token, no attention"
_PIXELS_A_TOKEN = 16  # a side: a VAE that divides by 8, and patches of 2
_FRAMES_A_TOKEN = 4
_DENOISER_FOLDERS = ("transformer", "unet")
_DENOISER_PREFIX = "model.diffusion_model."  # in a file that holds the other models too
_OTHER_MODELS = ("first_stage_model.", "conditioner.", "cond_stage_model.", "text_encoders.", "vae.")
# Matrices that see one vector per picture: modulation, time, guidance and pooled text.
_ONE_TOKEN = re.compile(r"(^|[._])(\w*mod|modulation|ada_?ln\w*|\w*time\w*|t_embedder|y_embedder|guidance\w*|vector_in|"
                        r"pooled\w*|norm\w*\.linear|emb_layers|label_emb|add_embedding)([._]|$)")  # fmt: skip
_LONGEST_HEADER = 100_000_000  # the format's own limit
_FLOATS = ("F16", "BF16", "F32", "F64")
# Where a list of layers usually runs; what has no number in its name comes before, or after for the words of `_LAST`.
_STAGES = (("double", "input", "down", "transformer_blocks", "joint"), ("middle", "mid_"), ("single", "output", "up_"))
_LAST = re.compile(r"^(norm_out|proj_out|final|out\b|head|conv_norm_out|conv_out|last|unpatch)")


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    nbytes: int


def walk_path(source: str | Path, resolution: Resolution | None = None, dtype: torch.dtype | None = None) -> ModelWalk:
    """The walk of a .safetensors file, a folder of one diffusers model, or the denoiser of a pipeline's folder.

    Args:
        resolution: of the picture or video, for the number of tokens; None: 1024x1024.
        dtype: in which floating-point weights will be held; None: as they are stored.

    Raises:
        ModelFileError: (a ValueError) missing, pickled, damaged, or no weights in it.
    """
    path = Path(source).expanduser()
    size = resolution or Resolution(1024, 1024)
    tensors = [tensor for file in _files(path) for tensor in _header(file, dtype)]
    tensors, notes = _denoiser_only(tensors)
    if not tensors:
        raise ModelFileError(path, "it holds no weights", "Name the denoiser's .safetensors file or folder")
    tokens = _tokens(size)
    units: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        units.setdefault(tensor.name.rpartition(".")[0] or tensor.name, []).append(tensor)
    order = sorted(units, key=_running_order)
    walked = tuple(_unit(name, index, units[name], tokens) for index, name in enumerate(order))
    return ModelWalk(path.name or str(path), str(size), walked, source=ESTIMATED, notes=notes)


def _tokens(size: Resolution) -> int:
    frames = 1 if size.frames is None else (size.frames - 1) // _FRAMES_A_TOKEN + 1
    return frames * (size.width // _PIXELS_A_TOKEN) * (size.height // _PIXELS_A_TOKEN)


def _unit(name: str, index: int, tensors: list[_Tensor], tokens: int) -> UnitCost:
    rows = 1 if _ONE_TOKEN.search(name) else tokens
    weights = sum(math.prod(tensor.shape) for tensor in tensors if len(tensor.shape) > 1)
    traffic = sum(tensor.nbytes for tensor in tensors)
    numbered = re.match(r"(.*?\.\d+)\.", name + ".")
    nbytes = sum(aligned(tensor.nbytes) for tensor in tensors)
    operation = (2.0 * weights * rows, traffic)
    return UnitCost(name, index, nbytes, len(tensors), numbered[1] if numbered else None, (operation,), 1)


def _running_order(name: str) -> tuple[int, int, tuple[tuple[int, int | str], ...]]:
    """A key that sorts modules as they probably run; numbers in names count as numbers."""
    parts = tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))
    if not any(part.isdigit() for part in name.split(".")):
        return (2 if _LAST.search(name) else 0, 0, parts)
    stage = next((i for i, words in enumerate(_STAGES) if name.startswith(words)), 1)
    return 1, stage, parts


def _denoiser_only(tensors: list[_Tensor]) -> tuple[list[_Tensor], tuple[str, ...]]:
    """Of a checkpoint that holds the other models too, the denoiser."""
    inside = [t for t in tensors if t.name.startswith(_DENOISER_PREFIX)]
    if not inside and not any(t.name.startswith(_OTHER_MODELS) for t in tensors):
        return tensors, ()
    rest = inside or [t for t in tensors if not t.name.startswith(_OTHER_MODELS)]
    cut = [_Tensor(t.name.removeprefix(_DENOISER_PREFIX), t.shape, t.nbytes) for t in rest]
    return cut, (f"{len(tensors) - len(rest)} tensors of text encoders and the VAE are left out",)


def _files(path: Path) -> list[Path]:
    """The .safetensors files of one model."""
    if not path.exists():
        raise ModelFileError(path, "there is no such file or folder, and no known model has that name", _KNOWN)
    if path.is_file():
        if path.suffix in PICKLED:
            raise ModelFileError(path, "pickled weights, whose shapes cannot be read safely", _KNOWN)
        if path.suffix != ".safetensors":
            raise ModelFileError(path, f"'{path.suffix}' is no format that is read here", _KNOWN)
        return [path]
    if (path / "model_index.json").exists():
        inner = [path / name for name in _DENOISER_FOLDERS if (path / name).is_dir()]
        if not inner:
            raise ModelFileError(path, f"it has no {' or '.join(_DENOISER_FOLDERS)} folder", _KNOWN)
        path = inner[0]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelFileError(path, "no .safetensors file is in it", _KNOWN)
    return _one_variant(path, files)


_KNOWN = "Name a known model, a .safetensors file, or a folder of a diffusers model or pipeline"


def _one_variant(folder: Path, files: list[Path]) -> list[Path]:
    """Of weights that lie there in several precisions, one set: the plain one, else the first."""
    variants: dict[tuple[str, ...], list[Path]] = {}
    for file in files:
        words = re.sub(r"-\d{5}-of-\d{5}", "", file.name).split(".")[1:-1]
        variants.setdefault(tuple(words), []).append(file)
    chosen = variants.get((), next(iter(variants.values())))
    stems = {re.sub(r"-\d{5}-of-\d{5}", "", file.name) for file in chosen}
    if len(stems) > 1:
        raise ModelFileError(folder, f"it holds several models ({', '.join(sorted(stems)[:3])})", "Name one file")
    return chosen


def _header(file: Path, dtype: torch.dtype | None) -> list[_Tensor]:
    """Names and sizes of the tensors in a file, read without mapping it: it may be larger than the RAM.

    The format: eight bytes with the header's length (little endian), the header as JSON, the weights.
    """
    try:
        whole = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, whole - 8):
                raise ValueError(f"a header of {length} bytes in a file of {whole}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if whole != 8 + length + end:
            raise ValueError(f"{whole} bytes, where its header says {8 + length + end}")
        return [_tensor(name, entry, dtype) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        words = " ".join(str(error).split())[:200]
        raise ModelFileError(file, f"damaged or truncated ({words})", "Fetch the file again") from error


def _tensor(name: str, entry: dict[str, Any], dtype: torch.dtype | None) -> _Tensor:
    shape = tuple(int(side) for side in entry["shape"])
    begin, end = entry["data_offsets"]
    nbytes = math.prod(shape) * dtype.itemsize if dtype is not None and entry["dtype"] in _FLOATS else end - begin
    return _Tensor(name, shape, nbytes)
