"""Invariant: a wrong argument is one sentence with the field, what was given and what is allowed, and exit code 2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from balanced_offload.offload import cli
from balanced_offload.offload.demo import options, run

from .conftest import command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "fast"], ["--mode", "'fast'", "none, balanced, model, sequential, auto"]),
        (["--device", "tpu"], ["--device", "'tpu'", "auto, simulated, cuda, cpu"]),
        (["--device", "cuda"], ["--device", "'cuda'", "allowed here"]),
        (["--cap", "15"], ["--cap", "'15'", "allowed"]),
        (["--cap", "110%"], ["--cap", "'110%'", "allowed"]),
        (["--pictures", "0"], ["--pictures", "0", "allowed"]),
        (["--pictures", "many"], ["--pictures", "many"]),
        (["--device", "cpu", "--card", "rtx4090-24g"], ["--card", "'rtx4090-24g'", "simulated"]),
    ],
)
def test_bad_arguments_of_the_demo(arguments, words, tmp_path: Path):
    if arguments == ["--device", "cuda"] and cli_has_cuda():
        pytest.skip("this machine has the device")
    ended = command("demo", "--out", str(tmp_path), *arguments)
    assert ended.code == 2
    assert ended.out == ""
    for word in words:
        assert word in ended.err


def cli_has_cuda() -> bool:
    import torch

    return torch.accelerator.is_available() and str(torch.accelerator.current_accelerator()) == "cuda"


def test_an_unknown_card_names_the_ones_there_are(vram: ModuleType, tmp_path: Path):
    ended = command("demo", "--device", "simulated", "--card", "rtx9999", "--out", str(tmp_path))
    assert ended.code == 2
    assert "'rtx9999'" in ended.err
    assert "rtx4090-24g" in ended.err


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    ended = command("demo", "--device", "cpu", "--out", str(tmp_path / "file" / "demo"))
    assert ended.code == 2
    assert "--out" in ended.err


@pytest.mark.parametrize("arguments", [[], ["tune"], ["plan"]])
def test_only_commands_that_exist(arguments):
    ended = command(*arguments)
    assert ended.code == 2
    assert "usage: balanced-offload" in ended.err


def test_help_lists_the_commands():
    ended = command("--help")
    assert ended.code == 0
    assert all(name in ended.out for name in ("demo", "probe", "plan", "bench"))


def test_version_is_the_checkouts(root: Path):
    ended = command("--version")
    assert ended.code == 0
    number = ended.out.split()[-1]
    assert f'version = "{number}"' in (root / "pyproject.toml").read_text(encoding="utf-8")


def test_missing_extras_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None):
        return None if name in ("diffusers", "matplotlib") else real(name, package)

    monkeypatch.setattr(options.importlib.util, "find_spec", without)
    ended = command("demo", "--out", str(tmp_path / "never"))
    assert ended.code == 2
    assert "diffusers, matplotlib" in ended.err
    assert 'pip install "balanced-offload[demo]"' in ended.err
    assert not (tmp_path / "never").exists()


def test_ctrl_c_ends_with_130_and_leaves_the_device_clean(vram: ModuleType, monkeypatch: pytest.MonkeyPatch, small):
    before, cap = vram.memory_allocated(), vram.memory_cap()
    look = run.Auditor.look

    def interrupted(self):
        look(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Auditor, "look", interrupted)
    ended = small()
    assert ended.code == cli.INTERRUPTED == 130
    assert ended.out == ""
    assert ended.err.endswith("balanced-offload: interrupted\n")
    assert (vram.memory_allocated(), vram.memory_cap()) == (before, cap)
