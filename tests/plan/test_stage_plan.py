"""Invariant: where the times of the units are known, a stage's plan is the event model's, and says so."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from balanced_offload.offload.candidates import SIMPLE
from balanced_offload.offload.explain import plan_sentence
from balanced_offload.offload.plan import StagePlan, full_plan, sequential_plan, stream_plan
from balanced_offload.offload.schedule import Piece, Rates, StepTime, predict_step
from balanced_offload.offload.units import Component, build_component

SEEDS = range(16)
LINK = Rates(512e6, 256e6, copy_latency=0.0)  # 512 bytes take a microsecond


def component_of(sizes: list[int], name: str = "c") -> Component:
    """One leaf per size, in units of 512 bytes."""
    net = nn.Module()
    for i, size in enumerate(sizes):
        leaf = nn.Module()
        leaf.register_parameter("weight", nn.Parameter(torch.empty(size * 128), requires_grad=False))
        net.add_module(f"leaf{i}", leaf)
    component = build_component(name, net)
    assert [u.slot_bytes for u in component.units] == [512 * size for size in sizes]
    return component


def checked(plan: StagePlan, component: Component) -> StagePlan:
    """The plan's own figures agree with the units it names."""
    assert plan.resident_bytes == sum(component.units[i].slot_bytes for i in plan.resident)
    assert plan.resident_bytes + plan.streamed_bytes == component.device_bytes
    assert plan.device_bytes == plan.resident_bytes + plan.ring_bytes
    assert plan.streams == (plan.streamed_bytes > 0)
    assert component.name in plan.sentence
    return plan


def timed_component(rng: random.Random, count: int) -> tuple[Component, list[tuple[int, float]]]:
    """Units of up to 100 times 512 bytes, and their times: about those of their copies."""
    component = component_of([rng.randrange(1, 100) for _ in range(count)])
    order = rng.sample(range(count), count)
    return component, [(i, component.units[i].slot_bytes / 512 * rng.random() * 1e-6) for i in order]


