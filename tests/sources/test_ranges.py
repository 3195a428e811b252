"""Which addresses are looked at, against each region looked at by itself."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dedup import _core
from dedup.errors import DedupError
from dedup.kernel import maps, pagemap
from dedup.kernel.processes import Handle, pids
from dedup.model.eligibility import why_not
from dedup.pages import Region
from dedup.scanning import Plan, scan_pids
from dedup.sources import ranges
from dedup.sources.live import Options
from tests.kernel_fixtures import PAGE, Target
from tests.kernel_fixtures import pagemap as pagemap_words

if TYPE_CHECKING:
    from collections.abc import Iterable

HUGE = 2 << 20
Told = list[tuple[int, int, int, int]]
"""Start, end, flags and region of ranges."""


def region_of(m: maps.Mapping) -> Region:
    why = why_not(m.vm_flags, m.name)
    return Region(0, m.start, m.end, m.perms, m.name, m.vm_flags, not why, why, False, not why)


def chosen(handle: Handle, regions: Iterable[tuple[Region, maps.Mapping]]) -> Told:
    """As a scan chooses them."""
    chooser = ranges.Chooser(pagemap.sight())
    for index, (region, m) in enumerate(regions):
        chooser.add(region, m, index)
    fd = handle.open("pagemap")
    try:
        found = chooser.ranges(fd)
    finally:
        os.close(fd)
    assert found.start.dtype == found.end.dtype == np.uint64
    return list(zip(*(column.tolist() for column in found), strict=True))


def one_by_one(handle: Handle, regions: Iterable[tuple[Region, maps.Mapping]]) -> Told:
    """Each region by itself."""
    sight = pagemap.sight()
    told: Told = []
    fd = handle.open("pagemap")
    try:
        for index, (region, m) in enumerate(regions):
            if not region.scanned or not m.anonymous_bytes:
                continue
            flags = _core.RANGE_LOCKED if "lo" in m.vm_flags else 0
            flags |= _core.RANGE_KSM if m.ksm_bytes is None or m.ksm_bytes else 0
            shared = _core.RANGE_SHARED if m.shared_bytes else 0
            flags |= _core.RANGE_TORN if m.shared_bytes else 0
            dense = m.anonymous_bytes * 2 >= m.end - m.start
            if not sight.pagemap_scan or (dense and not m.anon_huge_bytes and sight.frames):
                told.append(
                    (region.start, region.end, flags | (shared if m.anon_huge_bytes else 0), index)
                )
                continue
            for start, end, what in pagemap.present_ranges(fd, region.start, region.end).tolist():
                huge = _core.RANGE_HUGE | shared if what & _core.PAGE_IS_HUGE else 0
                told.append((start, end, flags | huge, index))
    finally:
        os.close(fd)
    return told


def test_every_process_in_sight() -> None:
    compared = 0
    for pid in pids():
        try:
            with Handle(pid) as handle:
                regions = [(region_of(m), m) for m in maps.read(handle)]
                before = one_by_one(handle, regions)
                found = chosen(handle, regions)
                after = one_by_one(handle, regions)
        except (DedupError, OSError):
            continue
        if before == after:
            assert found == before, pid
            compared += bool(before)
    assert compared


def lay_out(target: Target, number: int) -> None:
    """Many mappings of all kinds, side by side and apart."""
    chance = random.Random(number)
    for i in range(60):
        name, pages = f"m{i}", chance.choice([1, 2, 5, 40, 200])
        kind = chance.choice(["dense", "sparse", "read", "file", "huge", "locked", "none", "void"])
        if kind == "huge":
            target.do("map", name=name, pages=512 * chance.choice([1, 2]), align=HUGE)
            target.do("advise", name=name, what="hugepage")
            target.do("fill", name=name, at=0, count=512, what="unique")
            continue
        target.do("map", name=name, pages=pages, file="memfd" if kind == "file" else "")
        target.do("advise", name=name, what="nohugepage")
        if kind in {"dense", "locked", "none"}:
            target.do("fill", name=name, at=0, count=pages, what="unique")
        elif kind in {"sparse", "file"}:
            for at in sorted(chance.sample(range(pages), max(1, pages // 5))):
                target.do("fill", name=name, at=at, count=1, what="unique")
        elif kind == "read":
            target.do("touch", name=name, at=0, count=pages)
            target.do("fill", name=name, at=0, count=1, what="unique")
        if kind == "locked":
            target.do("lock", name=name, at=0, count=pages)
        elif kind == "none":
            target.do("protect", name=name, how="none")


@pytest.mark.root
@pytest.mark.parametrize("number", range(4))
def test_random_layouts(number: int, target: Target) -> None:
    """The same ranges as one by one; and a scan finds the pages that pagemap has."""
    lay_out(target, number)
    if forked := number % 2:
        target.do("fork")
    with Handle(target.pid) as handle:
        regions = [(region_of(m), m) for m in maps.read(handle)]
        # Parts of mappings, as spans and marked ranges make them; every fifth one is left out.
        parts = []
        for at, (region, m) in enumerate(regions):
            size = m.end - m.start
            if at % 3 == 0 and size >= 4 * PAGE:
                parts.append((region._replace(end=m.start + PAGE), m))
                parts.append((region._replace(start=m.start + 2 * PAGE), m))
            else:
                parts.append((region._replace(scanned=region.scanned and at % 5 > 0), m))
        for some in (regions, parts):
            told = one_by_one(handle, some)
            torn = _core.RANGE_TORN if forked else 0
            huge = _core.RANGE_HUGE | (_core.RANGE_SHARED | torn if forked else 0)
            assert {flags for _, _, flags, _ in told} >= {0, huge, _core.RANGE_LOCKED | torn}
            assert chosen(handle, some) == told
    zero = pagemap.sight().zero_frame
    wanted = set()
    for region, m in regions:
        if not region.scanned:
            continue
        for i, word in enumerate(pagemap_words(target.pid, m.start, (m.end - m.start) // PAGE)):
            frame = word & ((1 << 55) - 1)
            if word >> 63 and not word >> 61 & 1 and frame != zero:
                wanted.add(m.start + i * PAGE)
    scan = scan_pids([target.pid], Plan(Options(), passes=1))
    assert set(scan.pages.address_of(np.arange(len(scan.pages.hashes))).tolist()) == wanted


@pytest.mark.root
def test_many_mappings_are_asked_for_in_few_calls(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse mappings side by side take one call; one full of pages in between ends it."""
    target.do("map", name="pieces", pages=4 * 2000)
    target.do("advise", name="pieces", what="nohugepage")
    start = target.do("map", name="full", pages=200)
    target.do("fill", name="full", at=0, count=200, what="unique")
    for piece in range(0, 2000, 2):
        target.do("fill", name="pieces", at=4 * piece, count=1, what="unique")
        target.do("advise", name="pieces", what="mergeable", at=4 * piece, count=4)
    calls = []
    present_ranges = pagemap.present_ranges

    def counted(fd: int, start: int, end: int) -> object:
        calls.append((start, end))
        return present_ranges(fd, start, end)

    monkeypatch.setattr(pagemap, "present_ranges", counted)
    with Handle(target.pid) as handle:
        regions = [(region_of(m), m) for m in maps.read(handle)]
        told = chosen(handle, regions)
    assert sum(m.anonymous_bytes == PAGE for _, m in regions) >= 1000
    assert len(told) >= 1000
    assert len(calls) < 100
    assert not any(a <= start < b for a, b in calls)
