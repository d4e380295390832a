"""The same walk under other libraries' strategies. Invariant: each follows the library's own calls, one by one.

What the installed code does (diffusers `hooks/group_offloading.py`, accelerate `hooks.py`), as a host, a compute
stream, a copy stream and a copy engine in time; held to the real libraries on the simulated accelerator:

- accelerate copies each tensor when its leaf is called, from pageable memory, and waits for each;
- diffusers' leaf groups without a stream do so too, and copy the weights *down* again after each leaf;
- with a stream, a group's hook waits for the copy stream (its own weights), issues the next group's copies, runs, and
  waits for the compute stream before it drops the weights; the first group's copies are issued when the model's
  forward begins, so they are exposed in every step; nothing ever stays;
- `record_stream` spares the second wait: the allocator holds the memory until the device has passed it;
- in block groups, what lies outside the blocks is copied up at the beginning of a forward and down at its end, waited
  for tensor by tensor;
- SD.Next's balanced mode is accelerate's dispatch with a device map: a resident prefix, the rest leaf by leaf;
- ComfyUI keeps the largest leaves, and streams the rest with a lookahead of two leaves (its best case: all pinned, no
  host sync in the model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .schedule import Piece, Rates, Schedule, StepTime
from .sizes import GIB

STEPS = 48  # at most, until a strategy's steps recur
RECUR = 1e-9  # relative
SDNEXT_LARGE_CARD = 24 * GIB  # from here on its high watermark is the higher one
SDNEXT_HIGH, SDNEXT_HIGH_LARGE = 0.6, 0.8
COMFY_SMALL = 64 << 10  # bytes; leaves below are kept first


@dataclass(frozen=True)
class Overheads:
    """What the other libraries pay beside copies, seconds. Zero Python time flatters whoever has many hooks."""

    launch: float = 5e-6  # host time to issue a copy, and until the first kernel behind a wait is there
    sync: float = 5e-6  # host time of a synchronize call
    accelerate_hook: float = 0.0  # Python per offloaded leaf
    group_hook: float = 0.0  # Python per group
    d2h_pageable: float | None = None  # bytes/s; None: three quarters of the way up


@dataclass
class _Engines:
    """Where the host, the compute stream and the copies are, seconds."""

    rates: Rates
    over: Overheads
    host: float = 0.0
    compute: float = 0.0
    copy_stream: float = 0.0
    h2d: float = 0.0
    held: list[tuple[float, int]] = field(default_factory=list)  # (until when, bytes): the allocator's deferred frees
    in_use: int = 0

    def up(self, piece: Piece) -> None:
        """Copy the tensors on the compute stream from pageable memory, waiting for each."""
        for nbytes in _tensors(piece):
            self.host += self.over.launch
            begin = max(self.compute, self.host, self.h2d)
            self.compute = self.h2d = begin + self.rates.copy_latency + nbytes / self.rates.h2d_pageable
            self.host = self.compute

    def down(self, piece: Piece) -> None:
        """Copy the tensors back to pageable memory, waiting for each."""
        rate = self.over.d2h_pageable or 0.75 * self.rates.h2d_pageable
        for nbytes in _tensors(piece):
            self.host += self.over.launch
            self.compute = max(self.compute, self.host) + self.rates.copy_latency + nbytes / rate
            self.host = self.compute

    def ahead(self, piece: Piece) -> None:
        """Issue the copies of the tensors on the copy stream, from pinned memory."""
        for nbytes in _tensors(piece):
            self.host += self.over.launch
            begin = max(self.copy_stream, self.host, self.h2d)
            self.copy_stream = self.h2d = begin + self.rates.copy_latency + nbytes / self.rates.h2d

    def wait(self, until: float) -> None:
        """The host waits for a stream."""
        self.host = max(self.host + self.over.sync, until)

    def run(self, seconds: float, host_s: float) -> None:
        """Launch kernels of `seconds`: the first one is there after one launch, the last when all are launched."""
        begin = max(self.compute, self.host + min(self.over.launch, host_s))
        self.host += host_s
        self.compute = max(begin + seconds, self.host)

    def allocate(self, nbytes: int, room: int) -> None:
        """Take memory; where what is held back stands in the way, everything is waited for."""
        self._settle()
        if self.in_use + nbytes > room and self.held:
            self.host = max(self.host, self.compute, self.copy_stream)
            self._settle()
        self.in_use += nbytes

    def release(self, nbytes: int) -> None:
        """Give memory back once the compute stream has passed this point."""
        self.held.append((self.compute, nbytes))

    def _settle(self) -> None:
        self.in_use -= sum(nbytes for until, nbytes in self.held if until <= self.host)
        self.held = [(until, nbytes) for until, nbytes in self.held if until > self.host]


@dataclass(frozen=True)
class _Leaf:
    """A piece with its time until its own forward ends, and behind it."""

    piece: Piece
    own_s: float
    own_host: float
    rest_s: float
    rest_host: float


def _tensors(piece: Piece) -> list[float]:
    """Bytes of its tensors: one that has nearly all of them, and small ones (a bias)."""
    return [float(piece.nbytes)] + [0.0] * (piece.tensors - 1) if piece.nbytes else []


def _leaves(walk: Sequence[Piece]) -> list[_Leaf]:
    found = []
    for piece in walk:
        own = piece.compute_s if piece.own_s is None else min(piece.own_s, piece.compute_s)
        share = own / piece.compute_s if piece.compute_s > 0 else 1.0
        host = piece.host_s * share
        found.append(_Leaf(piece, own, host, piece.compute_s - own, piece.host_s - host))
    return found


def _steady(engines: _Engines, step: Callable[[], None]) -> float:
    """Seconds per step once the steps recur."""
    ends: list[float] = []
    for _ in range(STEPS):
        step()
        ends.append(max(engines.compute, engines.host))
        if len(ends) > 3:
            last, before = ends[-1] - ends[-2], ends[-2] - ends[-3]
            if abs(last - before) <= RECUR * last:
                return last
    return (ends[-1] - ends[STEPS // 2 - 1]) / (STEPS // 2)


def _result(walk: Sequence[Piece], rates: Rates, step_s: float, copied: int) -> StepTime:
    compute = sum(p.compute_s for p in walk)
    host = sum(p.host_s for p in walk)
    bound = max(compute, copied / rates.h2d)
    return StepTime(max(step_s, bound), max(0.0, step_s - max(compute, host)), compute, bound, copied)


def _total(walk: Sequence[Piece]) -> int:
    return sum(p.nbytes for p in walk)


def _largest(walk: Sequence[Piece]) -> int:
    return max((p.nbytes for p in walk), default=0)


# ---------------------------------------------------------------------- one function per peer
def whole(walk: Sequence[Piece], budget: int, rates: Rates, over: Overheads = Overheads()) -> StepTime | None:
    """torch.to and diffusers' model offload: all of it or nothing."""
    if _total(walk) > budget:
        return None
    return Schedule(walk, rates).predict(frozenset(range(len(walk))), 0)


