"""Applying on processes: smart scan's forecast, and others who change things meanwhile."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from dedup.change.apply import apply
from dedup.kernel.ksm import Ksm
from dedup.scanning import Plan
from dedup.sources.live import Options
from tests.kernel_fixtures import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel_fixtures import KsmControl

pytestmark = [pytest.mark.ksm, pytest.mark.root]

PAGES = 300
PLAN = Plan(options=Options(scope="advised"), interval_seconds=0.1)


def mergeable(target: Target, zero: int = 0) -> None:
    target.do("map", name="a", pages=PAGES)
    target.do("put", name="a", at=0, what=[f"content {i}" for i in range(PAGES - zero)])
    target.do("fill", name="a", at=PAGES - zero, count=zero, what="zero")
    target.do("advise", name="a", what="mergeable")


@pytest.fixture
def pids() -> Iterator[list[int]]:
    """Three processes with the same mergeable pages."""
    with ExitStack() as stack:
        targets = [stack.enter_context(Target()) for _ in range(3)]
        for target in targets:
            mergeable(target, zero=20)
        yield [t.pid for t in targets]


def when_scanned(change: dict[str, int]) -> threading.Thread:
    """Change tunables as soon as ksmd has scanned once, as somebody else would."""

    def wait_and_write() -> None:
        ksm = Ksm()
        deadline = time.monotonic() + 20
        begin = ksm.counters().full_scans
        while ksm.counters().full_scans <= begin and time.monotonic() < deadline:
            time.sleep(0.001)
        for name, value in change.items():
            ksm.write(name, value)

    thread = threading.Thread(target=wait_and_write)
    thread.start()
    return thread


def test_kept_tunables_are_compared_with_smart_scans_forecast(
    ksm: KsmControl, pids: list[int]
) -> None:
    ksm.set(smart_scan=1)
    ksm.start()
    done = apply(pids, PLAN, keep_tunables=True)
    assert done.smart_scan
    assert done.holds
    assert done.comparison.actual["pages_sharing"] == 2 * (PAGES - 20) + 59
    assert done.comparison.actual["pages_unshared_and_volatile"] == 0
    assert "pages_volatile" not in done.comparison.actual
    assert ksm.ksm.tunables()["smart_scan"] == 1
    assert ksm.ksm.running


def test_zero_pages_switched_on_meanwhile_make_a_range(ksm: KsmControl, pids: list[int]) -> None:
    ksm.set(use_zero_pages=0, pages_to_scan=300, sleep_millisecs=20)
    writer = when_scanned({"use_zero_pages": 1})
    done = apply(pids, PLAN, start_ksmd=True)
    writer.join()
    assert any("use_zero_pages changed from 0 to 1" in w for w in done.warnings)
    assert done.comparison.predicted["ksm_zero_pages"] is None
    assert done.comparison.bounds["ksm_zero_pages"] == (0, 60)
    assert done.holds


def test_a_new_pace_meanwhile_changes_nothing_but_the_time(
    ksm: KsmControl, pids: list[int]
) -> None:
    ksm.set(pages_to_scan=300, sleep_millisecs=20)
    writer = when_scanned({"pages_to_scan": 5000})
    done = apply(pids, PLAN, start_ksmd=True)
    writer.join()
    assert any("pages_to_scan changed from 300 to 5000" in w for w in done.warnings)
    assert done.holds
    assert not any(done.comparison.difference.values())


def test_others_who_come_meanwhile_leave_the_sums(ksm: KsmControl, pids: list[int]) -> None:
    ksm.set(pages_to_scan=300, sleep_millisecs=20)
    with Target() as other:
        begin = ksm.ksm.counters().full_scans

        def join() -> None:
            deadline = time.monotonic() + 20
            while ksm.ksm.counters().full_scans <= begin and time.monotonic() < deadline:
                time.sleep(0.001)
            mergeable(other)

        joiner = threading.Thread(target=join)
        joiner.start()
        done = apply(pids, PLAN, start_ksmd=True)
        joiner.join()
    assert done.by_process
    assert done.holds


def test_pages_rewritten_with_the_same_bytes_make_a_range(ksm: KsmControl, pids: list[int]) -> None:
    """No look sees it: the kernel's count of broken pages does."""
    # A full scan takes long enough for all of them to be written to in it.
    ksm.set(pages_to_scan=100, sleep_millisecs=20)
    with Target() as target:
        mergeable(target)
        target.send("keep_writing", name="a", pages=list(range(50)), same=True)
        try:
            done = apply([*pids, target.pid], PLAN, start_ksmd=True)
        finally:
            target.stop()
    assert done.broken_pages
    assert done.comparison.predicted["pages_sharing"] is None
    low, high = done.comparison.bounds["pages_sharing"]
    assert high == 3 * PAGES - 20 * 3 + 59
    assert high - 1.25 * 60 <= low < high
    assert done.holds


def test_contents_rewritten_everywhere_leave_the_counters(ksm: KsmControl) -> None:
    """Each copy of each content is written to in a full scan: its node goes, all at once."""
    ksm.set(pages_to_scan=100, sleep_millisecs=20)
    with Target() as first, Target() as second:
        for target in (first, second):
            mergeable(target)
            target.do("map", name="more", pages=1000)
            target.do("fill", name="more", at=0, count=1000, what="unique")
            target.do("advise", name="more", what="mergeable")
            target.send("keep_writing", name="a", pages=list(range(PAGES)), same=True)
        try:
            done = apply([first.pid, second.pid], PLAN, start_ksmd=True)
        finally:
            first.stop()
            second.stop()
    low, high = done.comparison.bounds["pages_sharing"]
    assert (low, high) == (0, PAGES)
    assert done.comparison.actual["pages_sharing"] < PAGES
    assert done.holds


def test_chains_of_what_is_no_longer_there(ksm: KsmControl, target: Target) -> None:
    """Given back, as when swapped out: the kernel counts its chains, and the prediction holds."""
    target.do("map", name="b", pages=302)
    target.do("put", name="b", at=0, what=["pair"] * 2 + [f"many {i % 30}" for i in range(300)])
    target.do("advise", name="b", what="mergeable")
    ksm.set(max_page_sharing=5)
    first = apply([target.pid], PLAN, start_ksmd=True)
    assert first.holds
    assert not first.comparison.bounds
    # Nothing is left that ksmd would look for: it comes by none of those chains.
    target.do("advise", name="b", what="dontneed", at=2)
    again = apply([target.pid], PLAN, start_ksmd=True)
    assert again.holds, again.comparison
    name = "stable_node_chains"
    predicted = again.scan.prediction.stable_node_chains
    assert predicted is not None
    assert again.comparison.actual[name] > predicted
    assert again.comparison.predicted[name] is None
    assert again.comparison.bounds[name] == (predicted, predicted + first.comparison.actual[name])
    assert set(again.comparison.bounds) <= {name, "stable_node_dups"}


def test_the_advisor_is_named(ksm: KsmControl, pids: list[int]) -> None:
    ksm.set(advisor_mode="scan-time")
    done = apply(pids, PLAN, start_ksmd=True)
    assert any("advisor" in w for w in done.warnings)
    assert done.holds
