"""Invariant: after any one fault the run finishes right or raises once, and the next is right and moves the same bytes.

Faults of the device (a copy that takes ten times as long, memory or page locks refused) strike the k-th time, for
every k; errors strike in every leaf; an interrupt strikes at every line of the core. They strike the first forward,
which is traced, the second, which is timed, the third, in front of which the stage is planned again, and a later one.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from balanced_offload.offload import OffloadPolicy, Session, weights

from .faults import Interrupt, Lines, Rig, frozen  # noqa: F401
from .test_clean import Bomb
from .toys import DEVICE, NETS, build, clone, copied, policy, tokens

PHASES = {"first": 0, "timed": 1, "third": 2, "steady": 5}  # clean forwards before the one that is struck
UNIT = 64 * 64 * 4 + 512


class Uneven(nn.Module):
    """Layers of very different sizes, and compute that has nothing to do with them: by times the plan is another."""

    WIDTHS = (64, 192, 64, 96, 64, 256, 64, 32, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        pairs = itertools.pairwise((64, *self.WIDTHS))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            for _ in range(12 if at == 1 else 0):
                x = torch.sin(x)
        return x


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "chain": NETS["chain"],
    "tied": NETS["tied"],
    "own tensors": NETS["own tensors"],
    "uneven": (Uneven, tokens),
    "twice": NETS["twice"],
}
_expected: dict[str, list[torch.Tensor]] = {}


def rig_of(sim: ModuleType, name: str, wanted: OffloadPolicy | str, phase: str = "first") -> Rig:
    """A rig of its own, as many forwards in as the phase says."""
    make, inputs = SUBJECTS[name]
    rig = Rig(sim, make, inputs, wanted, _expected.get(name))
    _expected[name] = rig.expected
    rig.warm(PHASES[phase])
    sim.synchronize()  # what was timed can be read: a host that runs ahead would plan again a forward later
    return rig


def balanced(name: str) -> OffloadPolicy:
    return policy("balanced", high="100KiB" if name == "uneven" else "40KiB")


def wanted_for(mode: str, name: str) -> OffloadPolicy:
    return balanced(name) if mode == "balanced" else policy(mode)


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers a slab: a page lock that is refused half-way has something on either side."""
    monkeypatch.setattr(weights, "SLAB_BYTES", 2 * UNIT)


def test_the_third_forward_is_where_the_stage_is_planned_again(sim: ModuleType) -> None:
    """What the phases claim: the second forward is timed, and in front of the third another plan is made."""
    rig = rig_of(sim, "uneven", balanced("uneven"), "timed")
    assert not rig.managed.timing.learned
    before = rig.managed.plan
    rig.warm(1)
    sim.synchronize()
    assert rig.managed.plan is before and before is not None and before.step_s is None
    rig.forward()
    assert rig.managed.timing.learned
    after = rig.managed.plan
    assert after is not None and after.step_s is not None and after.resident != before.resident
    rig.leave()


# ---------------------------------------------------------------------- faults of the device
def delay(sim: ModuleType, at: int) -> None:
    sim.delay_copy(at, 10)


def refuse_memory(sim: ModuleType, at: int) -> None:
    sim.refuse_allocation(at)


def refuse_lock(sim: ModuleType, at: int) -> None:
    sim.refuse_pinning(at)


FAULTS: dict[str, tuple[Callable[[ModuleType, int], None], str]] = {
    "copy delayed": (delay, "copies"),
    "memory refused": (refuse_memory, "allocations"),
}
DEVICE_CASES = [
    *itertools.product(FAULTS, ["chain"], ["balanced", "sequential"], PHASES, [3]),
    *itertools.product(FAULTS, ["chain"], ["model", "auto"], ["first"], [3]),
    *itertools.product(FAULTS, ["uneven"], ["balanced"], ["third"], [5]),
    *itertools.product(FAULTS, ["tied", "own tensors"], ["balanced"], ["timed"], [4]),
]
EVERY_CASE = [
    case
    for case in itertools.product(FAULTS, SUBJECTS, ["balanced", "sequential", "model", "auto"], PHASES, [1])
    # what is resident copies nothing once it is there
    if case[0] != "copy delayed" or case[2] in ("balanced", "sequential") or case[3] == "first"
]


