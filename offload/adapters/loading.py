"""Pipelines from local files. Invariant: a pipeline that comes back is whole, every weight read from its file.

Nothing is downloaded, nothing is unpickled, no code from a model folder is run. Each model is loaded by itself, so
that a weight which its file does not have is an error, and not a random number.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_CONVERT = (
    "Convert it where you trust its source: load it there with diffusers and call "
    "`save_pretrained(folder, safe_serialization=True)`, which writes safetensors"
)


class ModelFileError(ValueError):
    """A model file or folder that cannot be loaded: which one, what is wrong with it, what to do."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}. {remedy}.")
        self.path = path


def load_pipeline(
    source: str | Path, *, torch_dtype: torch.dtype | None = None, pipeline_class: Any = None, **kw: Any
) -> Any:
    """A diffusers pipeline on the CPU, in evaluation mode, from a folder or from one .safetensors file.

    Args:
        source: a folder with model_index.json, or a file.
        torch_dtype: of all models; None takes what diffusers takes.
        pipeline_class: instead of the class that the folder or file calls for.
        kw: given on to the pipeline: components to use instead of the folder's, `variant`, and for a single file
            `config` (a folder of a pipeline of the same kind) or `original_config`.

    Raises:
        ModelFileError: (a ValueError) missing, truncated, pickled, the wrong model, or weights that are not there.
        ImportError: diffusers, transformers or safetensors is not installed.
    """
    for key in ("trust_remote_code", "device_map", "custom_pipeline"):
        if kw.pop(key, None):
            raise ValueError(
                f"{key}: not allowed here, as this loads local weights to the CPU and runs no foreign code"
            )
    for key in ("use_safetensors", "local_files_only"):
        if kw.pop(key, True) is not True:
            raise ValueError(f"{key}: got false, allowed is true, which is what it always is here")
    path = Path(source).expanduser()
    if not path.exists():
        raise ModelFileError(path, "there is no such file or folder", _near(path))
    if path.is_dir():
        return _from_folder(path, torch_dtype, pipeline_class, kw)
    return _from_file(path, torch_dtype, pipeline_class, kw)


# ---------------------------------------------------------------------- a folder
def _from_folder(folder: Path, dtype: torch.dtype | None, pipeline_class: Any, kw: dict[str, Any]) -> Any:
    import diffusers

    index = _index(folder)
    given = {name: kw.pop(name) for name in list(kw) if name in index}
    variant = kw.pop("variant", None)
    # All that can be found out without reading weights comes first.
    plan: dict[str, tuple[Any, str | None]] = {}
    for name, (library, class_name) in _entries(index):
        if name in given:
            continue
        kind = _component_class(folder / name, library, class_name)
        if issubclass(kind, nn.Module):
            plan[name] = kind, _check_weights(folder / name, name, variant)
        else:
            _check_files(folder / name, name, kind)
    parts: dict[str, nn.Module] = {}
    for name, (kind, found) in plan.items():
        # a library may draw values for weights that it misses, before it says so
        with torch.random.fork_rng(devices=[]):
            parts[name] = _load_module(kind, folder / name, dtype, found)
    make = pipeline_class or diffusers.DiffusionPipeline
    options = {"use_safetensors": True, "local_files_only": True, **kw}
    try:
        pipe = make.from_pretrained(str(folder), **parts, **given, torch_dtype=dtype, **options)
    except Exception as error:
        raise ModelFileError(
            folder, f"the pipeline does not load ({_words(error)})", "Compare model_index.json with the folder"
        ) from error
    return _whole(pipe, folder)


def _index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.exists():
        if (folder / "config.json").exists():
            raise ModelFileError(
                folder, "this is one model, not a pipeline (no model_index.json)", "Name the folder above it"
            )
        pickled = [f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLED]
        if pickled:
            raise ModelFileError(
                folder, f"only pickled weights ({', '.join(pickled[:3])}), which may run code", _CONVERT
            )
        single = [f.name for f in sorted(folder.glob("*.safetensors"))]
        remedy = f"Name the file itself: {', '.join(single[:3])}" if single else "Name the folder that holds it"
        raise ModelFileError(folder, "no pipeline (no model_index.json)", remedy)
    index = _object(file)
    kind = index.get("_class_name", "")
    if not isinstance(kind, str):  # diffusers reads a list as the name of a Python file in the folder, to be run
        raise ModelFileError(
            file,
            f"its _class_name is {json.dumps(kind)[:100]}, not a class name (a list would run the folder's code)",
            "Name there the diffusers pipeline that the models are for, where you trust the source",
        )
    return index


def _object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, which is an object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(file, f"not readable as JSON ({_words(error)})", "Fetch the file again") from error
    if not isinstance(found, dict):
        raise ModelFileError(file, "not a JSON object", "Fetch the file again")
    return found


