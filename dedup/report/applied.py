"""Self-test, application and restore, for people and as JSON."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, Final

from dedup.report import planned
from dedup.report.jsonout import envelope, host_object
from dedup.report.names import lossless, safe
from dedup.report.table import Column, fitting
from dedup.report.text import span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from dedup.change.apply import Application
    from dedup.change.journal import Restored
    from dedup.change.undo import Undone
    from dedup.change.verify import Comparison
    from dedup.selftest.cases import Case
    from dedup.selftest.run import CaseResult, SelfTest


SHOWN: Final = 20
"""Processes in a table."""


def _comparison(c: Comparison) -> dict[str, Any]:
    return {
        "predicted": dict(c.predicted),
        "actual": dict(c.actual),
        "difference": c.difference,
        "bounds": {k: list(v) for k, v in c.bounds.items()},
    }


def restored_object(restored: Iterable[Restored]) -> list[dict[str, str]]:
    """What was put back, file by file."""
    return [
        {"path": r.path, "value": r.value, "found": r.found, "outcome": r.outcome, "why": r.why}
        for r in restored
    ]


def case_object(case: CaseResult) -> dict[str, Any]:
    """One case. Where others use KSM, its figures are the sum of the processes'."""
    if case.skipped:
        return {"name": case.name, "skipped": case.skipped}
    predicted: dict[str, int | None]
    if case.comparison is not None:
        predicted, actual = dict(case.comparison.predicted), dict(case.comparison.actual)
    else:
        predicted, actual = {}, {}
        for p in case.processes:
            for name, value in p.comparison.actual.items():
                actual[name] = actual.get(name, 0) + value
                predicted[name] = (predicted.get(name) or 0) + (p.comparison.predicted[name] or 0)
    data: dict[str, Any] = {
        "name": case.name,
        "predicted": predicted,
        "actual": actual,
        "equal": case.equal,
        "processes": [{"pid": p.pid, **_comparison(p.comparison)} for p in case.processes],
    }
    if case.note:
        data["note"] = case.note
    if case.failure:
        data["failure"] = case.failure
    return data


def self_test_object(test: SelfTest, page_size: int, tunables: dict[str, Any]) -> dict[str, Any]:
    """A self-test whole; skipped cases stand apart with their reasons."""
    cases = [case_object(c) for c in test.cases]
    return envelope(
        "self_test",
        host=host_object(platform.release(), page_size, tunables),
        passed=test.passed,
        cases=[c for c in cases if "skipped" not in c],
        skipped=[c for c in cases if "skipped" in c],
        by_process=bool(test.others),
        others=[lossless(o) for o in test.others],
        warnings=[lossless(w) for w in test.warnings],
        seconds=test.seconds,
        restored=restored_object(test.restored),
    )


def application_object(a: Application) -> dict[str, Any]:
    """An application whole."""
    scan = a.scan
    return envelope(
        "apply",
        host=host_object(scan.kernel, scan.pages.page_size, scan.tunables),
        **planned.way_object(a.plan),
        **planned.marked_object(a.marked, a.failed),
        **_comparison(a.comparison),
        holds=a.holds,
        tolerance_pages=a.tolerance_pages,
        by_process=a.by_process,
        smart_scan=a.smart_scan,
        processes=[
            {
                "pid": p.pid,
                "name": lossless(p.name),
                **(_comparison(p.comparison) if p.comparison else {"predicted": None}),
            }
            for p in a.processes
        ],
        full_scans=a.full_scans,
        broken_pages=a.broken_pages,
        seconds=a.seconds,
        memory={
            when: {
                "anon_pages_bytes": m.anon_pages_bytes,
                "mem_free_bytes": m.mem_free_bytes,
                "per_cpu_bytes": m.per_cpu_bytes,
                "free_bytes": m.free_bytes,
            }
            for when, m in (("before", a.memory_before), ("after", a.memory_after))
        },
        restored=restored_object(a.restored),
        warnings=[lossless(w) for w in a.warnings],
    )


def restore_object(restored: Sequence[Restored], undone: Sequence[Undone]) -> dict[str, Any]:
    """A restore whole."""
    return envelope(
        "restore", restored=restored_object(restored), processes=planned.undone_object(undone)
    )


def case_list_object(cases: Sequence[Case]) -> dict[str, Any]:
    """What a self-test would run."""
    return envelope("self_test_plan", cases=[{"name": c.name, "note": c.note} for c in cases])


# -- for people --------------------------------------------------------------------------------


def case_line(case: CaseResult) -> str:
    """One case on a line; more lines only where it does not hold."""
    if case.skipped:
        return f"skip   {case.name}: {safe(case.skipped)}"
    mark = "equal " if case.equal else "DIFFER"
    lines = [f"{mark} {case.name}{_figures(case)}"]
    if not case.equal:
        if case.failure:
            lines.append(f"       {safe(case.failure)}")
        parts = [("", case.comparison)] if case.comparison else []
        parts += [(f"pid {p.pid} ", p.comparison) for p in case.processes]
        for who, c in parts:
            for name, off in c.difference.items():
                if off:
                    lines.append(
                        f"       {who}{name}: predicted {c.predicted[name]}, "
                        f"the kernel says {c.actual[name]} ({off:+d})"
                    )
    if case.note:
        lines.append(f"       {case.note}")
    return "\n".join(lines)


