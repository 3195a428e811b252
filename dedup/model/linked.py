"""Contents that huge pages tie together: several in one decide over each other.

They are scanned mapping by mapping (`order.Scanner`), where a content is among them whose order
decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.model.copies import distinct, joined
from dedup.model.order import ON_ZERO_PAGE, Memory, Scanner
from dedup.model.special import delayed_mappings
from dedup.pages import Flag

if TYPE_CHECKING:
    from dedup.model.copies import Copies
    from dedup.model.given import Given
    from dedup.model.huge import HugePages
    from dedup.model.totals import Totals
    from dedup.pages import I64, Bool

LINKED_MOST: Final = 1 << 18
"""Mappings that are scanned one by one at the most, where that makes ranges one number: 1 s."""


class Linked:
    """Scans what huge pages tie together, and adds it up.

    Parameters
    ----------
    given : Given
        Frames known, the order of processes too, nothing pinned.
    totals : Totals
        What it adds to.
    huge : HugePages
        Where it notes which of them split.
    """

    def __init__(self, given: Given, totals: Totals, huge: HugePages) -> None:
        self.given, self.totals, self.huge = given, totals, huge
        self.pages, self.rules, self.limit = given.pages, given.rules, given.limit

    def scan(self, c: Copies, zeros: Copies) -> tuple[Copies, Copies, bool] | None:
        """Scan mapping by mapping what huge pages tie to a content whose order decides.

        Parameters
        ----------
        c : Copies
            Contents that are not all zero.
        zeros : Copies
            All-zero pages.

        Returns
        -------
        tuple or None
            Contents left, all-zero pages left, and whether searches of the unstable tree may have
            been cut short (`zero.ZeroPages.cut`). None where ranges stay nonetheless.
        """
        both = joined(c, zeros)
        folio = np.where(both.thp, both.frame // self.pages.huge_pages, -1)
        linked = self._among(both, folio)
        chosen = linked[both.group]
        if not chosen.any() or np.count_nonzero(chosen) > LINKED_MOST:
            return None
        cut = self._add_scanned(both.take(chosen), folio[chosen])
        if cut and self._order_decides(c):
            return None
        n = len(c.index)
        return c.take(~chosen[:n]), zeros.take(~chosen[n:]), cut

    def _among(self, c: Copies, folio: I64) -> Bool:
        """Contents to scan: those whose order decides, and all in the same huge pages."""
        n = np.bincount(c.group, minlength=c.groups)
        huge = np.bincount(c.group, c.thp, c.groups) > 0
        zero = np.bincount(c.group, c.zero, c.groups) > 0
        shared = distinct(c.group, c.frame, c.groups, c.alone) < n
        linked: Bool = huge & ((n % self.limit == 1) | zero | (shared & (n > self.limit)))
        unsure = ((c.word & (Flag.OUTSIDE | Flag.HIDDEN)) != 0) | delayed_mappings(c)
        blind = np.bincount(c.group, unsure, c.groups) > 0
        if not linked.any():
            return linked
        while True:
            pages = np.unique(folio[linked[c.group] & c.thp])
            more = np.bincount(c.group, np.isin(folio, pages) & c.thp, c.groups) > 0
            if not (more & ~linked).any():
                break
            linked |= more
        return linked & ~blind if not (linked & blind).any() else np.zeros_like(linked)

    def _order_decides(self, c: Copies) -> bool:
        """Whether there are contents beyond the limit whose fate is a matter of order."""
        n = np.bincount(c.group, minlength=c.groups)
        shared = distinct(c.group, c.frame, c.groups, c.alone) < n
        return bool(((n > self.limit) & (shared | (n % self.limit == 1))).any())

    def _add_scanned(self, c: Copies, folio: I64) -> bool:
        """Scan these, and add them up; gives whether searches may have been cut short."""
        order = np.argsort(self.pages.scan_order(c.index))
        c, folio = c.take(order), folio[order]
        zero = np.bincount(c.group, c.zero, c.groups) > 0
        end = Scanner(
            Memory(
                c.group.tolist(),
                c.frame.tolist(),
                folio.tolist(),
                c.ksm.tolist(),
                frozenset(np.flatnonzero(zero).tolist()),
                frozenset(self.huge.locked.tolist()),
            ),
            self.limit,
            use_zero_pages=self.rules.use_zero_pages,
        ).run()
        on_node, placed = np.array(end.on_node), np.array(end.placed)
        gone = np.array(end.frame) == ON_ZERO_PAGE
        nodes = [len(frames) for frames in end.nodes.values()]
        self.totals.shared.add(sum(nodes))
        self.totals.sharing.add(int(on_node.sum()) - sum(nodes))
        self.totals.unshared.add(len(end.in_tree))
        self.totals.volatile.add(len(on_node) - int((on_node | gone).sum()) - len(end.in_tree))
        self.totals.chains.add(sum(n >= 2 for n in nodes))
        self.totals.dups.add(sum(n for n in nodes if n >= 2))
        self.totals.merging += c.count(on_node)[:, None]
        self.totals.zero.add(int(placed.sum()))
        self.totals.zero_by_process += c.count(placed)[:, None]
        self.totals.gone.add(int(gone.sum()))
        self.totals.gone_by_process += c.count(gone)[:, None]
        self.huge.split |= end.split
        left = {f for f in end.frame if f != ON_ZERO_PAGE}
        freed = len(np.unique(c.frame)) - len(left)
        self.totals.freed.add(freed)
        zero_left = set(np.array(end.frame)[c.zero & ~gone].tolist())
        zero_freed = len(np.unique(c.frame[c.zero])) - len(zero_left)
        self.totals.zero_saved += zero_freed
        self._add_split_of_savings(c, freed - zero_freed)
        return end.cut

    def _add_split_of_savings(self, c: Copies, freed: int) -> None:
        """Divide frames freed into those within a process and those across."""
        rest = ~c.zero
        pair = c.group[rest] * len(self.pages.processes) + c.process[rest]
        own = np.unique(np.stack((pair, c.frame[rest])), axis=1)[0]
        within = min(freed, len(own) - len(np.unique(own)))
        self.totals.within_saved += within
        self.totals.across_saved += freed - within
