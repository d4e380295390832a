"""Verdicts can fail: a changed bit, a race, an error, memory left behind are each told, and none ends the suite."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from balanced_offload.offload.bench.document import failures
from balanced_offload.offload.bench.measure import Bench as Running
from balanced_offload.offload.bench.measure import LeftBehind, Setting
from balanced_offload.offload.bench.peers import whole
from balanced_offload.offload.bench.places import SimulatedPlace
from balanced_offload.offload.bench.strategies import Applied, Room, Strategy, chosen
from balanced_offload.offload.bench.subjects import CUT, TINY
from balanced_offload.offload.bench.twin import compare, make_twin

from .conftest import LOOSE, TIGHT, Bench


def changes_a_bit(module: nn.Module, room: Room) -> Applied:
    """One bit of one weight."""
    weight = next(module.parameters())
    bits = weight.data.view(torch.int16)
    bits.view(-1)[0] ^= 1 << 10
    return whole(module, room)


def late(module: nn.Module, room: Room) -> Applied:
    """Right in the first two forwards, wrong from the third one on."""
    applied, calls = whole(module, room), 0

    def hook(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            next(module.parameters()).data.mul_(2)

    module.register_forward_pre_hook(hook)
    return applied


def breaks(module: nn.Module, room: Room) -> Applied:
    raise RuntimeError("this library does not know\nthe device")


def result_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(r for r in document["cases"][0]["results"] if r["name"] == name)
    return found


@pytest.mark.parametrize("apply", [changes_a_bit, late])
def test_a_changed_bit_of_ours_fails(bench: Bench, apply: Any) -> None:
    document = bench(Strategy("ours.none", True, apply), *chosen(["torch.to"]), caps=(LOOSE,))
    assert result_of(document, "ours.none")["equal"] is False
    assert result_of(document, "torch.to")["equal"] is True
    assert len(document["failures"]) == 1 and "ours.none" in document["failures"][0]


def test_a_peers_changed_bit_is_in_its_row(bench: Bench) -> None:
    document = bench(Strategy("test.wrong", False, changes_a_bit), caps=(LOOSE,))
    assert result_of(document, "test.wrong")["equal"] is False
    assert document["failures"] == []


def test_a_peers_error_is_in_its_row_and_the_rest_runs(bench: Bench) -> None:
    document = bench(Strategy("test.broken", False, breaks), *chosen(["torch.to"]), caps=(LOOSE,))
    broken = result_of(document, "test.broken")
    assert broken["completed"] is False and broken["step_s"] is None
    assert broken["error"] == "RuntimeError: this library does not know the device"
    assert result_of(document, "torch.to")["completed"] is True
    assert document["failures"] == [] and document["complete"] is True


def test_a_mode_of_ours_that_must_run_and_does_not_fails(bench: Bench) -> None:
    document = bench(Strategy("ours.auto", True, breaks), Strategy("ours.none", True, breaks), caps=(LOOSE,))
    assert len(document["failures"]) == 1 and "ours.auto" in document["failures"][0]


def test_less_is_tried_where_memory_runs_out(bench: Bench) -> None:
    asked: list[int] = []

    def hungry(module: nn.Module, room: Room) -> Applied:
        asked.append(1)
        raise torch.OutOfMemoryError("too much")

    document = bench(Strategy("test.modest", False, hungry, fallbacks=(hungry, whole)), caps=(LOOSE,))
    assert asked == [1, 1]
    assert result_of(document, "test.modest")["completed"] is True


def test_memory_left_behind_is_an_error_of_its_own(bench: Bench, sim: ModuleType) -> None:
    kept: list[torch.Tensor] = []

    def leaks(module: nn.Module, room: Room) -> Applied:
        kept.append(torch.empty(4096, device=room.device))
        return whole(module, room)

    document = bench(Strategy("test.leak", False, leaks), *chosen(["torch.to"]), caps=(LOOSE,))
    assert result_of(document, "test.leak")["error"].startswith("LeftBehind: 16384 device bytes")
    assert result_of(document, "torch.to")["completed"] is True
    kept.clear()


def test_leaving_memory_behind_raises(place: SimulatedPlace) -> None:
    room = Room(place.device, None, 0, 0)
    kept = []
    with pytest.raises(LeftBehind), Running(place, Setting(TINY, None), whole, room) as running:
        kept.append(running.step())
    kept.clear()


def test_an_interrupt_goes_through_and_leaves_nothing(bench: Bench, sim: ModuleType) -> None:
    def interrupts(module: nn.Module, room: Room) -> Applied:
        whole(module, room)
        raise KeyboardInterrupt

    before = sim.memory_allocated()
    with pytest.raises(KeyboardInterrupt):
        bench(Strategy("test.stop", False, interrupts), caps=(LOOSE,))
    assert sim.memory_allocated() == before
    assert sim.others() == 0


def test_races_of_ours_fail_and_those_of_peers_are_told() -> None:
    result: dict[str, Any] = {"name": "ours.auto", "ours": True, "completed": True, "equal": None, "races": 2}
    entry: dict[str, Any] = {"model": "m", "resolution": "8x8", "card": None, "cap": 1 << 30, "results": [result]}
    assert failures({"cases": [entry]}) == ["ours.auto, m 8x8 on 1 GiB: 2 races"]
    result |= {"ours": False, "name": "diffusers.model"}
    assert failures({"cases": [entry]}) == []


def test_the_twin_tells_a_changed_bit(place: SimulatedPlace) -> None:
    twin = make_twin(place, CUT)
    wrong = compare(place, Strategy("ours.none", True, changes_a_bit), twin)
    assert wrong["twin_equal"] is False
    assert wrong["twin"]["tight"] is None and wrong["twin"]["loose"] is False
    right = compare(place, chosen(["diffusers.group_leaf_stream"])[0], twin)
    assert right["twin_equal"] is True and right["twin"]["tight"] is True and right["twin"]["loose"] is True


def test_ours_streams_on_the_twin_with_a_part_resident(place: SimulatedPlace) -> None:
    found = compare(place, chosen(["ours.balanced"])[0], make_twin(place, CUT))
    assert found["twin_equal"] is True and found["twin"]["tight"] is True
    assert "keeps" in found["twin"]["tight_sentence"] and "streams" in found["twin"]["tight_sentence"]
    assert found["twin"]["races"] == 0


@pytest.mark.slow
def test_ours_is_equal_under_both_caps(bench: Bench, tmp_path: Path) -> None:
    document = bench(*chosen(["ours"]), caps=(TIGHT, LOOSE))
    tight, loose = ({r["name"]: r for r in entry["results"]} for entry in document["cases"])
    assert {name for name, result in tight.items() if not result["completed"]} == {"ours.none"}
    assert all(result["completed"] for result in loose.values())
    for result in (*tight.values(), *loose.values()):
        assert result["equal"] is (True if result["completed"] else None), result["name"]
        assert not result["completed"] or result["bytes_d2h"] == 0
    assert document["failures"] == []
