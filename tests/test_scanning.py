"""One scan from end to end: its looks, and what they say over time."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from dedup import sampling
from dedup.errors import ProcessGone
from dedup.kernel.ksm import Ksm
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import Options
from tests.kernel_fixtures import KsmControl, Target

PAGES = 400


def test_a_long_full_scan_takes_a_third_look(target: Target) -> None:
    target.do("map", name="a", pages=PAGES)
    target.do("fill", name="a", at=0, count=PAGES, what="same")
    written = list(range(0, PAGES, 10))
    for page in written:
        # Unlike each other, or what one look says would change with each round.
        target.do("fill", name="a", at=page, count=1, what="unique")
    before = scan_pids([target.pid], Plan(passes=1)).prediction.pages_sharing
    assert before is not None
    target.send("keep_writing", name="a", pages=written)
    assert target.answer() == "started"
    found = scan_pids([target.pid], Plan(full_scan_seconds=60))
    target.stop()
    assert found.passes == 3
    assert found.extrapolated
    for seconds, least in zip(found.looks_seconds, [0, 2.5, 7.5], strict=True):
        assert least - 0.01 <= seconds < least + 4
    assert not found.drifting
    # What is written to all the time never merged; nothing else is ever lost.
    assert found.prediction.pages_sharing == pytest.approx(before, abs=12)
    assert len(written) - 2 <= (found.prediction.pages_volatile or 0) < PAGES


def test_nothing_written_is_nothing_to_extrapolate(target: Target) -> None:
    target.do("map", name="a", pages=PAGES)
    target.do("fill", name="a", at=0, count=PAGES, what="same")
    found = scan_pids([target.pid], Plan(full_scan_seconds=60))
    assert found.extrapolated
    assert found.drifting is False
    assert "pages_sharing" not in found.prediction.bounds


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_looks_that_were_asked_for(target: Target, passes: int) -> None:
    found = scan_pids([target.pid], Plan(passes=passes, interval_seconds=0.2, full_scan_seconds=60))
    assert found.passes == passes
    assert not found.extrapolated
    assert len(found.looks_seconds) == passes
    gaps = [b - a for a, b in pairwise(found.looks_seconds)]
    assert all(0.19 < gap < 3 for gap in gaps)
    assert found.interval_seconds == max(gaps, default=0.0)
    assert (found.drifting is None) == (passes == 1)


@pytest.mark.parametrize("how", ["whole", "partial", "sample"])
def test_where_all_processes_end_nothing_is_foretold(how: str) -> None:
    with Target() as one, Target() as other:
        for target in (one, other):
            target.do("map", name="a", pages=12_000)
            target.do("fill", name="a", at=0, count=12_000, what="unique")

        def end_all(what: str, _done: int, _total: int) -> None:
            if what == "waiting":
                one.kill()
                other.kill()

        # Longer than a look, and what it imports, takes on a busy host: else nothing waits.
        plan = Plan(
            options=Options(progress=end_all), passes=3, interval_seconds=2,
            partial_passes=how == "partial",
        )  # fmt: skip
        with pytest.raises(ProcessGone, match="all 2 processes ended during the scan"):
            if how == "sample":
                sampling.sample_pids([one.pid, other.pid], 0.25, replace(plan, passes=2))
            else:
                scan_pids([one.pid, other.pid], plan)


def test_memory_that_grows_alike_is_drifting() -> None:
    """Two processes in which ever more pages become equal."""
    with Target() as a, Target() as b:
        for target in (a, b):
            target.do("map", name="a", pages=3 * PAGES)
            target.do("fill", name="a", at=0, count=PAGES, what="same")
            target.do("fill", name="a", at=PAGES, count=2 * PAGES, what="unique")

        def grow() -> None:
            time.sleep(0.3)
            a.do("fill", name="a", at=PAGES, count=2 * PAGES, what="same")

        grower = threading.Thread(target=grow)
        grower.start()
        found = scan_pids([a.pid, b.pid], Plan(interval_seconds=1.5))
        grower.join()
    assert found.drifting
    assert found.prediction.pages_sharing is None
    low, high = found.prediction.bounds["pages_sharing"]
    assert low <= 3 * PAGES
    assert high >= 4 * PAGES - 10


@pytest.mark.ksm
@pytest.mark.root
def test_a_running_ksmd_tells_its_pace(ksm: KsmControl, target: Target) -> None:
    """Where ksmd runs already, its own scans give the time of one."""
    target.do("map", name="a", pages=5000)
    target.do("fill", name="a", at=0, count=5000, what="unique")
    target.do("advise", name="a", what="mergeable")
    ksm.set(pages_to_scan=200, sleep_millisecs=8)
    ksm.start()
    deadline = time.monotonic() + 20
    while ksm.ksm.counters().full_scans < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first = ksm.ksm.counters()
    begin = time.monotonic()
    found = scan_pids([target.pid], Plan())
    while ksm.ksm.counters().full_scans < first.full_scans + 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    took = (time.monotonic() - begin) / 6
    # All of the process is counted, and ksmd follows 5000 pages of it.
    assert found.full_scan_seconds == pytest.approx(
        took * found.scanned_pages / first.rmap_items, rel=0.4
    )
    assert Ksm().running


def test_merging_pages_that_become_more_are_no_gain_of_smart_scan() -> None:
    """Pages shared by fork that become copies between the looks."""
    with Target() as target:
        target.do("map", name="a", pages=PAGES)
        target.do("put", name="a", at=0, what=[f"content {i}" for i in range(PAGES)])
        child = target.do("fork")

        def rewrite() -> None:
            time.sleep(0.3)
            target.do(
                "put", child=(0,), name="a", at=0, what=[f"content {i}" for i in range(PAGES)]
            )

        writer = threading.Thread(target=rewrite)
        writer.start()
        found = scan_pids([target.pid, child], Plan(interval_seconds=1.5, full_scan_seconds=3000))
        writer.join()
    assert found.prediction.bounds["pages_sharing"][1] >= PAGES
    assert found.smart_scan is not None
    for name, (low, high) in found.smart_scan.bounds.items():
        assert low <= high, name


def test_a_ksmd_that_scans_nothing_has_no_price(target: Target) -> None:
    found = scan_pids([target.pid], Plan(passes=1, assumed={"pages_to_scan": 0}))
    assert found.cost is None
    assert found.full_scan_seconds > 0
    assert [p.tunables["pages_to_scan"] for p in found.proposals] == [1000, 5000, 20_000]