def _entries(index: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[0] and entry[1]:
            yield name, (str(entry[0]), str(entry[1]))


def _component_class(place: Path, library: str, class_name: str) -> Any:
    """The class that model_index.json names, from diffusers or transformers and from nowhere else."""
    import diffusers.pipelines

    if library in ("diffusers", "transformers"):
        module: Any = importlib.import_module(library)
    else:
        module = getattr(diffusers.pipelines, library, None)
    found = getattr(module, class_name, None) if module is not None else None
    if not isinstance(found, type):
        near = difflib.get_close_matches(class_name, dir(module) if module is not None else [], n=2, cutoff=0.75)
        hint = f"near it are {', '.join(near)}" if near else "it may need a newer version, or code of its own"
        raise ModelFileError(
            place,
            f"its class {library}.{class_name} is not one that diffusers or transformers has ({hint})",
            "Update diffusers and transformers, or load the model yourself and pass it as an argument",
        )
    return found


def _check_files(place: Path, name: str, kind: Any) -> None:
    """A folder of what has no weights (tokenizer, scheduler, processor) has the files that make it what it is.

    From a folder without a vocabulary transformers makes a tokenizer of its special tokens alone, and says nothing.
    """
    if not place.is_dir():
        raise ModelFileError(place, f"component '{name}' is missing", _near(place))
    wanted: list[str] = []
    if hasattr(kind, "vocab_files_names"):
        files = dict(kind.vocab_files_names)
        whole = files.pop("tokenizer_file", "tokenizer.json")
        core = {key: file for key, file in files.items() if key in ("vocab_file", "merges_file")} or files
        # the padding and the longest prompt are in here, and a default for them would be a guess
        wanted = [] if _filled(place / "tokenizer_config.json") else ["tokenizer_config.json"]
        lacking = [file for file in core.values() if not _filled(place / file)]
        if (lacking or (not core and kind.vocab_files_names)) and not _filled(place / whole):
            wanted += [*lacking[:-1], f"{lacking[-1]} (or {whole})"] if lacking else [whole]
    elif "tokenizer" in _parts(kind):
        known = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "tekken.json", "tokenizer/*")
        if not any(_filled(file) for pattern in known for file in place.glob(pattern)):
            wanted = ["tokenizer.json (or the vocabulary in another form)"]
    elif isinstance(getattr(kind, "config_name", None), str):
        wanted = [] if _filled(place / kind.config_name) else [kind.config_name]
    if wanted:
        raise ModelFileError(place, f"component '{name}' lacks {', '.join(wanted)}", "Fetch the folder again")


