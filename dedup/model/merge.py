"""The counters of a converged ksmd, in closed form.

Sources: mm/ksm.c (cmp_and_merge_page, stable_node_dup, try_to_merge_one_page), mm/migrate.c
(try_to_map_unused_to_zeropage, for huge pages that split), Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from dedup.model import fate, pins
from dedup.model.fate import Members, closed_form
from dedup.model.numa import by_node
from dedup.model.order import ON_ZERO_PAGE, Memory, Scanner
from dedup.model.prediction import (
    RMAP_ITEM_BYTES,
    STABLE_NODE_BYTES,
    Breakdown,
    Prediction,
    ProcessPrediction,
    Range,
)
from dedup.pages import FRAME_MASK, NO_FLAG, Flag

if TYPE_CHECKING:
    from dedup.model.fate import Fate
    from dedup.model.prediction import Rules
    from dedup.pages import I64, U32, U64, Bool, Groups, Index, Owners, Pages, Sums


NOT_SIMPLE: Final = Flag.KSM | Flag.ZERO | Flag.OUTSIDE | Flag.HIDDEN
"""Flags of pages for which more than their number decides."""

UNSTABLE: Final = Flag.VOLATILE | Flag.NEW
ABSENT: Final = Flag.GONE | Flag.UNREAD
NOT_STABLE: Final = UNSTABLE | ABSENT

CHUNK_PAGES: Final = 1 << 16
"""Pages of contents added up in one go: what is needed a page lives no longer."""

LARGE_PAGES: Final = 1 << 13
"""Mappings from which on a content is too large for arrays of all that is known of each."""

_INT64_BITS: Final = 63
"""Of a number above 0."""

LINKED_MOST: Final = 1 << 18
"""Mappings that are scanned one by one at the most, where that makes ranges one number: 1 s."""


DEPENDS: Final = Flag.DUPLICATE | Flag.KSM | Flag.ZERO
"""Flags of pages that savings depend on: a page like no other merges only if it is all zero, with
`use_zero_pages` or by the split of its huge page, or was merged before."""


@dataclass(slots=True)
class _Copies:
    """The mappings of some contents, content after content."""

    index: Index
    group: I64
    groups: int
    word: U64
    frame: I64
    """Frame number; a number of its own for each mapping where it is hidden."""
    process: I64
    thp: Bool
    ksm: Bool
    zero: Bool
    maybe_shared: Bool
    """Hidden and not exclusive: the same frame as another mapping, or not."""
    maybe_ksm: Bool
    """Hidden, and in a region with KSM pages."""

    @property
    def alone(self) -> Bool:
        """Frames with this one mapping, by pagemap; a KSM page can be called so too.

        Of a huge page mapped as one, pagemap calls all pages exclusive where its first one is.
        """
        return np.asarray(((self.word & Flag.EXCLUSIVE) != 0) & ~self.ksm & ~self.thp)

    def take(self, which: Bool | I64 | slice) -> _Copies:
        """Some of them."""
        return _Copies(
            self.index[which],
            self.group[which],
            self.groups,
            self.word[which],
            self.frame[which],
            self.process[which],
            self.thp[which],
            self.ksm[which],
            self.zero[which],
            self.maybe_shared[which],
            self.maybe_ksm[which],
        )


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


def predict(pages: Pages, groups: Groups, rules: Rules) -> Prediction:
    """Predict the counters for the pages of a scan.

    Parameters
    ----------
    pages : Pages
        Marked by `dedup.grouping.group`.
    groups : Groups
        From the same call.
    rules : Rules

    Returns
    -------
    Prediction
    """
    volatile_known = pages.looks >= 2
    found = _Model(pages, groups, rules).run(volatile_known=volatile_known)
    exact = not found.bounds and not any(p.bounds for p in found.processes)
    order_known = rules.order_known or len(pages.processes) <= 1
    pinned = any(p.pinned_bytes for p in pages.processes)
    if exact or pinned or not order_known or not pages.frames_known:
        return found
    # Several contents in one huge page decide over each other: one after the other, then.
    linked = _Model(pages, groups, rules, linked=True)
    scanned = linked.run(volatile_known=volatile_known)
    return found if linked.undecided else scanned


def matter(pages: Pages) -> Bool:
    """Which pages, marked by `dedup.grouping.group`, the savings depend on (`DEPENDS`)."""
    found = np.empty(len(pages.frames), bool)
    for low in range(0, len(found), CHUNK_PAGES):
        found[low : low + CHUNK_PAGES] = (pages.frames[low : low + CHUNK_PAGES] & DEPENDS) != 0
    return found


class _Model:
    def __init__(self, pages: Pages, groups: Groups, rules: Rules, *, linked: bool = False) -> None:
        self.pages, self.groups, self.rules = pages, groups, rules
        self.census = groups.census
        self.linked = linked
        nodes = None if rules.merge_across_nodes else pages.nodes
        self.nodes = nodes if pages.frames_known else None
        self.blind = 1 if nodes is None or pages.frames_known else len(nodes)
        """NUMA nodes between which hidden frames may be spread."""
        self.lonely: Index = np.empty(0, np.int64)
        """Pages whose copies are all on other nodes."""
        if self.nodes is not None:
            self.groups, self.lonely = by_node(pages, groups, self.nodes)
        self.limit = rules.max_page_sharing
        n_processes = len(pages.processes)
        self.shared, self.sharing, self.unshared, self.volatile = (Range() for _ in range(4))
        self.zero, self.chains, self.dups, self.freed = (Range() for _ in range(4))
        self.gone = Range()  # rmap_items that leave KSM
        # By process, a column for the lowest and one for the highest.
        self.gone_by_process = np.zeros((n_processes, 2), np.int64)
        self.zero_by_process = np.zeros((n_processes, 2), np.int64)
        self.zero_by_process += np.array(
            [p.ksm_zero_pages for p in pages.processes], np.int64
        ).reshape(-1, 1)
        self.merging = np.zeros((n_processes, 2), np.int64)
        self.left_over = np.zeros((3, n_processes), np.int64)
        """Of contents with one mapping left over, those of each process; see `by_process`."""
        self.owners: Owners | None = None
        self.zero_saved = self.within_saved = self.across_saved = 0
        # Huge pages by number: those that split for sure, those that may; and sets of which one
        # at the most stays whole.
        self.split: set[int] = set()
        self.may_split: set[int] = set()
        self.one_stays: list[set[int]] = []
        self.shared_folios: set[int] = set()
        self.locked_folios = np.empty(0, np.int64)
        """Huge pages whose all-zero pages a split leaves in place."""
        self.locked_hidden = False
        """Whether other processes' huge pages are the same is hidden."""
        self.undecided = False
        """Linked, and still not one number."""
        self.cut = False
        """Searches of the unstable tree may be cut short, so that any page waits for a scan.

        ksmd gives a search up where it comes by an all-zero page that the split of its huge page
        has taken out of KSM (mm/ksm.c, unstable_tree_search_insert); whether it does depends on
        the bytes of all pages in the tree.
        """
        self.apart: bool | None = None
        """See `_copies_apart`; None where nobody has asked yet."""
        self.vanished = False
        """All-zero pages of huge pages, beside others in theirs, are added up already."""
        self.safe_splits: set[int] | None = None
        """With pinned pages: the huge pages that split unless pinned themselves."""
        self.pinned = sum(-(-p.pinned_bytes // pages.page_size) for p in pages.processes)

    def run(self, *, volatile_known: bool) -> Prediction:
        pages, census = self.pages, self.census
        rmap_by_process = census.by_process(len(pages.processes), ABSENT)
        self.volatile.add(int(rmap_by_process.sum()) - census.of(NOT_STABLE))
        self._all_singles()
        zeros = self._zeros()
        self.cut |= bool((zeros.thp & ((zeros.word & Flag.LOCKED) == 0)).any())
        if zeros.thp.any():
            self._find_locked()
        if self.linked:
            contents, zeros = self._scan_linked(self._joined_rest(), zeros)
            self._contents(contents)
        else:
            for piece in self.groups.pieces():
                self._contents(self._rest(piece))
        self._add_left_over()
        if zeros.groups == 1 and len(zeros.index):
            self._zero(zeros)
        elif zeros.groups > 1:
            for g in np.unique(zeros.group).tolist():
                self._zero(zeros.take(zeros.group == g))
        if self.pinned:
            self._widen(zeros)
        self.zero.add(sum(p.ksm_zero_pages for p in pages.processes))
        return self._result(rmap_by_process, volatile_known=volatile_known)

    def _zeros(self) -> _Copies:
        """All-zero pages, a content for each node that merges apart.

        None where nothing but their number decides; then they are added up already.
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
        one = len(self.pages.processes) == 1 and self.nodes is None and self.blind == 1
        plain = one and not (self.rules.use_zero_pages or self.pinned)
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
        if self.nodes is not None and len(index):
            frame = (self.pages.frames[index] & FRAME_MASK).astype(np.int64)
            names, group = np.unique(self.nodes.of(frame), return_inverse=True)
            groups = len(names)
        return self._copies(index, group, groups)

    def _told_by_frames(self, mask: np.uint64, n: int) -> bool:
        """Whether of `n` all-zero pages of several processes it counts which frames they have.

        Some of it, that is, with no need of an array of all of them.
        """
        if len(self.pages.processes) <= 1 or self.nodes is not None or self.blind > 1:
            return False
        if self.linked or self.rules.use_zero_pages or self.pinned:
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
        frames, most, outside = self._frames_of(self.pages.frames, mask, Flag.ZERO)
        if frames == n:
            self._plain_zero(n, outside, by_process)
            return True
        one = np.count_nonzero(by_process) == 1
        if frames > 1 and n > self.limit and (self.rules.order_known or one):
            return False
        f = fate.of_frames(n, frames, most, self.limit)
        self.zero_saved += self._add_outcome(n, outside, f)
        self._add_uncertain_merging(by_process, by_process if len(f.stays) else 0 * by_process, f)
        return True

    def _but_frames_in_company(self, mask: np.uint64) -> I64:
        """As `_but_in_company`, of several processes: a page may have several mappings."""
        word, size = self.pages.frames, self.pages.huge_pages
        kept = [self.groups.passes.select(word, mask | Flag.THP, Flag.ZERO)]
        mask |= Flag.THP
        for frame, index in self.groups.by_frame(word, mask, Flag.ZERO | Flag.THP, size):
            at = np.flatnonzero(_starts(frame))
            folio = frame[at] // size
            begins = np.flatnonzero(_starts(folio))
            pages = np.diff(begins, append=len(folio))
            several = np.repeat(pages > 1, pages)
            which = np.repeat(several, np.diff(at, append=len(frame)))
            kept.append(index[~which])
            self.split.update(folio[begins[pages > 1]].tolist())
            n, frames = int(np.count_nonzero(which)), int(np.count_nonzero(several))
            self.vanished |= n > 0
            self.gone.add(n)
            mine = np.bincount(self._process_of(index[which]), minlength=len(self.pages.processes))
            self.gone_by_process += mine[:, None]
            self.freed.add(frames)
            self.zero_saved += frames
        self.cut |= self.vanished
        return np.sort(np.concatenate(kept))

    def _all_apart(self, mask: np.uint64, n: int) -> bool:
        """Whether all `n` all-zero pages have frames of their own, none of them a KSM page's."""
        if self.census.of(mask | Flag.KSM | Flag.HIDDEN, Flag.ZERO) != n:
            return False
        exclusive = self.census.of(mask | Flag.EXCLUSIVE, Flag.ZERO | Flag.EXCLUSIVE)
        return exclusive == n or n == 1 or self._copies_apart()

    def _copies_apart(self) -> bool:
        """Whether all pages with a copy have frames of their own, KSM pages and hidden ones aside.

        So it is in one process, but for what the kernel says of huge pages while they change.
        """
        if self.apart is None:
            flags = Flag.DUPLICATE | Flag.KSM | Flag.HIDDEN | NOT_STABLE
            self.apart = self.groups.passes.all_apart(self.pages.frames, flags, Flag.DUPLICATE)
        return self.apart

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
        self.split.update(folio[several].tolist())
        self.gone.add(n)
        self.gone_by_process += n
        self.freed.add(n)
        self.zero_saved += n
        return np.sort(np.concatenate((small, last[~several])))

    def _rest(self, groups: Groups) -> _Copies:
        """Add up the contents that need no closer look; give the others.

        They are most of what a scan finds. All-zero pages are left out.
        """
        which = self._but_simple(groups)
        for g in np.flatnonzero(which & (np.diff(groups.offsets) >= LARGE_PAGES)).tolist():
            if self._add_large(groups.order[groups.offsets[g] : groups.offsets[g + 1]]):
                which[g] = False
        index, sizes = groups.of(which)
        return self._copies(index, np.repeat(np.arange(len(sizes)), sizes), len(sizes))

    def _joined_rest(self) -> _Copies:
        """The same for all contents."""
        parts = [piece.of(self._but_simple(piece)) for piece in self.groups.pieces()]
        index, sizes = (np.concatenate(p) for p in zip(*parts, strict=True))
        return self._copies(index, np.repeat(np.arange(len(sizes)), sizes), len(sizes))

    def _but_simple(self, groups: Groups) -> Bool:
        """Add up what needs no closer look of some contents; gives which of them are left."""
        frames, sizes = self.pages.frames, np.diff(groups.offsets)
        several = len(self.pages.processes) > 1
        own = Flag.EXCLUSIVE | Flag.KSM | Flag.HIDDEN, Flag.EXCLUSIVE
        if several:
            # Of a huge page, the mark may be that of its first page (see `_Copies.alone`).
            own = Flag.EXCLUSIVE | Flag.KSM | Flag.THP, Flag.EXCLUSIVE
        else:
            unsure = Flag.DUPLICATE | Flag.KSM | Flag.HIDDEN | Flag.EXCLUSIVE
            if self.census.of(unsure, Flag.DUPLICATE) and self._copies_apart():
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
            self.within_saved += int(merged.freed.sum())
            self.merging += int((sizes - merged.left)[merged.which].sum())
        huge = merged.which & ((s.some & Flag.THP) != 0)
        if huge.any():
            folios = groups.passes.blocks_of(
                frames, groups.order, groups.offsets, huge.view(np.uint8),
                Flag.THP, Flag.THP, self.pages.huge_pages,
            )  # fmt: skip
            self.split.update(folios.tolist())
        return np.asarray(rest & ~merged.which & ~merged.one_frame)

    def _add_large(self, index: U32) -> bool:
        """Add up a content beyond the limit, its frames known and forked, in an order not known.

        As `_special` does, with no need of arrays of all that is known of each mapping. Gives
        whether it is such a content.
        """
        pages, size, n = self.pages, self.pages.huge_pages, len(index)
        if len(pages.processes) <= 1 or self.blind > 1 or self.rules.order_known or n <= self.limit:
            return False
        word = pages.frames[index]
        if np.bitwise_or.reduce(word) & (Flag.KSM | Flag.HIDDEN | Flag.LOCKED):
            return False
        mine = np.zeros(len(pages.processes), np.int64)
        for low in range(0, n, LARGE_PAGES):
            process = self._process_of(index[low : low + LARGE_PAGES])
            mine += np.bincount(process, minlength=len(mine))
        frames, most, outside = self._frames_of(word, NO_FLAG, NO_FLAG)
        if np.count_nonzero(mine) < 2 or not 1 < frames < n:
            return False
        f = fate.of_frames(n, frames, most, self.limit)
        self.across_saved += self._add_outcome(n, outside, f)
        self._add_uncertain_merging(mine, mine, f)
        one_of_them: set[int] = set()
        for frame, _ in self.groups.by_frame(word, Flag.THP, Flag.THP, size):
            folio, count = np.unique(frame[_starts(frame)] // size, return_counts=True)
            # Two frames of the content in a huge page: one of them merges.
            self.split.update(folio[count > 1].tolist())
            one_of_them.update(folio[count == 1].tolist())
        if one_of_them:
            self.one_stays.append(one_of_them)
        return True

    def _frames_of(self, word: U64, mask: np.uint64, value: np.uint64) -> tuple[int, int, int]:
        """Frames of such words, mappings of one at the most, and frames mapped outside too."""
        frames = most = outside = 0
        for frame, index in self.groups.by_frame(word, mask, value):
            at = np.flatnonzero(_starts(frame))
            frames += len(at)
            most = max(most, int(np.diff(at, append=len(frame)).max()))
            is_outside = (word[index] & Flag.OUTSIDE) != 0
            outside += int(np.count_nonzero(np.logical_or.reduceat(is_outside, at)))
        return frames, most, outside

    def _clear(self, s: Sums) -> Bool:
        """Contents of which nothing is hidden that matters."""
        if self.blind > 1:
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
        o = self._owners()
        counts, within = groups.passes.by_process(
            self.pages.frames, groups.order, groups.offsets, which, *own,
            o.start, o.process, o.hint, len(self.pages.processes),
        )  # fmt: skip
        self.merging += counts[0][:, None]
        self.left_over += counts[1:]
        # What a process saves by itself.
        within = np.minimum(within, merged.freed)
        self.within_saved += int(within[merged.which].sum())
        self.across_saved += int((merged.freed - within)[merged.which].sum())

    def _add_left_over(self) -> None:
        """Of each content with a mapping left over, the last one in scan order is not merged."""
        alone, last, involved = self.left_over
        self.merging -= alone[:, None]
        if self.rules.order_known and not self.cut:
            self.merging -= last[:, None]
        else:
            self.merging[:, 0] -= involved

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
        self.unshared.add(int(np.count_nonzero(one_frame)))
        self.volatile.add(int((n[one_frame] - 1).sum()))
        # In a huge page the last in the order need not be the one left over.
        many = plain & (d >= 2) & ~(huge & (left > 0))
        nodes, left = np.where(many, nodes, 0), np.where(many, left, 0)
        # Where KSM pages have room for all that is new, or nothing is new.
        new = n - s.ksm
        joins = clear & (s.ksm > 0) & ~outside & ((new == 0) | (new <= s.room))
        nodes = np.where(joins, s.ksm_frames, nodes)
        which = many | joins
        self._add_nodes(nodes, n, left, which)
        low, high = _freed(np.where(which, d - nodes - left, 0), s.outside, nodes)
        self.freed.add(int(low.sum()), int(high.sum()))
        return _Merged(which, one_frame, left, low)

    # -- arrays --------------------------------------------------------------------------------

    def _count(self, c: _Copies, mask: Bool | None = None) -> I64:
        """How many of these mappings each process has."""
        process = c.process if mask is None else c.process[mask]
        return np.bincount(process, minlength=len(self.pages.processes)).astype(np.int64)

    def _process_of(self, index: Index) -> I64:
        if not len(index):
            return np.empty(0, np.int64)
        if len(self.pages.processes) == 1:
            return np.broadcast_to(np.int64(0), len(index))
        return self._owners().of(index)

    def _owners(self) -> Owners:
        if self.owners is None:
            self.owners = self.pages.owners()
        return self.owners

    def _folio_of(self, c: _Copies) -> I64:
        """A number for the huge page of each page; below 0 where frame numbers are hidden."""
        huge = self.pages.huge_pages
        hidden = (c.word & Flag.HIDDEN) != 0
        folio = c.frame // huge
        if hidden.any():
            address = self.pages.address_of(c.index[hidden]) // (self.pages.page_size * huge)
            folio[hidden] = -1 - (address * len(self.pages.processes) + c.process[hidden])
            self.shared_folios.update(folio[c.thp & c.maybe_shared].tolist())
        return folio

    def _find_locked(self) -> None:
        """Find the huge pages that any of their mappings locks, whatever it holds itself.

        Source: mm/migrate.c, try_to_map_unused_to_zeropage: PG_mlocked is the huge page's.
        """
        pages, lock = self.pages, Flag.THP | Flag.LOCKED
        if not self.census.of(ABSENT | lock, lock):
            return
        index = np.flatnonzero((pages.frames & (ABSENT | lock)) == lock)
        c = self._copies(index, np.zeros(len(index), np.int64), 1)
        self.locked_folios = np.unique(self._folio_of(c))
        self.locked_hidden = bool(((c.word & Flag.HIDDEN) != 0).any()) and len(pages.processes) > 1

    def _copies(self, index: Index, group: I64, groups: int) -> _Copies:
        word = self.pages.frames[index]
        frame = (word & FRAME_MASK).astype(np.int64)
        hidden = (word & Flag.HIDDEN) != 0
        thp = (word & Flag.THP) != 0
        # Below 0: never a frame number.
        frame[hidden] = -1 - index[hidden].astype(np.int64)
        return _Copies(
            index=index,
            group=group,
            groups=groups,
            word=word,
            frame=frame,
            process=self._process_of(index),
            thp=thp,
            ksm=(word & Flag.KSM) != 0,
            zero=(word & Flag.ZERO) != 0,
            maybe_shared=hidden & ((word & Flag.EXCLUSIVE) == 0),
            maybe_ksm=hidden & ~thp & self._beside_ksm(index, hidden),
        )

    def _beside_ksm(self, index: Index, hidden: Bool) -> Bool:
        """Whether the region of each page has KSM pages; asked where frames are hidden."""
        if not hidden.any():
            return np.zeros(len(index), bool)
        has = np.array([r.ksm_bytes > 0 for r in self.pages.regions])
        return np.asarray(has[self.pages.region_of(index)])

    def _members(self, c: _Copies) -> Members:
        return Members(
            frame=c.frame,
            process=c.process,
            rank=self.pages.scan_order(c.index),
            ksm=c.ksm,
            thp=c.thp,
            folio=self._folio_of(c) if c.thp.any() else c.frame,
            maybe_shared=c.maybe_shared,
            maybe_ksm=c.maybe_ksm,
            outside=(c.word & Flag.OUTSIDE) != 0,
        )

    # -- contents that are not all zero --------------------------------------------------------

    def _all_singles(self) -> None:
        """Contents that are there once."""
        mask = NOT_STABLE | Flag.ZERO | Flag.DUPLICATE
        n = self.census.of(mask)
        if not len(self.lonely) and self.census.of(mask | Flag.KSM | Flag.HIDDEN) == n:
            self.unshared.add(n)
            return
        word = self.pages.frames
        single = (word & mask) == 0
        single[self.lonely] = (word[self.lonely] & Flag.ZERO) == 0
        self._singles(single)

    def _singles(self, single: Bool) -> None:
        """Contents that are there once: unshared, or a KSM page that lost its partners."""
        word = self.pages.frames
        ksm = np.flatnonzero(single & ((word & Flag.KSM) != 0))
        self.unshared.add(int(np.count_nonzero(single)) - len(ksm))
        self.shared.add(len(ksm))
        np.add.at(self.merging, self._process_of(ksm), 1)
        hidden = np.flatnonzero(single & ((word & Flag.HIDDEN) != 0) & ((word & Flag.THP) == 0))
        if not len(hidden):
            return
        # Some of them may be KSM pages that other processes share.
        page = self.pages.page_size
        in_region = np.bincount(self.pages.region_of(hidden), minlength=len(self.pages.regions))
        for region, n in zip(self.pages.regions, in_region.tolist(), strict=True):
            most = min(n, region.ksm_bytes // page)
            if most:
                self.shared.add(0, most)
                self.unshared.add(-most, 0)
                self.merging[region.process, 1] += most

    def _contents(self, c: _Copies) -> None:
        """Add up all contents: the plain ones at once, the others one by one."""
        if not len(c.index):
            return
        n = np.bincount(c.group, minlength=c.groups)
        offsets = np.concatenate(([0], np.cumsum(n)))
        index = c.index.astype(np.uint32, copy=False)
        some = replace(self.groups, order=index, offsets=offsets)
        # Of a huge page, the mark may be that of its first page (see `_Copies.alone`).
        mask = Flag.EXCLUSIVE | Flag.KSM | Flag.THP
        s = some.sums(self.pages.frames, self.limit, (mask, Flag.EXCLUSIVE))
        unclear = np.zeros(c.groups, bool)
        if (s.some & Flag.HIDDEN).any():
            unclear = np.bincount(c.group, c.maybe_shared | c.maybe_ksm, c.groups) > 0
        if self.blind > 1:
            unclear[:] = True
        there = n > 0
        merged = self._add_clear(s, n, there & ~unclear)
        self._add_merging(c, merged.which, merged.left)
        self._add_breakdown(c, merged.which, merged.freed)
        split = c.take(c.thp & merged.which[c.group])
        self.split.update(_values(self._folio_of(split)))
        apart = ((s.some & Flag.THP) != 0) | (s.outside > 0)
        unknown = self._unknown_forks(c, n, there & ~apart)
        for g in np.flatnonzero(there & ~merged.one_frame & ~merged.which & ~unknown).tolist():
            self._special(c.take(slice(int(offsets[g]), int(offsets[g + 1]))))

    def _unknown_forks(self, c: _Copies, n: I64, among: Bool) -> Bool:
        """Add up contents of which nothing is known but one hidden, shared mapping a process.

        Without root that is what forked processes have by the thousand: one frame each, or not.
        """
        hidden = np.bincount(c.group, c.maybe_shared & ~c.maybe_ksm, c.groups)
        among = among & (self.blind == 1)
        unknown: Bool = np.asarray(among & (hidden == n) & (n >= 2) & (n <= self.limit))
        if not unknown.any():
            return unknown
        unknown &= distinct(c.group, c.process, c.groups) == n
        contents, mappings = int(np.count_nonzero(unknown)), int(n[unknown].sum())
        self.shared.add(0, contents)
        self.sharing.add(0, mappings - contents)
        self.unshared.add(0, contents)
        self.volatile.add(0, mappings)
        self.freed.add(0, mappings - contents)
        self.merging[:, 1] += self._count(c, unknown[c.group])
        return unknown

    def _add_nodes(self, nodes: I64, n: I64, left: I64, mask: Bool) -> None:
        self.shared.add(int(nodes[mask].sum()))
        self.sharing.add(int((n - nodes - left)[mask].sum()))
        self.unshared.add(int(left[mask].sum()))
        chained = mask & (nodes >= 2)
        self.chains.add(int(np.count_nonzero(chained)))
        self.dups.add(int(nodes[chained].sum()))

    def _add_merging(self, c: _Copies, merged: Bool, left: I64) -> None:
        """Mappings on stable nodes by process; the leftover is the last in scan order."""
        self.merging += self._count(c, merged[c.group])[:, None]
        for g in np.flatnonzero(merged & (left > 0)).tolist():
            lo, hi = np.searchsorted(c.group, [g, g + 1])
            involved = np.unique(c.process[lo:hi])
            if len(involved) == 1 or (self.rules.order_known and not self.cut):
                self.merging[involved[-1]] -= 1
            else:
                self.merging[involved, 0] -= 1

    def _add_breakdown(self, c: _Copies, merged: Bool, freed: I64) -> None:
        on = merged[c.group]
        if not on.any():
            return
        if len(self.pages.processes) == 1:
            self.within_saved += int(freed.sum())
            return
        # Distinct frames of each (content, process), less one: what it saves by itself.
        pair = c.group[on] * len(self.pages.processes) + c.process[on]
        _, packed = np.unique(pair, return_inverse=True)
        own = distinct(packed, c.frame[on], int(packed.max()) + 1, c.alone[on])
        group_of = np.zeros(len(own), np.int64)
        group_of[packed] = c.group[on]
        within = np.bincount(group_of, own - 1, c.groups).astype(np.int64)
        within = np.minimum(within, freed)
        self.within_saved += int(within[merged].sum())
        self.across_saved += int((freed - within)[merged].sum())

    # -- contents that huge pages tie together ---------------------------------------------------

    def _scan_linked(self, c: _Copies, zeros: _Copies) -> tuple[_Copies, _Copies]:
        """Scan mapping by mapping what huge pages tie to a content whose order decides.

        Gives the contents left, and the all-zero pages left.
        """
        both = _joined(c, zeros)
        folio = np.where(both.thp, both.frame // self.pages.huge_pages, -1)
        linked = self._linked(both, folio)
        chosen = linked[both.group]
        if not chosen.any() or np.count_nonzero(chosen) > LINKED_MOST:
            self.undecided = True
            return c, zeros
        self.cut = self._add_scanned(both.take(chosen), folio[chosen])
        self.undecided = self.cut and self._order_decides(c)
        n = len(c.index)
        return c.take(~chosen[:n]), zeros.take(~chosen[n:])

    def _linked(self, c: _Copies, folio: I64) -> Bool:
        """Contents to scan: those whose order decides, and all in the same huge pages."""
        n = np.bincount(c.group, minlength=c.groups)
        huge = np.bincount(c.group, c.thp, c.groups) > 0
        zero = np.bincount(c.group, c.zero, c.groups) > 0
        shared = distinct(c.group, c.frame, c.groups, c.alone) < n
        linked: Bool = huge & ((n % self.limit == 1) | zero | (shared & (n > self.limit)))
        unsure = ((c.word & (Flag.OUTSIDE | Flag.HIDDEN)) != 0) | self._delayed(c)
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

    def _order_decides(self, c: _Copies) -> bool:
        """Whether there are contents beyond the limit whose fate is a matter of order."""
        n = np.bincount(c.group, minlength=c.groups)
        shared = distinct(c.group, c.frame, c.groups, c.alone) < n
        return bool(((n > self.limit) & (shared | (n % self.limit == 1))).any())

    def _add_scanned(self, c: _Copies, folio: I64) -> bool:
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
                frozenset(self.locked_folios.tolist()),
            ),
            self.limit,
            use_zero_pages=self.rules.use_zero_pages,
        ).run()
        on_node, placed = np.array(end.on_node), np.array(end.placed)
        gone = np.array(end.frame) == ON_ZERO_PAGE
        nodes = [len(frames) for frames in end.nodes.values()]
        self.shared.add(sum(nodes))
        self.sharing.add(int(on_node.sum()) - sum(nodes))
        self.unshared.add(len(end.in_tree))
        self.volatile.add(len(on_node) - int((on_node | gone).sum()) - len(end.in_tree))
        self.chains.add(sum(n >= 2 for n in nodes))
        self.dups.add(sum(n for n in nodes if n >= 2))
        self.merging += self._count(c, on_node)[:, None]
        self.zero.add(int(placed.sum()))
        self.zero_by_process += self._count(c, placed)[:, None]
        self.gone.add(int(gone.sum()))
        self.gone_by_process += self._count(c, gone)[:, None]
        self.split |= end.split
        left = {f for f in end.frame if f != ON_ZERO_PAGE}
        freed = len(np.unique(c.frame)) - len(left)
        self.freed.add(freed)
        zero_left = set(np.array(end.frame)[c.zero & ~gone].tolist())
        zero_freed = len(np.unique(c.frame[c.zero])) - len(zero_left)
        self.zero_saved += zero_freed
        self._add_split_of_savings(c, freed - zero_freed)
        return end.cut

    def _add_split_of_savings(self, c: _Copies, freed: int) -> None:
        """Divide frames freed into those within a process and those across."""
        rest = ~c.zero
        pair = c.group[rest] * len(self.pages.processes) + c.process[rest]
        own = np.unique(np.stack((pair, c.frame[rest])), axis=1)[0]
        within = min(freed, len(own) - len(np.unique(own)))
        self.within_saved += within
        self.across_saved += freed - within

    # -- one content ---------------------------------------------------------------------------

    def _fate(self, c: _Copies, *, delayed: bool = False, spoils: bool = False) -> Fate:
        m = self._members(c)
        known = self.rules.order_known
        if ((c.word & Flag.HIDDEN) != 0).any():
            if self.blind > 1:
                return fate.spread(m, self.limit, self.blind)
            return fate.hidden(m, self.limit, order_known=known, delayed=delayed)
        return fate.known(m, self.limit, order_known=known, delayed=delayed, spoils=spoils)

    def _delayed(self, c: _Copies) -> Bool:
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

    def _special(self, c: _Copies) -> None:
        """One content with KSM pages, hidden sharing, or forks beyond the limit."""
        locked = bool(self._delayed(c).any())
        delayed = locked or (self.cut and not c.zero[0])
        self._add_fate(c, self._fate(c, delayed=delayed, spoils=locked))

    def _add_fate(self, c: _Copies, f: Fate) -> None:
        outside = len(_sorted_values(c.frame[(c.word & Flag.OUTSIDE) != 0]))
        low = self._add_outcome(len(c.index), outside, f)
        self._add_uncertain_merging(self._count(c), self._count(c, f.stays), f)
        if c.thp.any():
            self._add_splits(c, f)
        if c.zero[0]:
            self.zero_saved += low
        elif (c.process == c.process[0]).all():
            self.within_saved += low
        else:
            self.across_saved += low

    def _add_outcome(self, n: int, outside: int, f: Fate) -> int:
        """Add up `n` mappings, so many of their frames mapped outside; gives frames freed."""
        self.shared.add(*f.nodes)
        self.sharing.add(*f.sharing(n))
        self.unshared.add(*f.unshared)
        self.volatile.add(*f.volatile)
        if self.blind > 1:
            self.chains.add(0, min(self.blind, f.nodes[1] // 2))
        else:
            self.chains.add(int(f.nodes[0] >= 2), int(f.nodes[1] >= 2))
        self.dups.add(*(k if k >= 2 else 0 for k in f.nodes))
        # A frame that is mapped outside the scan too stays there, unless it is a node's.
        low = f.freed[0] - outside
        high = max(low, f.freed[1] - max(0, outside - f.nodes[1]))
        if f.freed[0] >= 0:
            low, high = max(0, low), max(0, high)
        self.freed.add(low, high)
        return low

    def _add_uncertain_merging(self, mine: I64, may_stay: I64, f: Fate) -> None:
        """Add up mappings by process, and those of them that may be on no node."""
        if f.exact:
            self.merging += (mine - may_stay)[:, None]
            return
        low = np.minimum(may_stay, f.out[1])
        if f.one_frame:
            # A process maps a frame once, unless it is a KSM page.
            low = np.minimum(low, 1)
        if f.out[0] == f.out[1] and np.count_nonzero(may_stay) == 1:
            mine = mine - np.where(may_stay > 0, f.out[0], 0)
            low = np.zeros_like(low)
        self.merging[:, 0] += mine - low
        self.merging[:, 1] += mine

    def _add_splits(self, c: _Copies, f: Fate) -> None:
        """Huge pages split when any of their pages merges."""
        folio = self._folio_of(c)
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

    # -- all-zero pages ------------------------------------------------------------------------

    def _zero(self, c: _Copies) -> None:
        """All-zero pages: merged like any content, mapped to the shared zero page, or both."""
        folio = self._folio_of(c) if c.thp.any() else c.frame
        # A split maps zero subpages to the shared zero page, but not if the huge page is locked.
        vanishing = c.thp & ~np.isin(folio, self.locked_folios)
        if self.locked_hidden:
            vanishing &= (c.word & Flag.HIDDEN) == 0
        unclear = bool(self.pinned) or self.blind > 1
        # Of a locked huge page that a child shares, the child's part may stay or go: the split
        # takes the parent's lock from it, now or when the CPU's batch is emptied.
        either = c.thp & ~vanishing & ((c.word & Flag.LOCKED) == 0)
        if self.rules.use_zero_pages:
            self._to_zero_page(c, folio, vanishing)
            self.zero.low -= int(either.sum())
            self.zero_by_process[:, 0] -= self._count(c, either)
        elif either.any():
            self._anything(c, folio, vanishing | either)
        elif vanishing.any() and unclear:
            self._anything(c, folio, vanishing)
        elif self.blind > 1:
            self._special(c)
        elif len(self.pages.processes) == 1 and c.alone.all() and not (c.thp | c.maybe_ksm).any():
            self._plain_zero(len(c.index))
        elif vanishing.any() or self.vanished:
            self._vanish(c, folio, vanishing)
        else:
            self._special(c)

    def _plain_zero(self, n: int, outside: int = 0, by_process: I64 | None = None) -> None:
        """Small, a frame each: nothing but their number decides.

        So many of the frames are mapped outside the scan too. Of one process, unless it is given
        how many each process has.
        """
        sizes = np.array([n])
        nodes, left = closed_form(sizes, self.limit)
        self._add_nodes(nodes, sizes, left, np.ones(1, bool))
        low, high = _freed(sizes - nodes - left, np.array([outside]), nodes)
        self.freed.add(int(low[0]), int(high[0]))
        self.zero_saved += int(low[0])
        mine = np.array([n]) if by_process is None else by_process
        self.merging += mine[:, None]
        if not left[0]:
            return
        involved = np.flatnonzero(mine)
        if len(involved) == 1 or self.rules.order_known:
            self.merging[involved[-1]] -= 1
        else:
            self.merging[involved, 0] -= 1

    def _to_zero_page(self, c: _Copies, folio: I64, vanishing: Bool) -> None:
        """use_zero_pages: all go to the shared zero page, but those merged before."""
        leave = ~c.ksm & ~c.maybe_ksm
        self.split.update(_values(folio[c.thp & leave]))
        self._leave(c, vanishing & leave)
        placed = leave & ~vanishing
        self._leave(c, placed)
        self.zero.add(int(placed.sum()))
        self.zero_by_process += self._count(c, placed)[:, None]
        if c.ksm.any():
            self._special(c.take(c.ksm))
        n = int(c.maybe_ksm.sum())
        if n:
            self.shared.add(0, n)
            self.sharing.add(0, n - 1)
            self.chains.add(0, int(n >= 2))
            self.dups.add(0, n if n >= 2 else 0)
            self.zero.add(0, n)
            self.gone.add(0, n)
            self.freed.add(0, n)
            mine = self._count(c, c.maybe_ksm)
            for by_process in (self.merging, self.zero_by_process, self.gone_by_process):
                by_process[:, 1] += mine

    def _leave(self, c: _Copies, which: Bool) -> None:
        """These mappings leave KSM for the shared zero page."""
        n = int(which.sum())
        self.gone.add(n)
        self.gone_by_process += self._count(c, which)[:, None]
        hidden = int((which & c.maybe_shared).sum())
        alone = c.alone
        frames = int((which & alone).sum()) + len(_sorted_values(c.frame[which & ~alone]))
        self.freed.add(frames - hidden, frames)
        self.zero_saved += frames

    def _vanish(self, c: _Copies, folio: I64, vanishing: Bool) -> None:
        """All-zero pages in huge pages, without use_zero_pages: gone once their huge page splits.

        It splits when another of its pages merges, or when ksmd tries to merge the zero page
        itself. That fails, so at the most one such page stays: in the unstable tree, alone.
        """
        rest = c.take(~vanishing)
        holders = set(_values(folio[vanishing]))
        always_room = False
        f = None
        if len(rest.index):
            m = self._members(rest)
            new = int((~m.ksm).sum())
            always_room = new < fate.room(m, self.limit) and not m.maybe_ksm.any()
            delayed = bool(self._delayed(rest).any())
            f = self._fate(rest, delayed=delayed or not always_room, spoils=delayed)
            if not always_room:
                known = self.rules.order_known
                f = fate.poisoned(m, f, self.limit, order_known=known, delayed=delayed)
                # Tried in vain, a huge page that is locked splits nonetheless.
                self.may_split.update(self._folio_of(rest)[rest.thp].tolist())
            self._add_fate(rest, f)
        candidates = self._lonely(c, folio, vanishing)
        others = set().union(self.may_split, *self.one_stays)
        # A huge page that splits for another of its pages, but lay in the tree before.
        rivals = candidates & (self.split | others)
        candidates -= self.split
        if always_room or not candidates or not self._may_stay(rest, f):
            self._leave(c, vanishing)
            self.split |= holders
            return
        hidden = bool(((c.word & Flag.HIDDEN) != 0).any())
        nothing_else = f is None or not (~rest.ksm).any()
        certain = nothing_else and not rivals and not hidden
        if certain:
            candidates = self._first(c, folio, vanishing, candidates)
        stays = vanishing & np.isin(folio, list(candidates))
        if certain and len(candidates) == 1:
            self._leave(c, vanishing & ~stays)
            self.unshared.add(1)
            self.volatile.add(int(stays.sum()) - 1)
            self.split |= holders - candidates
            return
        self._leave(c, vanishing & ~stays)
        self.split |= holders - candidates
        self.one_stays.append(candidates)
        views = np.unique(folio[stays], return_counts=True)[1]
        most = len(np.unique(c.process[stays])) if hidden else int(views.max())
        least = int(views.min()) if certain else 0
        n = int(stays.sum())
        self.gone.add(n - most, n - least)
        self.unshared.add(int(certain), 1)
        self.volatile.add(max(0, least - 1), most - 1)
        frames = len(np.unique(c.frame[stays]))
        shared = int((stays & c.maybe_shared).sum())
        self.freed.add(max(0, frames - shared - 1), frames - int(certain))
        self.zero_saved += frames - 1
        mine = self._count(c, stays)
        self.gone_by_process[:, 0] += np.maximum(0, mine - 1)
        self.gone_by_process[:, 1] += mine

    def _lonely(self, c: _Copies, folio: I64, vanishing: Bool) -> set[int]:
        """Huge pages with one zero page alone; two would split it by themselves."""
        if ((c.word[vanishing] & Flag.HIDDEN) != 0).any():
            _, where = np.unique(c.frame[vanishing], return_index=True)
            inside = np.sort(folio[vanishing][where])
        else:
            inside = _sorted_values(c.frame[vanishing]) // self.pages.huge_pages
        fresh = _starts(inside)
        return set(inside[fresh & np.append(fresh[1:], True)].tolist())

    def _first(self, c: _Copies, folio: I64, vanishing: Bool, candidates: set[int]) -> set[int]:
        """Of these huge pages the one that ksmd comes to first, where that is known."""
        at = np.flatnonzero(vanishing & np.isin(folio, list(candidates)))
        if not self.rules.order_known and len(np.unique(c.process[at])) > 1:
            return candidates
        return {int(folio[at[np.argmin(self.pages.scan_order(c.index[at]))]])}

    def _may_stay(self, rest: _Copies, f: Fate | None) -> bool:
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

    def _anything(self, c: _Copies, folio: I64, vanishing: Bool) -> None:
        """All-zero pages in huge pages, and no knowing what meets: the widest bounds."""
        n = len(c.index)
        self.shared.add(0, n)
        self.sharing.add(0, n - 1)
        self.unshared.add(0, min(n, self.blind))
        self.volatile.add(0, n)
        self.chains.add(0, self.blind)
        self.dups.add(0, n)
        self.gone.add(0, int(vanishing.sum()))
        self.gone_by_process[:, 1] += self._count(c, vanishing)
        self.merging[:, 1] += self._count(c)
        self.freed.add(-int((~c.alone).sum()), len(np.unique(c.frame)))
        self.may_split.update(folio[c.thp].tolist())

    # -- pinned pages --------------------------------------------------------------------------

    def _widen(self, zeros: _Copies) -> None:
        """Widen all figures by what pinned pages may change."""
        order = self.groups.order
        sizes = np.diff(self.groups.offsets)
        group = np.repeat(np.arange(len(sizes)), sizes)
        some = (self.pages.frames[order] & Flag.ZERO) == 0
        c = self._copies(order[some], group[some], len(sizes))
        vanishing = zeros.thp & ((zeros.word & Flag.LOCKED) == 0)
        if not self.rules.use_zero_pages and not vanishing.any():
            c = _joined(c, zeros)
        w = pins.widen(
            pins.Copies(
                c.group, c.groups, c.frame, c.process, c.ksm, c.maybe_shared | c.maybe_ksm,
                c.thp, self._folio_of(c), self._may_be_pinned(c),
            ),
            self.pinned, self.limit, self.pages.huge_pages, len(self.pages.processes),
        )  # fmt: skip
        for figure, (down, up) in (
            (self.shared, w.shared), (self.sharing, w.sharing), (self.unshared, w.unshared),
            (self.volatile, w.volatile), (self.chains, w.chains), (self.dups, w.dups),
        ):  # fmt: skip
            figure.low, figure.high = max(0, figure.low - down), figure.high + up
        self.freed.add(-w.freed[0], w.freed[1])
        change = np.array(w.merging, np.int64).reshape(-1, 2)
        self.merging[:, 0] = np.maximum(0, self.merging[:, 0] - change[:, 0])
        self.merging[:, 1] += change[:, 1]
        self.safe_splits = set(w.safe.tolist())
        self.may_split |= set(self._folio_of(c)[c.thp].tolist())
        if self.rules.use_zero_pages:
            self._widen_placed(zeros)

    def _may_be_pinned(self, c: _Copies) -> Bool:
        has = np.array([p.pinned_bytes > 0 for p in self.pages.processes])
        return np.asarray(((c.word & Flag.EXCLUSIVE) != 0) & ~c.ksm & has[c.process])

    def _widen_placed(self, zeros: _Copies) -> None:
        """use_zero_pages: a pinned zero page stays where it is."""
        may = self._may_be_pinned(zeros)
        if not may.any():
            return
        folio = self._folio_of(zeros) if zeros.thp.any() else zeros.frame
        most = self.pinned * (self.pages.huge_pages if zeros.thp.any() else 1)
        mine = np.minimum(self._count(zeros, may), most)
        n = min(int(may.sum()), most)
        self.zero.low -= n
        self.gone.low -= n
        self.zero_by_process[:, 0] -= mine
        self.gone_by_process[:, 0] -= mine
        for low in (self.zero_by_process, self.gone_by_process):
            np.maximum(low[:, 0], 0, out=low[:, 0])
        self.unshared.high += min(n, zeros.groups)
        self.volatile.high += n
        self.freed.low -= n
        assert self.safe_splits is not None
        self.safe_splits |= set(folio[zeros.thp & ~zeros.ksm].tolist())

    # -- the result ----------------------------------------------------------------------------

    def _at_least(self, folios: set[int]) -> int:
        """How many huge pages these are; hidden, two processes may see the same one."""
        shared = folios & self.shared_folios
        seen = np.array([-1 - f for f in shared], np.int64) % len(self.pages.processes)
        most = int(np.bincount(seen).max()) if len(seen) else 0
        return len(folios - self.shared_folios) + most

    def _splits(self) -> Range:
        """Huge pages that split."""
        among = set().union(*self.one_stays)
        low = max(len(self.split), len(self.split | among) - len(self.one_stays))
        high = len(self.split | among | self.may_split)
        if self.shared_folios:
            low = self._at_least(self.split)
        if self.safe_splits is not None:
            low = min(low, max(0, self._at_least(self.split & self.safe_splits) - self.pinned))
        split = Range()
        split.add(low, high)
        return split

    def _result(self, rmap_by_process: I64, *, volatile_known: bool) -> Prediction:
        page = self.pages.page_size
        total = int(rmap_by_process.sum())
        rmap_low, rmap_high = total - self.gone.high, total - self.gone.low
        profit = Range()
        profit.add(
            (self.sharing.low + self.zero.low) * page - rmap_high * RMAP_ITEM_BYTES,
            (self.sharing.high + self.zero.high) * page - rmap_low * RMAP_ITEM_BYTES,
        )
        metadata_high = rmap_high * RMAP_ITEM_BYTES + self.shared.high * STABLE_NODE_BYTES
        metadata_low = rmap_low * RMAP_ITEM_BYTES + self.shared.low * STABLE_NODE_BYTES
        saved = Range()
        saved.add(self.freed.low * page - metadata_high, self.freed.high * page - metadata_low)
        split = self._splits()
        ranges = {
            "pages_shared": self.shared,
            "pages_sharing": self.sharing,
            "pages_unshared": self.unshared,
            "pages_volatile": self.volatile,
            "ksm_zero_pages": self.zero,
            "stable_node_chains": self.chains,
            "stable_node_dups": self.dups,
            "general_profit": profit,
            "frames_freed": self.freed,
            "saved_bytes": saved,
            "thp_split": split,
        }
        values = {name: r.value for name, r in ranges.items()}
        bounds = {name: (r.low, r.high) for name, r in ranges.items() if r.value is None}
        if not self.pages.huge_known:
            # Whether a page belongs to a huge page is hidden too.
            values["thp_split"] = None
        if not volatile_known:
            values["pages_volatile"] = None
        return Prediction(
            **values,
            bounds=bounds,
            processes=self._processes(rmap_by_process),
            breakdown=Breakdown(self.zero_saved, self.within_saved, self.across_saved),
            metadata_bytes=metadata_high,
        )

    def _processes(self, rmap: I64) -> list[ProcessPrediction]:
        page = self.pages.page_size
        out = []
        for total, gone, zero, merging in zip(
            rmap.tolist(),
            self.gone_by_process.tolist(),
            self.zero_by_process.tolist(),
            self.merging.tolist(),
            strict=True,
        ):
            items = total - gone[1], total - gone[0]
            spans = {
                "ksm_rmap_items": items,
                "ksm_zero_pages": tuple(zero),
                "ksm_merging_pages": tuple(merging),
                "ksm_process_profit": (
                    (merging[0] + zero[0]) * page - items[1] * RMAP_ITEM_BYTES,
                    (merging[1] + zero[1]) * page - items[0] * RMAP_ITEM_BYTES,
                ),
            }
            out.append(
                ProcessPrediction(
                    **{name: low if low == high else None for name, (low, high) in spans.items()},
                    bounds={
                        name: (low, high) for name, (low, high) in spans.items() if low != high
                    },
                )
            )
        return out


def _joined(a: _Copies, b: _Copies) -> _Copies:
    """The contents of both, those of `b` numbered after those of `a`."""
    names = [n for n in _Copies.__slots__ if n not in {"group", "groups"}]
    parts = {n: np.concatenate((getattr(a, n), getattr(b, n))) for n in names}
    group = np.concatenate((a.group, b.group + a.groups))
    return _Copies(**parts, group=group, groups=a.groups + b.groups)


def _freed(frames: I64, outside: I64, nodes: I64) -> tuple[I64, I64]:
    """Frames given back at the least and at the most, of those that merging leaves unused.

    A frame that is mapped outside the scan too stays there, unless it is a node's.
    """
    most = np.maximum(0, frames - np.maximum(0, outside - nodes))
    return np.maximum(0, frames - outside), most


def _starts(ascending: I64) -> Bool:
    """Where a value stands for the first time."""
    first = np.ones(len(ascending), bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return first


def _sorted_values(numbers: I64) -> I64:
    """Distinct values, ascending: quickly where they ascend in long pieces, as frames do."""
    ascending = np.sort(numbers, kind="stable")
    return ascending[_starts(ascending)]


def _values(numbers: I64) -> list[int]:
    """Distinct values, by a table where that is possible: sorting takes many times as long."""
    if len(numbers) and int(numbers.min()) >= 0:
        return np.flatnonzero(np.bincount(numbers)).tolist()
    return [int(n) for n in np.unique(numbers)]


def distinct(group: I64, frame: I64, groups: int, alone: Bool | None = None) -> I64:
    """Distinct frames of each group; those of `alone` are known to have one mapping each."""
    if alone is not None:
        rest = ~alone
        others = distinct(group[rest], frame[rest], groups)
        return np.asarray(others + np.bincount(group[alone], minlength=groups))
    return np.bincount(_mappings(group, frame)[0], minlength=groups)


def _mappings(group: I64, frame: I64) -> tuple[I64, I64]:
    """Each frame of each group once: its group, ascending, and how many mappings it has."""
    if not len(group):
        return group, group
    least = int(frame.min())
    bits = (int(frame.max()) - least).bit_length()
    if int(group.max()).bit_length() + bits < _INT64_BITS:
        # One number for both, as numbers are sorted many times as fast as pairs.
        pair = (group << bits) | (frame - least)
        pair.sort()
        at = np.flatnonzero(_starts(pair))
        of = pair[at] >> bits
    else:
        order = np.lexsort((frame, group))
        g, f = group[order], frame[order]
        at = np.flatnonzero(_starts(g) | _starts(f))
        of = g[at]
    return of, np.diff(np.append(at, len(group)))
