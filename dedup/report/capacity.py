"""A capacity plan, for people and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dedup.estimate import domains
from dedup.estimate.instances import LEAST
from dedup.report.jsonout import envelope
from dedup.report.names import lossless, safe
from dedup.report.price import cost_object, duration, percent
from dedup.report.text import count, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dedup.estimate.capacity import Plan
    from dedup.estimate.curve import Point
    from dedup.estimate.fingerprints import Instance
    from dedup.estimate.stress import Day

BAR_FROM: Final = 64
"""Columns from which on there is room for bars."""
BAR: Final = 20
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DAYS: Final = {
    "measured": "as many as were seen to change",
    "tenth": "a tenth of them",
    "all": "all of them",
}


UNIT: Final = ("instance",)
MIX: Final = ("mix", "mixes")
WITHIN: Final = {
    domains.ZERO_PAGES: "zero pages alone",
    domains.INSTANCE: "within an instance",
    domains.LABEL: "within a service",
    domains.USER: "within a user",
    domains.CGROUP: "within a cgroup",
}


# -- JSON ------------------------------------------------------------------------------------------


def capacity_object(plan: Plan) -> dict[str, Any]:
    """A plan whole."""
    service = plan.service
    i = service.incidence
    return envelope(
        "capacity",
        label=lossless(plan.label),
        mix=None if plan.wish.mix is None else _mix(plan),
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
            "exponent": None if i.services > 1 else _finite(i.exponent()),
        },
        rest={
            "each_bytes": round(service.rest.each_bytes),
            "once_bytes": service.rest.once_bytes,
        },
        stress={
            "instances": plan.stressed,
            "days": [dataclasses.asdict(d) for d in plan.days],
            "restart_seconds": plan.restart_seconds,
        },
        domains=[dataclasses.asdict(d) for d in plan.domains],
        cost=None if plan.cost is None else cost_object(plan.cost),
        warnings=[{"code": w.code, "message": lossless(w.message)} for w in plan.warnings],
    )


def _finite(exponent: float) -> float | None:
    return None if math.isinf(exponent) else exponent


def _mix(plan: Plan) -> dict[str, Any]:
    """The mix once, and its services."""
    p, service = plan.curve[0], plan.service
    i = service.incidence
    alone = [part.curve(1)[0].frames for part in plan.parts]
    return {
        "services": [
            {
                "label": lossless(label), "instances": n, "seen": seen, "frames_alone": frames,
                "private_frames": [round(x) for x in i.of(i.private, s).tolist()],
                "exponent": _finite(i.exponent(s)), "classes_suspected": i.suspected(s),
            }
            for s, (label, n, seen, frames) in enumerate(
                zip(service.labels, service.unit.tolist(), i.sizes.tolist(), alone, strict=True)
            )
        ],
        **{n: v for n, v in dataclasses.asdict(p).items() if n != "instances"},
        "shared_frames": max(0, sum(alone) - p.frames),
        "fits": plan.fits.with_ksm >= 1,
        "fits_without_ksm": plan.fits.without_ksm >= 1,
        "fits_surely": plan.fits.low >= 1,
        "safe": plan.fits.safe >= 1,
    }  # fmt: skip


def _instance(one: Instance) -> dict[str, Any]:
    facts = dataclasses.asdict(one.facts)
    return {
        "file": lossless(one.name),
        "contents": len(one.contents),
        "frames": int(one.contents.frames.sum()) + one.facts.volatile_frames,
        **{n: v for n, v in facts.items() if n != "page_size"},
        "label": lossless(one.facts.label),
        "kernel": lossless(one.facts.kernel),
    }


# -- text ------------------------------------------------------------------------------------------


def lines(plan: Plan, width: int, *, plain: bool) -> list[RenderableType]:
    """The answer first, then the curve, the bad days and ksmd's price."""
    f, m = plan.fits, plan.memory
    label = safe(plan.label, plain=plain)
    room = size(m.budget_bytes)
    between = f" ({f.low:,} to {f.high:,})" if f.low != f.high else ""
    unit = UNIT if plan.wish.mix is None else MIX
    first = (
        f"{label}: {count(f.with_ksm, *unit)} with KSM{between}, {f.without_ksm:,} "
        f"without, in {room}; {f.safe:,} on a bad day, too."
    )
    if plan.wish.mix is not None:
        first = _of_mix(plan, label, room)
    out: list[RenderableType] = [
        Text(first),
        Text(_of_memory(plan), style="dim"),
        *(
            [Text(_unseen(plan), style="dim")]
            if plan.service.incidence.sizes.min() >= LEAST
            else []
        ),
        Text(""),
        _table(plan, width, plain=plain),
        Text(""),
        Text(
            f"Should merged pages be written to at once, {count(plan.stressed, *unit)} "
            f"{'needs' if plan.stressed == 1 else 'need'}:"
        ),
    ]
    days = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for d in plan.days:
        share = f" ({percent(d.share)})" if d.name == "measured" else ""
        days.add_row(
            Text(DAYS[d.name] + share), Text(size(d.bytes), justify="right"),
            Text(_room(d)),
        )  # fmt: skip
    out += [Padding(days, (0, 0, 0, 2)), Text(""), Text(_price(plan)), *_within(plan, unit)]
    return out


