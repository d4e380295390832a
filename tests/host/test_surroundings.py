"""Invariant: where something is missing the pack imports, says what is off, and the rest works."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from . import graphs
from .server import HERE, HostServer
from .test_object_info import IDS
from .test_prompts import with_report


@pytest.fixture(scope="module")
def poor(servers: Callable[..., HostServer]) -> HostServer:
    """A host without diffusers, whose output folder nobody can write to, with a pack that has our routes already.

    One server for all three: each is a sentence in the log, and starting one takes seconds. /proc takes no new file
    from anybody, root included.
    """
    packs = (HERE / "packs" / "no_diffusers", HERE / "packs" / "same_routes")
    return servers("--output-directory", "/proc", packs=packs)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc as a folder that takes no file")
class TestPoor:
    def test_the_pack_loads_and_prompts_run(self, poor: HostServer, server: HostServer) -> None:
        assert "IMPORT FAILED" not in poor.log()
        assert set(IDS) <= set(poor.object_info()), "a node that can't work says so when it is used"
        assert poor.digests(graphs.ours()) == server.digests(graphs.ours())

    def test_a_report_that_cannot_be_written_fails_no_prompt(self, poor: HostServer) -> None:
        prompt_id = poor.queue(with_report(graphs.ours(seed=15)))
        assert poor.wait(prompt_id)["status"]["completed"]
        for _ in range(50):  # the file is tried when the prompt has ended
            (record,) = (poor.history(prompt_id) or {})["outputs"]["90"]["vram_report"]
            if record["file"].get("error"):
                break
            time.sleep(0.1)
        assert record["file"].get("error"), "the record says that there is no file"

    def test_the_other_packs_routes_stay_its_own(self, poor: HostServer) -> None:
        assert poor.get("/offload/other") == {"from": "same_routes"}
        ours, theirs = poor.get("/offload/runs"), poor.get("/offload/status")
        assert "runs" in ours, "what nobody else has is served"
        assert theirs == {"from": "same_routes"} or "components" in theirs
        if theirs == {"from": "same_routes"}:
            assert "/offload/status is off: another pack has this route" in poor.log()

    def test_without_diffusers_the_node_names_the_remedy(self, poor: HostServer) -> None:
        build = graphs.Builder()
        loaded = build.add("PipelineLoaderWithOffload", pipeline_name="tiny_sdxl", dtype="auto")
        drawn = build.add(
            "PipelineGenerate",
            pipeline=[loaded, 0],
            prompt="a seven",
            negative="",
            width=64,
            height=64,
            steps=2,
            guidance=2.0,
            seed=1,
        )
        build.add("TestDigest", value=[drawn, 0])
        entry = poor.wait(poor.queue(build.graph))
        assert entry["status"]["status_str"] == "error"
        text = poor.error_of(entry)
        assert "diffusers" in text and "install" in text
        assert poor.run(graphs.ours(seed=16)), "the queue goes on"


def test_the_module_opens_without_a_server(host: object, root: Path) -> None:
    """As an installer or a linter imports it: no server, no GPU, the host merely importable."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('pack', {str(root / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(root)!r}])\n"
        "pack = importlib.util.module_from_spec(spec); sys.modules['pack'] = pack; spec.loader.exec_module(pack)\n"
        "import asyncio\n"
        "sys.argv = ['x', '--cpu']\n"
        "import comfy.options; comfy.options.enable_args_parsing()\n"
        "extension = asyncio.run(pack.comfy_entrypoint())\n"
        "print(len(asyncio.run(extension.get_node_list())))\n"
    )
    paths = os.pathsep.join([str(host.path), str(HERE / "shim"), os.environ.get("PYTHONPATH", "")])  # type: ignore[attr-defined]
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == str(len(IDS))
