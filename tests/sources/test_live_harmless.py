"""A scan leaves its target as it was."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dedup.kernel import maps
from dedup.kernel import pagemap as pagemap_interface
from dedup.kernel.processes import Handle
from dedup.scanning import Plan, Scan, scan_pids
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import PAGE, KsmControl, Target, frames, pagemap, process_numbers

pytestmark = pytest.mark.root

HUGE = 2 << 20
# Not the Pss of files: that changes whenever another program with the same libraries ends.
SUMS = ("Rss", "Pss_Anon", "Private_Dirty", "Anonymous", "AnonHugePages", "KSM", "Swap")


def scan(*pids: int, **options: Any) -> Scan:
    return scan_pids(list(pids), Plan(options=Options(**options), interval_seconds=0.05))


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def state(target: Target, pids: list[int], regions: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """All of a target that a scan could change."""
    found: dict[str, Any] = {}
    for pid in pids:
        rollup = process_numbers(pid, "smaps_rollup")
        found[f"{pid} sums"] = {n: rollup.get(n) for n in SUMS}
        found[f"{pid} VmPTE"] = process_numbers(pid, "status")["VmPTE"]
        found[f"{pid} ksm"] = process_numbers(pid, "ksm_stat")
        found[f"{pid} state"] = process_state(pid)
        for name, (start, pages) in regions.items():
            found[f"{pid} {name}"] = pagemap(pid, start, pages)
    return found


@pytest.mark.ksm
def test_nothing_changes(ksm: KsmControl, target: Target) -> None:
    """KSM pages (one mapping left, too), pages and huge pages shared by fork, untouched memory."""
    regions: dict[str, tuple[int, int]] = {}

    def lay(name: str, pages: int, **how: Any) -> int:
        regions[name] = (target.do("map", name=name, pages=pages, **how), pages)
        return regions[name][0]

    lay("merged", 400)
    target.do("fill", name="merged", at=0, count=200, what="a")
    target.do("fill", name="merged", at=200, count=200, what="b")
    target.do("advise", name="merged", what="mergeable")
    ksm.converge()
    lay("huge", 1024, align=HUGE)
    target.do("advise", name="huge", what="hugepage")
    target.do("fill", name="huge", at=0, count=1024, what="unique")
    lay("forked", 300)
    target.do("fill", name="forked", at=0, count=300, what="unique")
    child = target.do("fork")
    target.do("fill", name="forked", at=0, count=50, what="unique", child=(0,))
    lay("pairs", 200)
    target.do("put", name="pairs", at=0, what=[f"pair {i // 2}" for i in range(200)])
    target.do("advise", name="pairs", what="mergeable")
    ksm.converge()
    # One of each pair written: the other is a KSM page with a single mapping.
    for i in range(0, 200, 2):
        target.do("put", name="pairs", at=i, what=["unique"])
    lay("own huge", 512, align=HUGE)
    target.do("advise", name="own huge", what="hugepage")
    target.do("fill", name="own huge", at=0, count=512, what="unique")
    lay("own", 500)
    target.do("fill", name="own", at=0, count=500, what="unique")
    lay("none", 50)
    target.do("fill", name="none", at=0, count=50, what="unique")
    target.do("protect", name="none", how="none")
    lay("read only", 50)
    target.do("touch", name="read only", at=0, count=50)
    lay("untouched", 262144)
    pids = [target.pid, child]
    single = [w for w in pagemap(target.pid, *regions["pairs"])[1::2] if w >> 56 & 1]
    assert len(single) == 100, "KSM pages with one mapping left look exclusive"

    for pid in pids:
        # It has answered; it sleeps once it has also read the next line's absence.
        while process_state(pid) != "S":
            time.sleep(0.01)
    before = state(target, pids, regions)
    scans = [scan(*pids), scan(target.pid), scan(child), scan(*pids, scope="advised")]
    scan_pids(pids, Plan(interval_seconds=0.05, passes=3, partial_passes=True))
    assert state(target, pids, regions) == before

    first = scans[0]
    assert first.complete
    assert first.tally.proc_mem_pages >= 400 + 100 + 300
    assert first.tally.sharing_lost_pages == 0
    # 250 pages and two huge pages are one frame in parent and child.
    assert first.prediction.frames_freed is not None


@pytest.mark.ksm
def test_ksm_pages_that_can_not_be_told(ksm: KsmControl, target: Target) -> None:
    """Frames are shown, but not their flags, as where a container hides /proc/kpageflags."""
    start = target.do("map", name="a", pages=200)
    target.do("put", name="a", at=0, what=[f"pair {i // 2}" for i in range(200)])
    target.do("advise", name="a", what="mergeable")
    ksm.converge()
    for i in range(0, 200, 2):
        target.do("put", name="a", at=i, what=["unique"])
    ksm.stop()
    before = pagemap(target.pid, start, 200)
    assert all(w >> 56 & 1 for w in before), "KSM pages with one mapping left look exclusive"
    sight = replace(pagemap_interface.sight(), kpageflags=False)
    source = LiveSource([target.pid], Options(scope="advised"), sight=sight)
    source.first_look()
    assert pagemap(target.pid, start, 200) == before
    assert (source.tally.proc_mem_pages, source.tally.process_vm_readv_pages) == (200, 0)


def test_a_huge_page_whose_first_page_alone_a_relative_wrote_to(target: Target) -> None:
    """pagemap calls all of it exclusive then, where 511 pages are shared as before."""
    pages = 4 * HUGE // PAGE
    start = target.do("map", name="a", pages=pages, align=HUGE)
    target.do("advise", name="a", what="hugepage")
    target.do("fill", name="a", at=0, count=pages, what="unique")
    child, other = target.do("fork"), target.do("fork")
    target.do("unmap", name="a")
    for page in range(0, pages, HUGE // PAGE):
        target.do("fill", child=(1,), name="a", at=page, count=1, what="unique")

    def now() -> tuple[object, ...]:
        return tuple(
            (frames(pid, start, pages), process_numbers(pid, "smaps_rollup")["AnonHugePages"])
            for pid in (child, other)
        )

    before = now()
    exclusive = [w >> 56 & 1 for w in pagemap(child, start, pages)]
    assert all(exclusive), "the case this is about"
    found = scan(child)
    assert now() == before
    assert found.tally.proc_mem_pages >= pages


def test_pages_of_torn_huge_pages_stay_where_they_are(target: Target) -> None:
    """The child alone maps some pages of huge ones that it shares: they look exclusive."""
    start = target.do("map", name="a", pages=2048, align=HUGE)
    target.do("advise", name="a", what="hugepage")
    target.do("fill", name="a", at=0, count=2048, what="unique")
    child = target.do("fork")
    for i in range(0, 2048, 64):
        target.do("fill", name="a", at=i, count=1, what="parent's")
    for i in range(3, 2048, 512):
        target.do("fill", child=(0,), name="a", at=i, count=1, what="child's")
    before = frames(child, start, 2048)
    found = scan_pids([child], Plan(passes=1))
    assert frames(child, start, 2048) == before
    assert found.tally.sharing_lost_pages == 0
    assert found.tally.process_vm_readv_pages > 0


def test_untouched_memory_stays_so(target: Target) -> None:
    start = target.do("map", name="a", pages=262144)
    target.do("fill", name="a", at=5000, count=3, what="unique")
    before = process_numbers(target.pid, "status")["VmPTE"]
    found = scan(target.pid)
    assert process_numbers(target.pid, "status")["VmPTE"] == before
    assert sum(1 for f in frames(target.pid, start, 262144) if f) == 3
    assert found.complete


def test_16_tib_with_three_pages(target: Target) -> None:
    pages = (16 << 40) // 4096
    # MAP_NORESERVE besides private and anonymous.
    target.do("map", name="a", pages=pages, flags=0x4022)
    for at in (0, pages // 2, pages - 1):
        target.do("put", name="a", at=at, what=["x"])
    begin = time.monotonic()
    found = scan_pids([target.pid], Plan(passes=1))
    seconds = time.monotonic() - begin
    assert found.prediction.pages_sharing is not None
    assert found.prediction.pages_sharing >= 2
    # No timed test: only that time follows the pages, not the address space (4e9 of them).
    assert seconds < 20


class Forking:
    """A target that forks all the time while ksmd runs; children write some pages and end.

    The parent writes none, so that its unique pages keep their frames, whatever the children do:
    one that changes was unshared by a reader.
    """

    def __init__(self, ksm: KsmControl, target: Target) -> None:
        self.target = target
        self.start = target.do("map", name="a", pages=4000)
        target.do("advise", name="a", what="nohugepage")
        target.do("put", name="a", at=0, what=[f"pair {i // 2}" for i in range(2000)])
        target.do("fill", name="a", at=2000, count=2000, what="unique")
        target.do("advise", name="a", what="mergeable")
        ksm.converge(stop=False)
        target.send("keep_forking", name="a", pages=40, live_seconds=0.02)
        assert target.answer() == "started"

    def window(self, seconds: float, *, scanning: bool) -> tuple[int, int, int]:
        """Parent's frames lost, KSM pages copied, and what the scans say was lost."""
        for _ in range(20):
            moved = vmstat("pgmigrate_success")
            found = self._window(seconds, scanning=scanning)
            # When the kernel moves pages to make room for huge ones, frames change by that, too.
            if vmstat("pgmigrate_success") == moved:
                return found
        raise AssertionError("the kernel moves pages all the time")

    def _window(self, seconds: float, *, scanning: bool) -> tuple[int, int, int]:
        begin = self._frames()
        copied = vmstat("cow_ksm")
        reported = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if scanning:
                tally = scan_pids([self.target.pid], Plan(passes=1)).tally
                assert tally.sharing_lost_pages is not None
                reported += tally.sharing_lost_pages
            else:
                time.sleep(0.02)
        changed = sum(a != b for a, b in zip(begin, self._frames(), strict=True))
        return changed, vmstat("cow_ksm") - copied, reported

    def _frames(self) -> list[int]:
        return frames(self.target.pid, self.start + 2000 * 4096, 2000)