def _of_mix(plan: Plan, label: str, room: str) -> str:
    """Whether the mix fits."""
    f, p = plan.fits, plan.curve[0]
    words = [f"{label}: {size(p.bytes)} with KSM"]
    if p.low_bytes != p.high_bytes:
        words.append(f"({_span(p)})")
    words.append(f"and {size(p.without_ksm_bytes)} without:")
    if not f.with_ksm:
        words.append(f"it does not fit in {room}.")
    else:
        sure = "" if f.low else ", but maybe not by its range"
        bad = "a bad day fits, too" if f.safe else "a bad day does not"
        words.append(f"it fits in {room}{sure}; {bad}. {count(f.with_ksm, *MIX)} fit.")
    shared = sum(part.curve(1)[0].frames for part in plan.parts) - p.frames
    if len(plan.parts) > 1:
        words.append(f"Services share {size(max(0, shared) * plan.service.page_size)}.")
    return " ".join(words)


def _room(d: Day) -> str:
    if d.fits:
        return "fits"
    swap = f" with {size(d.swap_bytes)} in swap" if d.fits_in_swap else ""
    return f"{d.instances:,} fit" if not swap else f"fits{swap}; {d.instances:,} without"


def _within(plan: Plan, unit: tuple[str, ...]) -> list[RenderableType]:
    """What remains where less may merge."""
    known = [d for d in plan.domains if d.bytes is not None]
    if len(plan.parts) == 1:
        known = [d for d in known if d.name != domains.LABEL]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for d in known:
        table.add_row(
            Text(WITHIN[d.name]), Text(size(d.bytes or 0), justify="right"),
            Text("fits" if d.fits else f"{d.instances:,} fit"),
        )  # fmt: skip
    needs = "needs" if plan.stressed == 1 else "need"
    return [
        Text(""),
        Text(f"Where less may merge, {count(plan.stressed, *unit)} {needs}:"),
        Padding(table, (0, 0, 0, 2)),
    ]


def _unseen(plan: Plan) -> str:
    """What no sign tells of."""
    share = f"{100 * plan.service.incidence.class_share:.0f} %"
    return (
        f"Up to {share} of all may be of a kind not seen. Should further ones share with nobody, "
        f"{plan.fits.worst:,} fit."
    )


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
    seen = 0 if plan.wish.mix else len(plan.instances)
    numbers |= {seen, plan.fits.without_ksm, plan.fits.with_ksm}
    numbers |= {plan.fits.safe, plan.wish.instances or 0}
    return [plan.curve[n - 1] for n in sorted(numbers) if 1 <= n <= len(plan.curve)]


def _table(plan: Plan, width: int, *, plain: bool) -> RenderableType:
    points, seen = _shown(plan), 0 if plan.wish.mix else len(plan.instances)
    most = max(p.without_ksm_bytes for p in points)
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    out.add_column("Instances" if plan.wish.mix is None else "Mixes", justify="right", no_wrap=True)
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
    unit = UNIT if plan.wish.mix is None else MIX
    start = f"With {count(plan.stressed, *unit)} started together, ksmd has merged all"
    pace = f"pages_to_scan {plan.tunables.get('pages_to_scan', 100):,}"
    again = "What changes or starts anew has merged again"
    if c.cpu_seconds is None or c.steady_cores is None:
        return (
            f"{start} after {duration(c.converge_seconds)} at the least ({pace}). {again} within "
            f"{duration(plan.restart_seconds or 0)} or more; "
            "`sudo dedup tune --calibrate` gives its CPU."
        )
    return (
        f"{start} after {duration(c.converge_seconds)} ({pace}), for {duration(c.cpu_seconds)} "
        f"of CPU, and takes {percent(c.steady_cores)} of a core later on. {again} within "
        f"{duration(plan.restart_seconds or 0)}."
    )
