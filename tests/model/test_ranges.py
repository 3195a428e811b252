"""Which ranges pay: against brute force, and on layouts whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import grouping
from dedup.model import ranges
from dedup.model.ranges import RANGE_BYTES, WINDOW_BYTES, Choice, _segments, choose
from dedup.pages import Flag, Groups, Pages, Process, ProcessId, Region

PAGE = 4096
WINDOW = WINDOW_BYTES // PAGE


def pages_of(
    mappings: list[list[int]], huge: tuple[int, ...] = (), process_of: list[int] | None = None
) -> Pages:
    """Mappings of pages with these contents, far apart; negative contents are unique."""
    process_of = process_of or [0] * len(mappings)
    contents = np.array([c for m in mappings for c in m], np.int64)
    unique = contents < 0
    contents[unique] = 1_000_000 + np.arange(np.count_nonzero(unique))
    frames = np.arange(1, len(contents) + 1).astype(np.uint64)
    at = 0
    regions, first, start = [], [], []
    for number, mapping in enumerate(mappings):
        address = (number + 1) << 30
        if number in huge:
            frames[at : at + len(mapping)] |= Flag.THP
        regions.append(
            Region(process_of[number], address, address + (1 << 22), "rw-p", "", frozenset(),
                   eligible=True, why="", advised=False, scanned=True)
        )  # fmt: skip
        first.append(at)
        start.append(address)
        at += len(mapping)
    count = max(process_of) + 1
    return Pages(
        page_size=PAGE,
        hashes=contents.astype(np.uint64),
        frames=frames,
        run_start=np.array(start, np.int64),
        run_count=np.array([len(m) for m in mappings], np.int64),
        run_first=np.array(first, np.int64),
        run_region=np.arange(len(mappings)),
        regions=regions,
        processes=[Process(ProcessId(p + 1, 0), "test") for p in range(count)],
        looks=2,
    )


def chosen(pages: Pages, left: int = 1000, free: list[bool] | None = None) -> Choice:
    groups: Groups = grouping.group(pages)
    return choose(
        pages,
        groups,
        np.array(free or [True] * len(pages.regions)),
        max_page_sharing=256,
        costs=None,
        mappings_left=dict.fromkeys(range(len(pages.processes)), left),
    )


UNIQUE = [-1]


def test_only_the_mappings_with_copies_are_taken() -> None:
    pages = pages_of([UNIQUE * 600, [1] * 60 + [2] * 60, UNIQUE * 600])
    found = chosen(pages)
    assert found.ranges == {0: [(2 << 30, (2 << 30) + 120 * PAGE)]}
    assert (found.followed, found.whole_followed) == (120, 1320)
    assert found.freed_frames == pytest.approx(118)
    assert found.pays


def test_ranges_end_at_the_pages_that_merge() -> None:
    at = 5 * WINDOW + 3
    pages = pages_of([UNIQUE * at + [1] * 100 + UNIQUE * 500])
    start = (1 << 30) + at * PAGE
    assert chosen(pages).ranges == {0: [(start, start + 100 * PAGE)]}


def test_a_small_gap_is_joined_and_a_large_one_not() -> None:
    copies = [1] * WINDOW
    near = chosen(pages_of([copies + UNIQUE * 2 + copies]))
    assert len(near.ranges[0]) == 1
    far = chosen(pages_of([copies + UNIQUE * 20 * WINDOW + copies]))
    assert len(far.ranges[0]) == 2


def test_few_mappings_left_make_few_ranges() -> None:
    pages = pages_of([([n] * WINDOW + UNIQUE * 8 * WINDOW) * 1 for n in range(10)])
    assert len(chosen(pages).ranges[0]) == 10
    few = chosen(pages, left=6)
    assert len(few.ranges[0]) == 3
    assert chosen(pages, left=0).ranges == {}


def test_a_copy_far_from_all_others_may_not_pay_and_its_partner_then_neither() -> None:
    """Each alone among unique pages: in one window 1 page of 16 merges, and half of that is its."""
    lone = [7] + UNIQUE * (40 * WINDOW)
    found = chosen(pages_of([lone, lone]))
    # A page more is all that the range needs, so it does pay; with the whole window it would not.
    assert all(end - start == PAGE for r in found.ranges.values() for start, end in r)


def test_regions_that_are_not_free_take_part_and_are_not_chosen() -> None:
    pages = pages_of([[1] * 50, [1] * 50])
    found = chosen(pages, free=[False, True])
    assert found.ranges == {0: [(2 << 30, (2 << 30) + 50 * PAGE)]}
    assert found.freed_frames == pytest.approx(50 * 99 / 100)


def test_huge_pages_stay_whole() -> None:
    pages = pages_of([UNIQUE * 700 + [1] * 100 + UNIQUE * 224], huge=(0,))
    base = 1 << 30
    assert chosen(pages).ranges == {0: [(base + 512 * PAGE, base + 1024 * PAGE)]}


def test_nothing_merges() -> None:
    found = chosen(pages_of([UNIQUE * 100]))
    assert (found.ranges, found.freed_frames, found.followed) == ({}, 0.0, 0)
    empty = chosen(pages_of([[]]))
    assert empty.ranges == {}


def test_processes_have_ranges_of_their_own() -> None:
    pages = pages_of([[1] * 64, UNIQUE * 64, [1] * 64], process_of=[0, 1, 2])
    found = chosen(pages)
    assert sorted(found.ranges) == [0, 2]


@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=9),
    st.integers(0, 8),
    st.integers(1, 9),
)
def test_segments_are_the_best_there_are(worth: list[int], price: int, cut: int) -> None:
    """Against all subsets; a segment does not go from one region into the next."""
    net = np.array(worth, float)
    region = np.array([0] * min(cut, len(worth)) + [1] * max(0, len(worth) - cut))

    def total(taken: tuple[bool, ...]) -> float:
        begun = sum(
            t and (i == 0 or not taken[i - 1] or region[i] != region[i - 1])
            for i, t in enumerate(taken)
        )
        return float(net[np.array(taken)].sum() - price * begun)

    best = max(total(t) for t in itertools.product((False, True), repeat=len(worth)))
    found = _segments(net, region, float(price))
    taken = [False] * len(worth)
    for low, high in found:
        assert region[low] == region[high]
        taken[low : high + 1] = [True] * (high + 1 - low)
    assert float(net[taken].sum()) - price * len(found) == pytest.approx(best)


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=200), st.integers(0, 50))
def test_a_choice_is_consistent(contents: list[int], left: int) -> None:
    found = chosen(pages_of([contents, contents[::-1]]), left=left)
    assert found.freed_frames <= found.whole_freed_frames + 1e-9
    assert found.followed <= found.whole_followed
    for pieces in found.ranges.values():
        assert len(pieces) <= left // ranges.MAPPINGS_OF_RANGE
        for (start, end), following in zip(pieces, [*pieces[1:], (1 << 62, 0)], strict=True):
            assert start < end <= following[0]
            assert start % PAGE == end % PAGE == 0
    # Worth its price: what it frees outweighs the rmap_items and the mappings.
    cost = found.followed * 64 + RANGE_BYTES * sum(map(len, found.ranges.values()))
    assert found.freed_frames * PAGE >= cost or not found.followed