@pytest.mark.parametrize(
    "fault, name, mode, phase, stride",
    [*DEVICE_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY_CASE)],
)
def test_a_fault_of_the_device_the_kth_time(
    sim: ModuleType, fault: str, name: str, mode: str, phase: str, stride: int
) -> None:
    """For every k where `stride` is 1, which takes minutes in all; else for some of them, others in each case."""
    arm, counted = FAULTS[fault]
    wanted = wanted_for(mode, name)
    clean = rig_of(sim, name, wanted, phase)
    before = sim.counters()[counted]
    out = clean.forward()
    count = int(sim.counters()[counted] - before)
    del out
    steady = clean.settle()
    clean.leave()
    told = mode == "balanced" and name != "chain" and phase in ("first", "timed")
    assert count >= 3
    for at in range([*PHASES].index(phase) % stride, count, stride):
        rig = rig_of(sim, name, wanted, phase)
        sim.reset_clock()
        arm(sim, at)
        rig.check(0, f"{fault} at {at}")  # out of memory is a step down, not the end
        assert sim.counters()["faults"] == 1
        rig.sound(f"{fault} at {at}")
        moved = rig.settle()
        # where compute is launching, a device that falls behind takes other times, and another plan may come of them
        assert moved == steady or told, f"{fault} at {at}: another forward moves other bytes"
        rig.leave(f"{fault} at {at}")


@pytest.mark.parametrize("mode", ["balanced", "sequential", "model"])
def test_memory_that_is_refused_ends_the_run_where_the_user_wants_that(sim: ModuleType, mode: str) -> None:
    wanted = policy(mode, on_oom="stop")
    clean = rig_of(sim, "chain", wanted)
    before = sim.counters()["allocations"]
    clean.check()
    count = int(sim.counters()["allocations"] - before)
    steady = clean.settle()
    clean.leave()
    for at in range(0, count, 2):
        rig = rig_of(sim, "chain", wanted)
        sim.reset_clock()
        sim.refuse_allocation(at)
        with pytest.raises(torch.OutOfMemoryError, match="steps taken: nothing"):
            rig.forward()
        rig.sound(f"allocation {at}")
        assert rig.settle() == steady, f"allocation {at}"
        rig.leave()


GROWN = pytest.mark.xfail(
    strict=True,
    reason="StepDown._shrink takes half of the card where nothing is resident, whatever `high` says: what ran out of "
    "memory while it streamed comes back with more on the device than it had, up to all of it",
)


@pytest.mark.parametrize(
    "mode", ["model", pytest.param("balanced", marks=GROWN), pytest.param("sequential", marks=GROWN)]
)
def test_a_step_down_never_holds_more_than_before(sim: ModuleType, mode: str) -> None:
    rig = rig_of(sim, "chain", policy(mode), "steady")
    before = rig.managed.engine.device_bytes
    sim.refuse_allocation(3)
    rig.check()
    after = rig.managed.engine.device_bytes
    rig.leave()
    assert after <= before


@pytest.mark.parametrize("mode", ["balanced", "sequential"])
@pytest.mark.parametrize("name", ["chain", "own tensors", "uneven"])
def test_a_page_lock_that_is_refused_half_way(sim: ModuleType, name: str, mode: str) -> None:
    """What is locked by then stays so, the rest is copied from where it was: right, and the same bytes."""
    wanted = wanted_for(mode, name)
    clean = rig_of(sim, name, wanted)
    clean.forward()
    whole = clean.managed.weights.pinned
    slabs = len({id(slab) for slab, _ in clean.managed.weights._slabs.values()})
    steady = clean.settle()
    clean.leave()
    assert slabs > 1 and whole > 0
    pinned = []
    for at in range(slabs):
        rig = rig_of(sim, name, wanted)
        sim.reset_clock()
        sim.refuse_pinning(at)
        rig.check(0, f"lock {at}")
        assert sim.counters()["faults"] == 1
        pinned.append(rig.managed.weights.pinned)
        rig.sound(f"lock {at}")
        moved = rig.settle()
        if mode == "sequential":  # the gaps between two weights of a unit are only copied out of a slab
            assert abs(moved["h2d_bytes"] - steady["h2d_bytes"]) < 512 * len(rig.managed.component.units), f"lock {at}"
        assert sim.counters()["pinned"] - rig.locked <= whole + 4096 * slabs
        rig.leave(f"lock {at}")
    assert pinned == sorted(pinned) and pinned[0] == 0 and pinned[-1] < whole


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("mode", ["balanced", "sequential", "model"])
def test_a_system_that_locks_only_so_much(sim: ModuleType, mode: str, limit: float) -> None:
    sim.configure(pin_limit=max(1, int(limit * 6 * UNIT)))
    rig = rig_of(sim, "chain", mode)
    rig.warm(4)
    rig.sound()
    assert rig.managed.weights.pinned <= limit * 6 * UNIT
    rig.leave()
    sim.configure(pin_limit=0)


