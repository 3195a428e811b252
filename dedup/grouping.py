"""Pages to groups: contents with their copies."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup import _core
from dedup.pages import Census, Flag, Groups, Pages

if TYPE_CHECKING:
    from dedup.pages import I64

UNSTABLE: Final = int(Flag.VOLATILE | Flag.GONE | Flag.NEW | Flag.UNREAD)
"""Flags of pages whose content is not known to last: they take no part."""

SLICE_PAGES: Final = 1 << 24
"""Pages grouped at a time, at the most: 256 MiB for the records."""
ALONE_PAGES: Final = 1 << 16
"""So few are grouped sooner than threads start."""


def census(pages: Pages) -> Census:
    """Count the pages by process and flags."""
    process = pages.process_of_region()[pages.run_region]
    return Census(*_core.census(pages.frames, pages.run_first, pages.run_count, process))


def group(pages: Pages, threads: int = 1) -> Groups:
    """Group the pages that keep their content; marks them `DUPLICATE` in `pages.frames`.

    Parameters
    ----------
    pages : Pages
    threads : int
        That group slices of the hash space side by side.

    Raises
    ------
    MemoryError
    """
    n = len(pages.hashes)
    threads = 1 if n <= ALONE_PAGES else threads
    bits = 0
    while (1 << bits) < threads or (n >> bits) > SLICE_PAGES:
        bits += 1
    pages.frames &= ~Flag.DUPLICATE

    def part(which: int) -> tuple[I64, I64, int]:
        return _core.group(pages.hashes, pages.frames, UNSTABLE, bits, which)

    if bits == 0:
        return Groups(*part(0), census(pages))
    with ThreadPoolExecutor(threads) as pool:
        orders, ends, considered = zip(*pool.map(part, range(1 << bits)), strict=True)
    before = np.cumsum([0, *(len(o) for o in orders)])
    offsets = [e[1:] + b for e, b in zip(ends, before, strict=False)]
    return Groups(
        np.concatenate(orders),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        sum(considered),
        census(pages),
    )
