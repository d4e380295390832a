"""A run in one line, in a table, in a message. Invariant: reads the report only; what it does not know is n/a.

The categories in the line are exclusive: what is printed adds up to the time, `other` and `preview` where they count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .timers import peak_of

LINE_MAX = 200
TEXT_MAX = 1024

_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))
_VERDICTS = {
    "resident": "Everything that ran was resident.",
    "partial": "A part was resident, the rest streamed.",
    "streamed": "The weights were streamed.",
    "oom_recovered": "Ran out of memory, stepped down and went on.",
    "oom": "Ran out of memory.",
    "error": "Ended by an error.",
}


def size(nbytes: int | None, unit: str | None = None) -> str:
    """ "9.8 GiB", "12.0 MiB", "512 B"; `unit` fixes the unit; "n/a" for None."""
    if nbytes is None:
        return "n/a"
    name, scale = _unit(nbytes) if unit is None else next(pair for pair in _UNITS if pair[0] == unit)
    return f"{nbytes} B" if scale == 1 else f"{nbytes / scale:.1f} {name}"


def _unit(nbytes: int) -> tuple[str, int]:
    return next((pair for pair in _UNITS if nbytes >= pair[1]), _UNITS[-1])


def seconds(value: float | None) -> str:
    """ "5.52 s", "83.1 ms"; "n/a" for None."""
    if value is None:
        return "n/a"
    if value >= 1 or value == 0:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def percent(part: int | None, whole: int | None) -> str:
    """ "46%", "<1%"; empty where one of the two is not known."""
    if part is None or not whole:
        return ""
    return "<1%" if 0 < 200 * part <= whole else f"{100 * part / whole:.0f}%"


def line(report: Mapping[str, Any]) -> str:
    """The summary of an `offload-report/1`, at most 200 characters; all its times in the unit of the first."""
    text = _line(report, shares=True)
    if len(text) > LINE_MAX:
        text = _line(report, shares=False)
    return _short(text, LINE_MAX)


def _line(report: Mapping[str, Any], shares: bool) -> str:
    totals, vram = report["totals"], report["vram"]
    wall = totals["wall_s"]
    milli = wall is not None and wall < 1
    scale, unit = (1e3, "ms") if milli else (1.0, "s")

    def time(value: float | None) -> str:
        return "n/a" if value is None else f"{value * scale:.{1 if milli else 2}f}"

    def part(name: str) -> str:
        return f"{name} {time(totals[f'{name}_s'])}"

    def counts(name: str) -> bool:
        value = totals[f"{name}_s"]
        return value is not None and time(value) != time(0.0)

    work = [part(name) for name in ("encode", "denoise", "decode")] + [part("preview")] * counts("preview")
    moved = [part(name) for name in ("onload", "stall", "evict")] + [part("other")] * counts("other")
    total, peak, rss = vram["total"], peak_of(report), report["ram"]["peak_rss"]
    name, _ = _unit(next((n for n in (total, peak) if n is not None), 1))
    resolved = report["resolved"]
    if resolved.get("high") is None:
        high = "none" if "high" in resolved else "n/a"
    else:
        high = size(resolved["high"], name).removesuffix(f" {name}")
    shown = size(peak, name) if total is None else size(peak, name).removesuffix(f" {name}")
    of_card, of_ram = (percent(peak, total), percent(rss, report["host"].get("ram_total"))) if shares else ("", "")
    return " | ".join(
        (
            f"Time {time(wall)} {unit}" if wall is not None else "Time n/a",
            " ".join(work),
            " ".join(moved),
            f"VRAM peak {shown} of {size(total, name)}{of_card and ' ' + of_card}, high {high}",
            f"RAM {size(rss)}{of_ram and ' ' + of_ram}",
        )
    )


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Aligned plain text: headings from the keys in order of appearance, figures to the right, None as n/a."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    if not heads:
        return ""
    cells = [[_cell(row.get(head)) for head in heads] for row in rows]
    right = [
        any(isinstance(row.get(head), (int, float)) and not isinstance(row.get(head), bool) for row in rows)
        or all(_figure(line[i]) for line in cells)
        for i, head in enumerate(heads)
    ]
    width = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]

    def text(line: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, width, right, strict=True)
        ).rstrip()

    return "\n".join([text(heads), "  ".join("-" * w for w in width), *map(text, cells)])


def _cell(value: object) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("\n", " ")


def _figure(cell: str) -> bool:
    return cell == "n/a" or cell[:1].isdigit()


def report_text(report: Mapping[str, Any]) -> str:
    """What happened, for people, in at most 1024 characters: verdict, line, what was moved most, what is not known."""
    resolved, totals = report["resolved"], report["totals"]
    lines = [f"{_VERDICTS[report['verdict']]} Mode {resolved.get('mode') or 'n/a'}, {_rung(report['rung'])}."]
    if error := report.get("error"):
        lines.append(f"{error['type']}: {_short(error['message'], 200)}")
    lines.append(line(report))
    lines += hint_lines(report)
    if resolved.get("sentence"):
        lines.append(_short(resolved["sentence"], 200))
    if totals["move_count"] or totals.get("drop_count"):
        copies = f"{totals['move_count']} copies, {size(totals['bytes_h2d'])} up, {size(totals['bytes_d2h'])} down"
        lines.append(f"Moved: {copies}, {seconds(totals['overlapped_s'])} of it behind compute")
        lines += [f"  {text}" for text in top_moves(report)]
    events = [event for event in report.get("events", ()) if event["kind"] in ("oom", "step_down", "notice")]
    lines += [f"{event['kind']}: {_short(event['text'], 100)}" for event in events[:3]]
    if report["unknown"]:
        lines.append(_short("Not known: " + ", ".join(report["unknown"]), 160))
    text = "\n".join(lines)
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 3] + "..."


def hint_lines(report: Mapping[str, Any]) -> list[str]:
    """The hint of the run, and why nothing is said of what else moved; nothing where there is nothing to say."""
    told = []
    for hint in list(report.get("hints") or ())[:1]:
        label = (hint.get("action") or {}).get("label")
        told.append(_short(f"Hint: {hint['sentence']}{f' {label}.' if label else ''}", 380))
    if report.get("hint_note"):
        told.append(_short(f"Note: {report['hint_note']}", 300))
    return told


def top_moves(report: Mapping[str, Any], most: int = 4) -> list[str]:
    """The most bytes by component, direction and reason, largest first."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for move in report["moves"]:
        entry = sums.setdefault((move["component"], move["dir"], move["reason"]), [0, 0, 0])
        entry[0] += move["bytes"]
        entry[1] += move.get("count", 1)
        entry[2] += move["bytes"] if move["avoidable"] else 0
    verb = {"h2d": "onload", "d2h": "copied down", "drop": "evict"}
    ranked = sorted(sums.items(), key=lambda item: (-item[1][0], item[0]))[:most]
    return [
        f"{component} {verb[direction]} ({reason}): {size(nbytes)} in {count}"
        + (f", {size(avoidable)} avoidable" if avoidable else "")
        for (component, direction, reason), (nbytes, count, avoidable) in ranked
    ]


def _rung(rung: str) -> str:
    return {"gpu": "measured on a GPU", "simulated": "simulated", "cpu": "on the CPU"}.get(rung, rung)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
