"""Memory of every kind: what is predicted is what the kernel counts, and the frames given back."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dedup.kernel.pagemap import sight
from dedup.model.order import simulate
from tests.kernel_fixtures import PAGE, KsmControl, Target, pagemap, process_numbers
from tests.kinds.hold import hold, wait_until

pytestmark = [pytest.mark.ksm, pytest.mark.root]

TRIPLES = [f"triple {i}" for i in range(10)]
HUGE_PAGES = sight().huge_bytes // PAGE or 512


def lay(target: Target, contents: list[str], *, name: str = "a", **how: Any) -> int:
    """Map and write pages."""
    start: int = target.do("map", name=name, pages=len(contents), **how)
    target.do("advise", name=name, what="nohugepage")
    target.do("put", name=name, at=0, what=contents)
    return start


def mergeable(target: Target, name: str = "a", child: tuple[int, ...] = ()) -> None:
    target.do("advise", name=name, what="mergeable", child=child)


# -- forks -----------------------------------------------------------------------------------------


def test_a_tree_of_forks(ksm: KsmControl, target: Target) -> None:
    """Two levels, some pages rewritten: far fewer frames freed than pages_sharing says."""
    lay(target, [f"c {i % 40}" for i in range(120)])
    mergeable(target)
    child = target.do("fork")
    target.do("put", name="a", at=0, what=["unique"] * 10, child=(0,))
    grandchild = target.do("fork", child=(0,))
    target.do("put", name="a", at=5, what=["own"] * 10, child=(0, 0))
    sister = target.do("fork")
    held = hold(ksm, [target.pid, child, grandchild, sister])
    held.require_equal()
    assert 0 < held.counted["frames_freed"] < held.counted["pages_sharing"] / 2


# -- merged before ---------------------------------------------------------------------------------


def test_memory_merged_already_and_more_of_it(ksm: KsmControl, target: Target) -> None:
    lay(target, ["same"] * 300 + ["other"] * 7)
    mergeable(target)
    ksm.set(max_page_sharing=256)
    hold(ksm, [target.pid]).require_equal()
    with Target() as more:
        lay(more, ["same"] * 80 + ["other"] * 3 + ["unique"] * 20)
        mergeable(more)
        held = hold(ksm, [target.pid, more.pid])
    held.require_equal()
    # 7 and 3 of one, 380 of the other on two frames.
    assert held.counted["pages_shared"] == 3


def test_forks_of_merged_memory_go_beyond_max_page_sharing(ksm: KsmControl, target: Target) -> None:
    ksm.set(max_page_sharing=16)
    lay(target, ["same"] * 16 + ["pair", "pair", "alone"])
    mergeable(target)
    hold(ksm, [target.pid]).require_equal()
    children = [target.do("fork") for _ in range(3)]
    target.do("put", name="a", at=0, what=["unique", "pair"], child=(1,))
    held = hold(ksm, [target.pid, *children])
    held.require_equal()
    assert held.counted["pages_sharing"] > 3 * 16
    assert held.counted["frames_freed"] == 1


def test_overflow_of_max_page_sharing_goes_by_the_order(ksm: KsmControl) -> None:
    """The last process mergeable keeps the page that finds no partner, whatever its pid."""
    ksm.set(max_page_sharing=16)
    with Target() as first, Target() as second:
        for target in (second, first):
            lay(target, ["same"] * (10 if target is second else 7))
            mergeable(target)
        held = hold(ksm, [second.pid, first.pid])
    held.require_equal()
    assert held.counted["ksm_merging_pages[0]"] == 10
    assert held.counted["ksm_merging_pages[1]"] == 6


# -- huge pages ------------------------------------------------------------------------------------


@pytest.mark.skipif(not sight().huge_bytes, reason="this kernel has no huge pages")
def test_huge_pages_split_and_zero_pages_go(ksm: KsmControl, target: Target) -> None:
    """Of three huge pages two split; smaps loses what is predicted; zero pages leave KSM."""
    target.do("map", name="a", pages=3 * HUGE_PAGES, align=HUGE_PAGES * PAGE)
    target.do("advise", name="a", what="hugepage")
    target.do("fill", name="a", at=0, count=3 * HUGE_PAGES, what="unique")
    target.do("advise", name="a", what="nohugepage")
    target.do("put", name="a", at=5, what=["zero"] * 40 + ["pair"])
    target.do("put", name="a", at=HUGE_PAGES + 9, what=["pair"])
    mergeable(target)
    before = process_numbers(target.pid, "smaps_rollup")
    held = hold(ksm, [target.pid])
    after = process_numbers(target.pid, "smaps_rollup")
    held.require_equal()
    assert held.counted["thp_split"] == 2
    assert before["AnonHugePages"] - after["AnonHugePages"] == 2 * sight().huge_bytes // 1024
    assert held.counted["ksm_zero_pages"] == 0
    assert held.counted["frames_freed"] == 41
    assert held.counted["ksm_rmap_items[0]"] == 3 * HUGE_PAGES - 40


# -- mappings of all sorts -------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["memfd", "on disk"])
def test_private_file_pages_count_once_written(ksm: KsmControl, target: Target, file: str) -> None:
    """Copies alone are candidates: pages of the file, equal or not, are none."""
    target.do("map", name="a", pages=60, file=file)
    target.do("touch", name="a", at=0, count=60)
    target.do("put", name="a", at=10, what=["x"] * 20 + ["y"] * 3 + ["unique"] * 2)
    mergeable(target)
    held = hold(ksm, [target.pid])
    held.require_equal()
    assert held.counted["ksm_rmap_items[0]"] == 25
    assert held.counted["pages_sharing"] == 21


@pytest.mark.parametrize("protection", ["none", "r"])
def test_protected_pages(ksm: KsmControl, target: Target, protection: str) -> None:
    lay(target, ["same"] * 20 + ["unique"] * 5)
    target.do("protect", name="a", how=protection)
    mergeable(target)
    held = hold(ksm, [target.pid])
    held.require_equal()
    assert held.counted["pages_sharing"] == 19


@pytest.mark.parametrize("mode", [1, 2])
def test_userfaultfd(ksm: KsmControl, target: Target, mode: int) -> None:
    """Registered for missing pages, some of which are missing; or for write protection."""
    target.do("map", name="a", pages=40)
    target.do("advise", name="a", what="nohugepage")
    target.do("put", name="a", at=10, what=["same"] * 20 + ["unique"] * 5)
    target.do("watch_faults", name="a", mode=mode)
    mergeable(target)
    held = hold(ksm, [target.pid])
    held.require_equal()
    assert held.counted["ksm_rmap_items[0]"] == 25
    assert held.counted["pages_sharing"] == 19


def test_locked_pages(ksm: KsmControl, target: Target) -> None:
    lay(target, ["same"] * 20 + ["zero"] * 3 + ["unique"] * 5)
    target.do("lock", name="a", at=0, count=28)
    mergeable(target)
    held = hold(ksm, [target.pid])
    held.require_equal()
    assert held.counted["pages_sharing"] == 21


# -- swap ------------------------------------------------------------------------------------------


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """Swap on a loop device, for the time of a test."""
    file = tmp_path / "swap"
    with file.open("wb") as f:
        f.truncate(64 << 20)
    loop = subprocess.run(
        ["losetup", "--find", "--show", str(file)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["mkswap", loop], check=True, capture_output=True)
        subprocess.run(["swapon", loop], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", loop], check=True)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def swapped(pid: int, start: int, pages: int) -> list[int]:
    """Pages that are swapped out."""
    return [i for i, w in enumerate(pagemap(pid, start, pages)) if w >> 62 & 1]


def swap_out(target: Target, start: int, at: int, count: int, child: tuple[int, ...] = ()) -> None:
    """Write pages out until they are; the kernel may pass by one that it holds for a moment."""

    def done() -> bool:
        target.do("advise", name="a", what="pageout", at=at, count=count)
        return set(range(at, at + count)) <= set(swapped(target.pid, start, at + count))

    wait_until("pages are not swapped out", 20, done)


def test_swapped_pages_are_no_candidates(ksm: KsmControl, target: Target, swap: None) -> None:
    """Neither a scan nor ksmd brings them in."""
    start = lay(target, ["same"] * 60 + ["unique"] * 10)
    mergeable(target)
    swap_out(target, start, 20, 45)
    held = hold(ksm, [target.pid])
    held.require_equal()
    assert held.counted["ksm_rmap_items[0]"] == 25
    assert held.counted["pages_sharing"] == 19
    assert swapped(target.pid, start, 70) == list(range(20, 65))


def test_pages_in_the_swap_cache_merge(ksm: KsmControl, target: Target, swap: None) -> None:
    """Back in one process, still swapped out in its child: the swap cache holds them too."""
    start = lay(target, ["same"] * 30 + ["pair", "pair", "alone"])
    mergeable(target)
    swap_out(target, start, 0, 33)
    child = target.do("fork")
    target.do("touch", name="a", at=0, count=33)
    assert not swapped(target.pid, start, 33)
    assert swapped(child, start, 33) == list(range(33))
    held = hold(ksm, [target.pid, child])
    held.require_equal()
    assert held.counted["pages_sharing"] == 30
    assert swapped(child, start, 33) == list(range(33))


# -- pinned pages ----------------------------------------------------------------------------------


def triples(target: Target) -> int:
    """Three copies of ten contents: pages i, 10 + i, 20 + i."""
    start = lay(target, TRIPLES * 3)
    mergeable(target)
    return start


@pytest.mark.parametrize(
    ("pinned", "merged"),
    [
        # Scanned first, each blocks the other two; scanned last, it alone stays out.
        (range(10), (0, 0, 10, 20)),
        (range(20, 30), (10, 10, 0, 10)),
        (range(10, 15), (10, 15, 0, 5)),
    ],
)
@pytest.mark.parametrize("how", ["register_buffers", "splice"])
def test_pinned_pages_as_the_order_exact_model_has_them(
    ksm: KsmControl, target: Target, how: str, pinned: range, merged: tuple[int, ...]
) -> None:
    triples(target)
    target.do(how, name="a", pages=list(pinned))
    ends = [simulate([i, 10 + i, 20 + i], [False] * 3, 256, frozenset(pinned)) for i in range(10)]
    shared = sum(e.nodes for e in ends)
    simulated = (
        shared,
        sum(sum(e.merged) for e in ends) - shared,
        sum(e.unshared for e in ends),
        sum(e.volatile for e in ends),
    )
    held = hold(ksm, [target.pid])
    counted = tuple(
        held.counted[f"pages_{name}"] for name in ("shared", "sharing", "unshared", "volatile")
    )
    assert counted == simulated == merged
    if how == "splice":
        # vmsplice takes its references without counting them: nothing tells us.
        assert process_numbers(target.pid, "status")["VmPin"] == 0
        assert held.prediction.pages_sharing == 20
        return
    assert process_numbers(target.pid, "status")["VmPin"] == len(pinned) * PAGE // 1024
    held.require_inside()
    low, high = held.bounds("pages_sharing")
    # So many pins may block as many contents, or none.
    assert (low, high) == (20 - 2 * len(pinned), 20)


def test_a_pinned_huge_page_stays_whole(ksm: KsmControl, target: Target) -> None:
    target.do("map", name="a", pages=HUGE_PAGES, align=HUGE_PAGES * PAGE)
    target.do("advise", name="a", what="hugepage")
    target.do("fill", name="a", at=0, count=HUGE_PAGES, what="unique")
    target.do("put", name="a", at=0, what=["zero", "one", "two"])
    target.do("register_buffers", name="a", pages=[100])
    mergeable(target)
    with Target() as other:
        lay(other, ["zero", "one", "two", "three", "three"])
        mergeable(other)
        held = hold(ksm, [target.pid, other.pid])
    held.require_inside()
    assert held.counted["thp_split"] == 0
    assert held.counted["pages_sharing"] == 1


def test_nothing_pinned_nothing_changes(ksm: KsmControl, target: Target) -> None:
    """Unpinned again, the figures are numbers again."""
    triples(target)
    ring = target.do("register_buffers", name="a", pages=[0, 11])
    held = hold(ksm, [target.pid])
    held.require_inside()
    assert held.prediction.pages_sharing is None
    target.do("close", descriptor=ring)
    wait_until(
        "io_uring keeps its pins", 20, lambda: not process_numbers(target.pid, "status")["VmPin"]
    )
    ksm.clear()
    held = hold(ksm, [target.pid])
    held.require_equal()
    assert held.counted["pages_sharing"] == 20


# -- where ksmd is not the same every time ---------------------------------------------------------


def test_locked_pages_shared_by_fork_beyond_the_limit(ksm: KsmControl) -> None:
    """Merging a locked mapping makes ksmd pass its frame's others by: a range that holds."""
    ksm.set(max_page_sharing=5)
    for _ in range(4):
        with Target() as target, Target() as other:
            lay(target, [f"c {i % 3}" for i in range(30)])
            target.do("lock", name="a", at=3, count=20)
            mergeable(target)
            children = [target.do("fork") for _ in range(2)]
            lay(other, [f"c {i % 3}" for i in range(11)])
            mergeable(other)
            held = hold(ksm, [target.pid, *children, other.pid])
        ksm.clear()
        held.require_inside()
        assert held.prediction.pages_sharing is None


@pytest.mark.skipif(not sight().huge_bytes, reason="this kernel has no huge pages")
def test_huge_pages_shared_by_fork_beyond_the_limit(ksm: KsmControl) -> None:
    """A number where only the order decides, a range where zero pages leave huge pages."""
    ksm.set(max_page_sharing=2)
    for zero in (False, True) * 3:
        with Target() as target:
            target.do("map", name="a", pages=2 * HUGE_PAGES, align=HUGE_PAGES * PAGE)
            target.do("advise", name="a", what="hugepage")
            target.do("fill", name="a", at=0, count=2 * HUGE_PAGES, what="unique")
            target.do("advise", name="a", what="nohugepage")
            contents = ["zero" if zero and i % 5 == 1 else f"c {i % 2}" for i in range(60)]
            target.do("put", name="a", at=0, what=contents)
            target.do("put", name="a", at=HUGE_PAGES, what=contents[:7])
            mergeable(target)
            child = target.do("fork")
            target.do("put", name="a", at=20, what=["c 0", "c 1"], child=(0,))
            held = hold(ksm, [target.pid, child])
        ksm.clear()
        if zero:
            held.require_inside()
        else:
            held.require_equal()
        assert held.counted["thp_split"] == 2