def test_memory_that_was_written_survives_a_fault(sim: ModuleType) -> None:
    """A counter in a streamed unit: counted once per forward that came through, whatever was repeated or raised."""
    for mode, at in itertools.product(["balanced", "sequential"], [*range(12), 99]):
        net = build(NETS["bfloat16"][0])
        twin = clone(net)
        with Session(policy(mode), device=DEVICE) as session, torch.no_grad():
            session.add("net", net)
            for seed in range(3):
                x = tokens(seed).to(DEVICE)
                if seed == 1:
                    sim.refuse_allocation(at)
                assert torch.equal(net(x).cpu(), twin(tokens(seed))), (mode, at)
            assert sim.counters()["faults"] == (at < 12)
            del x
            for part in (net, twin):
                part.layers[2].weight.add_(1)  # between two forwards, wherever it lies
            for seed in range(3):
                assert torch.equal(net(tokens(seed).to(DEVICE)).cpu(), twin(tokens(seed))), (mode, at)
        sim.reset_clock()


@pytest.mark.parametrize("how", ["refresh", "to", "replaced"])
def test_what_was_taken_anew_is_given_back_unlocked(sim: ModuleType, how: str) -> None:
    rig = rig_of(sim, "chain", policy("sequential"), "steady")
    take_anew(rig, how)
    rig.warm(3)
    assert rig.managed.weights is not rig.weights
    rig.session.detach()
    locked = [name for name, p in rig.net.named_parameters() if p.is_pinned()]
    left = sim.counters()["pinned"] - rig.locked
    for parameter in rig.net.parameters():
        parameter.data = parameter.data.clone()
    rig.xs.clear()
    assert not locked and not left, (locked, left)


@pytest.mark.parametrize("how", ["refresh", "to", "replaced"])
def test_what_was_taken_anew_is_still_one_copy_a_unit(sim: ModuleType, how: str) -> None:
    rig = rig_of(sim, "chain", policy("sequential"), "steady")
    before = rig.steady()
    take_anew(rig, how)
    rig.warm(3)
    after = rig.steady()
    rig.session.detach()
    for parameter in rig.net.parameters():
        parameter.data = parameter.data.clone()
    rig.xs.clear()
    assert after["h2d"] == before["h2d"] == 6


def take_anew(rig: Rig, how: str) -> None:
    """What makes a session take the weights of a component as they are now; none of it changes a value."""
    if how == "refresh":
        rig.session.refresh("net")
    elif how == "to":
        rig.net.to(torch.float32)
    else:
        weight = rig.net.layers[3].weight
        weight.data = weight.data.clone()
        rig.session.stages.leave()


# ---------------------------------------------------------------------- errors in a leaf
@pytest.fixture
def bomb(monkeypatch: pytest.MonkeyPatch) -> Bomb:
    return Bomb(monkeypatch)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mode", ["balanced", "sequential"])