def sequential(walk: Sequence[Piece], budget: int, rates: Rates, over: Overheads = Overheads()) -> StepTime | None:
    """accelerate's cpu_offload, which is diffusers' sequential offload."""
    return None if _largest(walk) > budget else _dispatched(walk, 0, rates, over)


def dispatch(walk: Sequence[Piece], budget: int, rates: Rates, over: Overheads = Overheads()) -> StepTime | None:
    """accelerate's dispatch_model with the device map that it infers: the first leaves stay, as long as the largest
    one still has room beside them."""
    if _total(walk) <= budget:
        return whole(walk, budget, rates, over)
    left = budget - _largest(walk)
    if left < 0:
        return None
    stays = 0
    for piece in walk:
        if piece.nbytes > left:
            break
        left -= piece.nbytes
        stays += 1
    return _dispatched(walk, stays, rates, over)


def _dispatched(walk: Sequence[Piece], stays: int, rates: Rates, over: Overheads) -> StepTime:
    engines = _Engines(rates, over)

    def step() -> None:
        for at, piece in enumerate(walk):
            if at >= stays and piece.nbytes:
                engines.host += over.accelerate_hook
                engines.up(piece)
            engines.run(piece.compute_s, piece.host_s)

    return _result(walk, rates, _steady(engines, step), _total(walk[stays:]))


def balanced(
    walk: Sequence[Piece], budget: int, rates: Rates, over: Overheads = Overheads(), vram: int | None = None
) -> StepTime | None:
    """SD.Next's balanced offload: a device map below its high watermark of the card's `vram` bytes."""
    if vram is not None:
        high = SDNEXT_HIGH_LARGE if vram >= SDNEXT_LARGE_CARD else SDNEXT_HIGH
        budget = min(budget, int(high * vram))
    return dispatch(walk, budget, rates, over)


def group_leaf(walk: Sequence[Piece], budget: int, rates: Rates, over: Overheads = Overheads()) -> StepTime | None:
    """diffusers' leaf groups without a stream: up before, down after each leaf."""
    if _largest(walk) > budget:
        return None
    engines, leaves = _Engines(rates, over), _leaves(walk)

    def step() -> None:
        for leaf in leaves:
            if leaf.piece.nbytes:
                engines.host += over.group_hook
                engines.up(leaf.piece)
            engines.run(leaf.own_s, leaf.own_host)
            if leaf.piece.nbytes:
                engines.down(leaf.piece)
            engines.run(leaf.rest_s, leaf.rest_host)

    return _result(walk, rates, _steady(engines, step), _total(walk))


