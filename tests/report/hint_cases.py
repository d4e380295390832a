"""Reports as runs of one workload leave them. Invariant: figures are binary fractions where a test compares them."""

from __future__ import annotations

import copy
from typing import Any

from balanced_offload.offload.hints import Digest, digest
from balanced_offload.offload.policy import OffloadPolicy

GIB = 1 << 30
UNET = "UNet2DConditionModel"


def gib(amount: float) -> int:
    return int(amount * GIB)


def row(component: str, weight: float | None = None, **given: Any) -> dict[str, Any]:
    """A row of `by_component`; nothing moved unless given."""
    nbytes = None if weight is None else gib(weight)
    return {
        "component": component,
        "weight_bytes": nbytes,
        "resident_bytes": nbytes,
        "left_bytes": nbytes,
        "moves": 0,
        "bytes_h2d": 0,
        "bytes_d2h": 0,
        "drops": 0,
        "bytes_dropped": 0,
        "dropped_for": {},
        "avoidable_bytes": 0,
        "onload_s": 0.0,
        "stall_s": 0.0,
        "evict_s": 0.0,
        "compute_s": 0.0,
        "step_bytes": 0,
        "step_copy_s": None,
        "blocking_bytes": 0,
        "blocking_copy_s": None,
        "peak": None,
        **given,
    }


