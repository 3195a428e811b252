"""Contents with their copies: against np.unique."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dedup import grouping
from dedup.pages import Flag, Pages, Region


def pages_of(hashes: np.ndarray, frames: np.ndarray | None = None) -> Pages:
    nothing = np.zeros(0, np.int64)
    return Pages(
        page_size=4096,
        hashes=hashes.astype(np.uint64),
        frames=np.zeros(len(hashes), np.uint64) if frames is None else frames,
        run_start=nothing,
        run_count=nothing,
        run_first=nothing,
        run_region=nothing,
        regions=[],
        processes=[],
    )


def check(pages: Pages, threads: int) -> None:
    before = pages.frames & ~Flag.DUPLICATE
    groups = grouping.group(pages, threads)
    kept = np.flatnonzero((before & np.uint64(grouping.UNSTABLE)) == 0)
    values, counts = np.unique(pages.hashes[kept], return_counts=True)
    sizes = np.diff(groups.offsets)
    heads = pages.hashes[groups.order[groups.offsets[:-1]]]
    assert (pages.hashes[groups.order] == np.repeat(heads, sizes)).all()
    order = np.argsort(heads)
    assert (heads[order] == values[counts > 1]).all()
    assert (sizes[order] == counts[counts > 1]).all()
    assert groups.considered == len(kept)
    # Ascending within a group, and marked; no other flag is touched.
    inside = np.ones(len(groups.order), bool)
    inside[groups.offsets[:-1]] = False
    assert (np.diff(groups.order.astype(np.int64), prepend=0)[inside] > 0).all()
    marked = np.zeros(len(before), bool)
    marked[groups.order] = True
    assert (pages.frames == np.where(marked, before | Flag.DUPLICATE, before)).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("distribution", ["unique", "one", "pairs", "zipf", "same top bits"])
def test_many_pages(distribution: str, threads: int) -> None:
    n = 500_000
    chance = np.random.default_rng(5)
    frames = np.zeros(n, np.uint64)
    for flag in (Flag.VOLATILE, Flag.GONE, Flag.NEW, Flag.UNREAD, Flag.DUPLICATE, Flag.ZERO):
        frames[chance.random(n) < 0.05] |= flag
    match distribution:
        case "unique":
            content = np.arange(n)
        case "one":
            content = np.full(n, 7)
        case "pairs":
            content = chance.permutation(np.arange(n) // 2)
        case "zipf":
            content = chance.zipf(1.3, n)
        case _:
            # All in one part of the partition by the top bits.
            check(pages_of(chance.integers(0, 2**20, n), frames), threads)
            return
    spread = content.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    check(pages_of(spread, frames), threads)


@pytest.mark.parametrize("n", [0, 1, 2, grouping.ALONE_PAGES, grouping.ALONE_PAGES + 1])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_few_pages(n: int, threads: int) -> None:
    check(pages_of(np.arange(n) // 2 * 0x1234567891234567), threads)


def test_threads_change_nothing() -> None:
    """Neither the groups, nor what is counted: runs of several processes, cut anywhere."""
    n = 400_000
    chance = np.random.default_rng(7)
    hashes = chance.zipf(1.2, n).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    flags = np.array([Flag.EXCLUSIVE, Flag.THP, Flag.ZERO, Flag.GONE, Flag.SEEN], np.uint64)
    word = np.arange(n, dtype=np.uint64) | flags[chance.integers(0, 5, n)]
    ends = np.unique(chance.integers(1, n, 300))
    run_first = np.concatenate(([0], ends))
    run_count = np.diff(np.append(run_first, n))
    # Neither ascending by page, nor by process alone; an empty run is none.
    order = chance.permutation(len(run_first))
    found = []
    for threads in (1, 2, 4, 20):
        pages = replace(
            pages_of(hashes, word.copy()),
            run_first=run_first[order],
            run_count=run_count[order],
            run_region=np.arange(len(order)) // 40,
            regions=[
                Region(g // 2, 0, 1, "", "", frozenset(), True, "", True, True) for g in range(8)
            ],
        )
        groups = grouping.group(pages, threads)
        process = np.zeros(n, np.int64)
        for f, c, g in zip(pages.run_first, pages.run_count, pages.run_region, strict=True):
            process[f : f + c] = g // 2
        for p in range(4):
            for flag in (*flags, Flag.DUPLICATE):
                some = (process == p) & ((pages.frames & ~Flag.SEEN & flag) != 0)
                assert groups.census.by_process(4, flag, flag)[p] == some.sum()
        assert groups.census.of(np.uint64(0)) == n
        found.append((groups.order.tolist(), groups.offsets.tolist(), pages.frames.tolist()))
    assert all(f == found[0] for f in found)


def test_grouping_anew_forgets_the_old_marks() -> None:
    pages = pages_of(np.array([1, 1, 2, 2]))
    grouping.group(pages)
    pages.hashes[1] = 3
    assert grouping.group(pages).order.tolist() == [2, 3]
    assert ((pages.frames & Flag.DUPLICATE) != 0).tolist() == [False, False, True, True]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_more_pages_than_parts_are_meant_for() -> None:
    n = 40_000_000
    chance = np.random.default_rng(6)
    content = np.where(chance.random(n) < 0.5, np.arange(n), chance.integers(0, 10**6, n))
    spread = content.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    check(pages_of(spread), 2)
