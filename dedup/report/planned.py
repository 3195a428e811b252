"""The plan of an application, what became mergeable, and what was taken back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from dedup.kernel import processes
from dedup.report import price
from dedup.report.jsonout import (
    envelope,
    host_object,
    prediction_object,
    skipped_object,
    smart_object,
)
from dedup.report.names import lossless, safe
from dedup.report.text import count, partial, size, span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

    from dedup.change.act import Failed, Marked
    from dedup.change.apply import Application
    from dedup.change.plan import Plan
    from dedup.change.undo import Result, Undone

SHOWN: Final = 10
"""Processes named one by one."""


def plan_object(plan: Plan) -> dict[str, Any]:
    """A plan whole."""
    scan = plan.scan
    return envelope(
        "apply_plan",
        host=host_object(scan.kernel, scan.pages.page_size, scan.tunables),
        boot_id=processes.boot_id(),
        made_at=time.time(),
        **way_object(plan),
        prediction=prediction_object(scan),
        smart_scan=smart_object(scan.smart_scan),
        cost=price.scan_cost_object(scan),
        skipped=[skipped_object(s) for s in scan.pages.skipped],
    )


def way_object(plan: Plan) -> dict[str, Any]:
    """What is to be marked, and how."""
    ranges = plan.ranges
    choice = plan.choice
    return {
        "how": "none" if not plan.chosen else "whole" if ranges is None else "ranges",
        "marks": [
            {
                "pid": c.id.pid,
                "start_time": c.id.start_time,
                "name": lossless(c.name),
                "program": list(c.program),
                "ranges": None
                if ranges is None
                else [[hex(start), hex(end)] for start, end in ranges[c.id.pid]],
            }
            for c in plan.chosen
        ],
        "marks_bytes": plan.marked_bytes,
        "already_mergeable": plan.already,
        "ranges_compared": None
        if choice is None
        else {
            "ranges_frames_freed": round(choice.freed_frames),
            "ranges_rmap_items": choice.followed,
            "whole_frames_freed": round(choice.whole_freed_frames),
            "whole_rmap_items": choice.whole_followed,
        },
        "domains": _domains(plan),
    }


def _domains(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for member in plan.members:
        name = lossless(member.domain)
        found[name] = found.get(name, 0) + 1
    return found


def marked_object(marked: Sequence[Marked], failed: Sequence[Failed]) -> dict[str, Any]:
    """What became mergeable, and what could not."""
    return {
        "marked": [
            {
                "pid": m.id.pid,
                "name": lossless(m.name),
                "how": m.way,
                "marked_bytes": m.bytes,
                "missing_bytes": m.missing_bytes,
                "stops": len(m.stops),
                "stopped_seconds": max((s.stopped_seconds for s in m.stops), default=0.0),
                "self_healing": all(s.self_healing for s in m.stops),
            }
            for m in marked
        ],
        "failed": [
            {"pid": f.id.pid, "name": lossless(f.name), "code": f.error.code,
             "why": lossless(f.error.message)}
            for f in failed
        ],
    }  # fmt: skip


def undo_object(result: Result, *, dry_run: bool) -> dict[str, Any]:
    """An undoing whole."""
    return envelope(
        "undo",
        dry_run=dry_run,
        processes=undone_object(result.processes),
        unknown=[lossless(u) for u in result.unknown],
    )


def undone_object(processes: Iterable[Undone]) -> list[dict[str, Any]]:
    """What became of each process."""
    return [
        {
            "pid": p.pid,
            "name": lossless(p.name),
            "outcome": p.outcome,
            "why": lossless(p.why),
            "descendant_of": p.descendant_of,
            "unmarked_bytes": p.bytes,
            "elsewhere_bytes": p.elsewhere_bytes,
            "stopped_seconds": p.stopped_seconds,
        }
        for p in processes
    ]


# -- for people --------------------------------------------------------------------------------


def plan_lines(plan: Plan) -> list[str]:
    """What is to be done, in words."""
    lines = []
    if plan.chosen:
        what = (
            "whole, what they map later and their children included"
            if plan.ranges is None
            else f"in the {count(sum(map(len, plan.ranges.values())), 'range')} that pay"
        )
        who = count(len(plan.chosen), "process", "processes")
        lines.append(f"to make mergeable: {size(plan.marked_bytes)} of {who}, {what}")
        lines += [f"  {c.id.pid} {safe(c.name)}" for c in plan.chosen[:SHOWN]]
        if len(plan.chosen) > SHOWN:
            lines.append(f"  and {len(plan.chosen) - SHOWN} more")
    if plan.already:
        lines.append(f"mergeable already: {count(len(plan.already), 'process', 'processes')}")
    both = plan.choice
    if both is not None and both.whole_followed:
        lines.append(
            f"ranges free {both.freed_frames:,.0f} frames for {count(both.followed, 'page')} that "
            f"ksmd follows, the whole {both.whole_freed_frames:,.0f} for {both.whole_followed:,}"
        )
    others = [m for m in plan.members if not m.chosen]
    if others:
        lines.append(
            f"mergeable besides, and counted in: "
            f"{count(len(others), 'process', 'processes')} of others"
        )
    if plan.left_out:
        lines.append("left out:")
        lines += [f"  {safe(s.what)}" for s in plan.left_out[:SHOWN]]
        if len(plan.left_out) > SHOWN:
            lines.append(f"  and {len(plan.left_out) - SHOWN} more")
    return lines


def plan_parts(plan: Plan) -> list[str | Table]:
    """A plan whole: what, the counters that it leads to, the price."""
    from rich.table import Table

    from dedup.model.prediction import FIELDS

    prediction = plan.scan.prediction
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("")
    table.add_column("predicted", justify="right")
    for name in FIELDS:
        value = getattr(prediction, name)
        low, high = prediction.bounds.get(name, (value, value))
        table.add_row(name, "unknown" if low is None else span(low, high))
    parts: list[str | Table] = ["\n".join(plan_lines(plan)), "", table, ""]
    rows = price.rows(plan.scan)
    if rows:
        batch, time, cpu, cores = rows[0]
        words = f"at {batch} pages a batch ksmd is done in {time}"
        if cpu:
            words += f", with {cpu} of CPU; afterwards it takes {cores} of a core"
        parts.append(words)
    if advice := price.advice(plan.scan):
        parts.append(advice)
    parts.append("nothing was changed (--dry-run)")
    return parts


def marked_lines(a: Application) -> list[str]:
    """What became mergeable."""
    lines = []
    if a.marked:
        stops = sorted(s.stopped_seconds for m in a.marked for s in m.stops)
        lines.append(
            f"made mergeable: {size(sum(m.bytes for m in a.marked))} of "
            f"{count(len(a.marked), 'process', 'processes')} ({a.marked[0].way}); "
            f"{_stopped(stops)}"
        )
        missing = sum(m.missing_bytes for m in a.marked)
        if missing:
            lines.append(f"{size(missing)} of the ranges was not there any more")
        if not all(s.self_healing for m in a.marked for s in m.stops):
            windows = [s.window_seconds for m in a.marked for s in m.stops if not s.self_healing]
            lines.append(
                f"{count(len(windows), 'stop')} would not have healed by itself, had dedup been "
                f"killed within {max(windows) * 1000:.2f} ms"
            )
    if a.plan.already:
        lines.append(f"mergeable already: {count(len(a.plan.already), 'process', 'processes')}")
    lines += [f"not made mergeable: {safe(f.error.message)}" for f in a.failed]
    if a.scan.pages.skipped:
        lines.append(f"left out: {partial(a.scan)}")
    return lines


def _stopped(stops: Sequence[float]) -> str:
    if not stops:
        return "without a stop"
    middle, most = stops[len(stops) // 2], stops[-1]
    return f"stopped for {middle * 1000:.1f} ms in the median, {most * 1000:.1f} ms at the most"


def undo_lines(result: Result, *, dry_run: bool) -> list[str]:
    """What was taken back."""
    if not result.processes and not result.unknown:
        return ["nothing to undo: no process was made mergeable by dedup"]
    lines = []
    for p in result.processes:
        whose = f", a descendant of {p.descendant_of}" if p.descendant_of else ""
        who = f"{p.pid} ({safe(p.name)}{whose}): "
        if p.outcome == "undone":
            done = "would be" if dry_run else "is"
            lines.append(f"{who}{size(p.bytes)} {done} not mergeable any more")
        elif p.outcome == "failed":
            lines.append(f"{who}could not be taken back: {safe(p.why)}")
        else:
            lines.append(f"{who}nothing to take back: {safe(p.why)}")
    lines += [
        f"{p.pid} ({safe(p.name)}) has {size(p.elsewhere_bytes)} mergeable at other addresses: "
        "moved there, or marked by itself; whether that is ours can't be known"
        for p in result.processes
        if p.elsewhere_bytes
    ]
    lines += [safe(u) for u in result.unknown]
    return lines
