"""Invariant: `plan` predicts with the planner's own figures, and says what they rest on; nothing is run for it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import torch

from balanced_offload.offload import advice_options
from balanced_offload.offload.advice import CONTEXT, MODES, advise
from balanced_offload.offload.advice_options import Asked, Figures, figures_of, read_rate, read_tflops
from balanced_offload.offload.models import NAMES, UnitCost, build_denoiser, walk
from balanced_offload.offload.models.walks import ModelWalk
from balanced_offload.offload.policy import ComponentInfo, Machine, OffloadMode, OffloadPolicy, WorkingSet
from balanced_offload.offload.simulator.cards import CARDS

from .conftest import command

GIB = 1 << 30
CARD = ("--vram", "16GiB", "--bandwidth", "24GB/s", "--tflops", "58")


@pytest.fixture(scope="module")
def schema() -> dict:
    root = Path(__file__).resolve().parents[2]
    found = json.loads((root / "offload" / "schemas" / "offload-plan-1.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def plan(*arguments: str) -> dict:
    ended = command("plan", *arguments, "--json")
    assert ended.code == 0, ended.err
    return ended.document


# Predictions of another event model for the same cards (24 GB/s; GiB, TFLOP/s), it/s: with everything resident, and
# the best plan. Its cards keep 2.0 to 3.5 GB for activations, ours 2.0 GiB and more.
KNOWN = {
    ("sdxl", None, 8, 24): (None, None),
    ("sd35-large", None, 8, 24): (0.385, 0.385),
    ("sd35-large", None, 24, 99): (1.59, 1.59),
    ("flux1-dev", None, 16, 58): (0.780, 0.780),
    ("flux1-dev", None, 24, 99): (1.33, 1.33),
    ("flux1-dev", "512x512", 12, 35): (1.63, 1.63),
    ("qwen-image", None, 16, 58): (0.822, 0.822),
    ("qwen-image", None, 24, 99): (1.40, 1.30),
    ("wan21-14b", None, 16, 58): (0.0346, 0.0346),
    ("wan21-14b", None, 32, 125): (0.074, 0.074),
}


@pytest.mark.parametrize(("model", "resolution", "gib", "tflops"), KNOWN)
def test_every_model_on_two_cards(model, resolution, gib, tflops, schema):
    size = () if resolution is None else ("--resolution", resolution)
    walk(model, resolution)  # counting the shapes is not what is timed
    start = time.perf_counter()
    document = plan("--model", model, "--vram", f"{gib}GiB", "--bandwidth", "24GB/s", "--tflops", str(tflops), *size)
    assert time.perf_counter() - start < 20
    jsonschema.validate(document, schema)
    expected, best = KNOWN[model, resolution, gib, tflops]
    if expected is not None:
        assert 1 / document["compute_s"] == pytest.approx(expected, rel=0.01)
        assert document["plan"]["its"] == pytest.approx(best, rel=0.01)
    assert document["compute_s"] == pytest.approx(document["flops"] / tflops / 1e12)
    consistent(document)


def consistent(document: dict) -> None:
    """What holds for any card: no promise below the bound, and sizes that add up."""
    assert document["budget"] == max(
        0, document["vram"] - document["reserve"] - document["context"] - document["activations"]
    )
    missing = max(0, document["weights"] - document["budget"])
    assert document["bound_s"] == pytest.approx(max(document["compute_s"], missing / document["bandwidth"]))
    found = document["plan"]
    assert list(document["modes"]) == list(MODES)
    for step in (found, *document["modes"].values()):
        if step is None:
            continue
        assert step["step_s"] >= document["bound_s"] * (1 - 1e-9)
        assert step["its"] == pytest.approx(1 / step["step_s"])
        assert step["resident"] + step["streamed"] == document["weights"]
        assert step["resident"] + step["ring"] <= document["budget"]
        assert (step["ring"] > 0) == (step["streamed"] > 0)
        if step.get("high") is not None and step["resolved"] == "balanced":
            assert step["resident"] + step["ring"] <= step["high"]
        assert found["step_s"] <= step["step_s"] * 1.0005
    whole = document["weights"] <= document["budget"]
    assert (document["modes"]["none"] is not None) == (document["modes"]["model"] is not None) == whole
    for peer, step in document["peers"].items():
        if step is not None:
            assert step["step_s"] >= document["compute_s"] * (1 - 1e-9), peer
            assert found["step_s"] <= step["step_s"] * 1.0005, peer


PEERS = {
    "diffusers.model",
    "diffusers.sequential",
    "diffusers.group_leaf",
    "diffusers.group_leaf_stream",
    "diffusers.group_leaf_stream_record",
    "diffusers.group_block_stream",
    "accelerate.dispatch",
    "torch.to",
    "sdnext.balanced",
    "comfyui.two_leaf",
}


def test_every_peer_under_the_same_rates():
    document = plan("--model", "flux1-dev", *CARD)
    peers = document["peers"]
    assert set(peers) >= PEERS
    # What needs all of it at once cannot run; who keeps nothing copies everything.
    assert peers["diffusers.model"] is None and peers["torch.to"] is None
    for name in ("diffusers.sequential", "diffusers.group_leaf_stream", "diffusers.group_block_stream"):
        assert peers[name]["copied"] == document["weights"]
    seconds = {name: step["step_s"] for name, step in peers.items() if step is not None}
    # Published for this card, it/s: sequential 0.234, leaf groups with a stream 0.559, two leaves ahead 0.716.
    assert 1 / seconds["diffusers.sequential"] == pytest.approx(0.234, rel=0.02)
    assert 1 / seconds["diffusers.group_leaf_stream"] == pytest.approx(0.559, rel=0.05)
    assert seconds["diffusers.group_leaf"] > seconds["diffusers.sequential"] > seconds["accelerate.dispatch"]
    slower = plan("--model", "flux1-dev", *CARD, "--pageable", "4GB/s")["peers"]
    assert slower["diffusers.sequential"]["step_s"] > 1.5 * seconds["diffusers.sequential"]
    assert slower["diffusers.group_leaf_stream"]["step_s"] < 1.05 * seconds["diffusers.group_leaf_stream"]
    whole = plan("--model", "flux1-dev", *CARD, "--vram", "32GiB")["peers"]
    assert whole["torch.to"]["step_s"] == pytest.approx(document["compute_s"]) and whole["torch.to"]["copied"] == 0


def test_a_run_that_fits_moves_nothing():
    document = plan("--model", "sdxl", *CARD)
    for mode in ("none", "model", "auto", "balanced"):
        assert document["modes"][mode]["resident"] == document["weights"]
        assert document["modes"][mode]["step_s"] == pytest.approx(document["compute_s"])
    assert document["modes"]["auto"]["resolved"] == "none"
    assert document["modes"]["sequential"]["resident"] == 0
    assert document["plan"]["placement"] == "resident"


def test_a_mode_keeps_to_its_policys_mark():
    """The default profile caps one component at 60 % of the card; the plan may use all of it."""
    document = plan("--model", "qwen-image", *CARD)
    balanced = document["modes"]["balanced"]
    assert balanced["high"] == int(0.6 * 16 * GIB)
    assert document["modes"]["auto"]["resolved"] == "balanced"
    assert balanced["resident"] + balanced["ring"] > 0.97 * balanced["high"]
    assert document["plan"]["resident"] > balanced["resident"]


def test_what_to_write_for_the_plan_is_what_gives_it():
    """The mark that the text names, asked of the policy, is one under which the same plan is made."""
    for vram, mode in (("16GiB", "auto"), ("4GiB", "balanced")):
        ended = command("plan", "--model", "flux1-dev", "--resolution", "512x512", *CARD, "--vram", vram)
        named = re.search(r'(\w+) with high = "([0-9.]+GiB)" gives the plan above', ended.out)
        assert named is not None and named[1] == mode
        policy = OffloadPolicy(mode=OffloadMode(named[1]), high=named[2])
        size = int(vram.removesuffix("GiB")) * GIB
        need = WorkingSet((ComponentInfo("denoiser", "x", "denoiser", 24 * 10**9),), 2 * GIB)
        resolved = policy.resolve(Machine("a card", "cuda", size, others=CONTEXT), need)
        found = plan("--model", "flux1-dev", "--resolution", "512x512", *CARD, "--vram", vram)["plan"]
        assert resolved.mode is OffloadMode.BALANCED
        assert found["resident"] + found["ring"] <= resolved.high < found["resident"] + found["ring"] + GIB // 8


def test_a_package_without_the_table_of_cards(monkeypatch):
    monkeypatch.setitem(sys.modules, "balanced_offload.offload.simulator.cards", None)
    ended = command("plan", "--model", "sdxl", "--card", "rtx4080-16g")
    assert ended.code == 2 and "without the table of cards" in ended.err and "--bandwidth" in ended.err


def test_what_it_says():
    ended = command("plan", "--model", "qwen-image", *CARD)
    assert ended.code == 0 and ended.err == ""
    document = plan("--model", "qwen-image", *CARD)
    text = ended.out
    assert "qwen-image at 1024x1024 on a card with 16.0 GiB" in text
    assert "24 GB/s pinned (given), 8 pageable (assumed), 58 TFLOP/s (given)" in text
    assert document["plan"]["sentence"] in text
    assert "qwen-image: needs 38.1 GiB, 12.1 GiB" in text or "qwen-image: needs 38.1 GiB, 13.1 free" in text
    for name in ("the bound", *(f"ours.{mode}" for mode in MODES), *document["peers"]):
        assert sum(line.lstrip("* ").startswith(name + " ") for line in text.splitlines()) == 1, name
    assert "ours.none" in text and "does not fit" in text
    marked = [
        line for line in text.splitlines() if line.startswith("* ") and "it/s" not in line and "marks" not in line
    ]
    assert any("the plan above" in line for line in marked)
    assert 'with high = "' in text
    assert "predictions (rung: schedule)" in text
    best = min(step["step_s"] for step in document["peers"].values() if step is not None)
    assert f"The plan is {best / document['plan']['step_s']:.2f} x as fast as the best of the others" in text


def test_text_beside_a_file_and_not_beside_standard_output(tmp_path: Path):
    target = tmp_path / "plan.json"
    ended = command("plan", "--model", "sdxl", *CARD, "--json", str(target))
    assert ended.code == 0 and "sdxl at 1024x1024" in ended.out
    other = command("plan", "--model", "sdxl", *CARD, "--json")
    assert other.document == json.loads(target.read_text(encoding="utf-8"))
    assert "sdxl at 1024x1024" in other.err
    assert command("plan", "--model", "sdxl", *CARD, "--json", str(tmp_path / "no" / "plan.json")).code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "flux"], ["--model", "'flux'", "flux1-dev", "wan21-14b", ".safetensors"]),
        (["--model", "/no/such.safetensors"], ["/no/such.safetensors", "no such file"]),
        (["--vram", "16"], ["--vram", "'16'", "16GiB"]),
        (["--vram", "0GiB"], ["--vram", "at least 1.0 GiB"]),
        (["--vram", "50%"], ["--vram", "'50%'", "bytes"]),
        (["--bandwidth", "24"], ["--bandwidth", "'24'", "24GB/s"]),
        (["--bandwidth", "fast"], ["--bandwidth", "'fast'", '"24GB/s"']),
        (["--bandwidth", "0GB/s"], ["--bandwidth", "between 1 MB/s"]),
        (["--pageable", "30GB/s"], ["--pageable", "at most --bandwidth (24 GB/s)"]),
        (["--tflops", "0"], ["--tflops", "'0'", "over 0"]),
        (["--tflops", "many"], ["--tflops", "'many'", "60 %"]),
        (["--resolution", "big"], ["--resolution", "'big'", "WIDTHxHEIGHT"]),
        (["--resolution", "1000x1000"], ["--resolution", "multiples of 16", "992"]),
        (["--reserve", "1"], ["--reserve", "'1'", "1GiB"]),
        (["--dtype", "int4"], ["--dtype", "'int4'", "bf16, fp16, fp32"]),
        (["--activations=-1GiB"], ["--activations", "'-1GiB'", "negative"]),
        (["--card", "rtx9999"], ["--card", "'rtx9999'", "rtx4090-24g"]),
    ],
)
def test_bad_options(arguments, words):
    model = () if "--model" in arguments else ("--model", "flux1-dev")
    ended = command("plan", *model, *CARD, *arguments)
    assert ended.code == 2
    assert ended.out == ""
    for word in words:
        assert word in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_model_has_to_be_named():
    assert "--model" in command("plan", *CARD).err


def test_a_card_by_name_and_what_overrides_it():
    document = plan("--model", "flux1-dev", "--card", "rtx4080-16g")
    card = CARDS["rtx4080-16g"]
    assert (document["vram"], document["bandwidth"], document["pageable"]) == (card.vram, 24e9, 8e9)
    assert (document["tflops"], document["hbm"]) == (card.flops16 / 1e12, card.hbm)
    assert document["sources"]["tflops"] == "card rtx4080-16g"
    assert document["compute_s"] > 1.2 * document["flops"] / card.flops16  # memory-bound work counts
    other = plan("--model", "flux1-dev", "--card", "rtx4080-16g", "--tflops", "58", "--vram", "12GiB")
    assert (other["tflops"], other["hbm"], other["vram"]) == (58, None, 12 * GIB)
    assert other["sources"] | {"tflops": "given", "vram": "given"} == other["sources"]
    assert other["compute_s"] == pytest.approx(other["flops"] / 58e12)
    consistent(document)


def test_options_that_change_the_weights_and_their_room():
    plain = plan("--model", "sdxl", *CARD)
    double = plan("--model", "sdxl", *CARD, "--dtype", "fp32")
    assert double["weights"] == pytest.approx(2 * plain["weights"], rel=1e-3)
    assert plan("--model", "sdxl", *CARD, "--activations", "3GiB")["activations"] == 3 * GIB
    kept = plan("--model", "sdxl", *CARD, "--reserve", "2GiB")
    assert kept["budget"] == plain["budget"] - 2 * GIB
    large = plan("--model", "flux1-dev", *CARD, "--resolution", "4096x4096")
    assert large["sources"]["activations"] == "counted" and large["activations"] > 6 * GIB
    assert plain["sources"]["activations"] == "assumed" and plain["activations"] == 2 * GIB


def test_a_card_on_which_nothing_fits_says_so(schema):
    document = plan("--model", "flux1-dev", *CARD, "--vram", "3GiB")
    jsonschema.validate(document, schema)
    assert document["plan"] is None and set(document["modes"].values()) == {None}
    assert any("cannot fit: largest unit needs 108.0 MiB" in note for note in document["notes"])
    text = command("plan", "--model", "flux1-dev", *CARD, "--vram", "3GiB").out
    assert "not even the largest unit has room" in text and "cannot fit: largest unit needs" in text


def test_a_file_is_planned_from_its_header(tmp_path: Path, schema):
    build_denoiser("flux1-dev", torch.float32, tiny=True).save_pretrained(tmp_path / "flux")
    document = plan("--model", str(tmp_path / "flux"), *CARD)
    jsonschema.validate(document, schema)
    assert document["weights"] == walk("flux1-dev", dtype=torch.float32, tiny=True).weights
    assert "estimated from the shapes" in document["sources"]["compute"]
    assert "estimated from the shapes" in command("plan", "--model", str(tmp_path / "flux"), *CARD).out
    smaller = plan("--model", str(tmp_path / "flux"), *CARD, "--resolution", "512x512", "--dtype", "bf16")
    assert smaller["weights"] < document["weights"] and smaller["compute_s"] < document["compute_s"]


def test_without_rates_they_are_this_machines(monkeypatch, sim: ModuleType):
    """On a machine with an accelerator its size, its link and a matrix product; here the simulated one."""
    sim.use_card("rtx4080-16g")
    sim.configure(ghost=1 << 20)
    figures = figures_of(Asked("flux1-dev"))
    assert (figures.bandwidth, figures.pageable) == (24e9, 8e9)
    assert figures.tflops == pytest.approx(advice_options.MATMUL_SHARE * CARDS["rtx4080-16g"].flops16 / 1e12, rel=0.01)
    assert figures.vram == sim.memory_cap()
    assert figures.sources["tflops"] == "measured" and figures.sources["bandwidth"] == "stored"
    given = figures_of(Asked("flux1-dev", vram="24GiB", tflops="99"))
    assert (given.vram, given.tflops, given.bandwidth) == (24 * GIB, 99, 24e9)


def test_without_rates_and_without_a_card_they_are_assumed(monkeypatch):
    monkeypatch.setattr(advice_options, "_machine", lambda asked: None)
    figures = figures_of(Asked("sdxl", vram="8GiB"))
    assert set(figures.sources.values()) == {"assumed", "given"}
    assert figures.tflops == advice_options.ASSUMED_TFLOPS
    with pytest.raises(ValueError, match="--vram: got nothing"):
        figures_of(Asked("sdxl"))


@pytest.mark.parametrize(
    ("written", "rate"), [("24GB/s", 24e9), ("12 GiB/s", 12 * GIB), ("800MB/s", 8e8), ("24GBps", 24e9), ("24GB", 24e9)]
)
def test_rates(written, rate):
    assert read_rate("--bandwidth", written) == rate


@pytest.mark.parametrize(("written", "value"), [("58", 58), ("1e3", 1000), ("58.5 TFLOPS", 58.5), ("99TFLOP/s", 99)])
def test_tflops(written, value):
    assert read_tflops(written) == value


def unit(index: int, nbytes: int, seconds: float, flows: bool = True) -> UnitCost:
    """A unit of `nbytes` and `seconds` on a card of 1 TFLOP/s."""
    return UnitCost(f"u{index}", index, nbytes, 1, None, ((seconds * 1e12, 0),), 1, flows)


def test_by_hand():
    """Four units of 1 GiB and 1 s, a link of 1 GiB/s, room for 2.5: two slots let each copy run beside a forward."""
    units = tuple(unit(i, GIB, 1.0) for i in range(4))
    vram = CONTEXT + 2 * GIB + 5 * GIB // 2
    card = Figures("a card", vram, float(GIB), GIB / 2, 1.0, None, 0.0)
    document = advise(ModelWalk("four", None, units), card)
    assert document["activations"] == 2 * GIB and document["budget"] == 5 * GIB // 2
    assert document["compute_s"] == 4.0 and document["bound_s"] == 4.0
    assert document["plan"]["resident"] == 0 and document["plan"]["ring"] == 2 * GIB
    assert document["plan"]["streamed"] == 4 * GIB
    assert document["plan"]["step_s"] == pytest.approx(4.0)
    slow = advise(ModelWalk("four", None, units), dataclasses.replace(card, bandwidth=GIB / 2))
    # Four copies of 2 s. One that stays would leave one slot, and copies and forwards in turn: 3 x (2 + 1) = 9 s.
    assert slow["bound_s"] == 4.0 and slow["plan"]["step_s"] == pytest.approx(8.0)
    assert document["modes"]["none"] is None and document["modes"]["model"] is None


def test_what_cannot_flow_stays_in_every_mode():
    units = (unit(0, GIB, 1.0, flows=False), *(unit(i, GIB, 1.0) for i in range(1, 5)))
    idle = (unit(5, GIB // 2, 0.0),)
    card = Figures("a card", CONTEXT + 2 * GIB + 4 * GIB, float(GIB), GIB / 2, 1.0, None, 0.0)
    document = advise(ModelWalk("five", None, units, unused=idle), card)
    assert document["weights"] == 5 * GIB + GIB // 2
    assert document["plan"]["resident"] >= GIB + GIB // 2
    assert document["modes"]["sequential"]["resident"] == GIB + GIB // 2
    consistent(document)


def test_the_help_does_not_wait_for_torch(root: Path):
    script = (
        f"import sys; sys.path.insert(0, {str(root / 'tests')!r})\n"
        "import types; package = types.ModuleType('bo'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['bo'] = package\n"
        "from bo.offload.cli import build_parser\n"
        "text = build_parser().format_help()\n"
        "assert 'plan' in text and 'bench' in text and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_models_are_in_the_help():
    text = command("plan", "--help").out
    assert all(name in text for name in NAMES)