@pytest.mark.ksm
def test_a_target_that_forks_all_the_time_keeps_its_sharing(
    ksm: KsmControl, target: Target
) -> None:
    """With ksmd running: no more sharing lost than in as long a time without a scan."""
    forking = Forking(ksm, target)
    windows: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
    for _ in range(6):
        for scanning in (True, False):
            windows[scanning].append(forking.window(0.6, scanning=scanning))
    assert target.stop() > 50, "forks"
    assert [w[0] for w in windows[False]] == [0] * 6, "the parent's frames change by a reader alone"
    assert [w[0] for w in windows[True]] == [0] * 6
    assert [w[2] for w in windows[True]] == [0] * 6
    with_scan, without = (statistics.median(w[1] for w in windows[s]) for s in (True, False))
    # Children write merged pages, too. While a scan takes its share of the cores there are fewer
    # forks, never more.
    assert with_scan <= without * 1.25 + 20, windows


@pytest.mark.ksm
def test_without_the_rule_sharing_would_be_lost(
    ksm: KsmControl, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast way forced: forks between the look at pagemap and the read; it is reported."""
    forking = Forking(ksm, target)
    make = LiveSource._target

    def forced(self: LiveSource, *args: Any, **words: Any) -> Any:
        found, room = make(self, *args, **words)
        found.fast = True
        return found, room

    monkeypatch.setattr(LiveSource, "_target", forced)
    lost = reported = 0
    end = time.monotonic() + 60
    while not lost and time.monotonic() < end:
        changed, _, said = forking.window(0.6, scanning=True)
        lost, reported = lost + changed, reported + said
    target.stop()
    assert 0 < lost <= reported


def vmstat(name: str) -> int:
    """A count since boot; `cow_ksm` is KSM pages copied at a fault, by writing or unsharing."""
    values = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(values[name])


def test_a_process_with_children_is_not_read_the_fast_way(target: Target) -> None:
    target.do("map", name="a", pages=100)
    target.do("fill", name="a", at=0, count=100, what="unique")
    assert scan(target.pid).tally.process_vm_readv_pages > 0
    target.do("fork")
    assert scan(target.pid).tally.process_vm_readv_pages == 0
    target.do("kill_child", index=0)
    # It has waited for a child: it may fork again at any time.
    assert scan(target.pid).tally.process_vm_readv_pages == 0


@pytest.mark.ksm
def test_no_fast_way_while_ksmd_runs_on_mergeable_memory(ksm: KsmControl, target: Target) -> None:
    target.do("map", name="a", pages=100)
    target.do("fill", name="a", at=0, count=100, what="unique")
    ksm.start()
    assert scan(target.pid).tally.process_vm_readv_pages > 0
    target.do("advise", name="a", what="mergeable")
    assert scan(target.pid).tally.process_vm_readv_pages == 0


def test_a_fork_during_the_look_is_seen(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced onto the fast way, a target that forks all the time is noticed and counted."""
    pages = 40_000
    target.do("map", name="a", pages=pages)
    target.do("fill", name="a", at=0, count=pages, what="unique")
    target.send("keep_forking", name="a", pages=1, live_seconds=0.05)
    assert target.answer() == "started"
    make = LiveSource._target

    def forced(self: LiveSource, *args: Any, **words: Any) -> Any:
        found, room = make(self, *args, **words)
        found.fast = True
        return found, room

    monkeypatch.setattr(LiveSource, "_target", forced)
    noticed = 0
    try:
        for _ in range(60):
            tally = scan_pids([target.pid], Plan(passes=1)).tally
            noticed += tally.forking_processes
            if noticed and tally.process_vm_readv_pages:
                break
    finally:
        target.stop()
    assert noticed


def test_maps_of_a_scanned_process_are_the_same(target: Target) -> None:
    with Handle(target.pid) as handle:
        before = maps.read(handle)
        scan(target.pid)
        assert maps.read(handle) == before
