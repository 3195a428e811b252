"""Smart scan: which pages meet, and what is certain of it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from dedup import grouping
from dedup.model import smart
from dedup.model.merge import predict
from dedup.model.prediction import Rules
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests.kernel_fixtures import Target
from tests.model.layouts import Layout

if TYPE_CHECKING:
    from tests.kernel_fixtures import KsmControl

PAGE = 4096


def test_the_scans_in_which_a_page_is_processed() -> None:
    assert [k for k in range(1, 42) if smart.processed(k)] == [1, 2, 3, 4, 6, 9, 14, 23, 32, 41]


@pytest.mark.parametrize(
    ("ahead", "scan"),
    # As counted on Linux 6.18, for a second copy that came so many full scans after the first.
    [(30, 2), (31, None), (32, 9), (33, None), (34, None), (35, 6), (36, 14), (37, 4), (38, 3),
     (39, 2), (0, 2)],
)  # fmt: skip
def test_when_two_copies_meet(ahead: int, scan: int | None) -> None:
    assert smart.meet(ahead) == scan


def forecast(layout: Layout, followed: set[int], rules: Rules) -> smart.SmartScan:
    """With the processes in `followed` known to ksmd before."""
    pages = layout.pages()
    pages.processes = [
        replace(p, ksm_rmap_items=100 * (i in followed)) for i, p in enumerate(pages.processes)
    ]
    groups = grouping.group(pages)
    return smart.forecast(pages, groups, rules, predict(pages, groups, rules), grouping.group)


def two_alike(pages: int = 10) -> Layout:
    layout = Layout()
    for p in range(2):
        layout.process()
        for i in range(pages):
            layout.page(p, i + 1)
    return layout


def test_all_new_is_as_without_it() -> None:
    found = forecast(two_alike(), set(), Rules())
    assert (found.pages_shared, found.pages_sharing) == (10, 10)
    assert found.pages_unshared_and_volatile == 0
    assert found.never_merging_pages == 0
    assert found.full_scans == 2
    assert not found.bounds


def test_an_old_and_a_new_copy_may_never_meet() -> None:
    found = forecast(two_alike(), {0}, Rules())
    assert found.pages_sharing is None
    assert found.bounds["pages_sharing"] == (0, 10)
    assert found.bounds["pages_unshared_and_volatile"] == (0, 20)
    assert found.bounds["never_merging_pages"] == (0, 20)
    assert found.bounds["full_scans"] == (2, 14)


def test_two_new_copies_make_a_node_that_old_ones_find() -> None:
    layout = two_alike()
    layout.process()
    for i in range(10):
        layout.page(2, i + 1)
    found = forecast(layout, {0}, Rules())
    assert found.pages_sharing == 20
    assert forecast(layout, {0, 1}, Rules()).bounds["pages_sharing"] == (0, 20)


def test_an_old_page_finds_a_node_that_is_there() -> None:
    layout = Layout()
    layout.process()
    layout.process()
    layout.ksm(1, [0, 0])
    layout.page(1, 1)
    assert forecast(layout, {0, 1}, Rules()).pages_sharing == 2


def test_zero_pages_go_alone() -> None:
    layout = Layout()
    for p in range(2):
        layout.process()
        layout.page(p, 0)
    assert forecast(layout, {0, 1}, Rules(use_zero_pages=True)).ksm_zero_pages == 2
    assert forecast(layout, {0, 1}, Rules()).pages_sharing is None


def test_memory_that_is_written_to_merges_less() -> None:
    whole = forecast(two_alike(100), set(), Rules())
    assert smart.slowed(whole, 1.0, PAGE) == whole
    slowed = smart.slowed(whole, 0.6, PAGE)
    assert slowed.bounds["pages_sharing"] == (60, 100)
    assert slowed.bounds["pages_unshared_and_volatile"] == (0, 80)
    assert slowed.bounds["general_profit"] == (60 * PAGE - 200 * 64, 100 * PAGE - 200 * 64)
    assert slowed.full_scans == 2


@pytest.mark.ksm
@pytest.mark.root
def test_the_kernel_keeps_within_the_forecast(ksm: KsmControl) -> None:
    """One process scanned for a while, then a second like it: between nothing and all."""
    names = [f"content {i}" for i in range(60)]

    def scans(number: int) -> None:
        end = ksm.ksm.counters().full_scans + number
        deadline = time.monotonic() + 30
        ksm.start()
        while ksm.ksm.counters().full_scans < end:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        ksm.stop()

    ksm.set(smart_scan=1, sleep_millisecs=20)
    with Target() as old, Target() as new, Target() as third:
        for target in (old, new, third):
            target.do("map", name="a", pages=len(names))
            target.do("put", name="a", at=0, what=names)
        old.do("advise", name="a", what="mergeable")
        scans(31)
        new.do("advise", name="a", what="mergeable")
        pids = [old.pid, new.pid]
        plan = Plan(options=Options(scope="advised"), interval_seconds=0.05)
        found = scan_pids(pids, plan)
        assert found.prediction.pages_sharing == len(names)
        assert found.smart_scan is not None
        assert found.smart_scan.bounds["pages_sharing"] == (0, len(names))
        scans(40)
        counters = ksm.ksm.counters()
        assert 0 <= counters.pages_sharing <= len(names)
        if counters.pages_sharing == 0:
            # They never meet: a third one does not help them, but finds one of the two, or none.
            assert counters.pages_unshared + counters.pages_volatile == 2 * len(names)
        third.do("advise", name="a", what="mergeable")
        both = scan_pids([*pids, third.pid], plan)
        assert both.smart_scan is not None
        low, high = both.smart_scan.bounds.get("pages_sharing", (2 * len(names),) * 2)
        scans(40)
        assert low <= ksm.ksm.counters().pages_sharing <= high
