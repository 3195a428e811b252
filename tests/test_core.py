"""The compiled core: hash, grouping, flags, system calls."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections import Counter

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import _core, grouping
from dedup.kernel import pagemap
from dedup.kernel.memory import load_hash
from dedup.kernel.processes import Handle
from dedup.pages import FRAME_MASK, Flag, Pages
from dedup.scanning import Plan, scan_pids
from dedup.sources.live import LiveSource, Options
from tests.kernel_fixtures import Target

PAGE = mmap.PAGESIZE
SEEDS = st.integers(0, 2**64 - 1)
FLAG_SETS = [int(Flag.EXCLUSIVE), int(Flag.SEEN | Flag.ZERO), int(Flag.OUTSIDE | Flag.KSM)]


@given(st.binary(min_size=241, max_size=PAGE), SEEDS)
def test_the_hash_is_xxh3(data: bytes, seed: int) -> None:
    load_hash(PAGE)
    assert _core.hash_bytes(data, seed) == xxhash.xxh3_64_intdigest(data, seed)


def test_short_input_is_refused() -> None:
    load_hash(PAGE)
    with pytest.raises(ValueError, match="240"):
        _core.hash_bytes(bytes(240), 1)


@pytest.mark.parametrize("candidates", ["[('/nonexistent.so', 'x')]", "[('libc.so.6', 'x')]", "[]"])
def test_the_fallback_gives_the_same_values(candidates: str) -> None:
    """No library, one that can't be loaded, one without the symbols: the Python call serves."""
    code = (
        "import xxhash\n"
        "from dedup import _core\n"
        f"source = _core.load_hash({candidates}, xxhash.xxh3_64_intdigest, 4096)\n"
        "data = bytes(range(256)) * 16\n"
        "for seed in (0, 7, 2**64 - 1):\n"
        "    assert _core.hash_bytes(data, seed) == xxhash.xxh3_64_intdigest(data, seed)\n"
        "import os\n"
        "from dedup.kernel import memory\n"
        "memory.load_hash.__wrapped__ and None\n"
        "print(source)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "python:xxh3_64_intdigest\n"


def test_a_scan_with_the_fallback_finds_the_same() -> None:
    """The whole pipeline with the Python call, in threads."""
    code = (
        "import sys, numpy as np, xxhash\n"
        "from dedup import _core\n"
        "from dedup.kernel import memory\n"
        "slow = lambda size: _core.load_hash([], xxhash.xxh3_64_intdigest, size)\n"
        "if sys.argv[2] == 'slow': memory.load_hash = slow\n"
        "from dedup.sources.live import LiveSource, Options\n"
        "pages = LiveSource([int(sys.argv[1])], Options(seed=5, threads=2)).first_look()\n"
        "print(len(pages.hashes), int(np.bitwise_xor.reduce(pages.hashes)))\n"
    )
    with Target() as target:
        target.do("map", name="a", pages=3000)
        target.do("fill", name="a", at=0, count=2000, what="unique")
        target.do("fill", name="a", at=2000, count=1000, what="zero")
        found = {
            subprocess.run(
                [sys.executable, "-c", code, str(target.pid), how],
                capture_output=True, text=True, check=True,
            ).stdout
            for how in ("slow", "fast")
        }  # fmt: skip
    assert len(found) == 1


def test_flags_are_the_same_on_both_sides() -> None:
    python = {n: int(v) for n, v in vars(Flag).items() if n.isupper()}
    assert python == _core.FLAGS
    assert not any(v & int(FRAME_MASK) for v in python.values())


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1]), max_size=300),
    st.data(),
    st.integers(1, 4),
)
def test_grouping_equals_unique(values: list[int], data: st.DataObject, threads: int) -> None:
    hashes = np.array(values, np.uint64)
    skip = int(Flag.GONE)
    drawn = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    gone = np.array(drawn, bool)
    frames = np.where(gone, Flag.GONE, np.uint64(5)).astype(np.uint64)
    nothing = np.zeros(0, np.int64)
    order, offsets, considered, census = _core.group(
        hashes, frames, skip, nothing, nothing, nothing, threads
    )
    assert considered == int((~gone).sum())
    assert len(census) == 0
    kept = np.flatnonzero(~gone)
    unique, inverse, counts = np.unique(hashes[kept], return_inverse=True, return_counts=True)
    expected = sorted(
        kept[np.flatnonzero(inverse == g)].tolist() for g in np.flatnonzero(counts >= 2)
    )
    found = sorted(order[offsets[g] : offsets[g + 1]].tolist() for g in range(len(offsets) - 1))
    assert found == expected
    marked = np.flatnonzero((frames & Flag.DUPLICATE) != 0).tolist()
    assert marked == sorted(i for g in expected for i in g)
    assert len(unique) >= len(expected)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.sampled_from([0, *FLAG_SETS]), max_size=40),
        ),
        max_size=12,
    ),
    st.integers(1, 3),
    st.booleans(),
)
def test_census_counts_each_page_once(
    runs: list[tuple[int, list[int]]], threads: int, between: bool
) -> None:
    """By process and flags, whatever the frame numbers, and pages of no run left out."""
    expected: Counter[tuple[int, int]] = Counter()
    frames, first = [7] * between, []
    for process, words in runs:
        first.append(len(frames))
        frames += [w | (i + 1) for i, w in enumerate(words)] + [int(Flag.GONE)] * between
        expected.update((process, w & ~int(Flag.SEEN | Flag.DUPLICATE)) for w in words)
    count = [len(words) for _, words in runs]
    *_, census = _core.group(
        np.arange(len(frames), dtype=np.uint64),
        np.array(frames, np.uint64),
        0,
        np.array(first, np.int64),
        np.array(count, np.int64),
        np.array([p for p, _ in runs], np.int64),
        threads,
    )
    found: Counter[tuple[int, int]] = Counter()
    for p, f, n in census.tolist():
        assert n > 0
        found[p, f] += n
    assert found == expected