def _filled(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _parts(processor: Any) -> list[str]:
    """What a transformers processor is put together from, [] for any other class."""
    new = hasattr(processor, "get_attributes")  # transformers 5; before that they were a field
    listed = processor.get_attributes() if new else getattr(processor, "attributes", [])
    return list(listed) if isinstance(listed, (list, tuple)) else []


def _check_weights(place: Path, name: str, variant: str | None) -> str | None:
    """A folder of one model has its weights, as safetensors, whole. Reads headers only. The variant that it has."""
    if not place.is_dir():
        raise ModelFileError(place, f"component '{name}' is missing", _near(place))
    if not (place / "config.json").exists():
        raise ModelFileError(place, f"component '{name}' has no config.json", "Fetch the folder again")
    files = sorted(place.glob("*.safetensors"))
    if not files:
        pickled = [f.name for f in sorted(place.iterdir()) if f.suffix in PICKLED]
        if pickled:
            raise ModelFileError(
                place, f"component '{name}' has only pickled weights ({', '.join(pickled[:3])})", _CONVERT
            )
        raise ModelFileError(place, f"component '{name}' has no weights", "Fetch its .safetensors file")
    by_variant: dict[str | None, list[Path]] = {}
    for file in files:
        by_variant.setdefault(_variant_of(file), []).append(file)
    if variant not in by_variant:
        variant = None  # as in diffusers: not every model of a pipeline needs to have it
    if None not in by_variant and variant is None:
        known = sorted(str(v) for v in by_variant)
        raise ModelFileError(
            place, f"component '{name}' has weights as {', '.join(known)} only", f"Pass `variant='{known[0]}'`"
        )
    for shards in place.glob("*.safetensors.index*.json"):
        if _variant_of(shards) != variant:
            continue
        weight_map = _object(shards).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelFileError(
                shards, "its weight_map is not an object that names a file for each weight", "Fetch the file again"
            )
        missing = sorted(set(weight_map.values()) - {f.name for f in files})
        if missing:
            raise ModelFileError(place, f"component '{name}' lacks {', '.join(missing[:3])}", "Fetch the files again")
    for file in by_variant[variant]:
        _header(file)
    return variant


def _variant_of(file: Path) -> str | None:
    """The word between name and ending: fp16 in `model.fp16.safetensors`, None in `model.safetensors`."""
    words = re.sub(r"-\d{5}-of-\d{5}", "", file.name).split(".")
    middle = [word for word in words[1:-1] if word not in ("safetensors", "index")]
    return middle[-1] if middle else None


def _header(file: Path) -> dict[str, torch.Tensor]:
    """Names and shapes in a safetensors file, as meta tensors; the header gives the size that the file must have."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return {
                key: torch.empty(opened.get_slice(key).get_shape(), device="meta")
                for key in opened.keys()  # noqa: SIM118 (the object is no mapping)
            }
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            file, f"damaged or truncated ({_words(error)})", "Fetch the file again and compare its size"
        ) from error


def _load_module(kind: Any, place: Path, dtype: torch.dtype | None, variant: str | None) -> nn.Module:
    """One model with every weight that it needs."""
    from diffusers import ModelMixin

    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if variant is not None:
        options["variant"] = variant
    options["torch_dtype" if issubclass(kind, ModelMixin) else "dtype"] = dtype
    try:
        module, info = kind.from_pretrained(str(place), **options)
    except Exception as error:
        raise ModelFileError(
            place, f"the weights do not fit {kind.__name__} ({_words(error)})", _WRONG_MODEL
        ) from error
    missing, mismatched = sorted(info.get("missing_keys", ())), list(info.get("mismatched_keys", ()))
    if missing or mismatched:
        wrong = missing or [str(key[0] if isinstance(key, (tuple, list)) else key) for key in mismatched]
        kept = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        word = "without" if missing else "of another shape for"
        raise ModelFileError(place, f"the weights do not fit {kind.__name__}: {word} {kept}", _WRONG_MODEL)
    loaded: nn.Module = module.eval()
    return loaded


_WRONG_MODEL = "The file belongs to another model than config.json says: fetch both from one place"


# ---------------------------------------------------------------------- one file
def _from_file(file: Path, dtype: torch.dtype | None, pipeline_class: Any, kw: dict[str, Any]) -> Any:
    if file.suffix in PICKLED:
        raise ModelFileError(file, "pickled weights, which may run code when loaded", _CONVERT)
    if file.suffix != ".safetensors":
        raise ModelFileError(
            file, f"'{file.suffix}' is no format that is read here", "Name a .safetensors file or a folder"
        )
    header = _header(file)
    if not header:
        raise ModelFileError(file, "it holds no weights", "Fetch the file again")
    if not kw.get("config") and not kw.get("original_config"):
        kw["config"] = _cached_config(file, header)
    make = pipeline_class or _class_of(file, kw.get("config"))
    if not hasattr(make, "from_single_file"):
        raise ModelFileError(file, f"{make.__name__} does not load from one file", "Name the pipeline's folder instead")
    if kw.get("config"):  # what has no weights is read from there
        folder, taken = Path(kw["config"]), inspect.signature(make.__init__).parameters
        for name, (library, class_name) in _entries(_index(folder)):
            if name in taken and name not in kw:
                kind = _component_class(folder / name, library, class_name)
                if not issubclass(kind, nn.Module):
                    _check_files(folder / name, name, kind)
    try:
        pipe = make.from_single_file(str(file), torch_dtype=dtype, local_files_only=True, **kw)
    except ModelFileError:
        raise
    except Exception as error:
        raise ModelFileError(
            file,
            f"it does not load as {make.__name__} ({_words(error)})",
            "Name the right `pipeline_class` and `config`, or pass the models that the file lacks as arguments",
        ) from error
    return _whole(pipe, file)


def _cached_config(file: Path, header: dict[str, torch.Tensor]) -> str:
    """A folder with the configuration that the file's weights call for, from what is on this machine already."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    repo = fetch_diffusers_config(dict(header))["pretrained_model_name_or_path"]
    try:
        return str(snapshot_download(repo, local_files_only=True))
    except Exception as error:
        raise ModelFileError(
            file,
            f"the weights look like {repo}, whose configuration is not on this machine",
            "Pass `config=` with the folder of a pipeline of the same kind; its weights are not read",
        ) from error


def _class_of(file: Path, config: Any) -> Any:
    import diffusers

    name = _index(Path(config)).get("_class_name", "") if config else ""
    found = getattr(diffusers, str(name), None)
    if found is None:
        raise ModelFileError(file, f"which pipeline it is for is not known (got '{name}')", "Pass `pipeline_class=`")
    return found


# ---------------------------------------------------------------------- both
def _whole(pipe: Any, source: Path) -> Any:
    """The pipeline, if every weight of it holds data."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            empty = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
            if empty:
                raise ModelFileError(
                    source,
                    f"component '{name}' has no weights for {', '.join(empty[:3])}",
                    f"Load it by itself and pass it as `{name}=`",
                )
            part.eval()
    return pipe


def _near(path: Path) -> str:
    """What is beside a path that does not exist."""
    try:
        siblings = sorted(p.name for p in path.parent.iterdir())
    except OSError:
        return f"The folder {path.parent} does not exist either; only local files are loaded"
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
    if near:
        return f"Near it are {', '.join(near)}"
    return (
        f"Beside it are {', '.join(siblings[:5])}" if siblings else "Its folder is empty; only local files are loaded"
    )


def _words(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
