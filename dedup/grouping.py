"""Pages to groups: contents with their copies."""

from __future__ import annotations

from typing import Final

import numpy as np

from dedup import _core
from dedup.pages import Census, Flag, Groups, Pages

UNSTABLE: Final = int(Flag.VOLATILE | Flag.GONE | Flag.NEW | Flag.UNREAD)
"""Flags of pages whose content is not known to last: they take no part."""

ALONE_PAGES: Final = 1 << 16
"""So few are grouped sooner than threads start."""


def group(pages: Pages, threads: int = 1) -> Groups:
    """Group the pages that keep their content; marks them `DUPLICATE` in `pages.frames`.

    Parameters
    ----------
    pages : Pages
    threads : int
        That share the work, this one among them.

    Raises
    ------
    MemoryError
    """
    order, offsets, considered, census = _core.group(
        pages.hashes,
        pages.frames,
        UNSTABLE,
        pages.run_first,
        pages.run_count,
        pages.process_of_region()[pages.run_region],
        1 if len(pages.hashes) <= ALONE_PAGES else threads,
    )
    process, flags, count = census.T
    return Groups(order, offsets, considered, Census(process, flags.view(np.uint64), count), _core)
