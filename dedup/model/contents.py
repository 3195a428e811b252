"""Contents that are not all zero: most of them by sums over many at once.

Sources: mm/ksm.c (cmp_and_merge_page, stable_node_dup).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from dedup.model import fate
from dedup.model.copies import NOT_STABLE, distinct, starts, values
from dedup.model.fate import closed_form
from dedup.model.special import Special
from dedup.model.totals import given_back
from dedup.pages import NO_FLAG, Flag

if TYPE_CHECKING:
    from dedup.model.copies import Copies
    from dedup.model.given import Given
    from dedup.model.huge import HugePages
    from dedup.model.totals import Totals
    from dedup.pages import I64, U32, Bool, Groups, Sums

NOT_SIMPLE: Final = Flag.KSM | Flag.ZERO | Flag.OUTSIDE | Flag.HIDDEN
"""Flags of pages for which more than their number decides."""

LARGE_PAGES: Final = 1 << 13
"""Mappings from which on a content is too large for arrays of all that is known of each."""


class _Merged(NamedTuple):
    """What became of contents, as arrays."""

    which: Bool
    """Contents whose mappings are on nodes."""
    one_frame: Bool
    """Contents of one frame, shared by fork."""
    left: I64
    """Mappings on no node, of those contents of `which`."""
    freed: I64
    """Frames given back by these, at the least."""


class Contents:
    """Adds up all contents but the all-zero one.

    Parameters
    ----------
    given : Given
    totals : Totals
        What it adds to.
    huge : HugePages
        Where it notes which of them split.
    linked : bool
        What huge pages tie together is left to `linked.Linked`.
    """

    def __init__(
        self, given: Given, totals: Totals, huge: HugePages, *, linked: bool = False
    ) -> None:
        self.given, self.totals, self.huge, self.linked = given, totals, huge, linked
        self.pages, self.groups, self.rules = given.pages, given.groups, given.rules
        self.census, self.limit = given.census, given.limit
        self.special = Special(given, totals, huge)
        self.left_over = np.zeros((3, len(self.pages.processes)), np.int64)
        """Of contents with one mapping left over, those of each process; see `by_process`."""

    # -- there once ----------------------------------------------------------------------------

    def add_singles(self) -> None:
        """Add up contents that are there once."""
        mask = NOT_STABLE | Flag.ZERO | Flag.DUPLICATE
        n = self.census.of(mask)
        if not len(self.given.lonely) and self.census.of(mask | Flag.KSM | Flag.HIDDEN) == n:
            self.totals.unshared.add(n)
            return
        word = self.pages.frames
        single = (word & mask) == 0
        single[self.given.lonely] = (word[self.given.lonely] & Flag.ZERO) == 0
        self._singles(single)

    def _singles(self, single: Bool) -> None:
        """Add them up one by one: unshared, or a KSM page that lost its partners."""
        word = self.pages.frames
        ksm = np.flatnonzero(single & ((word & Flag.KSM) != 0))
        self.totals.unshared.add(int(np.count_nonzero(single)) - len(ksm))
        self.totals.shared.add(len(ksm))
        np.add.at(self.totals.merging, self.given.process_of(ksm), 1)
        hidden = np.flatnonzero(single & ((word & Flag.HIDDEN) != 0) & ((word & Flag.THP) == 0))
        if not len(hidden):
            return
        # Some of them may be KSM pages that other processes share.
        page = self.pages.page_size
        in_region = np.bincount(self.pages.region_of(hidden), minlength=len(self.pages.regions))
        for region, n in zip(self.pages.regions, in_region.tolist(), strict=True):
            most = min(n, region.ksm_bytes // page)
            if most:
                self.totals.shared.add(0, most)
                self.totals.unshared.add(-most, 0)
                self.totals.merging[region.process, 1] += most

    # -- without a closer look -----------------------------------------------------------------

    def rest(self, groups: Groups) -> Copies:
        """Add up the contents that need no closer look; give the others.

        They are most of what a scan finds. All-zero pages are left out.
        """
        which = self._but_simple(groups)
        for g in np.flatnonzero(which & (np.diff(groups.offsets) >= LARGE_PAGES)).tolist():
            if self._add_large(groups.order[groups.offsets[g] : groups.offsets[g + 1]]):
                which[g] = False
        index, sizes = groups.of(which)
        return self.given.copies(index, np.repeat(np.arange(len(sizes)), sizes), len(sizes))

    def joined_rest(self) -> Copies:
        """The same for all contents."""
        parts = [piece.of(self._but_simple(piece)) for piece in self.groups.pieces()]
        index, sizes = (np.concatenate(p) for p in zip(*parts, strict=True))
        return self.given.copies(index, np.repeat(np.arange(len(sizes)), sizes), len(sizes))

    def _but_simple(self, groups: Groups) -> Bool:
        """Add up what needs no closer look of some contents; gives which of them are left."""
        frames, sizes = self.pages.frames, np.diff(groups.offsets)
        several = len(self.pages.processes) > 1
        own = Flag.EXCLUSIVE | Flag.KSM | Flag.HIDDEN, Flag.EXCLUSIVE
        if several:
            # Of a huge page, the mark may be that of its first page (see `Copies.alone`).
            own = Flag.EXCLUSIVE | Flag.KSM | Flag.THP, Flag.EXCLUSIVE
        else:
            unsure = Flag.DUPLICATE | Flag.KSM | Flag.HIDDEN | Flag.EXCLUSIVE
            if self.census.of(unsure, Flag.DUPLICATE) and self.given.copies_apart():
                own = Flag.KSM | Flag.HIDDEN, NO_FLAG
        s = groups.sums(frames, self.limit, own, Flag.ZERO)
        rest = (s.some & Flag.ZERO) == 0
        clear = rest & ((s.some & Flag.HIDDEN) == 0)
        if several:
            clear = rest & self._clear(s)
        if self.linked:
            # What huge pages tie together is scanned.
            clear &= ((s.every & Flag.EXCLUSIVE) != 0) & ((s.some & (NOT_SIMPLE | Flag.THP)) == 0)
            if several:
                clear &= closed_form(sizes, self.limit)[1] == 0
        merged = self._add_clear(s, sizes, clear)
        if several:
            self._add_by_process(groups, merged, own)
        else:
            self.totals.within_saved += int(merged.freed.sum())
            self.totals.merging += int((sizes - merged.left)[merged.which].sum())
        huge = merged.which & ((s.some & Flag.THP) != 0)
        if huge.any():
            folios = groups.passes.blocks_of(
                frames, groups.order, groups.offsets, huge.view(np.uint8),
                Flag.THP, Flag.THP, self.pages.huge_pages,
            )  # fmt: skip
            self.huge.split.update(folios.tolist())
        return np.asarray(rest & ~merged.which & ~merged.one_frame)

    def _add_large(self, index: U32) -> bool:
        """Add up a content beyond the limit, its frames known and forked, in an order not known.

        As `Special` does, with no need of arrays of all that is known of each mapping. Gives
        whether it is such a content.
        """
        pages, size, n = self.pages, self.pages.huge_pages, len(index)
        if self.rules.order_known or len(pages.processes) <= 1:
            return False
        if self.given.blind > 1 or n <= self.limit:
            return False
        word = pages.frames[index]
        if np.bitwise_or.reduce(word) & (Flag.KSM | Flag.HIDDEN | Flag.LOCKED):
            return False
        mine = np.zeros(len(pages.processes), np.int64)
        for low in range(0, n, LARGE_PAGES):
            process = self.given.process_of(index[low : low + LARGE_PAGES])
            mine += np.bincount(process, minlength=len(mine))
        frames, most, outside = self.given.frames_of(word, NO_FLAG, NO_FLAG)
        if np.count_nonzero(mine) < 2 or not 1 < frames < n:
            return False
        f = fate.of_frames(n, frames, most, self.limit)
        self.totals.across_saved += self.totals.add_outcome(n, outside, f)
        self.totals.add_uncertain_merging(mine, mine, f)
        one_of_them: set[int] = set()
        for frame, _ in self.groups.by_frame(word, Flag.THP, Flag.THP, size):
            folio, count = np.unique(frame[starts(frame)] // size, return_counts=True)
            # Two frames of the content in a huge page: one of them merges.
            self.huge.split.update(folio[count > 1].tolist())
            one_of_them.update(folio[count == 1].tolist())
        if one_of_them:
            self.huge.one_stays.append(one_of_them)
        return True

    def _clear(self, s: Sums) -> Bool:
        """Contents of which nothing is hidden that matters."""
        if self.given.blind > 1:
            return np.zeros(len(s.some), bool)
        clear: Bool = (s.some & Flag.HIDDEN) == 0
        if not clear.all() and not any(r.ksm_bytes for r in self.pages.regions):
            clear |= ((s.every & Flag.EXCLUSIVE) != 0) & ((s.some & Flag.THP) == 0)
        return clear

    def _add_by_process(
        self, groups: Groups, merged: _Merged, own: tuple[np.uint64, np.uint64]
    ) -> None:
        """Divide what has been added up between the processes."""
        which = merged.which.astype(np.uint8)
        which[merged.which & (merged.left > 0)] = 2
        o = self.given.owners()
        counts, within = groups.passes.by_process(
            self.pages.frames, groups.order, groups.offsets, which, *own,
            o.start, o.process, o.hint, len(self.pages.processes),
        )  # fmt: skip
        self.totals.merging += counts[0][:, None]
        self.left_over += counts[1:]
        # What a process saves by itself.
        within = np.minimum(within, merged.freed)
        self.totals.within_saved += int(within[merged.which].sum())
        self.totals.across_saved += int((merged.freed - within)[merged.which].sum())

    def add_left_over(self, *, cut: bool) -> None:
        """Of each content with a mapping left over, the last one in scan order is not merged."""
        alone, last, involved = self.left_over
        self.totals.merging -= alone[:, None]
        if self.rules.order_known and not cut:
            self.totals.merging -= last[:, None]
        else:
            self.totals.merging[:, 0] -= involved

    def _add_clear(self, s: Sums, n: I64, clear: Bool) -> _Merged:
        """Add up contents of which nothing is hidden, but those that need a closer look.

        Parameters
        ----------
        s : Sums
        n : int64 array
            Mappings of each content.
        clear : bool array
            Which contents are meant.
        """
        d = s.ksm_frames + s.frames
        outside, huge = s.outside > 0, (s.some & Flag.THP) != 0
        nodes, left = closed_form(n, self.limit)
        simple = (d == n) | (n <= self.limit)
        plain = clear & (s.ksm == 0) & ((simple & (~outside | (left == 0))) | (d == 1))
        one_frame = plain & (d == 1) & (n > 1)
        # One frame alone, shared by fork: one mapping in the unstable tree, the rest in neither.
        self.totals.unshared.add(int(np.count_nonzero(one_frame)))
        self.totals.volatile.add(int((n[one_frame] - 1).sum()))
        # In a huge page the last in the order need not be the one left over.
        many = plain & (d >= 2) & ~(huge & (left > 0))
        nodes, left = np.where(many, nodes, 0), np.where(many, left, 0)
        # Where KSM pages have room for all that is new, or nothing is new.
        new = n - s.ksm
        joins = clear & (s.ksm > 0) & ~outside & ((new == 0) | (new <= s.room))
        nodes = np.where(joins, s.ksm_frames, nodes)
        which = many | joins
        self.totals.add_nodes(nodes, n, left, which)
        low, high = given_back(np.where(which, d - nodes - left, 0), s.outside, nodes)
        self.totals.freed.add(int(low.sum()), int(high.sum()))
        return _Merged(which, one_frame, left, low)

    # -- with arrays of all that is known of each mapping --------------------------------------

    def add(self, c: Copies, *, cut: bool) -> None:
        """Add up what `rest` left: the plain contents at once, the others one by one.

        Parameters
        ----------
        c : Copies
        cut : bool
            Searches of the unstable tree may be cut short (`zero.ZeroPages.cut`).
        """
        if not len(c.index):
            return
        n = np.bincount(c.group, minlength=c.groups)
        offsets = np.concatenate(([0], np.cumsum(n)))
        index = c.index.astype(np.uint32, copy=False)
        some = replace(self.groups, order=index, offsets=offsets)
        # Of a huge page, the mark may be that of its first page (see `Copies.alone`).
        mask = Flag.EXCLUSIVE | Flag.KSM | Flag.THP
        s = some.sums(self.pages.frames, self.limit, (mask, Flag.EXCLUSIVE))
        unclear = np.zeros(c.groups, bool)
        if (s.some & Flag.HIDDEN).any():
            unclear = np.bincount(c.group, c.maybe_shared | c.maybe_ksm, c.groups) > 0
        if self.given.blind > 1:
            unclear[:] = True
        there = n > 0
        merged = self._add_clear(s, n, there & ~unclear)
        self._add_merging(c, merged.which, merged.left, cut=cut)
        self._add_breakdown(c, merged.which, merged.freed)
        split = c.take(c.thp & merged.which[c.group])
        self.huge.split.update(values(self.huge.folio_of(split)))
        apart = ((s.some & Flag.THP) != 0) | (s.outside > 0)
        unknown = self._unknown_forks(c, n, there & ~apart)
        for g in np.flatnonzero(there & ~merged.one_frame & ~merged.which & ~unknown).tolist():
            self.special.add(c.take(slice(int(offsets[g]), int(offsets[g + 1]))), cut=cut)

    def _unknown_forks(self, c: Copies, n: I64, among: Bool) -> Bool:
        """Add up contents of which nothing is known but one hidden, shared mapping a process.

        Without root that is what forked processes have by the thousand: one frame each, or not.
        """
        hidden = np.bincount(c.group, c.maybe_shared & ~c.maybe_ksm, c.groups)
        among = among & (self.given.blind == 1)
        unknown: Bool = np.asarray(among & (hidden == n) & (n >= 2) & (n <= self.limit))
        if not unknown.any():
            return unknown
        unknown &= distinct(c.group, c.process, c.groups) == n
        contents, mappings = int(np.count_nonzero(unknown)), int(n[unknown].sum())
        self.totals.shared.add(0, contents)
        self.totals.sharing.add(0, mappings - contents)
        self.totals.unshared.add(0, contents)
        self.totals.volatile.add(0, mappings)
        self.totals.freed.add(0, mappings - contents)
        self.totals.merging[:, 1] += c.count(unknown[c.group])
        return unknown

    def _add_merging(self, c: Copies, merged: Bool, left: I64, *, cut: bool) -> None:
        """Mappings on stable nodes by process; the leftover is the last in scan order."""
        self.totals.merging += c.count(merged[c.group])[:, None]
        for g in np.flatnonzero(merged & (left > 0)).tolist():
            lo, hi = np.searchsorted(c.group, [g, g + 1])
            involved = np.unique(c.process[lo:hi])
            if len(involved) == 1 or (self.rules.order_known and not cut):
                self.totals.merging[involved[-1]] -= 1
            else:
                self.totals.merging[involved, 0] -= 1

    def _add_breakdown(self, c: Copies, merged: Bool, freed: I64) -> None:
        on = merged[c.group]
        if not on.any():
            return
        if len(self.pages.processes) == 1:
            self.totals.within_saved += int(freed.sum())
            return
        # Distinct frames of each (content, process), less one: what it saves by itself.
        pair = c.group[on] * len(self.pages.processes) + c.process[on]
        _, packed = np.unique(pair, return_inverse=True)
        own = distinct(packed, c.frame[on], int(packed.max()) + 1, c.alone[on])
        group_of = np.zeros(len(own), np.int64)
        group_of[packed] = c.group[on]
        within = np.bincount(group_of, own - 1, c.groups).astype(np.int64)
        within = np.minimum(within, freed)
        self.totals.within_saved += int(within[merged].sum())
        self.totals.across_saved += int((freed - within)[merged].sum())
