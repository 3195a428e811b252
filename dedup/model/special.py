"""Contents for which more than their number decides: one at a time, by their `fate`.

They have KSM pages, or sharing by fork that is hidden or beyond the limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dedup.model import fate
from dedup.model.copies import sorted_values
from dedup.model.fate import Members
from dedup.pages import Flag

if TYPE_CHECKING:
    from dedup.model.copies import Copies
    from dedup.model.fate import Fate
    from dedup.model.given import Given
    from dedup.model.huge import HugePages
    from dedup.model.totals import Totals
    from dedup.pages import Bool


class Special:
    """Adds up one content at a time.

    Parameters
    ----------
    given : Given
    totals : Totals
        What it adds to.
    huge : HugePages
        Where it notes which of them split.
    """

    def __init__(self, given: Given, totals: Totals, huge: HugePages) -> None:
        self.given, self.totals, self.huge = given, totals, huge

    def add(self, c: Copies, *, cut: bool = False) -> None:
        """Add up one content.

        Parameters
        ----------
        c : Copies
        cut : bool
            Searches of the unstable tree may be cut short (`zero.ZeroPages.cut`).
        """
        locked = bool(delayed_mappings(c).any())
        delayed = cut or locked
        self.add_fate(c, self.fate(c, delayed=delayed, spoils=locked))

    def fate(self, c: Copies, *, delayed: bool = False, spoils: bool = False) -> Fate:
        """What becomes of a content; `delayed` and `spoils` as for `fate.known`."""
        m, limit = self.members(c), self.given.limit
        known = self.given.rules.order_known
        if ((c.word & Flag.HIDDEN) != 0).any():
            if self.given.blind > 1:
                return fate.spread(m, limit, self.given.blind)
            return fate.hidden(m, limit, order_known=known, delayed=delayed)
        return fate.known(m, limit, order_known=known, delayed=delayed, spoils=spoils)

    def members(self, c: Copies) -> Members:
        """The mappings of a content."""
        return Members(
            frame=c.frame,
            process=c.process,
            rank=self.given.pages.scan_order(c.index),
            ksm=c.ksm,
            thp=c.thp,
            folio=self.huge.folio_of(c) if c.thp.any() else c.frame,
            maybe_shared=c.maybe_shared,
            maybe_ksm=c.maybe_ksm,
            outside=(c.word & Flag.OUTSIDE) != 0,
        )

    def add_fate(self, c: Copies, f: Fate) -> None:
        """Add up a content whose fate is known."""
        outside = len(sorted_values(c.frame[(c.word & Flag.OUTSIDE) != 0]))
        low = self.totals.add_outcome(len(c.index), outside, f, self.given.blind)
        self.totals.add_uncertain_merging(c.count(), c.count(f.stays), f)
        if c.thp.any():
            self.huge.add(c, f)
        if c.zero[0]:
            self.totals.zero_saved += low
        elif (c.process == c.process[0]).all():
            self.totals.within_saved += low
        else:
            self.totals.across_saved += low


def delayed_mappings(c: Copies) -> Bool:
    """Locked mappings of shared frames: they may make ksmd pass the frame's others by for once.

    Once such a mapping is merged, its old frame waits in the CPU's batch of pages to unlock,
    with a reference that blocks merging, until the next scan begins or anything on that CPU
    empties the batch (mm/mlock.c, munlock_folio). Where such a page lies in the unstable tree,
    a merge with it fails half way.
    """
    locked: Bool = np.asarray((c.word & Flag.LOCKED) != 0)
    if locked.any():
        locked &= ~c.alone & ~c.ksm
        _, which, mappings = np.unique(c.frame, return_inverse=True, return_counts=True)
        locked &= (mappings[which] > 1) | c.maybe_shared
    return locked
