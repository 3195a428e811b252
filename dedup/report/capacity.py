"""A capacity plan, for people and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dedup.report.jsonout import envelope
from dedup.report.names import lossless, safe
from dedup.report.price import cost_object, duration, percent
from dedup.report.text import count, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dedup.estimate.capacity import Plan
    from dedup.estimate.curve import Point
    from dedup.estimate.fingerprints import Instance

BAR_FROM: Final = 64
"""Columns from which on there is room for bars."""
BAR: Final = 20
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DAYS: Final = {
    "measured": "as many as were seen to change",
    "tenth": "a tenth of them",
    "all": "all of them",
}


# -- JSON ------------------------------------------------------------------------------------------


def capacity_object(plan: Plan) -> dict[str, Any]:
    """A plan whole."""
    service = plan.service
    i = service.incidence
    exponent = i.exponent()
    return envelope(
        "capacity",
        label=lossless(plan.label),
        page_size=service.page_size,
        tunables=plan.tunables,
        memory={**dataclasses.asdict(plan.memory), "budget_bytes": plan.memory.budget_bytes},
        instances=[_instance(one) for one in plan.instances],
        curve=[dataclasses.asdict(p) for p in plan.curve],
        fits=dataclasses.asdict(plan.fits),
        classes_suspected=i.classes_suspected,
        unseen_class_share=i.class_share,
        growth={
            "private_frames": [round(x) for x in i.private.tolist()],
            "exponent": None if math.isinf(exponent) else exponent,
        },
        rest={
            "each_bytes": round(service.rest.each_bytes),
            "once_bytes": service.rest.once_bytes,
        },
        stress={
            "instances": plan.stressed,
            "days": [dataclasses.asdict(d) for d in plan.days],
        },
        cost=None if plan.cost is None else cost_object(plan.cost),
        warnings=[{"code": w.code, "message": lossless(w.message)} for w in plan.warnings],
    )


def _instance(one: Instance) -> dict[str, Any]:
    facts = dataclasses.asdict(one.facts)
    return {
        "file": lossless(one.name),
        "contents": len(one.contents),
        "frames": int(one.contents.frames.sum()) + one.facts.volatile_frames,
        **{n: v for n, v in facts.items() if n not in {"label", "page_size"}},
        "kernel": lossless(one.facts.kernel),
    }


# -- text ------------------------------------------------------------------------------------------


def lines(plan: Plan, width: int, *, plain: bool) -> list[RenderableType]:
    """The answer first, then the curve, the bad days and ksmd's price."""
    f, m = plan.fits, plan.memory
    label = safe(plan.label, plain=plain)
    room = size(m.budget_bytes)
    between = f" ({f.low:,} to {f.high:,})" if f.low != f.high else ""
    out: list[RenderableType] = [
        Text(
            f"{label}: {count(f.with_ksm, 'instance')} with KSM{between}, {f.without_ksm:,} "
            f"without, in {room}; {f.safe:,} on a bad day, too."
        ),
        Text(_of_memory(plan), style="dim"),
        Text(""),
        _table(plan, width, plain=plain),
        Text(""),
        Text(
            f"Should merged pages be written to at once, {count(plan.stressed, 'instance')} "
            f"{'needs' if plan.stressed == 1 else 'need'}:"
        ),
    ]
    days = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for d in plan.days:
        share = f" ({percent(d.share)})" if d.name == "measured" else ""
        days.add_row(
            Text(DAYS[d.name] + share), Text(size(d.bytes), justify="right"),
            Text("fits" if d.fits else f"{d.instances:,} fit"),
        )  # fmt: skip
    out += [Padding(days, (0, 0, 0, 2)), Text(""), Text(_price(plan))]
    return out


def _of_memory(plan: Plan) -> str:
    m, seen = plan.memory, count(len(plan.instances), "instance")
    parts = [f"{size(m.ram_bytes)} of memory"]
    if m.reserve_bytes:
        parts.append(f"less {size(m.reserve_bytes)} for others")
    if m.headroom:
        parts.append(f"{percent(m.headroom)} of it kept free")
    return f"From {seen} seen. {', '.join(parts)}."


def _shown(plan: Plan) -> list[Point]:
    """Some of the curve: powers of two, what was seen, asked for, and what fits."""
    numbers = {n for n in ROWS if n <= len(plan.curve)}
    numbers |= {len(plan.instances), plan.fits.without_ksm, plan.fits.with_ksm}
    numbers |= {plan.fits.safe, plan.wish.instances or 0}
    return [plan.curve[n - 1] for n in sorted(numbers) if 1 <= n <= len(plan.curve)]


def _table(plan: Plan, width: int, *, plain: bool) -> RenderableType:
    points, seen = _shown(plan), len(plan.instances)
    most = max(p.without_ksm_bytes for p in points)
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    out.add_column("Instances", justify="right", no_wrap=True)
    out.add_column("With KSM", justify="right", no_wrap=True)
    wide = width >= BAR_FROM
    if wide:
        out.add_column("Range", justify="right", no_wrap=True)
    out.add_column("Without", justify="right", no_wrap=True)
    out.add_column("" if wide else "Saved", no_wrap=True)
    for p in points:
        exact = p.low_bytes == p.high_bytes
        between = "exact" if exact and p.instances <= seen else _span(p)
        saved = p.without_ksm_bytes - p.bytes
        row = [f"{p.instances:,}", size(p.bytes)]
        row += [between] if wide else []
        row += [size(p.without_ksm_bytes)]
        row += [_bar(p, most, plain=plain)] if wide else [size(saved)]
        out.add_row(*map(Text, row))
    return Padding(out, (0, 0, 0, 2))


def _span(p: Point) -> str:
    return " to ".join(dict.fromkeys((size(p.low_bytes), size(p.high_bytes))))


def _bar(p: Point, most: int, *, plain: bool) -> str:
    """Bytes with KSM full, and without it the rest."""
    needed = round(BAR * p.bytes / most) if most else 0
    without = round(BAR * p.without_ksm_bytes / most) if most else 0
    full, rest = ("#", ".") if plain else ("█", "░")
    return full * needed + rest * max(0, without - needed)


def _price(plan: Plan) -> str:
    c = plan.cost
    if c is None:
        return "ksmd scans nothing: pages_to_scan is 0."
    start = f"With {count(plan.stressed, 'instance')} started together, ksmd has merged all"
    pace = f"pages_to_scan {plan.tunables.get('pages_to_scan', 100):,}"
    if c.cpu_seconds is None or c.steady_cores is None:
        return (
            f"{start} after {duration(c.converge_seconds)} at the least ({pace}); "
            "`sudo dedup tune --calibrate` gives its CPU."
        )
    return (
        f"{start} after {duration(c.converge_seconds)} ({pace}), for {duration(c.cpu_seconds)} "
        f"of CPU, and takes {percent(c.steady_cores)} of a core later on."
    )