def _figures(case: CaseResult) -> str:
    if case.comparison is None:
        return ""
    a = case.comparison.actual
    text = f": shared {a['pages_shared']}, sharing {a['pages_sharing']}"
    for name, short in (
        ("pages_unshared", "unshared"),
        ("pages_volatile", "volatile"),
        ("ksm_zero_pages", "zero"),
    ):
        if a[name]:
            text += f", {short} {a[name]}"
    return text


def self_test_summary(test: SelfTest) -> str:
    """The last lines of a self-test."""
    ran = [c for c in test.cases if not c.skipped]
    equal = sum(c.equal for c in ran)
    skipped = len(test.cases) - len(ran)
    text = f"\n{equal} of {len(ran)} cases equal, every counter, in {test.seconds:.1f} s"
    if skipped:
        text += f"; {skipped} skipped"
    if test.others:
        text += (
            "\nothers use KSM on this host, so the processes' own counters were compared: "
            + ", ".join(safe(o) for o in test.others[:5])
        )
    back = [r for r in test.restored if r.outcome == "restored"]
    left = [r for r in test.restored if r.outcome == "left"]
    if back:
        names = ", ".join(f"{r.path.rpartition('/')[2]}={r.value}" for r in back)
        text += f"\nput back: {names}"
    for r in left:
        text += f"\nleft as it is: {r.path}={r.found} ({r.why})"
    return text


def comparison_table(c: Comparison, width: int, *, plain: bool) -> RenderableType:
    """Predicted, actual, difference."""
    difference = c.difference
    rows = [
        [name, _predicted(c, name), f"{actual:,}", _off(difference, name)]
        for name, actual in c.actual.items()
    ]
    columns = [
        Column("", 5, right=False), Column("predicted", 2), Column("actual", 4),
        Column("difference", 3),
    ]  # fmt: skip
    return fitting(columns, rows, width, plain=plain, flexible=0)


def _predicted(c: Comparison, name: str) -> str:
    if name in c.bounds:
        return span(*c.bounds[name])
    value = c.predicted[name]
    return "unknown" if value is None else f"{value:,}"


def _off(difference: dict[str, int], name: str) -> str:
    if name not in difference:
        return ""
    return f"{difference[name]:+,}" if difference[name] else "0"


def process_table(a: Application, width: int, *, plain: bool) -> RenderableType:
    """Merged pages of each process, predicted and counted."""
    name = "ksm_merging_pages"
    rows = []
    for p in a.processes[:SHOWN]:
        c = p.comparison
        if c is None:
            rows.append([str(p.pid), "", "ended or hidden", "", p.name])
            continue
        off = _off(c.difference, name)
        rows.append([str(p.pid), _predicted(c, name), f"{c.actual[name]:,}", off, p.name])
    if len(a.processes) > SHOWN:
        rows.append([f"and {len(a.processes) - SHOWN} more", "", "", "", ""])
    columns = [
        Column("pid", 5), Column("merging, predicted", 3), Column("actual", 4),
        Column("difference", 2), Column("process", 5, right=False),
    ]  # fmt: skip
    return fitting(columns, rows, width, plain=plain)


def application_lines(a: Application) -> list[str]:
    """What stands below the table of an application."""
    mib = 1024 * 1024
    anon = a.memory_after.anon_pages_bytes - a.memory_before.anon_pages_bytes
    free = a.memory_after.free_bytes - a.memory_before.free_bytes
    verdict = "the prediction holds" if a.holds else "THE PREDICTION DOES NOT HOLD"
    tolerance = f"tolerance {a.tolerance_pages:,} pages"
    lines = [
        f"{verdict} ({tolerance}); {a.full_scans} full scans in {a.seconds:.1f} s",
        f"the host since: AnonPages {anon / mib:+.1f} MiB, free {free / mib:+.1f} MiB",
    ]
    if a.broken_pages:
        lines.append(
            f"{a.broken_pages:,.0f} merged pages were written to in each full scan: until ksmd "
            "comes by again they are not merged, which makes a range of the prediction"
        )
    if a.by_process:
        lines.append("others use KSM too: the figures are the sum over the chosen processes")
    if a.smart_scan:
        lines.append("smart scan was on: unshared and volatile count as one")
    lines += [f"warning: {safe(w)}" for w in a.warnings]
    return lines


def restored_lines(restored: Sequence[Restored]) -> list[str]:
    """What a restore did."""
    if not restored:
        return ["nothing to restore: no run of ours was interrupted"]
    words = {
        "restored": "put back to {value} (was {found})",
        "unchanged": "has {value} already",
        "left": "left at {found}, not put back to {value}: {why}",
        "failed": "could not be put back to {value}: {why}",
    }
    return [
        f"{r.path}: " + words[r.outcome].format(value=r.value, found=r.found, why=r.why)
        for r in restored
    ]
