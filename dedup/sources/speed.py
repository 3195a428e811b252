"""How fast this machine reads memory, in one go and page by page: measured on memory of our own."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.kernel import memory, processes

if TYPE_CHECKING:
    from dedup.kernel.pagemap import Sight

PROBE_BYTES: Final = 96 << 20
"""More than most caches hold."""
PROBE_RATE: Final = 0.1
NEXT_TO_NOTHING: Final = 1e-4
TIMES: Final = 2
"""Looks of each kind: the quicker one counts, for the first one warms up."""
LEAST_SHARE: Final = 0.01
"""What pages alone take of all of them, at the least: a guard against a lucky moment."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds a page."""

    found: float
    """To find it: smaps and pagemap."""
    read: float
    """To read and hash it beside all others."""
    alone: float
    """To read and hash it alone."""

    def seconds(self, pages: int, rate: float | None = None) -> float:
        """For a look at so many pages, or at a sample of them."""
        return pages * (self.found + (self.read if rate is None else self.alone * rate))

    def rate(self, pages: int, seconds: float) -> float:
        """Part of the pages that a look can read in that time; below 0 where it can't find them."""
        return (seconds / max(1, pages) - self.found) / self.alone


def measure(sight: Sight, threads: int) -> Speed:
    """Measure, in about a tenth of a second.

    Parameters
    ----------
    sight : Sight
    threads : int
        Reading threads.

    Raises
    ------
    MemoryError
    """
    size = PROBE_BYTES // sight.page_size * sight.page_size
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
        room.madvise(mmap.MADV_NOHUGEPAGE)
        words = np.frombuffer(room, np.uint64)
        # No two pages alike, and none constant.
        words[:] = np.arange(len(words), dtype=np.uint64)
        start = int(words.__array_interface__["data"][0])
        del words
        handle = processes.of_process(os.getpid())
        try:
            listed = _listed(handle)
            target = memory.Target(handle, fast=True)
            target.starts, target.ends = [start], [start + size]
            target.flags, target.regions = [0], [0]
            whole, some, none = (
                min(_look(target, sight, threads, rate) for _ in range(TIMES))
                for rate in (None, PROBE_RATE, NEXT_TO_NOTHING)
            )
        finally:
            handle.close()
    pages = size // sight.page_size
    return Speed(
        found=none / pages + listed * sight.page_size / max(size, handle.info.anonymous_bytes),
        read=max(0.0, whole - none) / pages,
        alone=max(some - none, LEAST_SHARE * whole) / pages / PROBE_RATE,
    )


def _listed(handle: processes.Handle) -> float:
    """Seconds for the kernel to walk our pages, as it does for smaps."""
    fd = handle.open("smaps_rollup")
    try:
        begin = time.perf_counter()
        os.pread(fd, PROBE_BYTES, 0)
        return time.perf_counter() - begin
    finally:
        os.close(fd)


def _look(target: memory.Target, sight: Sight, threads: int, rate: float | None) -> float:
    store = memory.Store.of(2 * PROBE_BYTES // sight.page_size)
    begin = time.perf_counter()
    memory.look([target], store, secrets.randbits(64), threads, sight, memory.Tally(), rate=rate)
    return time.perf_counter() - begin
