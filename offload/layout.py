"""Where streamed units lie in the ring. Invariant: a unit has the same address in every step, and copies keep order.

The streamed units of a step are laid one behind the other and start again at the front when the end is reached; each
step starts at the front too. So addresses recur (views of them are made once, and a captured graph stays valid), and
what each copy has to wait for is known beforehand: the release of the latest unit that lay on any of its bytes, or
that an earlier copy waits for, since there is one copy stream, which runs in order.

Pure figures: the schedule predicts with the very layout that the ring carries out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Offsets and waits of the `n` streamed units of one step, in the order in which they run.

    `starts[i]` is the offset of unit i in the ring, bytes. `after[i]` says which release the copy of unit i waits for,
    relative to the start of its step: 0 <= k < i is unit k of the same step, -n <= k < 0 is unit n + k of the step
    before. Never decreasing, and after[i] < i: a copy never waits for a unit that waits for it.
    """

    capacity: int
    starts: tuple[int, ...]
    after: tuple[int, ...]


def lay_out(sizes: Sequence[int], capacity: int) -> Layout:
    """Lay units of `sizes` bytes (aligned, as they are to lie in the ring), in running order, into `capacity` bytes.

    Raises:
        ValueError: a unit is larger than the ring.
    """
    starts: list[int] = []
    head = 0
    for i, size in enumerate(sizes):
        if size > capacity:
            raise ValueError(f"unit {i} takes {size} bytes, and the ring has {capacity}")
        if head + size > capacity:
            head = 0
        starts.append(head)
        head += size
    count = len(starts)
    after: list[int] = []
    latest = -count
    # What lies in the ring, newest last, from the step before on: everything wraps, so one turn back is enough.
    for i in range(count):
        begin, end = starts[i], starts[i] + sizes[i]
        for k in range(i - 1, i - 1 - count, -1):
            if starts[k % count] < end and begin < starts[k % count] + sizes[k % count]:
                latest = max(latest, k)
                break
            if k <= latest:
                break
        after.append(latest)
    return Layout(capacity, tuple(starts), tuple(after))
