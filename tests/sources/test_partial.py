"""Later looks that read only what would merge."""

from __future__ import annotations

import numpy as np
import pytest

import dedup
from dedup import grouping
from dedup.errors import Usage
from dedup.kernel import memory
from dedup.model import merge, steady
from dedup.model.prediction import FIELDS, Rules
from dedup.pages import Flag, Pages
from dedup.sampling import sample_pids
from dedup.scanning import Plan, Scan, scan_pids
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import Target, pagemap
from tests.report.scans import ZERO, make

UNREAD = ("pages_unshared", "pages_volatile")
SAVINGS = [name for name in FIELDS if name not in UNREAD]
UNIQUE, PAIRS, ZEROS = 1_500, 600, 200
HUGE = 2 << 20


def lay(target: Target) -> int:
    """Unique pages, pairs and zero pages, in a row; gives where they begin."""
    start: int = target.do("map", name="a", pages=UNIQUE + PAIRS + ZEROS)
    target.do("fill", name="a", at=0, count=UNIQUE, what="unique")
    pairs = [f"pair {i // 2}" for i in range(PAIRS)]
    target.do("put", name="a", at=UNIQUE, what=pairs)
    target.do("put", name="a", at=UNIQUE + PAIRS, what=[""] * ZEROS)
    return start


def scan(*pids: int, partial_passes: bool = True, **plan: object) -> Scan:
    options = {"interval_seconds": 0.05, **plan}
    return scan_pids(list(pids), Plan(partial_passes=partial_passes, **options))  # type: ignore[arg-type]


def pages_read(found: memory.Tally) -> int:
    return found.process_vm_readv_pages + found.proc_mem_pages


def holds(part: Scan, full: Scan) -> None:
    for name in UNREAD:
        assert getattr(part.prediction, name) is None
        (low, high), told = part.prediction.bounds[name], steady.reach(full.prediction, name)
        assert low <= told[0] <= told[1] <= high, name


@pytest.mark.root
@pytest.mark.parametrize("passes", [2, 3])
def test_the_same_savings_of_memory_at_rest(target: Target, passes: int) -> None:
    lay(target)
    target.do("map", name="huge", pages=1_024, align=HUGE)
    target.do("advise", name="huge", what="hugepage")
    target.do("fill", name="huge", at=0, count=600, what="unique")
    child = target.do("fork")
    target.do("put", child=(0,), name="a", at=0, what=[f"own {i // 3}" for i in range(90)])
    pids = (target.pid, child)
    full, part = scan(*pids, partial_passes=False, passes=passes), scan(*pids, passes=passes)
    for name in SAVINGS:
        # Of two processes, which comes first may decide.
        assert steady.reach(part.prediction, name) == steady.reach(full.prediction, name), name
    assert steady.reach(part.prediction, "frames_freed")[0] > (PAIRS + ZEROS) / 2
    assert part.prediction.processes == full.prediction.processes
    assert part.prediction.breakdown == full.prediction.breakdown
    holds(part, full)
    # A price, and smart scan's outcome, as if the others were steady, as they are here.
    assert part.load == full.load
    assert part.smart_scan == full.smart_scan
    assert (full.drifting, full.read_again_pages) == (False, None)
    assert part.drifting is None
    assert part.overstated_most_pages == 0


@pytest.mark.parametrize("passes", [2, 4])
def test_only_duplicates_are_read_again(target: Target, passes: int) -> None:
    lay(target)
    found = scan(target.pid, passes=passes)
    pages = found.pages
    again = found.read_again_pages
    assert again is not None
    assert PAIRS + ZEROS <= again < PAIRS + ZEROS + 1_500
    assert again == int(np.count_nonzero(merge.matter(pages)))
    assert pages_read(found.tally) == len(pages.hashes) + (passes - 1) * again
    assert found.tally.bytes_read == pages_read(found.tally) * pages.page_size


def test_what_savings_depend_on() -> None:
    # A zero page alone leaves KSM for the shared one with use_zero_pages.
    pages = make([[1, 1, 2, ZERO], [3]]).pages
    assert merge.matter(pages).tolist() == [True, True, False, True, False]
    pages.frames[4] |= Flag.KSM
    assert merge.matter(pages).tolist() == [True, True, False, True, True]