def pieces(component: Component, costs: list[tuple[int, float]], own: dict[int, float] | None = None) -> list[Piece]:
    return [
        Piece(component.units[i].slot_bytes, seconds, i, own_s=None if own is None else own.get(i))
        for i, seconds in costs
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_with_times_the_event_model_plans(seed: int) -> None:
    rng = random.Random(seed)
    component, costs = timed_component(rng, rng.randrange(2, 30))
    own = {i: seconds * rng.random() for i, seconds in costs}
    budget = int(component.device_bytes * rng.uniform(0.5, 0.95))
    held = set(rng.sample(range(len(component.units)), rng.randrange(0, 2)))
    plan = checked(stream_plan(component, budget, held, costs=costs, rates=LINK, own=own), component)
    assert plan.device_bytes <= budget and held <= plan.resident and plan.wrap
    walk = pieces(component, costs, own)
    stays = {at for at, (i, _) in enumerate(costs) if i in plan.resident}
    step = predict_step(walk, stays, plan.ring_bytes, LINK)
    assert (plan.step_s, plan.bound_s, plan.compute_s) == (step.step_s, step.bound_s, step.compute_s)
    assert plan.placement in {"leaky-bucket", *(name for name, _ in SIMPLE)}
    blind = stream_plan(component, budget, held, order=[i for i, _ in costs])
    assert blind.placement == "interleaved" and blind.step_s is None
    stays = {at for at, (i, _) in enumerate(costs) if i in blind.resident}
    assert step.step_s <= predict_step(walk, stays, blind.ring_bytes, LINK).step_s * (1 + 1e-9)


def test_a_component_that_fits_has_its_time_too() -> None:
    component, costs = timed_component(random.Random(0), 6)
    plan = stream_plan(component, component.device_bytes, costs=costs, rates=LINK)
    assert plan.resident == full_plan(component).resident and plan.placement == "resident"
    assert plan.step_s == plan.compute_s == plan.bound_s == pytest.approx(sum(seconds for _, seconds in costs))


def test_units_that_do_not_run_get_what_is_left() -> None:
    """Two entry points: the one that is planned for runs the first half; of the rest, what fits stays."""
    component = component_of([10] * 20)
    costs = [(i, 1e-4) for i in range(10)]
    plan = checked(stream_plan(component, 150 * 512, costs=costs, rates=LINK), component)
    assert set(range(10)) <= plan.resident and len(plan.resident) == 15
    assert plan.ring_bytes == 0 and plan.step_s == pytest.approx(1e-3), "nothing of what runs is streamed"
    scarce = checked(stream_plan(component, 60 * 512, costs=costs, rates=LINK), component)
    assert scarce.resident <= set(range(10))


def test_held_units_count_whether_they_run_or_not() -> None:
    component = component_of([10] * 20)
    costs = [(i, 1e-4) for i in range(10)]
    plan = checked(stream_plan(component, 60 * 512, {3, 15}, costs=costs, rates=LINK), component)
    assert {3, 15} <= plan.resident and plan.device_bytes <= 60 * 512


def test_without_room_for_a_ring_it_is_sequential_with_a_time() -> None:
    component = component_of([10] * 8)
    costs = [(i, 2e-5) for i in range(8)]
    plan = checked(stream_plan(component, 5 * 512, costs=costs, rates=LINK), component)
    assert plan == sequential_plan(component, ceiling=5 * 512, costs=costs, rates=LINK)
    assert plan.ring_bytes == 0 and plan.step_s is None
    sequential = checked(sequential_plan(component, costs=costs, rates=LINK), component)
    assert sequential.placement == "sequential" and sequential.ring_bytes == 20 * 512, "two are as fast as three"
    assert sequential.step_s == pytest.approx(8 * 2e-5 + 1e-5), "the first copy is not hidden"
    beside = sequential_plan(component, held=[0, 1], costs=costs, rates=LINK)
    assert beside.held_bytes == 20 * 512
    assert beside.step_s == pytest.approx(8 * 2e-5 + 2e-5), "two come up before, behind whose work the rest hides"


def test_units_in_pageable_memory_stay_first() -> None:
    component = component_of([10] * 12)
    costs = [(i, 1e-5) for i in range(12)]
    pageable = {1, 3, 5, 7, 9, 11}
    plan = stream_plan(component, 80 * 512, costs=costs, rates=LINK, pageable=pageable)
    assert len(plan.resident & pageable) > len(plan.resident - pageable)


def test_the_sentence() -> None:
    gib = 1 << 30
    step = StepTime(1.282, 0.0, 1.282, 1.282, 0)
    sizes = [int(x * gib) for x in (22.2, 13.7, 2.0, 13.1, 9.1, 0.5)]
    whole, free, activations, keeps, streams, ring = sizes
    assert plan_sentence("unet", whole, free, activations, keeps, streams, ring, step) == (
        "unet: needs 22.2 GiB, 13.7 free after 2.0 for activations: keeps 13.1, streams 9.1 through 0.5; "
        "predicted 0.78 it/s = compute bound"
    )
    late = StepTime(2.0, 0.5, 1.282, 1.9, 0)
    assert plan_sentence("unet", whole, free, None, keeps, streams, 100 << 20, late).endswith(
        "13.7 free: keeps 13.1, streams 9.1 through 0.1; predicted 0.5 it/s, 5.3% over the bound"
    )
    tight = StepTime(1.9, 0.6, 1.282, 1.9, 0)
    assert plan_sentence("unet", whole, free, None, 0, streams, 20 << 20, tight).endswith(
        "13.7 free: streams 9.1 through 20.0 MiB; predicted 0.526 it/s = transfer bound"
    )


def test_the_plans_sentence_has_the_plans_figures() -> None:
    component = component_of([2048] * 40)  # a MiB each
    costs = [(i, 1e-2) for i in range(40)]
    plan = stream_plan(component, 20 << 20, costs=costs, rates=LINK, activations=3 << 20)
    keeps, ring = plan.resident_bytes / (1 << 20), plan.ring_bytes / (1 << 20)
    assert plan.sentence == (
        f"c: needs 40.0 MiB, 20.0 free after 3.0 for activations: keeps {keeps:.1f}, streams {40 - keeps:.1f} through "
        f"{ring:.1f}; predicted 2.5 it/s = compute bound"
    )
