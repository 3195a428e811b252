"""`dedup.merge`: our own arrays."""

from __future__ import annotations

import mmap
import multiprocessing.shared_memory
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import dedup
from dedup.errors import KsmNotRunning, NotMergeable, Usage
from dedup.kernel import maps
from dedup.kernel.ksm import Ksm
from dedup.kernel.processes import Handle
from dedup.merging import piece_of

PAGE = mmap.PAGESIZE


def pair(pages: int = 300) -> tuple[Any, Any]:
    """Two arrays of the same pages, each in whole pages: else their pages would differ."""
    table, copy = (
        np.frombuffer(mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        for _ in range(2)
    )
    table[:] = copy[:] = np.random.default_rng().integers(0, 256, pages * PAGE, dtype=np.uint8)
    return table, copy


def own_ksm_bytes() -> int:
    import os

    with Handle(os.getpid()) as handle:
        return sum(m.ksm_bytes or 0 for m in maps.read(handle))


@pytest.mark.ksm
@pytest.mark.root
def test_merged_verified_unmerged() -> None:
    before = Ksm().tunables()
    table, copy = pair()
    kept = table.copy()
    with dedup.merge(table, copy) as merged:
        assert not any(merged.difference.values())
        merging = merged.actual["ksm_merging_pages"]
        assert merging == merged.predicted["ksm_merging_pages"]
        assert merging == 2 * 300
        assert own_ksm_bytes() == merging * PAGE
        copy[5] ^= 1
        assert own_ksm_bytes() == (merging - 1) * PAGE
        copy[5] ^= 1
    assert own_ksm_bytes() == 0
    assert (table == kept).all()
    assert Ksm().tunables() == before
    assert Ksm().counters().rmap_items == 0


@pytest.mark.ksm
@pytest.mark.root
def test_huge_pages_split_where_they_merge() -> None:
    memory = mmap.mmap(-1, 6 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.__array_interface__["data"][0] % (2 << 20)
    array = array[start : start + (4 << 20)]
    array[: 2 << 20] = np.random.default_rng().integers(0, 256, 2 << 20, dtype=np.uint8)
    array[2 << 20 :] = array[: 2 << 20]
    with dedup.merge(array) as merged:
        assert merged.scan.prediction.thp_split == 2
        assert merged.actual["ksm_merging_pages"] == 1024
        assert not any(merged.difference.values())


@pytest.mark.ksm
@pytest.mark.root
def test_an_error_inside_the_block_unmerges_too() -> None:
    table, copy = pair(50)
    with pytest.raises(ZeroDivisionError), dedup.merge(table, copy):
        raise ZeroDivisionError
    assert own_ksm_bytes() == 0


@pytest.mark.ksm
@pytest.mark.root
def test_without_root_where_ksmd_rests() -> None:
    code = (
        "import ctypes, os, numpy, dedup, dedup.merging\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"  # dumpable, as a program begun by nobody
        "try:\n"
        "    with dedup.merge(numpy.ones((9, 4096))): pass\n"
        "except dedup.DedupError as e: print(type(e).__name__, e.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(KsmNotRunning.__name__)


def test_ends_that_are_no_whole_page_are_left_out() -> None:
    memory = mmap.mmap(-1, 8 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)[100 : 5 * PAGE + 7]
    piece = piece_of(array)
    assert piece.span.start % PAGE == 0
    assert piece.span.length == 4 * PAGE
    assert piece.left_out_bytes == PAGE - 100 + 7


def test_what_does_not_merge_is_refused_with_the_reason() -> None:
    with pytest.raises(NotMergeable, match="contiguous"):
        piece_of(np.zeros((10, PAGE), np.uint8)[:, ::2])
    with pytest.raises(NotMergeable, match="no whole page"):
        piece_of(np.zeros(10))
    with pytest.raises(NotMergeable, match="no array"):
        dedup.merge()
    shared = multiprocessing.shared_memory.SharedMemory(create=True, size=16 * PAGE)
    try:
        assert shared.buf is not None
        array = np.frombuffer(shared.buf, np.uint8)
        array[:] = 1
        merge = dedup.merge(array)
        with pytest.raises(NotMergeable, match="shared"):
            merge.__enter__()
        del array, merge
    finally:
        shared.close()
        shared.unlink()


def test_scan_of_own_arrays_in_place() -> None:
    table, copy = pair(100)
    scan = dedup.scan(arrays=[table, copy], interval_seconds=0.1)
    assert scan.tally.in_place_pages > 0
    assert scan.tally.process_vm_readv_pages == scan.tally.proc_mem_pages == 0
    assert scan.prediction.pages_shared == 100


def test_scan_of_overlapping_pieces_counts_each_page_once() -> None:
    memory = mmap.mmap(-1, 64 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)
    array[:] = 3
    pieces = [array[40 * PAGE :], array[: 20 * PAGE], array[10 * PAGE : 50 * PAGE]]
    scan = dedup.scan(arrays=pieces, interval_seconds=0.1)
    assert scan.scanned_pages == 64
    assert scan.prediction.pages_volatile == 0


def test_scan_wants_one_of_pids_and_arrays() -> None:
    with pytest.raises(dedup.DedupError, match="nothing chosen"):
        dedup.scan()
    with pytest.raises(dedup.DedupError, match="together"):
        dedup.scan([1], arrays=[np.zeros(PAGE)])


def test_arguments_without_sense_are_refused() -> None:
    import os

    me = os.getpid()
    for words in (
        {"threads": -1}, {"scope": "x"}, {"seed": -1}, {"seed": 2**64}, {"passes": 1.5},
        {"interval_seconds": float("nan")}, {"interval_seconds": -1}, {"full_scan_seconds": 0},
    ):  # fmt: skip
        with pytest.raises(Usage):
            dedup.scan([me], **words)
    for pids in (me, "self", ["self"], [0]):
        with pytest.raises(Usage):
            dedup.scan(pids)  # type: ignore[arg-type]
    for thing in (memoryview(b"x" * 99999)[::2], [1, 2], None):
        with pytest.raises(NotMergeable, match="no array"):
            dedup.merge(thing)


@pytest.mark.ksm
@pytest.mark.root
def test_inside_another_merge_it_is_refused() -> None:
    table, copy = pair(20)
    other, another = pair(20)
    with dedup.merge(table, copy), pytest.raises(NotMergeable, match="already"):
        dedup.merge(other, another).__enter__()


@pytest.mark.ksm
@pytest.mark.root
def test_leaving_while_another_run_holds_the_lock() -> None:
    from dedup.kernel.lock import HostLock

    table, copy = pair(20)
    lock = HostLock()
    with dedup.merge(table, copy):
        lock.acquire()
    lock.release()
    assert own_ksm_bytes() == 0
    # What it could not have ksmd drop is dropped by the next one.
    with dedup.merge(table, copy) as merged:
        assert not any(merged.difference.values())
    assert Ksm().counters().rmap_items == 0