@pytest.mark.parametrize("name", ["uneven", "tied"])
def test_an_error_in_any_leaf_in_any_phase(sim: ModuleType, bomb: Bomb, name: str, mode: str, phase: str) -> None:
    wanted = wanted_for(mode, name)
    clean = rig_of(sim, name, wanted, phase)
    clean.check()
    steady = clean.settle()
    leaves = [at for at, leaf in enumerate(clean.net.modules()) if isinstance(leaf, (nn.Linear, nn.Embedding))]
    clean.leave()
    kinds = itertools.cycle([KeyboardInterrupt, Interrupt, RuntimeError])
    for at in leaves[:: 2 if phase in ("timed", "third") else 4]:
        rig = rig_of(sim, name, wanted, phase)
        bomb.target, bomb.error = [*rig.net.modules()][at], next(kinds)
        with pytest.raises(bomb.error, match="as the test wants it"):
            rig.forward()
        rig.sound(f"leaf {at}")
        assert rig.settle() == steady, f"leaf {at}"
        rig.leave(f"leaf {at}")


# ---------------------------------------------------------------------- another order
class Ordered(nn.Module):
    """Runs its layers in the order that it is told, some of them again, some not at all."""

    def __init__(self, widths: tuple[int, ...] = (64,) * 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64)) for width in widths)
        self.order = [*range(len(widths))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at in self.order:
            x = torch.tanh(self.layers[at](x))
        return x


def draw(net: nn.Module, x: torch.Tensor, into: list[torch.Tensor]) -> None:
    into.append(net(x.to(DEVICE)))


ORDERS = {
    "backwards": [5, 4, 3, 2, 1, 0],
    "two exchanged": [0, 2, 1, 3, 4, 5],
    "first last": [1, 2, 3, 4, 5, 0],
    "half": [0, 1, 2],
    "other half": [3, 4, 5],
    "one again": [0, 1, 2, 2, 3, 4, 5],
    "one": [4],
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mode", ["balanced", "sequential"])
def test_an_order_that_changes_in_the_middle_of_a_run(sim: ModuleType, mode: str, phase: str) -> None:
    x = tokens()
    for order in ORDERS.values():
        net = build(Ordered)
        twin = clone(net)
        with Session(wanted_for(mode, "chain"), device=DEVICE) as session, torch.no_grad():
            session.add("net", net)
            for _ in range(PHASES[phase]):
                net(x.to(DEVICE))
            whole = session.components["net"].component.device_bytes
            for at, now in enumerate([order, order, [0, 1, 2, 3, 4, 5], order, order, order]):
                net.order = twin.order = now
                drawn: list[torch.Tensor] = []
                moved = copied(sim, functools.partial(draw, net, x, drawn))
                assert torch.equal(drawn.pop().cpu(), twin(x)), (order, at)
                assert moved["h2d_bytes"] - x.nbytes <= 2 * whole, "more than a forward, and what was ahead, in vain"
            if len(set(order)) == len(order) and order[0] != 3 and len(order) > 1:
                # three times the same: exactly what streams of it
                flowing = [
                    unit.slot_bytes
                    for unit in session.components["net"].component.units
                    if unit.index not in session.components["net"].engine.loaded
                    and int(unit.name.split(".")[1]) in order
                ]
                held = session.components["net"].engine.held_units
                if not held:
                    for _ in range(2):
                        net(x.to(DEVICE))
                    moved = copied(sim, functools.partial(draw, net, x, []))
                    pad = len(flowing) * 512
                    assert sum(flowing) - pad <= moved["h2d_bytes"] - x.nbytes <= sum(flowing)
    assert sim.races() == 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    orders=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=2, max_size=7),
    mode=st.sampled_from(["balanced", "sequential"]),
    prefetch=st.sampled_from(["auto", 1, 36 << 10, 1 << 20]),
    link=st.sampled_from([1e8, 25e9]),
    widths=st.lists(st.sampled_from([8, 64, 100]), min_size=6, max_size=6),
)
@example([[0, 1, 2, 3, 4, 5]] * 3 + [[5, 4, 3, 2, 1, 0]] * 2 + [[0, 0]], "sequential", 1, 1e8, [64] * 6)
def test_any_sequence_of_orders(
    sim: ModuleType, orders: list[list[int]], mode: str, prefetch: Any, link: float, widths: list[int]
) -> None:
    sim.configure(h2d_pinned=link)
    net = build(lambda: Ordered(tuple(widths)))
    twin, x = clone(net), tokens()
    session = Session(policy(mode, prefetch=prefetch), device=DEVICE)
    session.add("net", net)
    with torch.no_grad():
        for order in orders:
            before = session.ledger.total_bytes_h2d
            net.order = twin.order = order
            drawn: list[torch.Tensor] = []
            moved = copied(sim, functools.partial(draw, net, x, drawn))
            assert torch.equal(drawn.pop().cpu(), twin(x))
            assert moved["h2d_bytes"] - x.nbytes == session.ledger.total_bytes_h2d - before
            assert sim.races() == 0, sim.last_race()
    session.detach()