class Both:
    """A source that reads everything and one that reads what would merge, of the same process."""

    def __init__(self, pid: int) -> None:
        self.full, self.part = (LiveSource([pid], Options(seed=5)) for _ in range(2))
        self.full.first_look()
        first = self.part.first_look()
        grouping.group(first)
        self.only = merge.matter(first)
        self.known = len(first.hashes)

    def again(self) -> tuple[Pages, Pages]:
        return self.full.look_again(), self.part.look_again(self.only)


def by_address(pages: Pages, flag: np.uint64) -> set[int]:
    index = np.flatnonzero((pages.frames & flag) != 0)
    return set(pages.address_of(index).tolist())


def test_what_changes_between_the_looks(target: Target) -> None:
    start = lay(target)
    both = Both(target.pid)
    page = both.part.sight.page_size
    # Both pages of ten pairs and one of ten others, forty unique pages; some go, some come.
    target.do("fill", name="a", at=UNIQUE, count=20, what="unique")
    for i in range(10):
        target.do("fill", name="a", at=UNIQUE + 20 + 2 * i, count=1, what="unique")
    target.do("fill", name="a", at=0, count=40, what="unique")
    target.do("advise", name="a", what="dontneed", at=100, count=30)
    new = target.do("map", name="b", pages=500)
    target.do("fill", name="b", at=0, count=500, what="same")
    full, part = both.again()

    pairs = start + UNIQUE * page
    written = {pairs + i * page for i in (*range(20), *range(20, 40, 2))}
    unique = {start + i * page for i in range(40)}
    inside = set(range(start, start + (UNIQUE + PAIRS + ZEROS) * page, page))
    assert by_address(part, Flag.VOLATILE) & inside == written
    assert by_address(full, Flag.VOLATILE) & inside == written | unique
    for flag in (Flag.GONE, Flag.NEW):
        assert by_address(part, flag) == by_address(full, flag)
    assert {start + i * page for i in range(100, 130)} <= by_address(part, Flag.GONE)
    come = {new + i * page for i in range(500)} & by_address(full, Flag.NEW)
    assert len(come) > 450
    assert pages_read(both.part.tally) == both.known + int(
        np.count_nonzero(both.only & ((part.frames[: both.known] & Flag.GONE) == 0))
    )

    told = [merge.predict(p, grouping.group(p), Rules()) for p in (full, part)]
    for name in SAVINGS:
        assert getattr(told[1], name) == getattr(told[0], name), name
    assert told[0].processes == told[1].processes
    unread = int(np.count_nonzero(part.present[: both.known] & ~both.only))
    open_to = steady.not_read_again(told[1], unread).bounds
    for name in UNREAD:
        low, high = open_to[name]
        assert low <= (getattr(told[0], name) or 0) <= high

    # Pages that came are never read: nobody knows what they hold, however alike they are.
    _, part = both.again()
    assert come <= by_address(part, Flag.NEW)
    assert written <= by_address(part, Flag.VOLATILE)
    assert not come & by_address(part, Flag.DUPLICATE)
    target.do("unmap", name="b")
    _, part = both.again()
    assert come <= by_address(part, Flag.GONE)


def test_new_pages_that_do_not_fit_count_once(target: Target) -> None:
    lay(target)
    both = Both(target.pid)
    store = both.part._store
    assert store is not None
    used = store.used
    both.part._store = memory.Store(store.hashes[:used].copy(), store.frames[:used].copy(), used)
    target.do("map", name="b", pages=6_000)
    target.do("fill", name="b", at=0, count=6_000, what="unique")
    full, part = both.again()
    assert len(part.hashes) == len(full.hashes)
    address = part.address_of(np.arange(len(part.hashes)))
    assert len(np.unique(address)) == len(address)
    new = by_address(part, Flag.NEW)
    assert new == by_address(full, Flag.NEW)
    # A page of it may lie where the program had one before.
    assert len(new) > 5_900


