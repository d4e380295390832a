"""Invariant: a byte stays on the device where it saves the most copies, and never more than there is room for."""

from __future__ import annotations

import random
from functools import cache
from itertools import product

import pytest

from balanced_offload.offload.keep import Stage, StageKeep, keep_sets, useful_bytes
from balanced_offload.offload.schedule import Rates

MB = 1_000_000
RATES = Rates(10e9, 5e9)  # 10 MB take a millisecond
SIZES = {"encoder": 900 * MB, "unet": 5000 * MB, "vae": 160 * MB}


def run(step_s: float, calls: int = 28, decode: int = 500 * MB) -> list[Stage]:
    """Encode once, denoise, decode once."""
    return [
        Stage("encoder", 1, 50 * MB, 20e-3, 100 * MB),
        Stage("unet", calls, 300 * MB, step_s, 200 * MB),
        Stage("vae", 1, decode, 50e-3, 40 * MB),
    ]


def by_name(found: list[StageKeep]) -> dict[str, StageKeep]:
    return {stage.component: stage for stage in found}


def test_what_fits_stays() -> None:
    found = by_name(keep_sets(SIZES, run(0.1), 8000 * MB, RATES))
    for name, stage in found.items():
        assert dict(stage.kept) == {other: size for other, size in SIZES.items() if other != name}
        assert (stage.budget, stage.loads, stage.streams, stage.early) == (SIZES[name], 0, 0, 0)


def test_a_vae_gives_way_to_a_denoiser_that_waits_for_copies() -> None:
    """28 steps each save a byte's copy: the VAE's 160 MB are worth 160 steps' megabytes, and are loaded once."""
    found = by_name(keep_sets(SIZES, run(step_s=0.01), 3000 * MB, RATES))
    assert found["unet"].kept == {}
    assert found["unet"].budget == 2700 * MB
    assert found["unet"].streams == 5000 * MB - 2500 * MB


def test_a_vae_stays_beside_a_denoiser_that_does_not() -> None:
    """Compute hides 4 GB per step: beyond 1000 MB no resident byte of the U-Net saves anything; another's may stay."""
    found = by_name(keep_sets(SIZES, run(step_s=0.4), 3000 * MB, RATES))
    assert found["unet"].kept["vae"] == 160 * MB
    assert found["vae"].loads == 0
    assert found["unet"].streams <= 0.4 * RATES.h2d


def test_the_denoiser_stays_over_a_decode_that_leaves_room() -> None:
    found = by_name(keep_sets(SIZES, run(step_s=0.01), 3000 * MB, RATES))
    assert found["vae"].kept["unet"] == 3000 * MB - 500 * MB - 40 * MB, "all but the decode's own and a ring"
    assert "encoder" not in found["vae"].kept


def test_a_byte_is_useful_where_compute_does_not_hide_its_copy() -> None:
    stage = run(step_s=0.3)[1]
    assert useful_bytes(5000 * MB, stage, RATES) == 2000 * MB
    assert useful_bytes(2000 * MB, stage, RATES) == 0
    assert useful_bytes(900 * MB, run(0.3)[0], RATES) == 0, "a single call copies each byte once in any case"


def test_the_hand_over_is_hidden_behind_the_last_call() -> None:
    """The last step copies what it streams; the rest of its time brings up the VAE."""
    found = keep_sets(SIZES, run(step_s=0.26), 3000 * MB, RATES, repeats=False)
    unet = found[1]
    left = 0.26 * RATES.h2d - unet.streams
    assert left > 0
    assert unet.early == min(160 * MB, int(left)) and unet.hidden_s == unet.early / RATES.h2d
    assert found[2].early == 0, "nothing follows"
    busy = keep_sets(SIZES, run(step_s=0.01), 3000 * MB, RATES, repeats=False)
    assert busy[1].early == 0, "its own copies take all of the time"


def test_nothing_stays_for_what_does_not_run_again() -> None:
    found = by_name(keep_sets(SIZES, run(0.4), 3000 * MB, RATES, repeats=False))
    assert "encoder" not in found["unet"].kept and "encoder" not in found["vae"].kept
    assert found["vae"].kept == {}


@pytest.mark.parametrize("seed", range(60))
def test_there_is_room_for_what_stays(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {name: rng.randrange(1, 6000) * MB for name in "abcd"[: rng.randrange(2, 5)]}
    stages = [
        Stage(name, rng.choice([1, 2, 30]), rng.randrange(0, 500) * MB, rng.uniform(0, 0.5), rng.randrange(1, 200) * MB)
        for name in [*sizes, *rng.choices(list(sizes), k=rng.randrange(0, 3))]
    ]
    room = max(s.ring + s.activations for s in stages) + rng.randrange(0, 8000) * MB
    repeats = rng.random() < 0.7
    for stage, found in zip(stages, keep_sets(sizes, stages, room, RATES, repeats=repeats), strict=True):
        assert found.component == stage.component and stage.component not in found.kept
        assert found.budget + sum(found.kept.values()) + stage.activations <= room
        assert all(0 < nbytes <= sizes[name] for name, nbytes in found.kept.items())
        assert found.budget >= min(sizes[stage.component], stage.ring)
        assert 0 <= found.loads <= found.budget and 0 <= found.streams <= sizes[stage.component]
        assert found.streams == 0 or found.streams >= sizes[stage.component] - found.budget
        assert found.early >= 0 and found.hidden_s <= stage.compute_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_no_eviction_copies_less(seed: int) -> None:
    """Single calls of small components, against all that could stay at each stage: bytes copied per run, settled."""
    rng = random.Random(seed)
    sizes = {name: rng.randrange(1, 4) for name in "abc"}
    order = rng.choice(["abc", "abac", "acb", "abcb"])
    stages = [Stage(name, 1, 0, 0.0, 1) for name in order]
    room = rng.randrange(max(sizes.values()), sum(sizes.values()) + 1)
    names = sorted(sizes)
    rounds = 8

    @cache
    def least(at: int, loaded: tuple[int, ...]) -> int:
        if at == rounds * len(stages):
            return 0
        running = names.index(stages[at % len(stages)].component)
        size = sizes[names[running]]
        best = None
        for stays in product(*(range(n + 1) for n in loaded)):
            beside = sum(n for i, n in enumerate(stays) if i != running)
            if beside + size > room and beside + 1 > room:
                continue
            most = size if beside + size <= room else max(0, room - beside - 1)
            after = tuple(max(most, 0) if i == running else n for i, n in enumerate(stays))
            cost = size - min(loaded[running], most) + least(at + 1, after)
            best = cost if best is None else min(best, cost)
        assert best is not None
        return best

    per_run = keep_sets(sizes, stages, room, RATES)
    settled = sum(stage.loads + stage.streams for stage in per_run)
    nothing = (0,) * len(names)
    later = (least(0, nothing) - least(4 * len(stages), nothing)) / (rounds - 4)  # without what a first run costs more
    assert settled < later + 1, (
        f"{settled} per run, where {later} would do: the best may alternate, by less than a unit"
    )


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="runs 'x'; allowed: encoder, unet, vae"):
        keep_sets(SIZES, [Stage("x", 1, 0, 0.0, 1)], 1000, RATES)
    with pytest.raises(ValueError, match=r"'unet' needs 500000000 bytes .* there are 400000000; lower the activations"):
        keep_sets(SIZES, run(0.1), 400 * MB, RATES)
