"""Invariant tested: what the stub answers is what the pack's own server would: schemas, keys, sums and rules."""

from __future__ import annotations

import importlib
import json
import math
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from . import canned, garbage, places

if TYPE_CHECKING:
    from .stub import Stub

SCHEMA = json.loads((places.ROOT / "offload" / "schemas" / "offload-report-1.json").read_text(encoding="utf-8"))


def get(stub: Stub, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(stub.url + path, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, None


def test_a_canned_report_is_a_report() -> None:
    report = canned.report(hints=[canned.hint()])
    jsonschema.validate(report, SCHEMA)
    totals = report["totals"]
    parts = ("encode", "denoise", "decode", "preview", "onload", "stall", "evict", "other")
    assert math.isclose(sum(totals[f"{part}_s"] for part in parts), totals["wall_s"], rel_tol=1e-9)
    rows = report["by_component"]
    for key in ("bytes_h2d", "bytes_dropped", "onload_s", "stall_s", "evict_s"):
        assert math.isclose(sum(row[key] for row in rows), totals[key], rel_tol=1e-9), key
    assert sum(row["moves"] for row in rows) == totals["move_count"]
    assert max(row["peak"] for row in rows) == report["vram"]["peak"] == canned.PEAK


def test_a_canned_policy_is_what_the_node_makes() -> None:
    policy = importlib.import_module("balanced_offload.offload.policy").OffloadPolicy
    assert set(canned.policy()) == set(policy().to_json())


def test_a_row_has_what_the_servers_row_has() -> None:
    rows = importlib.import_module("balanced_offload.nodes.rows")
    ours, theirs = canned.row(canned.report()), rows.row_of(canned.report())
    assert set(theirs) <= set(ours), set(theirs) - set(ours)
    assert set(theirs["nodes"][0]) <= set(ours["nodes"][0])


def test_telemetry_agrees_with_the_report() -> None:
    for step in (0, 7, 20):
        vram = canned.telemetry("p", "3", step, 20)["vram"]
        used = vram["weights"] + vram["activations"] + vram["others"]
        assert used + vram["free"] == vram["total"] and used <= vram["peak"] <= canned.PEAK
    assert vram["peak"] == canned.PEAK


def test_routes_answer_as_the_pack_does(stub: Stub) -> None:
    stub.add_run(canned.report("one"))
    stub.add_run(canned.report("two"))
    for prefix in ("", "/api"):
        assert [row["prompt_id"] for row in get(stub, f"{prefix}/offload/runs")[1]["runs"]] == ["two", "one"]
        assert get(stub, f"{prefix}/offload/report/one")[1]["prompt_id"] == "one"
        assert get(stub, f"{prefix}/offload/report/none")[0] == 404
        assert get(stub, f"{prefix}/offload/marks?mode=auto&high=50%25&low=auto")[1]["high"] == canned.TOTAL // 2
    assert get(stub, "/offload/runs?limit=0")[0] == get(stub, "/offload/status?telemetry=nobody")[0] == 400
    assert "/extensions/balanced_offload/js/adapter.js" in get(stub, "/extensions")[1]
    assert {"OffloadPolicy", "KSampler", "UNETLoader"} <= set(get(stub, "/object_info")[1])


def test_nothing_outside_the_front_end_is_served(stub: Stub) -> None:
    for path in ("/../METADATA", "/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/extensions/balanced_offload/../pyproject.toml"):
        assert get(stub, path)[0] in (403, 404), path


@pytest.mark.parametrize("number", range(len(garbage.ANSWERS)))
def test_garbage_is_text_that_a_server_can_send(number: int, stub: Stub) -> None:
    stub.answers["/offload/runs"] = garbage.ANSWERS[number]
    request = urllib.request.Request(f"{stub.url}/api/offload/runs")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == garbage.ANSWERS[number][0]
    except urllib.error.HTTPError as error:
        assert error.code == garbage.ANSWERS[number][0]
