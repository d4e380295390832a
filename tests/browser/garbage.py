"""Invariant: nothing here is what the pack would ever send; each is wrong in its own way, and JSON can carry it.

For events and for answers of routes: other types, NaN, unknown fields, missing ids, clocks that jump, newer schemas,
markup in names.
"""

from __future__ import annotations

import json
from typing import Any

from . import canned

NAN = float("nan")
MARKUP = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>{{7*7}}'
PLAIN: list[Any] = [None, 0, -1, True, "text", "", [], [[]], {}, {"": None}, [None], {"length": 3}, "x" * 100_000]


def telemetry() -> list[Any]:
    """What may come as `offload.telemetry`."""
    good = canned.telemetry("garbage", "7", 3, 20)
    bad = [*PLAIN]
    for key in good:
        bad += [{**good, key: value} for value in (None, NAN, "text", -5, [], {})]
        bad.append({name: value for name, value in good.items() if name != key})
    for key in good["vram"]:
        bad += [{**good, "vram": {**good["vram"], key: value}} for value in (None, NAN, "9 GiB", -1, 1e300, [])]
    bad += [{**good, "t": t} for t in (1e12, -1e12, 5.0, 0.0, 3.0)]  # the clock jumps, to and fro
    bad += [{**good, "node": node} for node in ("404", "404:7:1", ":", "7:", "__proto__", MARKUP)]
    bad += [{**good, "device": MARKUP, "components": [{"name": MARKUP, "bytes": 1, "total": 2}]}]
    bad += [{**good, "components": [None, {"name": None, "bytes": NAN, "total": -1}], "points": [None, {"t": NAN}]}]
    bad += [{**good, "v": 99, "surprise": {"deep": [1, {"er": None}]}}]
    return bad


def reports() -> list[dict[str, Any]]:
    """What `/offload/report` may answer, each under an id of its own."""
    made: list[dict[str, Any]] = []
    good = canned.report("good")
    lists = ("nodes", "stages", "steps", "moves", "by_component", "residency", "vram_track", "hints", "timers")
    for key in (*lists, "totals", "vram", "resolved", "policy", "line", "verdict", "error", "workload", "created"):
        for number, value in enumerate((None, NAN, "text", -1, [None], {"a": None})):
            made.append({**good, "prompt_id": f"bad-{key}-{number}", key: value})
    for key in lists:
        rows = [{name: value for name in row} for row in good[key][:2] for value in (NAN, MARKUP, -1)]
        made.append({**good, "prompt_id": f"bad-rows-{key}", key: rows})
    made.append({**good, "prompt_id": "bad-newer", "schema": "offload-report/9", "surprise": [1, 2, 3]})
    made.append({**good, "prompt_id": "bad-newer-empty", "schema": "offload-report/9", "verdict": "unheard-of"})
    made.append(named(MARKUP, "bad-markup"))
    return made


def named(name: str, prompt_id: str) -> dict[str, Any]:
    """A good report in which everything that has a name has this one."""
    text = json.dumps(canned.report(prompt_id, hints=[canned.hint(sentence=name)], line=name))
    for word in ("text_encoder", "denoiser", "KSampler", "CLIPTextEncode"):
        text = text.replace(f'"{word}"', json.dumps(name))
    found: dict[str, Any] = json.loads(text)
    return {**found, "verdict": name, "hint_note": name}


ANSWERS: list[tuple[int, Any]] = [
    *[(500, "oops"), (404, {"error": "no such route"}), (200, ""), (200, "<!doctype html><b>login</b>"), (200, "nul")],
    *[(200, []), (200, {}), (200, "null"), (200, {"runs": None}), (200, {"runs": [None, 7, {}, {"prompt_id": None}]})],
    *[(200, '{"runs": [{"prompt_id": "x", "totals": {"wall_s": NaN}}]}'), (503, {"error": MARKUP})],
    *[(200, {"runs": "x" * 1000}), (200, {"runs": {"length": 5}}), (200, {"total": "9", "high": [], "sentence": 5})],
]
"""Status and body of a route that has lost its mind."""