def test_census_refuses_a_run_beyond_the_pages() -> None:
    one, pages = np.ones(1, np.int64), np.zeros(1, np.uint64)
    with pytest.raises(ValueError, match="beyond the pages"):
        _core.group(pages, pages.copy(), 0, one, one, one)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_grouping_of_many_pages(threads: int) -> None:
    """In threads: as unique has it."""
    rng = np.random.default_rng(1)
    n = 2_000_000
    hashes = rng.integers(0, 2**63, n, dtype=np.uint64) * np.uint64(2)
    hashes[: n // 2] = hashes[rng.integers(n // 2, n // 2 + 50_000, n // 2)]
    hashes[: n // 8] = hashes[0]

    nothing = np.zeros(0, np.int64)
    frames = np.zeros(n, np.uint64)
    pages = Pages(4096, hashes, frames, nothing, nothing, nothing, nothing, [], [])
    groups = grouping.group(pages, threads)
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    assert len(groups.offsets) - 1 == int((counts >= 2).sum())
    assert sorted(np.diff(groups.offsets).tolist()) == sorted(counts[counts >= 2].tolist())
    assert (np.sort(groups.order) == np.flatnonzero(counts[inverse] >= 2)).all()
    starts = hashes[groups.order[groups.offsets[:-1]]]
    assert (np.repeat(starts, np.diff(groups.offsets)) == hashes[groups.order]).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 40) | st.integers(0, 5000), max_size=60), st.booleans())
def test_words_of_a_file(indices: list[int], ascending: bool) -> None:
    """In any order, close together or not; all ones beyond the end."""
    indices = sorted(indices) if ascending else indices
    with tempfile.TemporaryFile() as file:
        file.write(np.arange(3000, dtype=np.uint64).tobytes())
        file.flush()
        words = _core.read_words(file.fileno(), np.array(indices, np.int64))
    assert words.tolist() == [i if i < 3000 else 2**64 - 1 for i in indices]


def test_pagemap_scan_gives_no_range_twice() -> None:
    """More ranges than our vector and the kernel's own buffer (512) hold."""
    if not pagemap.sight().pagemap_scan:
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    pages = 20_000
    memory = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for i in range(0, pages, 2):
        memory[i * PAGE] = 1
    with memoryview(memory) as view:
        start = _core.address_of(view)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        ranges = pagemap.present_ranges(fd, start, start + pages * PAGE)
    finally:
        os.close(fd)
    begins = ((ranges[:, 0] - np.uint64(start)) // np.uint64(PAGE)).astype(np.int64)
    assert begins.tolist() == list(range(0, pages, 2))
    assert ((ranges[:, 1] - ranges[:, 0]) == PAGE).all()


def test_arrays_too_small_are_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a few pages: the job is continued in larger arrays, and finds the same."""
    from dedup.kernel import memory

    with Target() as target:
        target.do("map", name="a", pages=30_000)
        target.do("fill", name="a", at=0, count=30_000, what="unique")
        expected = LiveSource([target.pid], Options(seed=3)).first_look()
        small = memory.Store.of(100)
        monkeypatch.setattr(memory.Store, "of", classmethod(lambda _cls, _pages: small))
        found = LiveSource([target.pid], Options(seed=3, threads=2)).first_look()
    assert len(found.hashes) == len(expected.hashes)
    assert (np.sort(found.hashes) == np.sort(expected.hashes)).all()
    assert found.run_count.sum() == len(found.hashes)
    assert (np.sort(found.run_start) >= 0).all()


def test_memory_stays_bounded_over_many_scans() -> None:
    def rss() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1])

    with Target() as target:
        target.do("map", name="a", pages=20_000)
        target.do("fill", name="a", at=0, count=20_000, what="x")
        for _ in range(5):
            scan_pids([target.pid], Plan(passes=1))
        before = rss()
        for _ in range(40):
            scan_pids([target.pid], Plan(passes=1))
        assert rss() - before < 2000, "pages"
        with Handle(target.pid) as handle:
            assert len(os.listdir("/proc/self/fd")) < 40
            assert handle.alive()
