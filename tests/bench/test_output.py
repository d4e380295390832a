"""Tables and picture say what the document says: failures too, and that simulated figures are simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from balanced_offload.offload.bench.chart import chart_png
from balanced_offload.offload.bench.document import work_out
from balanced_offload.offload.bench.tables import closing_text, markdown, write_markdown

GIB = 1 << 30


def result(name: str, step: float | None, **more: Any) -> dict[str, Any]:
    done = step is not None
    base: dict[str, Any] = {"name": name, "ours": name.startswith("ours"), "completed": done, "step_s": step}
    base |= {"samples": [step] if done else [], "equal": None, "equal_on": "tiny", "twin_equal": True}
    base |= {"host_s": 0.002, "peak_vram": 6 * GIB if done else None, "pinned_ram": 12 * GIB if done else None}
    base |= {"bytes_h2d": 3.0 * GIB if done else None, "bytes_d2h": 0.0 if done else None, "host_syncs": 0.0}
    return base | {"error": None if done else "OutOfMemoryError: no room | at all", **more}


def entry(model: str, cap: int, card: str) -> dict[str, Any]:
    results = [
        result("ours.balanced", 1.32),
        result("ours.auto", 1.31),
        result("diffusers.group_leaf", 30.0),
        result("diffusers.group_leaf_stream_record", 2.62, twin_equal=False),
        result("accelerate.dispatch", 5.0),
        result("torch.to", None),
    ]
    found = {
        "model": model,
        "resolution": "1024x1024",
        "card": "key",
        "cap": cap,
        "parameters": {"card": card, "card_name": f"GeForce {card}", "link": "PCIe 4.0 x16", "h2d_pinned": 24e9},
        "weights": 22 * GIB,
        "activations": 1 * GIB,
        "compute_s": 1.0,
        "bound_s": 1.3,
        "bound_all_streamed_s": 1.6,
        "bandwidth": 24e9,
        "results": results,
    }
    work_out(found)
    return found


@pytest.fixture
def document() -> dict[str, Any]:
    cases = [entry("flux1-dev", 12 * GIB, "RTX 4070"), entry("qwen-image", 24 * GIB, "RTX 4090")]
    return {
        "schema": "offload-bench/1",
        "suite": "peers",
        "rung": "simulated",
        "device": "simulated",
        "parameters": {"versions": {"torch": "2", "diffusers": "1", "accelerate": None}},
        "cases": cases,
        "hooks": {"leaves": 10, "ours_us": 20.0, "accelerate_us": 200.0, "ratio": 0.1},
        "lora": [],
        "fit": [],
        "failures": [],
    }


def test_one_row_per_case(document: dict[str, Any]) -> None:
    lines = markdown(document).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 2
    assert lines[2] == (
        "| flux1-dev 1024px | 12 GiB RTX 4070 | 1.00 s | 1.30 s | **1.31 s** | 2.62 s (group_leaf_stream_record) "
        "| 2.00 x | 6.00 / 6.00 | 12.00 / 12.00 |"
    )
    assert "*Simulated*" in lines[-1] and "diffusers 1" in lines[-1] and "accelerate" not in lines[-1]
    document["rung"] = "gpu"
    assert "*Simulated*" not in markdown(document)


def test_a_case_in_which_nothing_ran(document: dict[str, Any]) -> None:
    case = document["cases"][0]
    case["results"] = [result("ours.auto", None), result("torch.to", None)]
    work_out(case)
    assert "| failed | none ran | – |" in markdown(document)
    assert "failed" in closing_text(document)


def test_the_file_has_every_strategy_and_the_cards(document: dict[str, Any], tmp_path: Path) -> None:
    text = write_markdown(document, tmp_path / "bench.md").read_text(encoding="utf-8")
    assert text.count("| accelerate.dispatch | 5.00 s |") == 2
    assert "OutOfMemoryError: no room / at all" in text, "a bar would begin a new cell"
    assert "| RTX 4070 | PCIe 4.0 x16 | 24 |" in text
    assert "| NO |" in text, "an unequal output is told"
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ") and "group_leaf" in line}
    assert len(widths) <= 2


def test_the_terminal_tells_ratio_and_hooks(document: dict[str, Any]) -> None:
    text = closing_text(document)
    assert "ours.auto is 2.00 x as fast as the best peer, diffusers.group_leaf_stream_record" in text
    assert "ours 20.0 us, accelerate's hook 200.0 us (1/10.0)" in text
    assert "(simulated)" in text


def test_the_picture(document: dict[str, Any], tmp_path: Path) -> None:
    import numpy as np
    from matplotlib.image import imread

    picture = imread(chart_png(document, tmp_path / "bench.png"))
    assert picture.shape[0] > 200 and picture.shape[1] > 600
    ours = np.all(np.abs(picture[..., :3] - np.array([0x00, 0x72, 0xB2]) / 255) < 0.02, axis=-1)
    assert ours.sum() > 500, "our bar is there, in its colour"
    # its length is the ratio: a slower run draws a longer bar
    for case in document["cases"]:
        next(r for r in case["results"] if r["name"] == "ours.auto")["samples"] = [3.9]
        work_out(case)
    slower = imread(chart_png(document, tmp_path / "slower.png"))
    longer = np.all(np.abs(slower[..., :3] - np.array([0x00, 0x72, 0xB2]) / 255) < 0.02, axis=-1)
    assert longer.sum() > 2 * ours.sum()


def test_nothing_to_draw(document: dict[str, Any], tmp_path: Path) -> None:
    document["cases"] = []
    with pytest.raises(ValueError, match="no results"):
        chart_png(document, tmp_path / "bench.png")
