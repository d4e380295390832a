"""Invariant: run.py installs torch first, pins what it found for all that follows, and does nothing the second time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class Machine:
    """Plays pip and torch for run.py, and keeps what was asked of them."""

    def __init__(self, script: ModuleType, offered: set[str], torch: str | None = None) -> None:
        self.script, self.offered, self.torch = script, offered, torch
        self.installs: list[tuple[str, ...]] = []

    def make_venv(self) -> None:
        python = self.script.venv_python()
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    def pip(self, *arguments: str) -> bool:
        self.installs.append(arguments)
        if arguments[0].startswith("torch"):
            if arguments[0] not in self.offered:
                return False
            self.torch = "2.13.0+cpu" if "==" in arguments[0] else "2.15.0"
        return True

    def torch_version(self) -> str | None:
        return self.torch


@pytest.fixture
def script(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py as a module, set in an empty folder with this project's pyproject.toml."""
    spec = importlib.util.spec_from_file_location("run_script", root / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_bytes((root / "pyproject.toml").read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.delenv("BALANCED_OFFLOAD_TORCH", raising=False)
    return module


def play(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *offered: str, torch: str | None = None) -> Machine:
    machine = Machine(script, set(offered), torch)
    for name in ("make_venv", "pip", "torch_version"):
        monkeypatch.setattr(script, name, getattr(machine, name))
    return machine


def constrained(script: ModuleType, extra: str) -> tuple[str, ...]:
    return ("-c", str(script.VENV / "constraints.txt"), "-e", f".[{extra}]")


def test_torch_comes_first_and_is_pinned(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = play(script, monkeypatch, "torch==2.13.0")
    script.set_up("test")
    assert machine.installs == [("torch==2.13.0",), constrained(script, "dev")]
    assert (script.VENV / "constraints.txt").read_text() == "torch==2.13.0+cpu\n"


def test_the_second_time_nothing_is_installed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = play(script, monkeypatch, "torch==2.13.0")
    script.set_up("test")
    count = len(machine.installs)
    script.set_up("test")
    assert len(machine.installs) == count
    script.set_up("demo")
    assert machine.installs[count:] == [constrained(script, "demo")]


def test_changed_requirements_are_installed_again(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = play(script, monkeypatch, "torch==2.13.0")
    script.set_up("demo")
    count = len(machine.installs)
    with (script.ROOT / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    script.set_up("demo")
    assert machine.installs[count:] == [constrained(script, "demo")]


def test_another_torch_where_the_first_choice_is_not_offered(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = play(script, monkeypatch, "torch>=2.7")
    script.set_up("demo")
    assert [arguments[0] for arguments in machine.installs[:2]] == ["torch==2.13.0", "torch>=2.7"]
    assert (script.VENV / "constraints.txt").read_text() == "torch==2.15.0\n"


def test_a_torch_that_is_there_stays(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = play(script, monkeypatch, "torch==2.13.0", torch="2.9.1")
    script.set_up("demo")
    assert machine.installs == [constrained(script, "demo")]
    assert (script.VENV / "constraints.txt").read_text() == "torch==2.9.1\n"


def test_the_users_torch_in_pips_words(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALANCED_OFFLOAD_TORCH", "torch==2.9.1 --pre")
    machine = play(script, monkeypatch, "torch==2.9.1")
    script.set_up("demo")
    assert machine.installs[0] == ("torch==2.9.1", "--pre")


def test_no_torch_ends_with_a_sentence(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    play(script, monkeypatch)
    with pytest.raises(SystemExit, match="torch could not be installed"):
        script.set_up("demo")
    assert not list(script.VENV.glob("set-up-*.txt"))


class Ran:
    """`run.py test` with every process left out: what it would have run, and the exit codes that it got."""

    def __init__(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, hosts: list[Path], **codes: int) -> None:
        self.commands: list[tuple[str, ...]] = []
        self.with_host: list[tuple[str, tuple[str, ...]]] = []
        self.codes = codes
        script.VENV.mkdir(exist_ok=True)
        reason = "~/comfy/ComfyUI is there" if hosts else "no ComfyUI found: nowhere"
        monkeypatch.setattr(script, "set_up", lambda command: None)
        monkeypatch.setattr(script, "set_up_browser", lambda: None)
        monkeypatch.setattr(script, "hosts", lambda: (hosts, reason))
        monkeypatch.setattr(script, "set_up_host", lambda: None if codes.get("pip") else script.ROOT / "python")
        monkeypatch.setattr(script, "run", self.run)
        monkeypatch.setattr(script, "run_host_tests", self.run_host_tests)

    def run(self, *command: str) -> int:
        self.commands.append(command)
        return self.codes.get(command[0], 0)

    def run_host_tests(self, host: Path, python: Path, arguments: list[str]) -> int:
        self.with_host.append((host.name, tuple(arguments)))
        return self.codes.get("host", 0)


def test_a_failing_check_fails_the_command(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(script, monkeypatch, [], mypy=1)
    assert script.main(["test", "-k", "policy"]) == 1
    assert [command[0] for command in ran.commands] == ["ruff", "ruff", "mypy", "pytest"], "one failure hides no other"
    assert ran.commands[-1][-2:] == ("-k", "policy")
    assert "mypy: FAILED (exit code 1)" in capsys.readouterr().err


def test_every_host_gets_its_own_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(script, monkeypatch, [Path("new"), Path("old")])
    assert script.main(["test", "-k", "policy"]) == 0
    assert ran.with_host == [("new", ("-k", "policy")), ("old", ("-k", "policy"))]
    assert "--ignore=tests/host" in ran.commands[-1], "they do not run beside other tests"
    assert "pytest with old: ok" in capsys.readouterr().err


def test_a_host_that_fails_fails_the_command(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    Ran(script, monkeypatch, [Path("new")], host=1)
    assert script.main(["test"]) == 1
    Ran(script, monkeypatch, [Path("new")], pip=1)
    assert script.main(["test"]) == 1, "an environment that cannot be made is no reason to pass"


def test_without_a_host_the_last_line_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(script, monkeypatch, [])
    assert script.main(["test"]) == 0
    assert ran.with_host == [] and "--ignore=tests/host" not in ran.commands[-1]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "run.py: host tests: none ran; no ComfyUI found: nowhere"


def test_the_last_line_is_what_pytest_told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(script, monkeypatch, [])

    def run(*command: str) -> int:
        if command[0] == "pytest":
            Path(os.environ["BALANCED_OFFLOAD_HOST_TESTS_TOLD"]).write_text("host tests: 7 skipped (none)\n")
        return ran.run(*command)

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setenv("BALANCED_OFFLOAD_HOST_TESTS_TOLD", "")  # given back after the test
    script.main(["test"])
    assert capsys.readouterr().err.splitlines()[-1] == "run.py: host tests: 7 skipped (none)"


def test_named_files_run_in_one_process(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (script.ROOT / "tests").mkdir()
    ran = Ran(script, monkeypatch, [Path("new")])
    script.main(["test", "tests::test_x", "-x"])
    assert ran.with_host == [] and ran.commands[-1][-2:] == ("tests::test_x", "-x")


class Fetched:
    """What the browser tests' set-up would have fetched. `at`: a folder of front ends; npm: whether there is one."""

    def __init__(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, at: Path, npm: bool, works: bool) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.works = works
        places = script.load("tests/browser/places.py")
        monkeypatch.setattr(places, "ROOT", at)
        monkeypatch.setattr(places, "NODE_TOOLS", at / "node_modules")
        monkeypatch.delenv("BALANCED_OFFLOAD_FRONTENDS", raising=False)
        monkeypatch.setattr(script, "load", lambda path: places)
        monkeypatch.setattr(script, "pip", self.pip)
        monkeypatch.setattr(script.shutil, "which", lambda name: "/usr/bin/npm" if npm else None)
        monkeypatch.setattr(script.subprocess, "run", self.process)

    def pip(self, *arguments: str) -> bool:
        self.calls.append(arguments)
        if self.works:
            static = Path(arguments[arguments.index("--target") + 1]) / "comfyui_frontend_package" / "static"
            static.mkdir(parents=True)
            (static / "index.html").touch()
        return self.works

    def process(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(tuple(command))
        return subprocess.CompletedProcess(command, 0 if self.works else 1)


def test_front_ends_and_tools_are_fetched_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched = Fetched(script, monkeypatch, tmp_path, npm=True, works=True)
    script.set_up_browser()
    *front_ends, tools = fetched.calls
    assert [call[-1] for call in front_ends] == [
        "comfyui-frontend-package==1.49.6",
        "comfyui-frontend-package==1.58.1",
    ]
    assert all("--no-deps" in call and str(tmp_path / ".frontends") in call[3] for call in front_ends)
    assert tools[:2] == ("/usr/bin/npm", "install") and {"--no-save", "--no-package-lock"} <= set(tools)
    (tmp_path / "node_modules").mkdir()
    script.set_up_browser()
    assert len(fetched.calls) == 3


def test_what_cannot_be_fetched_is_said(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Fetched(script, monkeypatch, tmp_path, npm=True, works=False)
    script.set_up_browser()
    said = capsys.readouterr().err
    assert "1.49.6 could not be fetched" in said and "1.58.1 could not be fetched" in said and "npm failed" in said


def test_nothing_is_fetched_into_a_folder_of_the_users(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched = Fetched(script, monkeypatch, tmp_path, npm=False, works=True)
    monkeypatch.setenv("BALANCED_OFFLOAD_FRONTENDS", str(tmp_path / "mine"))
    script.set_up_browser()
    assert fetched.calls == []


def test_vision_and_audio_belong_to_the_torch(script: ModuleType) -> None:
    assert script.vision_and_audio("2.13.0+cpu") == ["torchvision==0.28.*", "torchaudio<2.14"]
    assert script.vision_and_audio("2.7.1") == ["torchvision==0.22.*", "torchaudio<2.8"]


def test_an_unknown_command_prints_the_help(root: Path) -> None:
    done: subprocess.CompletedProcess[Any] = subprocess.run(
        [sys.executable, str(root / "run.py"), "dance"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "python run.py demo" in done.stdout and "python run.py test" in done.stdout
