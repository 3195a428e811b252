"""How fast this machine reads memory, in one go and page by page: measured on memory of our own."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.kernel import maps, memory, processes

if TYPE_CHECKING:
    from dedup.kernel.pagemap import Sight

PROBE_BYTES: Final = 96 << 20
"""More than most caches hold."""
PROBE_RATE: Final = 0.1
NEXT_TO_NOTHING: Final = 1e-4


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
            begin = time.perf_counter()
            mappings = maps.read(handle)
            listed = time.perf_counter() - begin
            ours = sum(m.anonymous_bytes for m in mappings) // sight.page_size
            target = memory.Target(handle, fast=True)
            target.starts, target.ends = [start], [start + size]
            target.flags, target.regions = [0], [0]
            seconds = []
            # The first one is a warm-up.
            for rate in (None, None, PROBE_RATE, NEXT_TO_NOTHING):
                store = memory.Store.of(2 * size // sight.page_size)
                begin = time.perf_counter()
                memory.look(
                    [target], store, secrets.randbits(64), threads, sight, memory.Tally(), rate=rate
                )
                seconds.append(time.perf_counter() - begin)
        finally:
            handle.close()
    pages = size // sight.page_size
    _, whole, some, none = seconds
    return Speed(
        found=none / pages + listed / max(1, ours),
        read=max(0.0, whole - none) / pages,
        alone=max(some - none, 0.01 * whole) / pages / PROBE_RATE,
    )
