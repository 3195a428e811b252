"""A calibration, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dedup.report.jsonout import envelope
from dedup.report.names import lossless, safe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from dedup.model.cost import Measured
    from dedup.observe.calibrate import Calibrated, Planned

BUSY: Final = 0.2


def calibration_object(result: Calibrated, path: Path) -> dict[str, Any]:
    """A finished calibration."""
    return envelope(
        "calibration",
        stored=lossless(str(path)),
        calibration=result.calibration.to_json(),
        others=[lossless(o) for o in result.others],
        seconds=result.seconds,
    )


def plan_object(plan: Planned, path: Path) -> dict[str, Any]:
    """What a calibration would do."""
    return envelope(
        "calibration_plan",
        stored=lossless(str(path)),
        sets=plan.sets,
        tunables=plan.tunables,
        others=[lossless(o) for o in plan.others],
    )


def measured_table(measured: Sequence[Measured]) -> Table:
    """CPU of a page in ns, set by set; in small batches ksmd sleeps in between."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("ksmd's CPU, ns a page", no_wrap=True)
    for heading in ("first scan", "second", "later", "small batches"):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in measured:
        figures = (m.first_ns, m.second_ns, m.steady_ns, m.batched_ns)
        table.add_row(m.name, *(f"{f / m.pages:,.0f}" if f else "" for f in figures))
    return table


def calibration_lines(result: Calibrated, path: Path) -> list[str]:
    """A finished calibration in words, besides its table."""
    found = result.calibration
    c = found.costs
    if found.observed:
        lines = [
            f"watched ksmd for {result.seconds:.0f} s at the work of {_names(result.others)}",
            f"a visit takes {_ns(c.merged_ns)} of CPU in the mean of this mix",
            "what merging takes was not seen: the ranges of prices are wide",
        ]
    else:
        lines = [
            f"merge of two pages: {_ns(c.node_ns)} more; of each further copy: {_ns(c.join_ns)}",
            f"a page that smart scan skips: {_ns(c.skip_ns)}",
            f"a batch: {_ns(c.batch_ns)} more, and {_ns(c.cold_ns)} times the root of its searches",
        ]
    return [
        *lines,
        f"repeated scans differ by {found.spread:.0%}",
        f"ksmd waited for a processor: {found.waiting:.0%} of its CPU time"
        + (" (a busy host: times can be as much longer)" if found.waiting > BUSY else ""),
        f"took {result.seconds:.1f} s, stored in {safe(str(path))}",
    ]


def plan_lines(plan: Planned, path: Path) -> list[str]:
    """What a calibration would do, in words."""
    if plan.others:
        lines = [f"would watch ksmd at the work of {_names(plan.others)}, and change nothing"]
    else:
        lines = ["would run ksmd on memory of our own:"]
        lines += [f"  {words}" for words in plan.sets]
        changed = ", ".join(f"{name}={value}" for name, value in plan.tunables.items())
        lines.append(f"with {changed}; all is put back")
    return [*lines, f"would store the result in {safe(str(path))}"]


def _ns(value: float) -> str:
    return f"{value:,.0f} ns"


def _names(others: list[str]) -> str:
    first = ", ".join(safe(o) for o in others[:3])
    return first + (f" and {len(others) - 3} more" if len(others) > 3 else "")
