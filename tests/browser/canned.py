"""Invariant: figures in one canned report agree with each other, as a real report's do: sums, peaks and byte counts.

A run of a model whose denoiser does not fit: encode, denoise (streamed), decode. Sizes bytes, times seconds. What a
test compares is computed here from the same few figures, never typed in twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MIB, GIB = 1 << 20, 1 << 30
TOTAL = 16 * GIB
HIGH, LOW = 9 * GIB + 512 * MIB, 3 * GIB + 256 * MIB
WEIGHTS = {"text_encoder": 1640 * MIB, "denoiser": 11 * GIB + 300 * MIB, "vae": 160 * MIB}
ONLOAD = {"text_encoder": 0.4125, "denoiser": 0.9375, "vae": 0.0315}
RESIDENT = {**WEIGHTS, "denoiser": 8 * GIB}
STREAMED = WEIGHTS["denoiser"] - RESIDENT["denoiser"]
"""Bytes that go up again in each step."""
OTHERS = GIB
PEAK = 14 * GIB + 123_456_789
"""Most in use on the card at once, other programs too."""


def _step(node: str, i: int, t0: float) -> dict[str, Any]:
    compute, stall, overlapped = 0.2075 + 0.001 * (i % 7), 0.0125 + 0.002 * (i % 3), 0.12
    t1 = t0 + compute + stall
    return {
        **{"node": node, "i": i, "t0": t0, "t1": t1, "compute_s": compute, "stall_s": stall},
        **{"overlapped_s": overlapped, "bytes_h2d": STREAMED},
    }


def _move(t: float, dur: float, component: str, size: int, **more: Any) -> dict[str, Any]:
    base = {"t": t, "dur_s": dur, "component": component, "dir": "h2d", "bytes": size, "reason": "stage"}
    return {**base, "step": None, "avoidable": False, "overlapped": False, **more}


def report(
    prompt_id: str = "prompt-1",
    *,
    nodes: tuple[str, str, str] = ("6", "3", "8"),
    steps: int = 20,
    created: str = "2026-01-31T12:00:00.000Z",
    workload: str | None = "tiny 512x512",
    **over: Any,
) -> dict[str, Any]:
    """A whole report, `offload-report/1` with its additions. nodes: ids of the encode, sampler and decode nodes.

    `over`: fields that replace the canned ones.
    """
    encode, sampler, decode = nodes
    onload = dict(ONLOAD)
    t_denoise = 0.05 + onload["text_encoder"] + 0.15
    t_first = t_denoise + onload["denoiser"]
    rows: list[dict[str, Any]] = []
    t = t_first
    for i in range(steps):
        rows.append(_step(sampler, i, t))
        t = rows[-1]["t1"]
    t_decode, evict = t, 0.004
    end = t_decode + evict + onload["vae"] + 0.35 + 0.02
    stall, compute = sum(row["stall_s"] for row in rows), sum(row["compute_s"] for row in rows)
    peak = PEAK
    moves = [
        _move(0.05, onload["text_encoder"], "text_encoder", WEIGHTS["text_encoder"]),
        _move(t_denoise, onload["denoiser"], "denoiser", RESIDENT["denoiser"], reason="forward"),
        *(
            _move(row["t0"], 0.13, "denoiser", STREAMED, reason="forward", step=row["i"], overlapped=True)
            for row in rows
        ),
        _move(t_decode, 0.0, "denoiser", RESIDENT["denoiser"], dir="drop", reason="need"),
        _move(t_decode + evict, onload["vae"], "vae", WEIGHTS["vae"]),
    ]
    ups = [move for move in moves if move["dir"] == "h2d"]
    by_component = [
        {
            **{"component": name, "weight_bytes": WEIGHTS[name], "resident_bytes": RESIDENT[name]},
            **{"left_bytes": 0 if name == "denoiser" else WEIGHTS[name]},
            "moves": sum(move["component"] == name for move in ups),
            "bytes_h2d": sum(move["bytes"] for move in ups if move["component"] == name),
            **{"bytes_d2h": 0, "drops": int(name == "denoiser"), "avoidable_bytes": 0, "onload_s": onload[name]},
            "bytes_dropped": RESIDENT[name] if name == "denoiser" else 0,
            "dropped_for": {"need": RESIDENT[name]} if name == "denoiser" else {},
            **{"stall_s": stall if name == "denoiser" else 0.0, "evict_s": evict if name == "denoiser" else 0.0},
            "compute_s": {"text_encoder": 0.15, "denoiser": compute, "vae": 0.35}[name],
            "peak": {"text_encoder": 2 * GIB, "denoiser": peak, "vae": 6 * GIB}[name],
        }
        for name in WEIGHTS
    ]
    made = {
        **{"schema": "offload-report/1", "prompt_id": prompt_id, "created": created, "complete": True, "error": None},
        "host": {"gpu": "Canned card", "vram_total": TOTAL, "driver": None, "os": "Linux", "ram_total": 64 * GIB},
        "env": {"pack": "0.1.0", "comfyui": "0.33.0", "torch": "2.13.0", "dynamic_vram": False, "flags": []},
        **{"rung": "simulated", "world": "static", "worlds": ["static"], "ended": True, "file": None},
        "policy": policy(),
        "resolved": {
            **{"mode": "balanced", "high": HIGH, "low": LOW, "sources": {"mode": "profile", "high": "profile"}},
            "sentence": "balanced: the denoiser's 11.3 GiB do not fit beside 3.0 GiB of activations.",
        },
        "output_neutral": True,
        "vram": {
            **{"total": TOTAL, "available": 15 * GIB, "peak_device": peak, "peak_torch": peak - 64 * MIB},
            **{"others_start": OTHERS, "high_crossings": 0, "spill_suspected": False, "peak": peak},
            **{"peak_noted": peak - 128 * MIB, "peak_weights": RESIDENT["denoiser"] + STREAMED},
        },
        "ram": {"peak_rss": 20 * GIB, "pinned": 12 * GIB},
        "totals": {
            **{"wall_s": end, "encode_s": 0.15, "denoise_s": compute, "decode_s": 0.35, "preview_s": 0.0},
            **{"onload_s": sum(onload.values()), "stall_s": stall, "evict_s": evict, "other_s": 0.07},
            **{"overlapped_s": 0.12 * steps, "bytes_h2d": sum(move["bytes"] for move in ups), "bytes_d2h": 0},
            **{"move_count": len(ups), "bytes_dropped": RESIDENT["denoiser"], "drop_count": 1, "host_s": end},
        },
        "stages": [
            {"name": "encode", "component": "text_encoder", "t0": 0.05, "t1": t_denoise, **_needs(2 * GIB)},
            {"name": "denoise", "component": "denoiser", "t0": t_denoise, "t1": t_decode, **_needs(peak)},
            {"name": "decode", "component": "vae", "t0": t_decode, "t1": end, **_needs(6 * GIB)},
        ],
        "nodes": [
            _node(encode, "CLIPTextEncode", 0.0, t_denoise, 2 * GIB, onload["text_encoder"], 0.0, 0.0),
            _node(sampler, "KSampler", t_denoise, t_decode, peak, onload["denoiser"], 0.0, stall),
            _node(decode, "VAEDecode", t_decode, end, 6 * GIB, onload["vae"], evict, 0.0),
        ],
        "steps": rows,
        "moves": moves,
        "segments": [],
        "vram_track": _track(t_denoise, t_first, t_decode, end, peak),
        "residency": [
            {"t": t, "component": name, "bytes": size}
            for t, name, size in (
                (0.05 + onload["text_encoder"], "text_encoder", WEIGHTS["text_encoder"]),
                (t_first, "denoiser", RESIDENT["denoiser"]),
                (t_decode, "denoiser", 0),
                (t_decode + evict + onload["vae"], "vae", WEIGHTS["vae"]),
            )
        ],
        "by_component": by_component,
        "events": [],
        **{"workload": workload, "notice": "Static: a canned run."},
        "line": f"wall {end:.2f} s = denoise {compute:.2f} + onload {sum(onload.values()):.2f} + stall {stall:.2f}",
        "timers": [
            {"name": "denoise", "seconds": compute, "means": "the model computes", "turn": "nothing: this is the work"},
            {"name": "onload", "seconds": sum(onload.values()), "means": "blocked on a copy", "turn": "mode, high"},
            {"name": "stall", "seconds": stall, "means": "a step waits for a copy", "turn": "prefetch, high"},
            {"name": "VRAM peak", "seconds": None, "bytes": peak, "means": "most in use", "turn": "high, mode"},
        ],
        **{"hints": [], "hint_note": None, "prediction": {"step_s": 0.22, "bound_s": 0.21}},
        **{"verdict": "partial", "fits": False, "overhead_ms": 1.75, "unknown": ["host.driver"], "sources": {}},
    }
    return {**made, **over}


def _needs(peak: int) -> dict[str, Any]:
    return {"need": peak, "have": 15 * GIB, "peak": peak}


def _node(key: str, kind: str, t0: float, t1: float, peak: int, onload: float, evict: float, stall: float) -> Any:
    return {
        **{"id": key, "display": key, "type": kind, "t0": t0, "t1": t1, "peak": peak, "onload_s": onload},
        **{"evict_s": evict, "stall_s": stall, "cached": False, "wall_s": t1 - t0},
    }


def _track(t_denoise: float, t_first: float, t_decode: float, end: float, peak: int) -> list[dict[str, Any]]:
    text, denoiser = WEIGHTS["text_encoder"], RESIDENT["denoiser"]
    points = [(0.0, 0, 0), (t_denoise, text + 200 * MIB, text), (t_first, text + denoiser + 100 * MIB, text + denoiser)]
    points += [(t_first + 0.1, peak - GIB, text + denoiser + STREAMED), (t_decode, peak - GIB, text + denoiser)]
    points += [(t_decode + 0.004, text + 100 * MIB, text), (end, text + WEIGHTS["vae"], text + WEIGHTS["vae"])]
    return [{"t": t, "allocated": allocated, "resident": resident} for t, allocated, resident in points]


def policy(**fields: Any) -> dict[str, Any]:
    """A policy as the Offload Policy node writes it with its defaults."""
    known = json.loads((HERE.parent / "host" / "object_info.json").read_text(encoding="utf-8"))["OffloadPolicy"]
    made = {name: described["default"] for name, described in known["inputs"].items()}
    made |= {"never": [], "always": [], "reserve": 0, "gc_threshold": None}  # as offload-policy/1 holds them
    return {"schema": "offload-policy/1", **made, **fields}


def row(whole: dict[str, Any]) -> dict[str, Any]:
    """The row of `/offload/runs` that belongs to a report."""
    keys = ("prompt_id", "created", "ended", "complete", "error", "world", "verdict", "fits", "output_neutral")
    keys += ("totals", "vram", "overhead_ms", "line", "workload", "hints", "hint_note")
    return {
        **{key: whole.get(key) for key in keys},
        "mode": whole["resolved"]["mode"],
        "text": whole["line"],
        "nodes": [
            {
                **{key: node.get(key) for key in ("id", "display", "type", "stall_s", "peak", "cached")},
                "wall_s": node.get("wall_s", node["t1"] - node["t0"]),
                "moves_s": node["onload_s"] + node["evict_s"] + node["stall_s"],
            }
            for node in whole["nodes"]
        ],
    }


def hint(**over: Any) -> dict[str, Any]:
    made = {
        **{"code": "FITS_BUT_MOVED", "saving_s": 1.48},
        "sentence": "The denoiser (11.3 GiB) moved although the run fits in 15.0 GiB; that cost 1.48 s a run.",
        "action": {"set": {"fit_aware": True}, "label": "Turn fit_aware on"},
    }
    return {**made, **over}


def telemetry(prompt_id: str, node: str, step: int, steps: int, t: float = 0.0, **over: Any) -> dict[str, Any]:
    """One message as the pack sends it; the bars grow with the steps."""
    weights, others = RESIDENT["denoiser"] + STREAMED, OTHERS
    activations = (PEAK - weights - others) * (step + 1) // (steps + 1)
    peak = weights + activations + others
    exact = {"t": t, "node": node, "step": step, "steps": steps, "step_ms": 221.5, "stall_ms": 14.25}
    made = {
        **{"v": 1, "prompt_id": prompt_id, "device": "vram:0", "type": "KSampler", **exact, "moved": STREAMED * step},
        "vram": {
            **{"weights": weights, "activations": activations, "others": others, "high": HIGH, "low": LOW},
            **{"free": TOTAL - weights - activations - others, "peak": peak, "total": TOTAL},
        },
        "components": [
            {"name": "denoiser", "bytes": RESIDENT["denoiser"], "total": WEIGHTS["denoiser"]},
            {"name": "text_encoder", "bytes": WEIGHTS["text_encoder"], "total": WEIGHTS["text_encoder"]},
        ],
        "points": [{**exact, "moved": STREAMED * step, "weights": weights, "allocated": weights + activations}],
        **{"stages": [], "ended": []},
    }
    return {**made, **over}


def marks(mode: str = "auto", high: str = "auto", low: str = "auto", **_: str) -> dict[str, Any]:
    """What `/offload/marks` answers: percentages of the canned card; a size in GiB; anything else is an error."""

    def size(text: str, usual: int) -> int:
        if text == "auto":
            return usual
        if text.endswith("%"):
            return int(TOTAL * float(text[:-1]) / 100)
        return int(float(text.removesuffix("GiB")) * GIB)

    base: dict[str, Any] = {"total": TOTAL, "available": 15 * GIB, "mode": "balanced" if mode == "auto" else mode}
    try:
        found = {"high": size(high, HIGH), "low": size(low, LOW), "error": None}
    except ValueError:
        return {**base, "high": None, "low": None, "sources": {}, "sentence": "", "error": f"high: got {high!r}"}
    sources = {"high": "profile" if high == "auto" else "user", "low": "profile" if low == "auto" else "user"}
    return {**base, **found, "sources": sources, "sentence": "marks of the canned card."}
