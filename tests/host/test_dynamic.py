"""Invariant: the host's own dynamic patcher takes our limits where it forgets its own, with a stand-in for its pager.

The pager's native library needs a GPU, so its range of pages is the stand-in of tests/adapters/pager.py, and nothing
is computed; the patcher, its load, its clones, its callbacks and its sampling wrappers are the host's own.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

MIB = 1 << 20
PAGE = 32 * MIB
CARD = 16 << 30


def stand_in() -> ModuleType:
    """tests/adapters/pager.py, without importing the tests beside it."""
    name = "host_pager_stand_in"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[1] / "adapters" / "pager.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


class HostBuffer:
    """Pinned memory that is never filled here."""

    def __init__(self, *_: Any) -> None:
        self.size = 0

    def truncate(self, *_: Any, **__: Any) -> None:
        raise AssertionError("nothing was pinned")


class Small(nn.Module):
    """Eight leaves of 64 MiB that the host pages, and one small weight that it moves at once."""

    def __init__(self) -> None:
        import comfy.ops

        super().__init__()
        ops = comfy.ops.manual_cast
        self.diffusion_model = nn.Module()
        self.diffusion_model.leaves = nn.ModuleList(
            ops.Linear(4096, 4096, bias=False, device="meta", dtype=torch.float32) for _ in range(8)
        )
        self.diffusion_model.norm = ops.LayerNorm(64, device="cpu", dtype=torch.float32)
        self.device = torch.device("meta")


@pytest.fixture
def dynamic(host: Any, management: ModuleType, pack: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if host.old:
        pytest.skip("0.3.64 has no dynamic VRAM")
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar

    pages = stand_in().Pages
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", pages)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    monkeypatch.setattr(management, "get_total_memory", lambda *_, **__: CARD)
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: CARD)
    backend: ModuleType = pack("offload.adapters.comfyui_dynamic")
    yield backend
    backend.release_all()


def patcher() -> Any:
    """The host's ModelPatcherDynamic. The meta device stands for the card: tensors there have no bytes."""
    import comfy.model_patcher

    made = comfy.model_patcher.ModelPatcherDynamic(Small(), torch.device("meta", 0), torch.device("cpu"))
    assert type(made) is comfy.model_patcher.ModelPatcherDynamic and made.is_dynamic()
    return made


def load(made: Any) -> Any:
    """As `load_models_gpu` does it -> the range of pages."""
    made.partially_load(made.load_device)
    return made._vbar_get()


def sample(made: Any) -> None:
    """The host's own wrapper machinery around a sampler that does nothing."""
    import comfy.patcher_extension as extension

    wrappers = made.get_all_wrappers(extension.WrappersMP.SAMPLER_SAMPLE)
    ran: list[tuple[Any, ...]] = []
    executor = extension.WrapperExecutor.new_class_executor(lambda *a, **k: ran.append(a), SimpleNamespace(), wrappers)
    executor.execute("guider", "sigmas", {}, None, "noise")
    assert ran == [("guider", "sigmas", {}, None, "noise")]


def apply(dynamic: ModuleType, given: Any, pack: Any, **policy: Any) -> tuple[Any, str]:
    found: tuple[Any, str] = dynamic.apply_dynamic(given, pack("offload.policy").OffloadPolicy(**policy))
    return found


def test_limits_are_stated_last_in_every_load_and_again_at_sampling(dynamic: ModuleType, pack: Any) -> None:
    made, notice = apply(dynamic, patcher(), pack, mode="balanced", high="200MiB", low="70MiB")
    assert "pages this model itself" in notice and "at most 192.0 MiB" in notice
    vbar = load(made)
    assert made.model.model_loaded_weight_memory == 2 * 64 * 4, "the small weights lie outside"
    # 200 MiB less half a KiB are six pages.
    assert vbar.log == [("prioritize",), ("set_watermark", 6 * PAGE), ("set_watermark_limit", 3 * PAGE)]
    vbar.limit = 0  # the host, after the node
    sample(made)
    assert vbar.limit == 3 and vbar.mark == 6
    vbar = load(made)
    assert vbar.mark == 6, "the host's load made it whole, and we were last"


def test_sequential_keeps_nothing(dynamic: ModuleType, pack: Any) -> None:
    made, _ = apply(dynamic, patcher(), pack, mode="sequential")
    assert load(made).mark == 0


@pytest.mark.parametrize("mode", ["auto", "none", "model"])
def test_stock_modes_leave_the_pager_whole(dynamic: ModuleType, pack: Any, mode: str) -> None:
    made, _ = apply(dynamic, patcher(), pack, mode=mode)
    vbar = load(made)
    sample(made)
    assert vbar.mark == vbar.pages and vbar.limit == 0
    assert {entry[0] for entry in vbar.log} == {"prioritize"}


def test_clones_keep_the_policy_and_the_given_stays_stock(dynamic: ModuleType, pack: Any) -> None:
    given = patcher()
    made, _ = apply(dynamic, given, pack, mode="sequential")
    assert load(made.clone()).mark == 0
    vbar = load(given)
    assert vbar.mark == vbar.pages


def test_the_pages_figures_are_told(dynamic: ModuleType, pack: Any) -> None:
    made, _ = apply(dynamic, patcher(), pack, mode="balanced", high="200MiB", low="70MiB")
    vbar = load(made)
    for leaf in made.model.diffusion_model.leaves[:3]:
        vbar.fault(leaf._v[1], leaf._v[2])
    found = dynamic.state(made.model, pages=True)
    assert found["watermark"] == 6 * PAGE and found["loaded"] == 6 * PAGE + found["outside"]
    assert found["pages"]["resident"] == 6 and found["failures"] == []


def test_a_static_clone_by_the_hosts_own_means(dynamic: ModuleType, pack: Any) -> None:
    import comfy.model_patcher

    given, reads = patcher(), []

    def again(path: str, disable_dynamic: bool = False) -> Any:
        reads.append((path, disable_dynamic))
        return comfy.model_patcher.ModelPatcher(Small(), given.load_device, given.offload_device)

    given.cached_patcher_init = (again, ("model.safetensors",))
    for _ in range(2):
        made, notice = apply(dynamic, given, pack, mode="balanced", use_core_dynamic="bypass")
        assert type(made) is comfy.model_patcher.ModelPatcher and made.model is not given.model
        assert "reads the files once more" in notice
    assert reads == [("model.safetensors", True)]


def test_without_a_factory_it_follows(dynamic: ModuleType, pack: Any) -> None:
    made, notice = apply(dynamic, patcher(), pack, mode="sequential", use_core_dynamic="bypass")
    assert made.is_dynamic() and "not static as asked for" in notice
    assert load(made).mark == 0


def test_the_real_range_has_the_calls_that_we_make(host: Any, management: ModuleType) -> None:
    if host.old:
        pytest.skip("0.3.64 has no dynamic VRAM")
    from comfy_aimdo.model_vbar import ModelVBAR

    for call in ("set_watermark", "set_watermark_limit", "get_watermark", "get_residency", "loaded_size", "prioritize"):
        assert callable(getattr(ModelVBAR, call)), call