def group_stream(
    walk: Sequence[Piece],
    budget: int,
    rates: Rates,
    over: Overheads = Overheads(),
    *,
    record: bool = False,
    blocks: Mapping[int, int] | None = None,
) -> StepTime | None:
    """diffusers' groups with a stream, one group ahead; leaves, or blocks: position in the walk -> block.

    Pieces that are in no block are copied up when the forward begins, and down when it ends.
    """
    groups = _groups(walk, blocks)
    outside = [piece for at, piece in enumerate(walk) if blocks is not None and at not in blocks and piece.nbytes]
    sizes = [sum(walk[at].nbytes for at in group) for group in groups]
    pairs = [a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True)]
    if max(pairs, default=0) + _total(outside) > budget:
        return None
    engines, leaves = _Engines(rates, over, in_use=_total(outside)), _leaves(walk)
    first = {group[0]: number for number, group in enumerate(groups)}
    last = {group[-1]: number for number, group in enumerate(groups)}

    def fetch(number: int) -> None:
        engines.wait(engines.copy_stream)
        for at in groups[number]:
            if record:
                engines.allocate(walk[at].nbytes, budget)
            engines.ahead(walk[at])

    def step() -> None:
        for piece in outside:
            engines.up(piece)
        if groups:
            fetch(0)
        for at, leaf in enumerate(leaves):
            if at in first:
                engines.host += over.group_hook
                if first[at] + 1 < len(groups):
                    fetch(first[at] + 1)
                else:
                    engines.wait(engines.copy_stream)
            engines.run(leaf.own_s, leaf.own_host)
            if at in last and record:
                engines.release(sizes[last[at]])
            elif at in last:
                engines.wait(engines.compute)
            engines.run(leaf.rest_s, leaf.rest_host)
        for piece in outside:
            engines.down(piece)

    return _result(walk, rates, _steady(engines, step), _total(walk))


def _groups(walk: Sequence[Piece], blocks: Mapping[int, int] | None) -> list[list[int]]:
    """Positions by group, in the order in which the groups run."""
    if blocks is None:
        return [[at] for at, piece in enumerate(walk) if piece.nbytes]
    found: dict[int, list[int]] = {}
    for at in range(len(walk)):
        if at in blocks:
            found.setdefault(blocks[at], []).append(at)
    return list(found.values())


def two_leaf(walk: Sequence[Piece], budget: int, rates: Rates, over: Overheads = Overheads()) -> StepTime | None:
    """ComfyUI's static residency with its two cast buffers: small leaves stay, then the largest ones; the copy of a
    leaf waits for the leaf before the last to have run. Its best case: everything pinned, and no host sync."""
    order = sorted(range(len(walk)), key=lambda at: (walk[at].nbytes >= COMFY_SMALL, -walk[at].nbytes, at))
    if _total(walk) <= budget:
        return whole(walk, budget, rates, over)
    schedule = Schedule(walk, rates)
    for stay in range(len(order), -1, -1):  # as many as leave two buffers of the largest leaf that flows
        keep = set(order[:stay])
        flow = [at for at in range(len(walk)) if at not in keep and walk[at].nbytes]
        sizes = [walk[at].nbytes for at in flow]
        if flow and sum(walk[at].nbytes for at in keep) + 2 * max(sizes) <= budget:
            step = schedule.step_after(flow, [i - 2 for i in range(len(flow))])
            return _result(walk, rates, step, sum(sizes))
    return None


Peer = Callable[[Sequence[Piece], int, Rates, Overheads], StepTime | None]

PEERS: dict[str, Peer] = {
    "diffusers.model": whole,
    "diffusers.sequential": sequential,
    "diffusers.group_leaf": group_leaf,
    "diffusers.group_leaf_stream": group_stream,
    "diffusers.group_leaf_stream_record": lambda w, b, r, o: group_stream(w, b, r, o, record=True),
    "accelerate.dispatch": dispatch,
    "torch.to": whole,
    "comfyui.two_leaf": two_leaf,
}


def predict_peers(
    walk: Sequence[Piece],
    budget: int,
    rates: Rates,
    *,
    blocks: Mapping[int, int] | None = None,
    vram: int | None = None,
    over: Overheads = Overheads(),
) -> dict[str, StepTime | None]:
    """Every peer by name under `budget` bytes for weights; None where it cannot run.

    `blocks` maps positions in the walk to blocks, for the strategy that moves blocks (None where not known); `vram` is
    the card's memory in bytes, of which SD.Next's watermark is a share.
    """
    found = {name: peer(walk, budget, rates, over) for name, peer in PEERS.items()}
    found["diffusers.group_block_stream"] = (
        group_stream(walk, budget, rates, over, blocks=blocks) if blocks is not None else None
    )
    found["sdnext.balanced"] = balanced(walk, budget, rates, over, vram)
    return found
