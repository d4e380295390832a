"""Invariant: the probe works with torch alone, names what it found, and its block names no user and no path."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from balanced_offload.offload import probe as probes
from balanced_offload.offload.backend.generic import AcceleratorBackend
from balanced_offload.offload.probe import clean, probe, probe_text

from .conftest import command

ALONE = """
import importlib.util, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "diffusers transformers accelerate matplotlib PIL safetensors pynvml".split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
root = sys.argv[1]
init = root + "/__init__.py"
spec = importlib.util.spec_from_file_location("balanced_offload", init, submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules["balanced_offload"] = module
spec.loader.exec_module(module)
from balanced_offload.offload.cli import main
sys.exit(main(sys.argv[2:]))
"""


def alone(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process where nothing but torch and psutil can be imported and no GPU is seen."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", ALONE, str(root), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


@pytest.mark.skipif(sys.platform == "darwin", reason="MPS cannot be hidden from torch")
def test_with_torch_alone_and_no_accelerator(root: Path):
    ended = alone(root, "probe", "--json")
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["schema"] == "offload-probe/1"
    assert document["accelerator"] is None
    assert "torch found none" in document["no_accelerator"]
    assert document["rates"] is None
    assert document["profile"]["name"] is None
    assert document["profile"]["mode"] == "none"
    assert document["ram"]["total"] > document["ram"]["pinned_budget"] > 0


@pytest.mark.skipif(sys.platform == "darwin", reason="MPS cannot be hidden from torch")
def test_for_people_without_an_accelerator(root: Path):
    ended = alone(root, "probe")
    assert ended.returncode == 0, ended.stderr
    assert "Accelerator: none" in ended.stdout
    block = re.search(r"```text\n(.*?)\n```", ended.stdout, re.DOTALL)
    assert block is not None
    assert private(block.group(1)) == []
    assert "torch" in block.group(1)


def private(text: str) -> list[str]:
    """What must not be in a bug report."""
    secrets = {str(Path.home()), os.getcwd(), sys.executable, sys.prefix}
    found = [secret for secret in secrets if len(secret) > 1 and secret in text]
    found += re.findall(r"(?:^|[\s'\"(])(?:/|[A-Za-z]:\\)\S+", text)
    if len(getpass.getuser()) > 3 and getpass.getuser() != "root":
        found += re.findall(rf"\b{re.escape(getpass.getuser())}\b", text)
    return found


def test_with_the_simulated_accelerator(sim: ModuleType):
    sim.set_memory_cap(12 << 30)
    sim.set_others(1 << 30)
    ended = command("probe", "--json")
    assert ended.code == 0
    card = ended.document["accelerator"]
    assert (card["kind"], card["rung"]) == ("simulated", "simulated")
    assert (card["total"], card["others"]) == (12 << 30, 1 << 30)
    profile = ended.document["profile"]
    assert profile["name"] == "up_to_12_gib"
    assert "more than 4 and at most 12 GiB" in profile["why"]
    # 2 * (123,060,480 + 694,659,840 + 2,567,463,684 + 83,653,863) bytes = 6.5 GiB, and 2 GiB of activations
    assert "8.5 GiB" in profile["sentence"] and "11.0 GiB" in profile["sentence"]
    assert profile["mode"] == "none"


def test_a_small_card_takes_its_profile(sim: ModuleType):
    sim.set_memory_cap(4 << 30)
    text = command("probe").out
    assert "Profile: up_to_4_gib, as the card has at most 4 GiB." in text
    assert "sequential:" in text
    assert "It is simulated" in text


def test_the_rates_and_where_they_are_from(sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BALANCED_OFFLOAD_STATE", str(tmp_path))
    sim.use_card("rtx4060-8g-pcie4x8")
    rates = command("probe", "--json").document["rates"]
    assert rates == {"h2d": 12.5e9, "h2d_pageable": 7e9, "copy_latency": 8e-6, "source": "stored", "link": None}
    text = command("probe").out
    assert text.count("12.5 GB/s from page-locked memory, 7.0 GB/s from pageable, 8.0 us for each (as stored") == 2
    assert private(text.split("```text")[1]) == []


def test_a_card_that_nobody_measured_is_measured_and_nothing_is_written(
    sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BALANCED_OFFLOAD_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(AcceleratorBackend, "link_rates", lambda self: None)
    sim.use_card("rtx4080-16g")
    rates = command("probe", "--json").document["rates"]
    assert rates["source"] == "measured" and rates["h2d"] == pytest.approx(24e9, rel=0.02)
    assert "measured now" in command("probe").out
    assert not (tmp_path / "state").exists()


def test_json_to_a_file(tmp_path: Path):
    target = tmp_path / "probe.json"
    ended = command("probe", "--json", str(target))
    assert (ended.code, ended.out) == (0, "")
    assert json.loads(target.read_text(encoding="utf-8"))["versions"]["torch"]


def test_a_file_that_cannot_be_written(tmp_path: Path):
    ended = command("probe", "--json", str(tmp_path / "none" / "probe.json"))
    assert ended.code == 2
    assert "--json" in ended.err


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("can be built with /usr/bin/g++", "can be built with g++"),
        ("cannot write /home/ada lovelace", "cannot write ada lovelace"),
        (r"at C:\Users\ada\torch.dll: no", "at torch.dll: no"),
        ("in ~/work/models, not found", "in models, not found"),
        ("12.5 GB/s and/or n/a", "12.5 GB/s and/or n/a"),
        ("set CXX='/opt/my tools/g++'", "set CXX='my tools/g++'"),
    ],
)
def test_paths_are_cut_to_their_last_part(text, cleaned):
    assert clean(text) == cleaned


def test_what_is_not_known_is_null(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes, "_package", lambda name: None)
    document = probe()
    assert set(document["packages"].values()) == {None}
    assert "diffusers not installed" in probe_text(document)
