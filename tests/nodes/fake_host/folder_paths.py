"""The host's model folders: `<root>/<folder>/<name>`. A test sets `root`; without one every list is empty."""

from __future__ import annotations

from pathlib import Path

root: Path | None = None
FOLDERS = ("checkpoints", "diffusion_models", "text_encoders", "vae", "vae_approx", "embeddings", "diffusers", "loras")


def get_folder_paths(folder: str) -> list[str]:
    if folder not in FOLDERS:
        raise KeyError(folder)
    return [] if root is None else [str(root / folder)]


def get_filename_list(folder: str) -> list[str]:
    return sorted(
        path.relative_to(at).as_posix() for at in map(Path, get_folder_paths(folder)) for path in at.rglob("*.*")
    )


def get_full_path(folder: str, name: str) -> str | None:
    paths = [Path(at) / name for at in get_folder_paths(folder)]
    return next((str(path) for path in paths if path.is_file()), None)


def get_full_path_or_raise(folder: str, name: str) -> str:
    found = get_full_path(folder, name)
    if found is None:
        raise FileNotFoundError(name)
    return found


def get_output_directory() -> str:
    if root is None:  # not the folder that tests run in
        raise FileNotFoundError("a test sets `root` first")
    return str(root / "output")
