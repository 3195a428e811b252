"""What merging costs, in words and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dedup.model.cost import Cost
    from dedup.scanning import Scan

MINUTE, HOUR, DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """Seconds for people: 12 ms, 3.4 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < MINUTE:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, name, part, part_name in (
        (MINUTE, "min", 1, "s"),
        (HOUR, "h", MINUTE, "min"),
        (DAY, "d", HOUR, "h"),
    ):
        if unit == DAY or seconds < unit * (60 if unit == MINUTE else 24):
            whole, rest = divmod(round(seconds / part), unit // part)
            return f"{whole} {name} {rest} {part_name}" if rest else f"{whole} {name}"
    raise AssertionError


def cost_object(cost: Cost) -> dict[str, Any]:
    """A price, with the bounds of each figure."""
    return {
        **dataclasses.asdict(cost),
        "bounds": {name: [low, high] for name, (low, high) in cost.bounds.items()},
    }


def scan_cost_object(scan: Scan) -> dict[str, Any] | None:
    """The price of a scan, and of other paces."""
    if scan.cost is None:
        return None
    return {
        **cost_object(scan.cost),
        "proposals": [
            {"tunables": p.tunables, "cost": cost_object(p.cost)} for p in scan.proposals
        ],
    }


def _between(cost: Cost, name: str) -> str:
    bounds = cost.bounds.get(name, (getattr(cost, name),) * 2)
    return " to ".join(dict.fromkeys(map(duration, bounds)))


def rows(scan: Scan) -> list[tuple[str, str, str, str]]:
    """Pages a batch, time until converged, ksmd's CPU until then, of a core afterwards."""
    if scan.cost is None:
        return []
    present = int({**scan.tunables, **scan.assumed}.get("pages_to_scan", 100))
    found = []
    for batch, cost in (
        (present, scan.cost),
        *((p.tunables["pages_to_scan"], p.cost) for p in scan.proposals),
    ):
        cpu = "" if cost.cpu_seconds is None else _between(cost, "cpu_seconds")
        cores = "" if cost.steady_cores is None else _share(cost)
        at_least = "" if cost.calibrated else "at least "
        found.append((f"{batch:,}", at_least + _between(cost, "converge_seconds"), cpu, cores))
    return found


def _share(cost: Cost) -> str:
    low, high = cost.bounds.get("steady_cores", (cost.steady_cores, cost.steady_cores))
    words = dict.fromkeys(percent(v) for v in (low, high) if v is not None)
    return " to ".join(words)


def percent(share: float) -> str:
    """A share of a core for people: 12%, 3.4%, 0.25%."""
    hundredths = share * 100
    digits = 0 if hundredths >= 10 else 1 if hundredths >= 1 else 2
    return f"{hundredths:.{digits}f}%" if hundredths >= 0.01 or hundredths == 0 else "<0.01%"


def advice(scan: Scan) -> str:
    """How to get what the price lacks; empty where nothing is missing."""
    if scan.cost is None or scan.cost.calibrated:
        return ""
    why = f" ({scan.why_uncalibrated})" if scan.why_uncalibrated else ""
    return (
        "ksmd's CPU is not known on this host yet, and its time is that of its sleeps alone"
        f"{why}: `dedup tune --calibrate` measures it in a few seconds, as root."
    )
