"""Huge pages: which page lies in which, which are locked, and which of them split.

Sources: mm/ksm.c (try_to_merge_one_page: a huge page splits when one of its pages merges),
mm/migrate.c (try_to_map_unused_to_zeropage).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dedup.model.copies import ABSENT
from dedup.model.prediction import Range
from dedup.pages import Flag

if TYPE_CHECKING:
    from dedup.model.copies import Copies
    from dedup.model.fate import Fate
    from dedup.model.given import Given
    from dedup.pages import I64


class HugePages:
    """The huge pages of a prediction, by number.

    Parameters
    ----------
    given : Given
    """

    def __init__(self, given: Given) -> None:
        self.given, self.pages = given, given.pages
        self.split: set[int] = set()
        """Those that split for sure."""
        self.may_split: set[int] = set()
        self.one_stays: list[set[int]] = []
        """Sets of which one at the most stays whole."""
        self.shared: set[int] = set()
        """Those that two processes may see, each by a number of its own."""
        self.locked = np.empty(0, np.int64)
        """Those whose all-zero pages a split leaves in place."""
        self.locked_hidden = False
        """Whether other processes' huge pages are the same is hidden."""
        self.safe: set[int] | None = None
        """With pinned pages: those that split unless pinned themselves."""

    def folio_of(self, c: Copies) -> I64:
        """A number for the huge page of each page; below 0 where frame numbers are hidden.

        Then, each process has numbers of its own.
        """
        huge = self.pages.huge_pages
        hidden = (c.word & Flag.HIDDEN) != 0
        folio = c.frame // huge
        if hidden.any():
            address = self.pages.address_of(c.index[hidden]) // (self.pages.page_size * huge)
            folio[hidden] = -1 - (address * len(self.pages.processes) + c.process[hidden])
            self.shared.update(folio[c.thp & c.maybe_shared].tolist())
        return folio

    def find_locked(self) -> None:
        """Find the huge pages that any of their mappings locks, whatever it holds itself.

        Source: mm/migrate.c, try_to_map_unused_to_zeropage: PG_mlocked is the huge page's.
        """
        pages, lock = self.pages, Flag.THP | Flag.LOCKED
        if not self.given.census.of(ABSENT | lock, lock):
            return
        index = np.flatnonzero((pages.frames & (ABSENT | lock)) == lock)
        c = self.given.copies(index, np.zeros(len(index), np.int64), 1)
        self.locked = np.unique(self.folio_of(c))
        self.locked_hidden = bool(((c.word & Flag.HIDDEN) != 0).any()) and len(pages.processes) > 1

    def add(self, c: Copies, f: Fate) -> None:
        """Note those that split by the fate of a content, as any of their pages merges."""
        folio = self.folio_of(c)
        surely = set(folio[c.thp & ~f.stays].tolist())
        if f.one_frame and not f.exact:
            # Two frames of the content in a huge page: one of them merges.
            inside = np.flatnonzero(c.thp & f.stays)
            _, where = np.unique(c.frame[inside], return_index=True)
            folios, count = np.unique(folio[inside][where], return_counts=True)
            surely |= set(folios[count >= 2].tolist())
        self.split |= surely
        rest = set(folio[c.thp & f.stays].tolist()) - surely
        if f.exact or not rest:
            return
        if f.one_frame:
            self.one_stays.append(rest)
        else:
            self.may_split |= rest

    def count(self) -> Range:
        """How many split."""
        among = set().union(*self.one_stays)
        low = max(len(self.split), len(self.split | among) - len(self.one_stays))
        high = len(self.split | among | self.may_split)
        if self.shared:
            low = self._at_least(self.split)
        if self.safe is not None:
            low = min(low, max(0, self._at_least(self.split & self.safe) - self.given.pinned))
        split = Range()
        split.add(low, high)
        return split

    def _at_least(self, folios: set[int]) -> int:
        """How many huge pages these are; hidden, two processes may see the same one."""
        shared = folios & self.shared
        seen = np.array([-1 - f for f in shared], np.int64) % len(self.pages.processes)
        most = int(np.bincount(seen).max()) if len(seen) else 0
        return len(folios - self.shared) + most
