"""Guards: one command shows every mode on one pipeline under one cap, and fails aloud where a claim does not hold.

The order: the plain CPU (on the simulated accelerator, to compare with), then mode none with the cap lifted as the
reference, from whose measured sizes the cap is chosen, then the other modes under that cap, all on the same prompts
and seeds, in one session that is switched from mode to mode without a reload. The classifier judges further pictures.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.diffusers import OffloadedPipeline, offload
from ..ledger import Ledger
from ..policy import OffloadMode, OffloadPolicy
from ..sizes import KIB, format_size, read_size
from ..summary import line
from .audit import Auditor
from .checks import ModeRun, check_mode, check_pictures
from .options import MODES, Batch, Options, batches, require_extras
from .output import assemble, write_files
from .pipeline import DEFAULTS, PROMPTS, load_pipeline
from .places import Place, find_place
from .predict import Meter, Part, needed_by_model, predict
from .progress import Progress

HIGH_SHARE = 0.8  # balanced: the most that one component may hold, as a share of the largest component
JUDGED = "balanced"  # the mode that draws the further pictures
CAP_STEP = 256 * KIB
LIFTED = 2  # the reference's card has at least this many times the weights of the run


@dataclass
class Demo:
    """What came out. `runs` in the order of the modes; `document` is offload-demo/1."""

    place: Place
    runs: list[ModeRun]
    failures: list[str]
    document: dict[str, Any]
    files: list[Path] = field(default_factory=list)


def run_demo(options: Options, say: Callable[[str], None], progress_stream: Any = None) -> Demo:
    """Run it and write the files to `options.out`. `say` gets what people read, line by line.

    Raises:
        MissingExtras: packages of the extra `demo` are missing.
        ValueError: a device, card or cap that cannot be had here.
        OSError: the folder cannot be written.
    """
    require_extras()
    place = find_place(options.device, options.card)
    read_size("--cap", options.cap)
    options.out.mkdir(parents=True, exist_ok=True)
    say(place.sentence)
    with _prepared(place):
        shared, further = batches(options.pictures)
        modes = [m for m in MODES if m in options.modes or m == "none"]
        generations = (len(modes) + (place.rung != "gpu")) * len(shared) + len(further)
        progress = Progress(generations * DEFAULTS["num_inference_steps"], progress_stream)
        try:
            bench = _Bench(place, options, modes, shared, further, progress, say)
            return bench.on_cpu() if place.rung == "cpu" else bench.on_device()
        finally:
            progress.close()


@contextmanager
def _prepared(place: Place) -> Any:
    """The simulated card as the user chose it, races strict; everything as before afterwards."""
    vram = place.simulator
    threads = torch.get_num_threads()
    if place.rung != "gpu":
        torch.set_num_threads(1)  # operations this small are slower on several threads, much slower on a busy machine
    if vram is None:
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        return
    before, cap, card = vram.configuration(), vram.memory_cap(), vram.card().key
    key = place.name.removeprefix("card ")
    vram.use_card(key if key in vram.CARDS else card)
    vram.configure(strict_races=1, ghost=0, copy_log=1)
    vram.reset_clock()
    try:
        yield
    finally:
        vram.use_card(card)
        vram.configure(**before)
        vram.set_memory_cap(cap)
        torch.set_num_threads(threads)


class _Bench:
    """One demo in progress."""

    def __init__(
        self,
        place: Place,
        options: Options,
        modes: Sequence[str],
        shared: list[Batch],
        further: list[Batch],
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.place, self.options, self.modes = place, options, modes
        self.shared, self.further = shared, further
        self.progress, self.say = progress, say
        self.asked = [digit for batch in shared for digit in batch.digits]
        self.notes: list[str] = []
        self.pipe: Any = load_pipeline()

    # ------------------------------------------------------------------ drawing
    def draw(self, call: Callable[..., Any], batch: Batch, after_step: Callable[[], None] | None = None) -> Tensor:
        """The pictures [len(digits), 3, H, W] of one generation, in 0..1 on the CPU."""

        def stepped(pipe: Any, step: int, at: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.progress.tick()
            if after_step is not None and step in (0, DEFAULTS["num_inference_steps"] - 1):
                after_step()
            return {}

        drawn = call(
            [PROMPTS[digit] for digit in batch.digits],
            generator=[torch.Generator().manual_seed(batch.seed) for _ in batch.digits],
            output_type="pt",
            callback_on_step_end=stepped,
            callback_on_step_end_tensor_inputs=[],
            **DEFAULTS,
        ).images
        pictures: Tensor = drawn.cpu()
        return pictures

    def plain(self, chosen: Sequence[Batch]) -> Tensor:
        """The pictures of the pipeline as it is, on the CPU, without us."""
        self.progress.begin("plain CPU")
        pictures = torch.cat([self.draw(self.pipe, batch) for batch in chosen])
        self.progress.end(f"{len(pictures)} pictures")
        return pictures

    # ------------------------------------------------------------------ an accelerator
    def on_device(self) -> Demo:
        """Every mode, measured."""
        on_simulator = self.place.simulator is not None
        reference = self.plain(self.shared) if on_simulator else None
        runs: list[ModeRun] = []
        failures: list[str] = []
        judged: ModeRun | None = None
        with offload(self.pipe, OffloadPolicy(OffloadMode.SEQUENTIAL), device=self.place.device) as handle:
            auditor = Auditor(handle.session, self.place.simulator)
            self.lift_cap(handle)
            none = self.run_mode(handle, auditor, "none", OffloadPolicy(OffloadMode.NONE), None, 0)
            handle.session.free(None)
            gc.collect()
            context = handle.session.backend.memory().allocated
            context = context if context >= CAP_STEP else 0  # a scheduler's few numbers are nobody's workspace
            cap, tight = self.choose_cap(handle, context)
            for mode in self.modes:
                run = none
                if mode != "none":
                    policy = self.policy(handle, mode, cap, context)
                    run = self.run_mode(handle, auditor, mode, policy, cap, context)
                self.compare(run, none, reference)
                runs.append(run)
                failures += [f"{mode}: {text}" for text in check_mode(run, on_simulator=on_simulator, tight=tight)]
                if run.pictures is not None and (judged is None or mode == JUDGED):
                    judged = run
                if mode == (JUDGED if JUDGED in self.modes else self.modes[-1]) and self.further:
                    more = self.run_further(handle, auditor, ModeRun(mode, cap=run.cap, context=context))
                    more.equal_to_none, more.equal_to_cpu = run.equal_to_none, run.equal_to_cpu
                    checked = check_mode(more, on_simulator=on_simulator, tight=False)
                    failures += [f"{mode}, further pictures: {text}" for text in checked]
                    judged = _joined(run, more)
        return self.finish(runs, judged, failures, cap)

    def lift_cap(self, handle: OffloadedPipeline) -> None:
        """Room for the reference: a simulated card of a size that figures of this pipeline can be read against."""
        if self.place.simulator is not None:
            weights = sum(m.component.device_bytes for m in handle.session.components.values())
            self.place.simulator.set_memory_cap(1 << (LIFTED * weights).bit_length())

    def choose_cap(self, handle: OffloadedPipeline, context: int) -> tuple[int, bool]:
        """The cap in bytes and whether it is below what the run needs. `context`: what libraries hold beside us.

        Between what mode model needs (its largest component with its activations) and the weights of the run.
        """
        session = handle.session
        peaks: dict[str, int] = {}
        for (name, _), nbytes in session.stages.peaks.learned.items():
            peaks[name] = max(peaks.get(name, 0), nbytes)
        sizes = {name: managed.component.device_bytes for name, managed in session.components.items()}
        least = max(size + peaks.get(name, 0) for name, size in sizes.items())
        return self.cap_between(least, sum(sizes.values()), max(peaks.values(), default=0), context)

    def cap_between(self, least: int, weights: int, activations: int, context: int = 0) -> tuple[int, bool]:
        """The cap as asked for, else between `least` and `weights` (bytes); says which."""
        read = read_size("--cap", self.options.cap)
        asked = read.to_bytes("--cap", weights)
        cap = asked if asked is not None else max(least + least // 50, (least + weights) // 2)
        if asked is None:
            cap = cap // CAP_STEP * CAP_STEP + context
        tight = cap - context < weights + activations
        self.say(
            f"Cap {format_size(cap)}, {'as asked' if asked is not None else 'chosen'}: the weights of the run are "
            f"{format_size(weights)}, its activations need up to {format_size(activations)}, and mode model needs "
            f"{format_size(least)}. Mode none runs with the cap lifted, as the reference."
        )
        if context:
            self.notes.append(f"{format_size(context)} of peak and cap are held by libraries (workspaces), not by us")
        if self.place.rung == "gpu":
            self.notes.append("the cap is emulated by the policy's reserve: the allocator itself is not limited")
        if cap - context >= weights:
            self.notes.append("the cap is not below the weights of the run")
        for note in self.notes:
            self.say(f"Note: {note}.")
        return cap, tight

    def policy(self, handle: OffloadedPipeline, mode: str, cap: int, context: int) -> OffloadPolicy:
        """The policy of one mode, and the cap in force."""
        largest = max(m.component.device_bytes for m in handle.session.components.values())
        high: int | str = min(int(HIGH_SHARE * largest), cap - context)
        reserve = 0
        if self.place.simulator is not None:
            self.place.simulator.set_memory_cap(cap)
            high = f"{int(high) * 100 // cap}%"
        else:
            now = handle.session.backend.memory()
            reserve = max(0, now.total - now.others - cap)
        return OffloadPolicy(OffloadMode(mode), high=high if mode == "balanced" else "auto", reserve=reserve)

    def run_mode(
        self,
        handle: OffloadedPipeline,
        auditor: Auditor,
        mode: str,
        policy: OffloadPolicy,
        cap: int | None,
        context: int,
    ) -> ModeRun:
        """Draw the shared pictures in one mode, from an empty device."""
        session = handle.session
        session.free(None)
        gc.collect()
        session.backend.empty_cache()
        run = ModeRun(mode, cap=cap, context=context)
        auditor.begin()
        moved = _totals(session.ledger)
        self.progress.begin(mode)
        try:
            handle.policy = policy
        except torch.OutOfMemoryError as error:
            run.error = str(error)
            return run
        return self.run_batches(handle, auditor, run, self.shared, moved)

    def run_further(self, handle: OffloadedPipeline, auditor: Auditor, run: ModeRun) -> ModeRun:
        """Draw the further pictures in the mode that is set, for the judge."""
        auditor.begin()
        self.progress.begin(f"{run.mode}, further pictures")
        return self.run_batches(handle, auditor, run, self.further, _totals(handle.session.ledger))

    def run_batches(
        self,
        handle: OffloadedPipeline,
        auditor: Auditor,
        run: ModeRun,
        chosen: Sequence[Batch],
        moved: tuple[int, int, int],
    ) -> ModeRun:
        """Fill `run` from generations under the policy that is set. `moved`: ledger totals to count from."""
        session, ledger = handle.session, handle.session.ledger
        begun = time.perf_counter()
        drawn: list[Tensor] = []
        run.peak_vram = run.resident_peak = run.high_crossings = 0
        run.stall_s = run.time_s = 0.0
        try:
            for batch in chosen:
                drawn.append(self.draw(handle, batch, auditor.look))
                auditor.look()
                auditor.drain()
                stages, record = session.stages, handle.record
                run.peak_vram = max(run.peak_vram, stages.peak_allocated)
                run.resident_peak = max(run.resident_peak, stages.resident_peak)
                run.high_crossings += stages.high_crossings
                run.stall_s = _add(run.stall_s, record.seconds.get("stall") if record else None)
                run.time_s = _add(run.time_s, record.wall_s if record else None)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            run.error = f"{type(error).__name__}: {error}"
            auditor.drain()
        run.looks = auditor.looks
        run.host_s = time.perf_counter() - begun
        run.resolved, run.high = session.resolved.mode.value, session.resolved.high
        run.bytes_h2d, run.bytes_d2h = ledger.total_bytes_h2d - moved[0], ledger.total_bytes_d2h - moved[1]
        run.moves = ledger.total_moves - moved[2]
        run.asked = [digit for batch in chosen[: len(drawn)] for digit in batch.digits]
        if drawn:
            run.pictures = torch.cat(drawn)
            run.read = read_pictures(run.pictures)
            run.report = handle.report(full=True)
        if run.error is not None:
            self.progress.end(run.error)
        else:
            self.progress.end(line(handle.report()))
        return run

    def compare(self, run: ModeRun, none: ModeRun, plain: Tensor | None) -> None:
        """Bit for bit with the reference and, where there is one, with the plain CPU run."""
        if run.pictures is None or run.error is not None:
            return
        if none.pictures is not None and none.error is None:
            run.equal_to_none = torch.equal(run.pictures, none.pictures)
        if plain is not None:
            run.equal_to_cpu = torch.equal(run.pictures, plain)

    # ------------------------------------------------------------------ no accelerator
    def on_cpu(self) -> Demo:
        """The pictures on the plain CPU, the modes' table predicted from sizes."""
        from ..adapters.parts import modules_of

        with Meter(modules_of(self.pipe)) as meter:
            self.progress.begin("counting operations")
            self.draw(self.pipe, self.shared[0])
        with offload(self.pipe, OffloadPolicy(OffloadMode.NONE), device="cpu") as handle:
            components = {name: managed.component for name, managed in handle.session.components.items()}
            auditor = Auditor(handle.session, None)
            self.progress.begin("plain CPU")
            auditor.begin()
            everything = [*self.shared, *self.further]
            drawn = self.run_batches(handle, auditor, ModeRun("none"), everything, (0, 0, 0))
        parts = [
            Part(component, meter.calls[name], meter.activations[name], meter.compute_s[name])
            for name, component in components.items()
            if meter.calls[name]
        ]
        weights = sum(part.component.device_bytes for part in parts)
        cap, _ = self.cap_between(needed_by_model(parts), weights, max(part.activations for part in parts))
        high = min(int(HIGH_SHARE * max(part.component.device_bytes for part in parts)), cap)
        runs = [predict(mode, parts, len(self.shared), cap, high) for mode in self.modes]
        self.notes.append("every figure in the table is predicted from sizes; only the pictures were computed")
        failures = [f"plain CPU: did not finish: {drawn.error}"] if drawn.error else []
        return self.finish(runs, drawn, failures, cap)

    # ------------------------------------------------------------------ the end
    def finish(self, runs: list[ModeRun], judged: ModeRun | None, failures: list[str], cap: int) -> Demo:
        """Judge the pictures, write the files, put the document together."""
        if judged is None or judged.pictures is None:
            failures.append("no mode drew a picture")
        else:
            failures += check_pictures(judged.pictures, judged.asked, judged.read)
        self.progress.begin("writing files")
        document = assemble(self.place, self.options.pictures, runs, judged, failures, cap, self.notes)
        demo = Demo(self.place, runs, failures, document)
        demo.files = write_files(self.options.out, document, runs, judged, self.asked)
        document["files"] = [path.name for path in demo.files]
        return demo


def read_pictures(pictures: Tensor) -> list[int]:
    """What the classifier reads in pictures [N, 3, H, W] in 0..1."""
    from .classifier import read_digits

    return read_digits(list(pictures))


def _totals(ledger: Ledger) -> tuple[int, int, int]:
    return ledger.total_bytes_h2d, ledger.total_bytes_d2h, ledger.total_moves


def _add(total: float | None, seconds: float | None) -> float | None:
    """None as soon as one is not known: a partial sum would pass for the whole."""
    return None if total is None or seconds is None else total + seconds


def _joined(run: ModeRun, more: ModeRun) -> ModeRun:
    """All pictures of a mode as one, for the judge."""
    joined = ModeRun(run.mode, asked=run.asked + more.asked, read=run.read + more.read, report=run.report)
    pictures = [part for part in (run.pictures, more.pictures) if part is not None]
    joined.pictures = torch.cat(pictures) if pictures else None
    return joined