def report(written: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """SDXL at rest on a card with 32 GiB, of which 25.6 GiB are available: nothing moves. `a__b` is key b of a."""
    document: dict[str, Any] = {
        "schema": "offload-report/1",
        "prompt_id": "p",
        "complete": True,
        "host": {"gpu": "Card", "vram_total": 32 * GIB, "ram_total": 64 * GIB},
        "env": {"dynamic_vram": False},
        "rung": "simulated",
        "world": "pipeline",
        "workload": "sdxl 1024",
        "policy": OffloadPolicy(**(written or {})).to_json(),
        "resolved": {
            "mode": "balanced",
            "sources": {"mode": "user", "high": "fit", "activation_peak": "learned"},
            "high": None,
            "low_always": False,
            "never": [],
            "weight_bytes": gib(6.5),
            "activation_peak": gib(2.125),
            "available": gib(25.6),
            "pinned_ram": 32 * GIB,
        },
        "vram": {"total": 32 * GIB, "available": gib(25.6), "peak": gib(9.0)},
        "ram": {"peak_rss": 16 * GIB, "pinned": 7 * GIB},
        "totals": {
            "wall_s": 13.5,
            "onload_s": 0.0,
            "stall_s": 0.0,
            "evict_s": 0.0,
            "move_count": 0,
            "drop_count": 0,
            "bytes_dropped": 0,
        },
        "stages": [
            {"name": "encode", "component": "text_encoder", "t0": 0.0, "t1": 1.0, "need": 0, "peak": gib(7.0)},
            {"name": "denoise", "component": UNET, "t0": 1.0, "t1": 12.0, "need": 0, "peak": gib(8.5)},
            {"name": "decode", "component": "vae", "t0": 12.0, "t1": 13.5, "need": 0, "peak": gib(3.75)},
        ],
        "by_component": [row("text_encoder", 1.5), row(UNET, 4.75, left_bytes=0), row("vae", 0.25)],
        "steps": [],
        "nodes": [],
        "events": [],
        "fits": True,
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        at = document
        for parent in parents:
            at = at[parent]
        at[key] = value
    return document


def seed(written: dict[str, Any] | None = None, reason: str = "low", **changes: Any) -> dict[str, Any]:
    """The second seed's run: txt2img and hires, a cold text encode. 13.47 s, of which onload 1.7 and offload 1.3."""
    out = 2 * gib(4.75)
    unet = row(
        UNET,
        4.75,
        left_bytes=0,
        bytes_h2d=out,
        avoidable_bytes=out,
        dropped_for={reason: out},
        bytes_dropped=out,
        onload_s=1.6875,
    )
    times = {"wall_s": 13.47, "onload_s": 1.6875, "stall_s": 0.0, "evict_s": 1.3125}
    moves = {"move_count": 2, "drop_count": 2, "bytes_dropped": out}
    rows = [row("text_encoder", 1.5), unet, row("vae", 0.25)]
    written = {"mode": "balanced", "fit_aware": False} if written is None else written
    return report(written, totals={**times, **moves}, by_component=rows, **changes)


def evicted(component: str, weight: float, reason: str, onload_s: float, **given: Any) -> dict[str, Any]:
    """A component that left for `reason` and came back once a run, though it need not have."""
    nbytes = gib(weight)
    moved = {"bytes_h2d": nbytes, "avoidable_bytes": nbytes, "dropped_for": {reason: nbytes}, "left_bytes": 0}
    return row(component, weight, **{**moved, "onload_s": onload_s, **given})


def streaming(**changes: Any) -> dict[str, Any]:
    """A UNet of 8 GiB under a high mark of 4 GiB on a card with 16 GiB: half of it streams in each of ten steps."""
    rows = [
        row("text_encoder", 3.0),
        row(UNET, 8.0, left_bytes=0, bytes_h2d=40 * GIB, step_bytes=40 * GIB, step_copy_s=4.0, stall_s=2.0),
        row("vae", 0.25),
    ]
    times = {"wall_s": 20.0, "onload_s": 0.0, "stall_s": 2.0, "evict_s": 0.0}
    document = report(
        {"mode": "balanced", "high": "4GiB"},
        totals={**times, "move_count": 400, "drop_count": 0, "bytes_dropped": 0},
        by_component=rows,
        steps=[{"i": i} for i in range(10)],
        vram={"total": 16 * GIB, "available": 12 * GIB, "peak": 9 * GIB},
        fits=False,
    )
    document["resolved"] |= {
        "high": 4 * GIB,
        "sources": {"mode": "user", "high": "user"},
        "weight_bytes": gib(11.25),
        "available": 12 * GIB,
        "activation_peak": 2 * GIB,
    }
    return copy.deepcopy(document | changes)


def runs(*reports: dict[str, Any]) -> tuple[Digest, list[Digest]]:
    """(now, before) of reports, oldest first."""
    *before, now = map(digest, reports)
    return now, before


def by_mode(mode: str = "sequential", blocked: float = 2.25, **written: Any) -> dict[str, Any]:
    run = report({"mode": mode, **written}, resolved__mode=mode)
    run["totals"] |= {"onload_s": blocked - 0.25, "stall_s": 0.25, "move_count": 9}
    return run


def failed(*steps: str | None, took: float = 0.5, mode: str = "balanced", **written: Any) -> dict[str, Any]:
    """A decode that ran out of memory once per step, each try taking `took` seconds."""
    run = report({"mode": mode, "before_decode": "keep", **written}, fits=False)
    run["stages"] = run["stages"][:2]
    run["events"] = [{"kind": "notice", "text": "n", "data": {}, "t": 12.0}]
    for i, step in enumerate(steps):
        t = 12.0 + i * took
        run["stages"].append({"name": "decode", "component": "vae", "t0": t, "t1": t + took, "need": 0, "peak": None})
        run["events"].append({"kind": "oom", "text": "out of memory in vae", "data": {"step": step}, "t": t + took})
    end = 12.0 + len(steps) * took
    run["stages"].append({"name": "decode", "component": "vae", "t0": end, "t1": 13.5, "need": 0, "peak": gib(9.0)})
    return run


def unpinned(**given: Any) -> dict[str, Any]:
    """20 GiB of the UNet's 40 GiB a run come from memory that is not page-locked, at 4 GiB/s in place of 10."""
    run = streaming(policy=OffloadPolicy(mode="balanced", pinned_ram="2GiB").to_json())
    run["by_component"][1] |= {
        "step_bytes": 20 * GIB,
        "step_copy_s": 2.0,
        "blocking_bytes": 20 * GIB,
        "blocking_copy_s": 5.0,
        "stall_s": 4.0,
        **given,
    }
    run["resolved"] |= {"high": gib(9.6), "sources": {"high": "profile", "pinned_ram": "user"}, "pinned_ram": 2 * GIB}
    run["ram"]["pinned"] = 2 * GIB
    return run


def timed(wall: float, written: dict[str, Any] | None = None, ran: tuple[str, ...] = ("3",), **given: Any) -> Any:
    nodes = [{"id": node, "type": "KSampler", "cached": False} for node in ran]
    nodes.append(
        {"id": "9", "type": "VRAMReport", "cached": False} if wall % 2 else nodes[0] | {"id": "1", "cached": True}
    )
    return report(written, totals__wall_s=wall, nodes=nodes, world="static", **given)


MINE = {"mode": "balanced", "high": "60%"}
DEFAULT = {"mode": "auto", "high": "60%"}
