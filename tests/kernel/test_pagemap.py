"""Which pages are present, what the kernel shows of frames, and how often each is mapped."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import _core
from dedup.kernel.pagemap import Sight, mappings_of, present_ranges, sight
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import Target, frames, pagemap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = mmap.PAGESIZE
PRESENT, FILE = 1 << 63, 1 << 61

needs_the_call = pytest.mark.skipif(
    not sight().pagemap_scan, reason="this kernel has no PAGEMAP_SCAN"
)


@pytest.fixture
def own() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


def touched_region(pages: int, touched: list[int]) -> tuple[mmap.mmap, int]:
    """Memory of ours with these pages written, and its address."""
    memory = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for i in touched:
        memory[i * PAGE] = 1
    with memoryview(memory) as view:
        return memory, _core.address_of(view)


def pages_in_ranges(fd: int, start: int, pages: int) -> list[int]:
    """Number of each page of each range, in the order given."""
    ranges = present_ranges(fd, start, start + pages * PAGE)
    return [
        p
        for begin, end in ranges[:, :2].tolist()
        for p in range((begin - start) // PAGE, (end - start) // PAGE)
    ]


@needs_the_call
@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_ranges_are_those_of_pagemap(touched: list[bool]) -> None:
    memory, start = touched_region(len(touched), [i for i, t in enumerate(touched) if t])
    words = pagemap(os.getpid(), start, len(touched))
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        found = pages_in_ranges(fd, start, len(touched))
    finally:
        os.close(fd)
    assert found == [i for i, w in enumerate(words) if w & PRESENT and not w & FILE]
    memory.close()


@needs_the_call
@pytest.mark.parametrize("count", [511, 512, 513, 4095, 4096, 4097, 8192, 12289])
@pytest.mark.parametrize("tail", [0, 1000])
def test_ranges_around_the_sizes_of_buffers(own: int, count: int, tail: int) -> None:
    """The kernel's of 512 ranges, ours of 4096: each page once, whatever is behind the last."""
    pages = 2 * count + tail
    _memory, start = touched_region(pages, list(range(0, 2 * count, 2)))
    assert pages_in_ranges(own, start, pages) == list(range(0, 2 * count, 2))


@needs_the_call
def test_read_untouched_and_shared_memory_is_left_out(own: int) -> None:
    memory, start = touched_region(10, [2])
    _ = memory[5 * PAGE]
    assert pages_in_ranges(own, start, 10) == [2]
    with mmap.mmap(-1, 10 * PAGE) as shared:
        shared[0] = 1
        with memoryview(shared) as view:
            assert pages_in_ranges(own, _core.address_of(view), 10) == []


def test_the_shared_zero_page() -> None:
    """What is read but never written maps it."""
    memory, start = touched_region(4, [1])
    _ = memory[0], memory[2 * PAGE]
    found = frames(os.getpid(), start, 4)
    if sight().frames:
        assert found[0] == found[2] == sight().zero_frame
        assert found[1] != sight().zero_frame
    else:
        assert not any(found)


@pytest.mark.root
def test_root_sees_all() -> None:
    here = sight()
    assert here.frames
    assert here.kpageflags
    assert here.kpagecount
    assert here.page_size == PAGE


def test_huge_pages_of_other_sizes(tmp_path: Path) -> None:
    """With small ones in use each page must be looked up."""
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    for size, enabled in {64: "always inherit madvise [never]", 2048: "[always] never"}.items():
        (tmp_path / f"hugepages-{size}kB").mkdir()
        (tmp_path / f"hugepages-{size}kB" / "enabled").write_text(enabled + "\n")
    assert not sight(thp=tmp_path).every_folio
    assert sight(thp=tmp_path).huge_bytes == 2 << 20
    (tmp_path / "hugepages-64kB" / "enabled").write_text("always inherit [madvise] never\n")
    sight.cache_clear()
    assert sight(thp=tmp_path).every_folio


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    found = sight(thp=tmp_path / "none")
    assert found.huge_bytes == 0
    assert not found.every_folio


@pytest.mark.root
def test_mappings_are_counted(target: Target) -> None:
    start = target.do("map", name="a", pages=8)
    target.do("fill", name="a", at=0, count=8, what="unique")
    numbers = np.array(frames(target.pid, start, 8), np.int64)
    assert mappings_of(numbers).tolist() == [1] * 8
    target.do("fork")
    target.do("fork")
    target.do("put", name="a", at=3, what=["x", "y"], child=(0,))
    assert mappings_of(numbers).tolist() == [3, 3, 3, 2, 2, 3, 3, 3]


def contents(target: Target, start: int, pages: int, sees: Sight) -> dict[int, tuple[int, int]]:
    """Hash and frame word of each page of a region, looked at with these means."""
    found = LiveSource([target.pid], Options(seed=9), sight=sees).first_look()
    everyone = np.arange(len(found.hashes))
    at = (found.address_of(everyone) - start) // PAGE
    return {
        int(at[i]): (int(found.hashes[i]), int(found.frames[i]))
        for i in np.flatnonzero((at >= 0) & (at < pages)).tolist()
    }


@pytest.mark.root
def test_without_the_call_a_look_finds_the_same(target: Target) -> None:
    """pagemap serves where the kernel has no PAGEMAP_SCAN: sparse, dense and huge."""
    huge = sight().huge_bytes
    pages = 4096
    start = target.do("map", name="a", pages=pages, align=huge or PAGE)
    target.do("advise", name="a", what="hugepage", at=0, count=1024)
    target.do("advise", name="a", what="nohugepage", at=1024)
    target.do("fill", name="a", at=0, count=512, what="unique")
    target.do("touch", name="a", at=1024, count=64)
    target.do("fill", name="a", at=1060, count=20, what="unique")
    target.do("fill", name="a", at=3000, count=3, what="zero")
    wanted = contents(target, start, pages, sight())
    assert len(wanted) >= 512 + 20 + 3
    assert contents(target, start, pages, replace(sight(), pagemap_scan=False)) == wanted