# ---------------------------------------------------------------------- an interrupt at any line
HOT = ("stream.py", "walk.py", "ring.py", "binding.py", "residents.py", "weights.py", "copies.py", "engine.py",
       "timing.py", "calibration.py", "stages.py", "session.py", "managed.py", "pinning.py")  # fmt: skip
HOLES = {
    ("session.py", "_call"): "`running` is counted outside the `try` that counts it back: the call counts as running "
    "for good, and every later one bypasses the session",
    ("walk.py", "pump"): "the copy stream is made current outside the `try` that puts the compute stream back, and "
    "nothing puts it back after an interrupt in that `finally`",
    ("calibration.py", "stop"): "an interrupt in front of its `finally` leaves the hooks of the timed forward on "
    "every module: nothing takes them off after an exception",
    ("pinning.py", "_registered"): "between `register` and the finaliser that undoes it, which is where an interrupt "
    "during the long call arrives: the memory is freed, and stays registered for good",
}
PHASE_OF = {("pinning.py", "_registered"): "first"}  # the phase that passes such a line; else the timed one
CASES = [(mode, phase) for mode in ("balanced", "sequential") for phase in PHASES]


def hole(lines: Lines, place: Any) -> tuple[str, str]:
    return place[0].rsplit("/", 1)[-1], lines.function(place)


