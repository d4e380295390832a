"""Invariant: the host of the host tests is found in the order that is promised, and "none" says where was looked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def places(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("host_places_tested", root / "tests" / "host" / "hosts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def comfyui(folder: Path, version: str) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "custom_nodes").mkdir()
    for name in ("main.py", "comfy/model_management.py"):
        (folder / name).touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def test_the_order(places: ModuleType, tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "checkout"
    assert places.host_for(elsewhere, {}, home)[0] is None
    default = comfyui(home / "comfy" / "ComfyUI", "0.33.0")
    assert places.host_for(elsewhere, {}, home)[0] == default
    around = comfyui(tmp_path / "around", "0.34.0")
    inside = around / "custom_nodes" / "balanced-offload"
    found, reason = places.host_for(inside, {}, home)
    assert found == around and "custom_nodes of ComfyUI 0.34.0" in reason
    named = comfyui(tmp_path / "named", "0.3.64")
    assert places.host_for(inside, {"COMFYUI_PATH": str(named)}, home)[0] == named


def test_a_wrong_path_is_no_other_host(places: ModuleType, tmp_path: Path) -> None:
    """Somebody named a host: testing another one instead would tell them something about the wrong one."""
    home = tmp_path / "home"
    comfyui(home / "comfy" / "ComfyUI", "0.33.0")
    found, reason = places.host_for(tmp_path, {"COMFYUI_PATH": str(tmp_path / "typo")}, home)
    assert found is None and "COMFYUI_PATH names" in reason and "typo" in reason
    assert places.why_not(tmp_path, {"COMFYUI_PATH": str(tmp_path / "typo")}, home) == reason


def test_nothing_found_says_where_was_looked(places: ModuleType, tmp_path: Path) -> None:
    reason = places.why_not(tmp_path, {}, tmp_path)
    for place in ("COMFYUI_PATH", "custom_nodes", "~/comfy/ComfyUI"):
        assert place in reason


def test_the_older_host_comes_second(places: ModuleType, tmp_path: Path) -> None:
    new = comfyui(tmp_path / "comfy" / "ComfyUI", "0.33.0")
    assert places.all_hosts(tmp_path, {}, tmp_path)[0] == [new]
    old = comfyui(tmp_path / "comfy" / "ComfyUI-0.3.64", "0.3.64")
    assert places.all_hosts(tmp_path, {}, tmp_path)[0] == [new, old]
    other = comfyui(tmp_path / "other", "0.10.0")
    assert places.all_hosts(tmp_path, {"COMFYUI_PATH_OLD": str(other)}, tmp_path)[0] == [new, other]
    assert places.all_hosts(tmp_path, {"COMFYUI_PATH": str(old)}, tmp_path)[0] == [old]


def test_missing_requirements_are_named(places: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui(tmp_path / "comfy" / "ComfyUI", "0.33.0")
    monkeypatch.setattr(places, "REQUIRED", ("json", "no_such_module"))
    reason = places.why_not(tmp_path, {}, tmp_path)
    assert "no_such_module" in reason and "python run.py test" in reason
    monkeypatch.setattr(places, "REQUIRED", ("json",))
    assert places.why_not(tmp_path, {}, tmp_path) is None
