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

ALONE_PAGES: Final = 1 << 16
"""So few are grouped sooner than threads start."""
STEP: Final = 1 << 18
"""Of an order, copied before its memory is given back."""
MANY_PAGES: Final = 1 << 20
"""Of more, each thread groups one slice after another: memory for its working is reused."""


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
    bits = 0 if n <= ALONE_PAGES else (threads - 1).bit_length() + (n > MANY_PAGES)
    # Without unstable pages, the frame words need not be read.
    skip = _core.clear(pages.frames, int(Flag.DUPLICATE)) & UNSTABLE

    def part(which: int) -> tuple[I64, I64, int]:
        return _core.group(pages.hashes, pages.frames, skip, bits, which)

    if bits == 0:
        return Groups(*part(0), census(pages), _core)
    if threads == 1:
        parts = [part(which) for which in range(1 << bits)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(part, range(1 << bits)))
    considered = sum(p[2] for p in parts)
    order = np.empty(sum(len(p[0]) for p in parts), np.int64)
    offsets = [np.zeros(1, np.int64)]
    at = 0
    while parts:
        some, ends, _ = parts.pop(0)
        for low in range(0, len(some), STEP):
            piece = some[low : low + STEP]
            order[at + low : at + low + len(piece)] = piece
            _core.let_go(piece)
        offsets.append(ends[1:] + at)
        at += len(some)
    return Groups(order, np.concatenate(offsets), considered, census(pages), _core)
