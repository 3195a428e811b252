"""All-zero pages: merged like any content, mapped to the shared zero page, or both.

Sources: mm/ksm.c (cmp_and_merge_page, unstable_tree_search_insert), mm/migrate.c
(try_to_map_unused_to_zeropage, for huge pages that split), Documentation/admin-guide/mm/ksm.rst
(use_zero_pages).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dedup.model import fate
from dedup.model.copies import ABSENT, NOT_STABLE, sorted_values, starts, values
from dedup.model.fate import closed_form
from dedup.model.special import Special, delayed_mappings
from dedup.model.totals import given_back
from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from dedup.model.copies import Copies
    from dedup.model.fate import Fate
    from dedup.model.given import Given
    from dedup.model.huge import HugePages
    from dedup.model.totals import Totals
    from dedup.pages import I64, Bool


class ZeroPages:
    """Adds up the all-zero pages.

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
        self.vanished = False
        """All-zero pages of huge pages, beside others in theirs, are added up already."""
        self.cut = False
        """Searches of the unstable tree may be cut short, so that any page waits for a scan.

        ksmd gives a search up where it comes by an all-zero page that the split of its huge page
        has taken out of KSM (mm/ksm.c, unstable_tree_search_insert); whether it does depends on
        the bytes of all pages in the tree.
        """

    # -- which there are -----------------------------------------------------------------------

    def find(self) -> Copies:
        """Find those still to be added up, a content for each node that merges apart.

        There are none where nothing but their number decides: then they are added up already.
        """
        mask, frames = NOT_STABLE | Flag.ZERO, self.pages.frames
        n = self.census.of(mask, Flag.ZERO)
        index = np.empty(0, np.int64)
        if n and self._told_by_frames(mask, n):
            if self.census.of(mask | Flag.THP, Flag.ZERO | Flag.THP):
                index = self._but_frames_in_company(mask)
                n = 0
            elif self._add_small_zeros(mask, n):
                n = 0
        one = len(self.pages.processes) == 1 and self.given.nodes is None and self.given.blind == 1
        plain = one and not (self.rules.use_zero_pages or self.given.pinned)
        if n and plain and self._all_apart(mask, n):
            passes = self.groups.passes
            if not self.census.of(mask | Flag.THP, Flag.ZERO | Flag.THP):
                outside = 0
                if self.census.of(mask | Flag.EXCLUSIVE, Flag.ZERO):
                    outside = passes.count(frames, mask | Flag.OUTSIDE, Flag.ZERO | Flag.OUTSIDE)
                self._plain_zero(n, outside)
                n = 0
            elif not self.linked and not self.census.of(
                ABSENT | Flag.THP | Flag.LOCKED, Flag.THP | Flag.LOCKED
            ):
                index = self._but_in_company(mask)
                n = 0
        if n:
            index = self.groups.passes.select(frames, mask, Flag.ZERO)
        group, groups = np.broadcast_to(np.int64(0), len(index)), 1
        if self.given.nodes is not None and len(index):
            frame = (self.pages.frames[index] & FRAME_MASK).astype(np.int64)
            names, group = np.unique(self.given.nodes.of(frame), return_inverse=True)
            groups = len(names)
        zeros = self.given.copies(index, group, groups)
        self.cut |= bool((zeros.thp & ((zeros.word & Flag.LOCKED) == 0)).any())
        if zeros.thp.any():
            self.huge.find_locked()
        return zeros

    def _told_by_frames(self, mask: np.uint64, n: int) -> bool:
        """Whether of `n` all-zero pages of several processes it counts which frames they have.

        Some of it, that is, with no need of an array of all of them.
        """
        if len(self.pages.processes) <= 1 or self.given.nodes is not None or self.given.blind > 1:
            return False
        if self.linked or self.rules.use_zero_pages or self.given.pinned:
            return False
        locked = Flag.THP | Flag.LOCKED
        if self.census.of(ABSENT | locked, locked):
            return False
        return self.census.of(mask | Flag.KSM | Flag.HIDDEN | Flag.LOCKED, Flag.ZERO) == n

    def _add_small_zeros(self, mask: np.uint64, n: int) -> bool:
        """Add up all-zero pages in no huge page; gives whether their frames were enough to know."""
        by_process = self.census.by_process(len(self.pages.processes), mask, Flag.ZERO)
        alone = Flag.ZERO | Flag.EXCLUSIVE
        if self.census.of(mask | Flag.EXCLUSIVE, alone) == n:
            self._plain_zero(n, by_process=by_process)
            return True
        frames, most, outside = self.given.frames_of(self.pages.frames, mask, Flag.ZERO)
        if frames == n:
            self._plain_zero(n, outside, by_process)
            return True
        one = np.count_nonzero(by_process) == 1
        if frames > 1 and n > self.limit and (self.rules.order_known or one):
            return False
        f = fate.of_frames(n, frames, most, self.limit)
        self.totals.zero_saved += self.totals.add_outcome(n, outside, f)
        may_stay = by_process if len(f.stays) else 0 * by_process
        self.totals.add_uncertain_merging(by_process, may_stay, f)
        return True

    def _but_frames_in_company(self, mask: np.uint64) -> I64:
        """As `_but_in_company`, of several processes: a page may have several mappings."""
        word, size = self.pages.frames, self.pages.huge_pages
        kept = [self.groups.passes.select(word, mask | Flag.THP, Flag.ZERO)]
        mask |= Flag.THP
        for frame, index in self.groups.by_frame(word, mask, Flag.ZERO | Flag.THP, size):
            at = np.flatnonzero(starts(frame))
            folio = frame[at] // size
            begins = np.flatnonzero(starts(folio))
            pages = np.diff(begins, append=len(folio))
            several = np.repeat(pages > 1, pages)
            which = np.repeat(several, np.diff(at, append=len(frame)))
            kept.append(index[~which])
            self.huge.split.update(folio[begins[pages > 1]].tolist())
            n, frames = int(np.count_nonzero(which)), int(np.count_nonzero(several))
            self.vanished |= n > 0
            self.totals.gone.add(n)
            process = self.given.process_of(index[which])
            mine = np.bincount(process, minlength=len(self.pages.processes))
            self.totals.gone_by_process += mine[:, None]
            self.totals.freed.add(frames)
            self.totals.zero_saved += frames
        self.cut |= self.vanished
        return np.sort(np.concatenate(kept))

    def _all_apart(self, mask: np.uint64, n: int) -> bool:
        """Whether all `n` all-zero pages have frames of their own, none of them a KSM page's."""
        if self.census.of(mask | Flag.KSM | Flag.HIDDEN, Flag.ZERO) != n:
            return False
        exclusive = self.census.of(mask | Flag.EXCLUSIVE, Flag.ZERO | Flag.EXCLUSIVE)
        return exclusive == n or n == 1 or self.given.copies_apart()

    def _but_in_company(self, mask: np.uint64) -> I64:
        """Add up the all-zero pages of huge pages that have several; gives the other ones.

        Such a huge page splits, whatever else there is (see `_vanish`).
        """
        pages = self.pages
        small, folio, count, last = self.groups.passes.by_block(
            pages.frames, mask, Flag.ZERO, Flag.THP, pages.huge_pages
        )
        several = count > 1
        n = int(count[several].sum())
        self.vanished = n > 0
        self.cut |= n > 0
        self.huge.split.update(folio[several].tolist())
        self.totals.gone.add(n)
        self.totals.gone_by_process += n
        self.totals.freed.add(n)
        self.totals.zero_saved += n
        return np.sort(np.concatenate((small, last[~several])))

    # -- what becomes of them ------------------------------------------------------------------

    def add(self, zeros: Copies) -> None:
        """Add up what `find` gave; after all other contents, as those make huge pages split."""
        if zeros.groups == 1 and len(zeros.index):
            self._add_one(zeros)
        elif zeros.groups > 1:
            for g in np.unique(zeros.group).tolist():
                self._add_one(zeros.take(zeros.group == g))

    def _add_one(self, c: Copies) -> None:
        """Add up those that merge with each other."""
        folio = self.huge.folio_of(c) if c.thp.any() else c.frame
        # A split maps zero subpages to the shared zero page, but not if the huge page is locked.
        vanishing = c.thp & ~np.isin(folio, self.huge.locked)
        if self.huge.locked_hidden:
            vanishing &= (c.word & Flag.HIDDEN) == 0
        unclear = bool(self.given.pinned) or self.given.blind > 1
        # Of a locked huge page that a child shares, the child's part may stay or go: the split
        # takes the parent's lock from it, now or when the CPU's batch is emptied.
        either = c.thp & ~vanishing & ((c.word & Flag.LOCKED) == 0)
        if self.rules.use_zero_pages:
            self._to_zero_page(c, folio, vanishing)
            self.totals.zero.low -= int(either.sum())
            self.totals.zero_by_process[:, 0] -= c.count(either)
        elif either.any():
            self._anything(c, folio, vanishing | either)
        elif vanishing.any() and unclear:
            self._anything(c, folio, vanishing)
        elif self.given.blind > 1:
            self.special.add(c)
        elif len(self.pages.processes) == 1 and c.alone.all() and not (c.thp | c.maybe_ksm).any():
            self._plain_zero(len(c.index))
        elif vanishing.any() or self.vanished:
            self._vanish(c, folio, vanishing)
        else:
            self.special.add(c)

    def _plain_zero(self, n: int, outside: int = 0, by_process: I64 | None = None) -> None:
        """Small, a frame each: nothing but their number decides.

        So many of the frames are mapped outside the scan too. Of one process, unless it is given
        how many each process has.
        """
        sizes = np.array([n])
        nodes, left = closed_form(sizes, self.limit)
        self.totals.add_nodes(nodes, sizes, left, np.ones(1, bool))
        low, high = given_back(sizes - nodes - left, np.array([outside]), nodes)
        self.totals.freed.add(int(low[0]), int(high[0]))
        self.totals.zero_saved += int(low[0])
        mine = np.array([n]) if by_process is None else by_process
        self.totals.merging += mine[:, None]
        if not left[0]:
            return
        involved = np.flatnonzero(mine)
        if len(involved) == 1 or self.rules.order_known:
            self.totals.merging[involved[-1]] -= 1
        else:
            self.totals.merging[involved, 0] -= 1

    def _to_zero_page(self, c: Copies, folio: I64, vanishing: Bool) -> None:
        """use_zero_pages: all go to the shared zero page, but those merged before."""
        leave = ~c.ksm & ~c.maybe_ksm
        self.huge.split.update(values(folio[c.thp & leave]))
        self._leave(c, vanishing & leave)
        placed = leave & ~vanishing
        self._leave(c, placed)
        self.totals.zero.add(int(placed.sum()))
        self.totals.zero_by_process += c.count(placed)[:, None]
        if c.ksm.any():
            self.special.add(c.take(c.ksm))
        n = int(c.maybe_ksm.sum())
        if n:
            self.totals.shared.add(0, n)
            self.totals.sharing.add(0, n - 1)
            self.totals.chains.add(0, int(n >= 2))
            self.totals.dups.add(0, n if n >= 2 else 0)
            self.totals.zero.add(0, n)
            self.totals.gone.add(0, n)
            self.totals.freed.add(0, n)
            mine, t = c.count(c.maybe_ksm), self.totals
            for by_process in (t.merging, t.zero_by_process, t.gone_by_process):
                by_process[:, 1] += mine

    def _leave(self, c: Copies, which: Bool) -> None:
        """These mappings leave KSM for the shared zero page."""
        n = int(which.sum())
        self.totals.gone.add(n)
        self.totals.gone_by_process += c.count(which)[:, None]
        hidden = int((which & c.maybe_shared).sum())
        alone = c.alone
        frames = int((which & alone).sum()) + len(sorted_values(c.frame[which & ~alone]))
        self.totals.freed.add(frames - hidden, frames)
        self.totals.zero_saved += frames

    def _vanish(self, c: Copies, folio: I64, vanishing: Bool) -> None:
        """All-zero pages in huge pages, without use_zero_pages: gone once their huge page splits.

        It splits when another of its pages merges, or when ksmd tries to merge the zero page
        itself. That fails, so at the most one such page stays: in the unstable tree, alone.
        """
        rest = c.take(~vanishing)
        holders = set(values(folio[vanishing]))
        always_room = False
        f = None
        if len(rest.index):
            m = self.special.members(rest)
            new = int((~m.ksm).sum())
            always_room = new < fate.room(m, self.limit) and not m.maybe_ksm.any()
            delayed = bool(delayed_mappings(rest).any())
            f = self.special.fate(rest, delayed=delayed or not always_room, spoils=delayed)
            if not always_room:
                known = self.rules.order_known
                f = fate.poisoned(m, f, self.limit, order_known=known, delayed=delayed)
                # Tried in vain, a huge page that is locked splits nonetheless.
                self.huge.may_split.update(self.huge.folio_of(rest)[rest.thp].tolist())
            self.special.add_fate(rest, f)
        candidates = self._lonely(c, folio, vanishing)
        others = set().union(self.huge.may_split, *self.huge.one_stays)
        # A huge page that splits for another of its pages, but lay in the tree before.
        rivals = candidates & (self.huge.split | others)
        candidates -= self.huge.split
        if always_room or not candidates or not self._may_stay(rest, f):
            self._leave(c, vanishing)
            self.huge.split |= holders
            return
        hidden = bool(((c.word & Flag.HIDDEN) != 0).any())
        nothing_else = f is None or not (~rest.ksm).any()
        certain = nothing_else and not rivals and not hidden
        if certain:
            candidates = self._first(c, folio, vanishing, candidates)
        stays = vanishing & np.isin(folio, list(candidates))
        if certain and len(candidates) == 1:
            self._leave(c, vanishing & ~stays)
            self.totals.unshared.add(1)
            self.totals.volatile.add(int(stays.sum()) - 1)
            self.huge.split |= holders - candidates
            return
        self._leave(c, vanishing & ~stays)
        self.huge.split |= holders - candidates
        self.huge.one_stays.append(candidates)
        views = np.unique(folio[stays], return_counts=True)[1]
        most = len(np.unique(c.process[stays])) if hidden else int(views.max())
        least = int(views.min()) if certain else 0
        n = int(stays.sum())
        self.totals.gone.add(n - most, n - least)
        self.totals.unshared.add(int(certain), 1)
        self.totals.volatile.add(max(0, least - 1), most - 1)
        frames = len(np.unique(c.frame[stays]))
        shared = int((stays & c.maybe_shared).sum())
        self.totals.freed.add(max(0, frames - shared - 1), frames - int(certain))
        self.totals.zero_saved += frames - 1
        mine = c.count(stays)
        self.totals.gone_by_process[:, 0] += np.maximum(0, mine - 1)
        self.totals.gone_by_process[:, 1] += mine

    def _lonely(self, c: Copies, folio: I64, vanishing: Bool) -> set[int]:
        """Huge pages with one zero page alone; two would split it by themselves."""
        if ((c.word[vanishing] & Flag.HIDDEN) != 0).any():
            _, where = np.unique(c.frame[vanishing], return_index=True)
            inside = np.sort(folio[vanishing][where])
        else:
            inside = sorted_values(c.frame[vanishing]) // self.pages.huge_pages
        fresh = starts(inside)
        return set(inside[fresh & np.append(fresh[1:], True)].tolist())

    def _first(self, c: Copies, folio: I64, vanishing: Bool, candidates: set[int]) -> set[int]:
        """Of these huge pages the one that ksmd comes to first, where that is known."""
        at = np.flatnonzero(vanishing & np.isin(folio, list(candidates)))
        if not self.rules.order_known and len(np.unique(c.process[at])) > 1:
            return candidates
        return {int(folio[at[np.argmin(self.pages.scan_order(c.index[at]))]])}

    def _may_stay(self, rest: Copies, f: Fate | None) -> bool:
        """Whether a zero page in a huge page may find no partner among the other zero pages.

        So it is if all of those are merged, and no node has room.
        """
        if f is None:
            return True
        new = int((~rest.ksm).sum())
        if f.out[0] > 0:
            return False
        if rest.maybe_ksm.any() or rest.ksm.any():
            return True
        if new < self.limit:
            return False
        shared = rest.maybe_shared.any() or len(np.unique(rest.frame)) < new
        return bool(shared) or new % self.limit == 0

    def _anything(self, c: Copies, folio: I64, vanishing: Bool) -> None:
        """All-zero pages in huge pages, and no knowing what meets: the widest bounds."""
        n = len(c.index)
        self.totals.shared.add(0, n)
        self.totals.sharing.add(0, n - 1)
        self.totals.unshared.add(0, min(n, self.given.blind))
        self.totals.volatile.add(0, n)
        self.totals.chains.add(0, self.given.blind)
        self.totals.dups.add(0, n)
        self.totals.gone.add(0, int(vanishing.sum()))
        self.totals.gone_by_process[:, 1] += c.count(vanishing)
        self.totals.merging[:, 1] += c.count()
        self.totals.freed.add(-int((~c.alone).sum()), len(np.unique(c.frame)))
        self.huge.may_split.update(folio[c.thp].tolist())