def swept(sim: ModuleType, name: str, mode: str, phase: str, chosen: Callable[[Lines, list[Any]], list[Any]]) -> None:
    """Interrupt a forward at every chosen line, each time in a session of its own."""
    wanted = wanted_for(mode, name)
    lines = Lines(HOT)
    clean = rig_of(sim, name, wanted, phase)
    places = chosen(lines, lines.places(clean.forward))
    steady = clean.settle()
    clean.leave()
    missed = 0
    for place, error in zip(places, itertools.cycle([KeyboardInterrupt, Interrupt]), strict=False):
        rig = rig_of(sim, name, wanted, phase)
        raised = lines.strike(rig.forward, place, error)
        if lines.struck is None:  # the allocator's cache is flushed by the wall clock
            missed += 1
        else:
            assert raised, f"swallowed at {lines.struck}"
            rig.sound(lines.struck)
            # the gaps between two weights of a unit are only copied out of a slab, and some may be in none now
            more = rig.settle()["h2d_bytes"] - steady["h2d_bytes"]
            assert abs(more) < 512 * len(rig.managed.component.units), f"{more} bytes more after {lines.struck}"
        rig.leave(str(lines.struck))
    assert missed < max(2, len(places) // 4), f"{missed} of {len(places)} lines were not passed again"


@pytest.mark.parametrize("mode, phase", CASES)
def test_an_interrupt_at_some_lines(sim: ModuleType, mode: str, phase: str) -> None:
    """A sample of what `test_an_interrupt_at_any_line` does: other lines in every case."""
    step = 31
    start = CASES.index((mode, phase))

    def sample(lines: Lines, places: list[Any]) -> list[Any]:
        return [place for place in places if hole(lines, place) not in HOLES][start::step]

    swept(sim, "chain", mode, phase, sample)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode, phase", CASES)
@pytest.mark.parametrize("name", ["chain", "own tensors"])
def test_an_interrupt_at_any_line(sim: ModuleType, name: str, mode: str, phase: str) -> None:
    swept(sim, name, mode, phase, lambda lines, places: [p for p in places if hole(lines, p) not in HOLES])


@pytest.fixture
def unlocked(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the test leaves page-locked is unlocked behind it: later memory there would be taken for locked."""
    locked: list[int] = []
    register = sim.host_register

    def watched(address: int, nbytes: int) -> bool:
        locked.append(address)
        return bool(register(address, nbytes))

    monkeypatch.setattr(sim, "host_register", watched)
    yield
    for address in locked:
        sim.host_unregister(address)


@pytest.mark.usefixtures("unlocked")
@pytest.mark.parametrize(
    "where",
    [
        pytest.param(where, marks=pytest.mark.xfail(strict=True, reason=reason), id="-".join(where))
        for where, reason in HOLES.items()
    ],
)
def test_an_interrupt_where_it_was_seen_to_do_harm(sim: ModuleType, where: tuple[str, str]) -> None:
    def only(lines: Lines, places: list[Any]) -> list[Any]:
        return [place for place in places if hole(lines, place) == where]

    swept(sim, "chain", "sequential", PHASE_OF.get(where, "timed"), only)


ENDINGS: dict[str, Callable[[Rig], Any]] = {
    "free": lambda rig: rig.session.free(),
    "switch": lambda rig: setattr(rig.session, "policy", policy("model")),
    "remove": lambda rig: rig.session.remove("net"),
    "detach": lambda rig: rig.session.detach(),
}
HALF_DONE = {
    "free": "Weights.unbind forgets where a storage is bound before its tensors are back at the master: an interrupt "
    "in between, and they are taken for somebody else's and left on the device for good",
    "detach": "an interrupt in Weights.restore, or behind it: a repeated `detach` finds tensors that are elsewhere "
    "than the master, or no masters at all (IndexError)",
}
UNBINDING = ("unbind", "_version", "bring_down", "look", "_point_at_master", "homes", "view")
FINALISERS = ("__del__", "release", "_give_back")  # what is raised there, Python itself swallows


def parted(lines: Lines, places: list[Any], what: str) -> tuple[list[Any], list[Any]]:
    """The places of giving back that do no harm, and those that do."""
    places = [place for place in places if lines.function(place) not in FINALISERS]
    names = [lines.function(place) for place in places]
    cut = names.index("restore") if "restore" in names else len(places)
    sound = [place for place in places[:cut] if lines.function(place) not in UNBINDING]
    return sound, places[cut:] if what == "detach" else [p for p in places if lines.function(p) in UNBINDING]


def given_back(sim: ModuleType, what: str, chosen: Callable[[Lines, list[Any]], list[Any]]) -> None:
    lines = Lines(HOT)
    wanted = policy("balanced", high="84KiB")  # some stay, some stream
    clean = rig_of(sim, "chain", wanted, "steady")
    places = chosen(lines, lines.places(lambda: ENDINGS[what](clean), most=1))
    assert places
    clean.leave()
    for place in places:
        rig = rig_of(sim, "chain", wanted, "steady")
        assert lines.strike(functools.partial(ENDINGS[what], rig), place), f"swallowed at {lines.struck}"
        if what in ("free", "switch"):
            rig.sound(str(lines.struck))
        rig.leave(str(lines.struck))


@pytest.mark.parametrize("what", ENDINGS)
def test_an_interrupt_at_any_line_of_giving_back(sim: ModuleType, what: str) -> None:
    """Interrupted while it gives back: it can be done again, and then everything is as it was."""
    given_back(sim, what, lambda lines, places: parted(lines, places, what)[0][::5])


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=pytest.mark.xfail(strict=True, reason=reason)) for what, reason in HALF_DONE.items()],
)
def test_an_interrupt_while_tensors_change_hands(sim: ModuleType, what: str) -> None:
    given_back(sim, what, lambda lines, places: parted(lines, places, what)[1])


def test_the_lines_are_those_of_the_core() -> None:
    """The sweep sees what it is meant to see."""
    lines = Lines(["layout.py"])
    from balanced_offload.offload.layout import lay_out

    places = lines.places(lambda: lay_out([512] * 3, 1024))
    assert Counter(lines.function(place) for place in places).keys() == {"lay_out"} or len(places) > 8
    assert lines.strike(lambda: lay_out([512] * 3, 1024), places[5])
    assert lines.struck is not None and lines.struck.startswith("layout.py:")
    assert not lines.strike(lambda: None, places[5])