def test_written_pages_leave_the_savings_beyond_the_looks(target: Target) -> None:
    """Three looks and an extrapolation, of copies some of which are written to all the time."""
    pages = 400
    target.do("map", name="a", pages=pages)
    target.do("fill", name="a", at=0, count=pages, what="same")
    before = scan_pids([target.pid], Plan(passes=1)).prediction.pages_sharing
    assert before is not None
    written = list(range(0, pages, 8))
    started: list[object] = []

    def write_from_then_on(what: str, _done: int, _total: int) -> None:
        """After the first look, by which all are equal."""
        if what == "waiting" and not started:
            target.send("keep_writing", name="a", pages=written)
            started.append(target.answer())

    options = Options(progress=write_from_then_on)
    found = scan(target.pid, interval_seconds=None, full_scan_seconds=60, options=options)
    target.stop()
    assert started == ["started"]
    assert (found.passes, found.extrapolated, found.drifting) == (3, True, None)
    sharing = found.prediction.pages_sharing
    assert sharing == pytest.approx(before - len(written), abs=12)
    low, high = found.prediction.bounds["pages_volatile"]
    assert low >= len(written) - 2
    assert high <= sum(p.ksm_rmap_items or 0 for p in found.prediction.processes)


def test_a_process_that_ends_between_the_looks(target: Target) -> None:
    """What may be lost until the steady state goes by the pages that were read again."""
    lay(target)
    with Target() as ending:
        done: list[str] = []

        def end_one_and_write(what: str, _done: int, _total: int) -> None:
            if what == "waiting" and not done:
                ending.kill()
                target.do("fill", name="a", at=UNIQUE, count=20, what="unique")
                done.append(what)

        plan = Plan(
            options=Options(progress=end_one_and_write), full_scan_seconds=60, partial_passes=True
        )
        found = scan_pids([target.pid, ending.pid], plan)
    assert [s.pid for s in found.pages.skipped] == [ending.pid]
    assert done
    assert (found.extrapolated, found.drifting, found.overstated_most_pages) == (False, None, None)
    low, high = found.prediction.bounds["pages_sharing"]
    changed = len(by_address(found.pages, Flag.VOLATILE))
    assert changed >= 20
    times = steady.STEADY_FACTOR * 60 / found.looks_seconds[-1]
    assert found.read_again_pages is not None
    # Some of the pages read again were those of the process that ended.
    assert 0 < low <= high * (1 - changed / found.read_again_pages) ** (times - 1)


@pytest.mark.root
def test_the_target_stays_as_it_was(target: Target) -> None:
    start = lay(target)
    hole = target.do("map", name="hole", pages=2_000)
    child = target.do("fork")
    target.do("put", child=(0,), name="a", at=0, what=["own"] * 50)
    pids = (target.pid, child)
    places = [(pid, at, n) for pid in pids for at, n in ((start, 2_300), (hole, 2_000))]
    before = [pagemap(*place) for place in places]
    found = scan(*pids)
    assert all(np.array_equal(a, pagemap(*place)) for a, place in zip(before, places, strict=True))
    assert found.tally.sharing_lost_pages == 0


def test_in_place() -> None:
    page = memory_page()
    array = np.ones(300 * page, np.uint8)
    array.reshape(300, page)[:200, 0] = np.arange(200)
    found = dedup.scan(arrays=[array], interval_seconds=0.01, partial_passes=True)
    full = dedup.scan(arrays=[array], interval_seconds=0.01)
    assert found.prediction.pages_sharing == full.prediction.pages_sharing
    assert found.prediction.pages_sharing is not None
    assert found.prediction.pages_sharing >= 98
    assert found.tally.in_place_pages < full.tally.in_place_pages


def memory_page() -> int:
    return LiveSource([]).sight.page_size


def test_what_does_not_go(target: Target) -> None:
    with pytest.raises(Usage, match="--passes 1 takes no other"):
        scan(target.pid, passes=1)
    with pytest.raises(Usage, match="does not go with a sample"):
        sample_pids([target.pid], 0.2, Plan(partial_passes=True))
