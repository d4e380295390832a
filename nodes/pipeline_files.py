"""Invariant: a name from a workflow opens a folder only where the host keeps diffusers pipelines, links followed.

A pipeline is a folder with a `model_index.json`, one or two levels below one of the host's `diffusers` folders (those
of extra_model_paths included). Its name is the path below that folder, with forward slashes on every system.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath

INDEX = "model_index.json"
DEPTH = 2
_LISTED = 5  # names in a message


class PipelineNameError(ValueError):
    """A name that opens no pipeline: what was given, what is allowed, what to do."""


def host_roots() -> list[Path]:
    """The host's `diffusers` folders, in its order; [] where it has none."""
    import folder_paths

    try:
        return [Path(found) for found in folder_paths.get_folder_paths("diffusers")]
    except KeyError:
        return []


def pipeline_names(roots: Sequence[Path]) -> list[str]:
    """The names of all pipelines below `roots`, sorted; one that leads outside of them all is left out."""
    allowed = _resolved(roots)
    found: set[str] = set()
    for root in roots:
        for folder in _folders(root, DEPTH):
            if (folder / INDEX).is_file() and _inside(folder, allowed):
                found.add(folder.relative_to(root).as_posix())
    return sorted(found, key=str.casefold)


def find_pipeline(name: str, roots: Sequence[Path]) -> Path:
    """The folder of pipeline `name`, in the first of `roots` that has it.

    Raises:
        PipelineNameError: (a ValueError) a path and not a name, outside of `roots`, or not there (near names listed).
    """
    parts = name.split("/")
    where = ", ".join(str(root) for root in roots) or "none (the host has no `diffusers` folder)"
    if name != name.strip() or not name or PureWindowsPath(name).anchor or name.startswith(("/", "~")):
        raise _refused(name, "it is no name below a folder", where)
    if any(part in ("", ".", "..") or "\0" in part for part in parts) or ".." in PureWindowsPath(name).parts:
        raise _refused(name, "it leaves the folder", where)
    allowed = _resolved(roots)
    for root in roots:
        folder = root.joinpath(*parts)
        if not (folder / INDEX).is_file():
            continue
        if not _inside(folder, allowed):
            raise _refused(name, "a link leads it outside", where)
        if len(parts) > DEPTH:
            raise _refused(name, f"it is {len(parts)} levels deep, allowed are {DEPTH}", where)
        return folder
    raise PipelineNameError(_missing(name, roots, where))


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """(path, size in bytes, time of change in ns) of each file of a pipeline: equal as long as nobody touched it."""
    found = []
    for place in (folder, *_folders(folder, 1)):
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_file():
                    status = entry.stat()
                    found.append((f"{place.name}/{entry.name}", status.st_size, status.st_mtime_ns))
    return tuple(sorted(found))


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Folders below `root`, at most `depth` levels; those below a pipeline are its parts and left out."""
    try:
        with os.scandir(root) as entries:
            below = sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError:  # a folder that is configured and missing, or not ours to read
        return
    for folder in below:
        yield folder
        if depth > 1 and not (folder / INDEX).is_file():
            yield from _folders(folder, depth - 1)


def _resolved(roots: Sequence[Path]) -> list[Path]:
    return [Path(os.path.realpath(root)) for root in roots]


def _inside(folder: Path, allowed: Sequence[Path]) -> bool:
    real = Path(os.path.realpath(folder))
    return any(root in real.parents for root in allowed)


def _refused(name: str, why: str, where: str) -> PipelineNameError:
    return PipelineNameError(
        f"pipeline_name: got {name!r}, which is refused: {why}. Allowed is the name of a pipeline folder below "
        f"{where}. Put the pipeline there, or add its folder as `diffusers` to extra_model_paths.yaml."
    )


def _missing(name: str, roots: Sequence[Path], where: str) -> str:
    known = pipeline_names(roots)
    if not known:
        return (
            f"pipeline_name: got {name!r}, and there is no pipeline below {where}. Put a folder with a {INDEX} there "
            "(written by diffusers' `save_pretrained`), or add its folder as `diffusers` to extra_model_paths.yaml."
        )
    near = difflib.get_close_matches(name.casefold(), [n.casefold() for n in known], n=_LISTED, cutoff=0.4)
    likely = [n for n in known if n.casefold() in near]
    listed = "Near it are" if likely else "Allowed are"
    names = likely or known
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    there = any(root.joinpath(*name.split("/")).is_dir() for root in roots)
    why = f"a folder without {INDEX}, which is no pipeline" if there else f"which is not below {where}"
    return f"pipeline_name: got {name!r}, {why}. {listed} {', '.join(names[:_LISTED])}{more}. Choose one of the list."
