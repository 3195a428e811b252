"""Reading: each way finds each page once, with arrays of any size, in any number of threads."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
import xxhash

from dedup import _core
from dedup.kernel import memory
from dedup.kernel.memory import Ranges, Store, Tally, Target, load_hash
from dedup.kernel.pagemap import sight
from dedup.kernel.processes import Handle

PAGE = mmap.PAGESIZE
SEED = 5


class Region:
    """Memory of our own, small pages: those of `what`, each of its bytes over and over."""

    def __init__(self, pages: int, what: dict[int, bytes]) -> None:
        self.map = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.what = what
        for page, data in what.items():
            self.map[page * PAGE : (page + 1) * PAGE] = self.content(data)
        with memoryview(self.map) as view:
            self.start = _core.address_of(view)
        self.end = self.start + pages * PAGE

    @staticmethod
    def content(data: bytes) -> bytes:
        return (data * (PAGE // len(data) + 1))[:PAGE]

    def hashes(self) -> dict[int, int]:
        return {
            page: xxhash.xxh3_64_intdigest(self.content(data), SEED)
            for page, data in self.what.items()
        }


def look(
    region: Region, room: int, threads: int = 1, *, fast: bool = True, in_place: bool = False
) -> tuple[dict[int, int], Tally]:
    """The hash of each page found, by arrays that hold `room` pages at first."""
    store, tally = Store.of(room), Tally()
    with Handle(os.getpid()) as handle:
        target = Target(handle, fast, in_place, Ranges.of([(region.start, region.end, 0, 0)]))
        found = memory.look([target], store, SEED, threads, sight(), tally)
    hashes: dict[int, int] = {}
    for start, count, first in zip(found.start, found.count, found.first, strict=True):
        for i in range(int(count)):
            page = (int(start) - region.start) // PAGE + i
            assert page not in hashes
            hashes[page] = int(store.hashes[int(first) + i])
    assert len(hashes) == store.used
    return hashes, tally


SPARSE = {i: i.to_bytes(8, "little") for i in range(6000) if i % 7 != 3}
WAYS = {"fast": (True, False), "slow": (False, False), "in place": (True, True)}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("way", WAYS)
def test_arrays_that_are_too_small_grow(way: str, threads: int) -> None:
    region = Region(6000, SPARSE)
    fast, in_place = WAYS[way]
    wanted = region.hashes()
    for room in (0, 1, 511, 512, 513, len(SPARSE) - 1, len(SPARSE), 10_000):
        assert look(region, room, threads, fast=fast, in_place=in_place)[0] == wanted


@pytest.mark.parametrize("way", WAYS)
def test_each_way_finds_the_same(way: str) -> None:
    """Constant pages, all-zero ones, and those that differ in the last byte."""
    region = Region(
        64,
        {
            0: bytes(8),
            1: b"\x01",
            2: b"12345678",
            3: bytes(8),
            5: b"123456789",
            **{i: bytes(PAGE - 1) + bytes([i]) for i in range(40, 50)},
        },
    )
    fast, in_place = WAYS[way]
    hashes, tally = look(region, 100, fast=fast, in_place=in_place)
    assert hashes == region.hashes()
    read = (tally.process_vm_readv_pages, tally.proc_mem_pages, tally.in_place_pages)
    number = len(region.what)
    assert read == {"fast": (number, 0, 0), "slow": (0, number, 0), "in place": (0, 0, number)}[way]
    assert tally.unread_pages == 0
    assert tally.bytes_read == number * PAGE


def test_threads_share_the_work() -> None:
    chance = np.random.default_rng(1)
    region = Region(20_000, {i: chance.bytes(PAGE) for i in range(20_000)})
    wanted = region.hashes()
    for threads in (1, 2, 4):
        assert look(region, 20_000, threads)[0] == wanted
    seen: list[tuple[int, int]] = []
    store = Store.of(20_000)
    with Handle(os.getpid()) as handle:
        target = Target(handle, True, False, Ranges.of([(region.start, region.end, 0, 0)]))
        memory.look([target], store, SEED, 2, sight(), Tally(), None, lambda *at: seen.append(at))
    assert store.used == 20_000
    assert all(done <= total == 20_000 for done, total in seen)


def test_stores_keep_what_they_hold() -> None:
    store = Store.of(3)
    store.hashes[:] = [1, 2, 3]
    store.frames[:] = [4, 5, 6]
    store.used = 2
    store.grow(10)
    assert len(store.hashes) == len(store.frames) >= 12
    assert store.hashes[:2].tolist() == [1, 2]
    assert store.frames[:2].tolist() == [4, 5]


def test_threads_are_within_the_cores_that_we_may_use() -> None:
    cores = os.sched_getaffinity(0)
    assert 1 <= memory.default_threads() <= len(cores)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert memory.default_threads() == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_the_hash_in_use_is_named() -> None:
    source = load_hash(PAGE)
    assert source.partition(":")[0] in {"xxhash-package", "libxxhash", "python"}
