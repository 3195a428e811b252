"""Pages to groups: contents with their copies."""

from __future__ import annotations

from dedup import _core
from dedup.pages import Flag, Groups, Pages

UNSTABLE = int(Flag.VOLATILE | Flag.GONE | Flag.NEW | Flag.UNREAD)
"""Flags of pages whose content is not known to last: they take no part."""


def group(pages: Pages) -> Groups:
    """Group the pages that keep their content; marks them `DUPLICATE` in `pages.frames`.

    Raises
    ------
    MemoryError
    """
    order, offsets, considered = _core.group(pages.hashes, pages.frames, UNSTABLE)
    return Groups(order, offsets, considered)
