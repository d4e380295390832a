"""What would I get on that card? Invariant: every figure comes from the planner and the schedule that runs use.

A document of predictions (rung "schedule"), `offload-plan/1`: the best plan for the denoiser within the card, every
mode as its policy resolves there, and the strategies of other libraries under the same rates. What runs in turn with
the denoiser (text encoders, the VAE) is not in it. Pure: figures in, document out.

What weights may take: the card, less what is reserved, less 1.0 GB for the driver's context, less activations; in a
mode no more than its high mark either, where the policy's rules set one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .advice_options import CONTEXT, LEAST_ACTIVATIONS, Figures
from .explain import plan_sentence, predicted
from .models.walks import ModelWalk, pieces
from .placement import CannotFit, Placement, plan_walk
from .policy import ComponentInfo, Machine, OffloadMode, OffloadPolicy, WorkingSet
from .schedule import Piece, Rates, predict_step
from .sizes import format_size
from .strategies import predict_peers

SCHEMA = "offload-plan/1"
MODES = ("none", "balanced", "model", "sequential", "auto")
GROWTH = 1.1  # of the counted activations: what rounding and fragmentation add


def advise(walked: ModelWalk, figures: Figures, activations: int | None = None) -> dict[str, Any]:
    """The document for a walk on a card. `activations`: bytes that the user gave for them."""
    return _Advice(walked, figures, activations).document()


class _Advice:
    def __init__(self, walked: ModelWalk, figures: Figures, activations: int | None) -> None:
        self.walked, self.figures = walked, figures
        self.walk: list[Piece] = pieces(walked, figures.tflops, figures.hbm)
        self.rates = Rates(figures.bandwidth, figures.pageable, figures.copy_latency)
        self.compute_s = sum(piece.compute_s for piece in self.walk)
        self.activations, self.activations_source = _activations(walked, activations)
        self.available = max(0, figures.vram - figures.reserve)
        self.budget = self.available - CONTEXT - self.activations
        # Weights that cannot flow: the model's own, and what runs more than once in a step. Unused ones stay, too.
        self.fixed = {unit.index for unit in walked.units if not unit.flows}
        self.idle = sum(unit.nbytes for unit in walked.unused)
        self.notes: list[str] = list(walked.notes)

    # ------------------------------------------------------------------ the document
    def document(self) -> dict[str, Any]:
        figures, weights = self.figures, self.walked.weights
        missing = max(0, weights - max(0, self.budget))
        modes = {mode: self.mode(mode) for mode in MODES}
        best = self.plan()
        return {
            "schema": SCHEMA,
            "rung": "schedule",
            "model": self.walked.model,
            "resolution": self.walked.resolution,
            "card": figures.name,
            "vram": figures.vram,
            "reserve": figures.reserve,
            "context": CONTEXT,
            "activations": self.activations,
            "budget": max(0, self.budget),
            "bandwidth": figures.bandwidth,
            "pageable": figures.pageable,
            "tflops": figures.tflops,
            "hbm": figures.hbm,
            "sources": {
                **figures.sources,
                "activations": self.activations_source,
                "compute": self.walked.source,
            },
            "weights": weights,
            "units": len(self.walked.units) + len(self.walked.unused),
            "largest_unit": {"name": self.walked.largest.name, "bytes": self.walked.largest.nbytes},
            "flops": self.walked.flops,
            "compute_s": self.compute_s,
            "bound_s": max(self.compute_s, missing / figures.bandwidth),
            "plan": best,
            "modes": modes,
            "peers": self.peers(),
            "notes": self.notes,
        }

    def plan(self) -> dict[str, Any] | None:
        """The fastest plan within all that the card has for weights."""
        try:
            return self.placed(self.place(self.budget), self.budget)
        except CannotFit as error:
            self.notes.append(f"{self.walked.model} {error}")
            return None

    # ------------------------------------------------------------------ modes
    def mode(self, mode: str) -> dict[str, Any] | None:
        """What a mode gives as it resolves on this card with nothing else asked for; null where it cannot run."""
        denoiser = ComponentInfo("denoiser", self.walked.model, "denoiser", self.walked.weights)
        working = WorkingSet((denoiser,), self.activations)
        machine = Machine(self.figures.name, "cuda", self.figures.vram, others=CONTEXT)
        policy = OffloadPolicy(mode=OffloadMode(mode), reserve=self.figures.reserve)
        resolved = policy.resolve(machine, working)
        budget = self.budget if resolved.high is None else min(self.budget, resolved.high)
        found = self._run(resolved.mode, budget)
        return None if found is None else {"resolved": resolved.mode.value, "high": resolved.high, **found}

    def _run(self, mode: OffloadMode, budget: int) -> dict[str, Any] | None:
        whole = self.walked.weights <= self.budget
        if mode is OffloadMode.NONE or (mode is OffloadMode.MODEL and whole):
            return self.whole() if whole else None
        if mode is OffloadMode.MODEL:
            return None
        try:
            return self.sequential() if mode is OffloadMode.SEQUENTIAL else self.placed(self.place(budget), budget)
        except CannotFit:
            return None

    def whole(self) -> dict[str, Any]:
        """Everything resident."""
        every = frozenset(range(len(self.walk)))
        step = predict_step(self.walk, every, 0, self.rates)
        return self.figured(step.step_s, "resident", self.walked.weights, 0)

    def sequential(self) -> dict[str, Any]:
        """Nothing resident but what cannot flow: leaf by leaf through a ring."""
        from .plan import LOOKAHEAD_UNITS

        flowing = [piece.nbytes for piece in self.walk if piece.index not in self.fixed]
        held = self.walked.weights - sum(flowing)
        largest = max(flowing, default=0)
        room = self.budget - held
        ring = next((n * largest for n in range(LOOKAHEAD_UNITS, 0, -1) if n * largest <= room), None)
        if ring is None:
            raise CannotFit("the largest unit")
        ring = min(ring, sum(flowing))
        resident = frozenset(at for at, piece in enumerate(self.walk) if piece.index in self.fixed)
        step = predict_step(self.walk, resident, ring, self.rates)
        return self.figured(step.step_s, "sequential", held, ring)

    def peers(self) -> dict[str, dict[str, Any] | None]:
        """The strategies of other libraries with the same walk, rates and room; null where one cannot run."""
        numbers: dict[str, int] = {}
        blocks = {
            at: numbers.setdefault(unit.block, len(numbers))
            for at, unit in enumerate(self.walked.units)
            if unit.block is not None
        }
        room = self.budget - self.idle
        found = predict_peers(self.walk, room, self.rates, blocks=blocks or None, vram=self.figures.vram)
        return {
            name: None
            if step is None
            else {"step_s": step.step_s, "its": rate(step.step_s), "copied": step.copied_bytes}
            for name, step in found.items()
        }

    # ------------------------------------------------------------------ figures
    def place(self, budget: int) -> Placement:
        return plan_walk(self.walk, budget - self.idle, self.fixed, self.rates)

    def placed(self, placement: Placement, budget: int) -> dict[str, Any]:
        sizes = {piece.index: piece.nbytes for piece in self.walk}
        resident = self.idle + sum(sizes[index] for index in placement.resident)
        found = self.figured(placement.step.step_s, placement.name, resident, placement.ring_bytes)
        streamed = self.walked.weights - resident
        if not streamed:
            words = f"all {format_size(resident)} resident, {format_size(budget)} free; {predicted(placement.step)}"
            return {**found, "sentence": f"{self.walked.model}: {words}."}
        sentence = plan_sentence(
            self.walked.model,
            self.walked.weights,
            budget,
            self.activations,
            resident,
            streamed,
            placement.ring_bytes,
            placement.step,
        )
        return {**found, "sentence": sentence + "."}

    def figured(self, step_s: float, placement: str, resident: int, ring: int) -> dict[str, Any]:
        return {
            "placement": placement,
            "resident": resident,
            "ring": ring,
            "streamed": self.walked.weights - resident,
            "step_s": step_s,
            "its": rate(step_s),
        }


def rate(step_s: float | None) -> float | None:
    """Iterations per second."""
    return None if not step_s else 1 / step_s


def fastest(document: dict[str, Any], groups: Sequence[str] = ("modes", "peers")) -> float | None:
    """The shortest predicted step of the document, seconds."""
    times = [found["step_s"] for group in groups for found in document[group].values() if found is not None]
    return min(times, default=None)


def _activations(walked: ModelWalk, given: int | None) -> tuple[int, str]:
    if given is not None:
        return given, "given"
    if walked.activations is None:
        return LEAST_ACTIVATIONS, "assumed"
    counted = int(GROWTH * walked.activations)
    return max(LEAST_ACTIVATIONS, counted), "counted" if counted > LEAST_ACTIVATIONS else "assumed"
