"""Guards: the JSON, the table and the files say the same, as all are made from the same rows.

Sizes are bytes and times seconds in the JSON; text for people rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..report import save_json
from ..sizes import format_size
from ..summary import line, seconds, table
from ..timeline import timeline_png
from ..trace import save_trace
from .checks import ModeRun
from .grid import images_png
from .places import Place

SCHEMA = "offload-demo/1"
TRACED = "balanced"


def row(run: ModeRun) -> dict[str, Any]:
    """One mode of the document `offload-demo/1`. equal_on names what else the pictures are equal to, bit for bit."""
    looks = run.looks
    return {
        "mode": run.mode,
        "resolved": run.resolved,
        "equal_to_none": run.equal_to_none,
        "equal_on": "cpu" if run.equal_to_cpu else None,
        "peak_vram": run.peak_vram,
        "resident_peak": run.resident_peak,
        "bytes_h2d": run.bytes_h2d,
        "bytes_d2h": looks.log_d2h if looks is not None and looks.log_d2h is not None else run.bytes_d2h,
        "moves": run.moves,
        "stall_s": run.stall_s,
        "time_s": run.time_s,
        "hooks_on_resident": looks.hooks_on_resident if looks is not None else None,
        "predicted": run.predicted,
        "cap": run.cap,
        "cap_share": run.cap_share,
        "high": run.high,
        "high_crossings": run.high_crossings,
        "component_peak": looks.component_peak if looks is not None else None,
        "copy_log_h2d": looks.log_h2d if looks is not None else None,
        "races": looks.races if looks is not None else None,
        "digits": {"right": run.digits_right, "total": len(run.asked)} if run.asked else None,
        "host_s": run.host_s,
        "sentence": run.report["resolved"]["sentence"] if run.report is not None else None,
        "line": line(run.report) if run.report is not None else None,
        "error": run.error,
    }


def assemble(
    place: Place,
    pictures: int,
    runs: Sequence[ModeRun],
    judged: ModeRun | None,
    failures: Sequence[str],
    cap: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The document `offload-demo/1`."""
    rows = []
    for run in runs:
        own = [text for text in failures if text.startswith((f"{run.mode}:", f"{run.mode},"))]
        rows.append(row(run) | {"failures": own})
    digits = None if judged is None else {"right": judged.digits_right, "total": len(judged.asked)}
    return {
        "schema": SCHEMA,
        "device": place.name,
        "rung": place.rung,
        "reason": place.reason,
        "cap": cap,
        "torch": torch.__version__,
        "pictures": pictures,
        "digits": digits,
        "modes": rows,
        "notes": list(notes),
        "failures": list(failures),
    }


def write_files(
    out: Path,
    document: Mapping[str, Any],
    runs: Sequence[ModeRun],
    judged: ModeRun | None,
    asked: Sequence[int],
) -> list[Path]:
    """report.json (mode -> offload-report/1), images.png, timeline.png and trace.json; those that there is data for."""
    measured = [run for run in runs if run.report is not None]
    if not measured and judged is not None and judged.report is not None:
        measured = [judged]  # on the plain CPU the modes are predicted, the run itself was not
    files: list[Path] = []
    on = {"gpu": "on the GPU", "simulated": "on the simulated accelerator", "cpu": "on the plain CPU"}[document["rung"]]
    labels = {id(run): "plain CPU" if document["rung"] == "cpu" else run.mode for run in measured}
    if measured:
        reports = {labels[id(run)]: run.report for run in measured}
        files.append(save_json(reports, out / "report.json"))
        files.append(timeline_png([(labels[id(r)], r.report) for r in measured if r.report], out / "timeline.png"))
        traced = next((run for run in measured if run.mode == TRACED), measured[-1])
        assert traced.report is not None
        files.append(save_trace(traced.report, out / "trace.json"))
    rows = [
        (labels[id(run)], run.pictures[: len(asked)], run.read[: len(asked)])
        for run in measured
        if run.pictures is not None and len(run.pictures) >= len(asked)
    ]
    if rows:
        equal = all(run.equal_to_none for run in measured) and len(measured) > 1
        note = "; all modes are equal, bit for bit" if equal else ""
        title = f"a photo of the digit ..., drawn {on}{note}"
        files.insert(1, images_png(rows, asked, out / "images.png", title))
    return files


def text_table(document: Mapping[str, Any]) -> str:
    """The rows of the document for people."""
    rows = []
    for mode in document["modes"]:
        digits = mode["digits"]
        rows.append(
            {
                "mode": mode["mode"],
                "resolved": mode["resolved"],
                "equal": mode["equal_to_none"],
                "peak": format_size(mode["peak_vram"]),
                "resident": format_size(mode["resident_peak"]),
                "moved up": format_size(mode["bytes_h2d"]),
                "moved down": format_size(mode["bytes_d2h"]),
                "stall": seconds(mode["stall_s"]),
                "time": seconds(mode["time_s"]),
                "hooks on resident": mode["hooks_on_resident"],
                "digits read": f"{digits['right']}/{digits['total']}" if digits else None,
            }
        )
    return table(rows)


def closing_text(document: Mapping[str, Any], out: Path, files: Sequence[Path]) -> list[str]:
    """Everything below the progress: the table, a line per mode, the judgement, the files."""
    predicted = any(mode["predicted"] for mode in document["modes"])
    shared = min(10, document["pictures"])
    heading = f"PREDICTED for {shared} pictures" if predicted else f"{shared} pictures in each mode"
    lines = ["", f"{heading}, cap {format_size(document['cap'])} (lifted for none):", text_table(document), ""]
    for mode in document["modes"]:
        if mode["line"] is not None:
            lines.append(f"{mode['mode']:<11}{mode['line']}")
    if any(mode["line"] for mode in document["modes"]):
        lines.append("(the lines, the report and the time line are of each mode's last generation)")
    lines += [
        f"auto became {mode['sentence']}" for mode in document["modes"] if mode["mode"] == "auto" and mode["sentence"]
    ]
    lines.append("")
    digits = document["digits"]
    if digits is not None:
        lines.append(f"The classifier read the digit right in {digits['right']} of {digits['total']} pictures.")
    if predicted:
        lines.append("Nothing was offloaded here: the table is predicted, the pictures are real.")
    lines.append(f"Written to {out}: {', '.join(path.name for path in files)}.")
    if not document["failures"] and not predicted:
        lines.append("All checks hold.")
    return lines
