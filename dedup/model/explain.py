"""Where each page of a scan goes, and which contents free the most: why KSM saves no more.

The rules are those of `merge`, told of single pages: of a content on d frames, `max_page_sharing`
lets some stay and the others are freed; mappings that share a frame since a fork save nothing.
Where the order of scanning decides, the parts are what is most likely, within the bounds of the
prediction or near them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import numpy as np

from dedup.model.fate import closed_form
from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dedup.model.prediction import Rules
    from dedup.pages import I64, U64, Bool, Groups, Index, Pages

CHUNK_PAGES: Final = 1 << 18
"""Pages looked at in one go: what is needed a page lives no longer."""
BLOCK_BITS: Final = 6
FLAG_BITS: Final = 14
FLAG_SHIFT: Final = np.uint64(48)
SAMPLES: Final = 4
"""Places given where a content can be looked at again."""


class End(IntEnum):
    """What becomes of a page; each page of a scan is one of these. The names are those of JSON."""

    DUPLICATE = 0
    CONSTANT = 1
    ZERO = 2
    ZERO_IN_HUGE_PAGE = 3
    KEPT = 4
    OUTSIDE = 5
    FORK = 6
    HIDDEN = 7
    KSM = 8
    UNIQUE = 9
    VOLATILE = 10
    NEW = 11
    UNREAD = 12
    GONE = 13


FREED: Final = (End.DUPLICATE, End.CONSTANT, End.ZERO, End.ZERO_IN_HUGE_PAGE)
"""Pages whose frames KSM gives back."""


@dataclass(frozen=True, slots=True)
class Content:
    """A content that is there more than once."""

    mappings: int
    """Pages that have it."""
    frames: int | None
    """Distinct frames under them; None where some are hidden."""
    frames_freed: tuple[int, int]
    """At the least and at the most."""
    zero: bool
    constant: bool
    regions: list[tuple[int, int]]
    """Regions (indices) and the pages in each, the most first."""
    samples: list[int]
    """Pages (indices) with it, for a look at one of them."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What becomes of all pages, and the contents that free the most."""

    pages: I64
    """Pages by region and `End`, shape (regions, len(End))."""
    contents: list[Content]
    """Those that free the most frames, the most first."""


def explain(pages: Pages, groups: Groups, rules: Rules, top: int = 0) -> Explanation:
    """Say what becomes of each page of a scan.

    Parameters
    ----------
    pages : Pages
        Marked by `dedup.grouping.group`.
    groups : Groups
        From the same call.
    rules : Rules
    top : int
        Contents wanted.

    Returns
    -------
    Explanation
    """
    ends = _Ends(pages, groups, rules, top)
    ends.by_word()
    ends.by_content()
    return Explanation(ends.counts, ends.contents())


@dataclass(slots=True)
class _Sum:
    """One content added up."""

    mappings: int = 0
    ksm: int = 0
    hidden: int = 0
    """Mappings of frames that are hidden and not exclusive."""
    new: int = 0
    """Mappings that are neither."""
    own: int = 0
    """Frames under those."""
    own_staying: int = 0
    """Of these, such as no split of a huge page gives back."""
    ksm_frames: int = 0
    freed: tuple[int, int] = (0, 0)

    @property
    def frames(self) -> int | None:
        return None if self.hidden else self.own + self.ksm_frames


class _Ends:
    def __init__(self, pages: Pages, groups: Groups, rules: Rules, top: int) -> None:
        self.pages, self.groups, self.rules, self.top = pages, groups, rules, top
        self.limit = rules.max_page_sharing
        self.counts = np.zeros((len(pages.regions), len(End)), np.int64)
        self.table = _table(use_zero_pages=rules.use_zero_pages)
        order = np.argsort(pages.run_first, kind="stable")
        self.first, self.region = pages.run_first[order], pages.run_region[order]
        # The run of each block of pages: of its first and of its last page.
        block = np.arange(0, len(pages.frames), 1 << BLOCK_BITS)
        self.block_run = self._runs(block).astype(np.int32)
        self.block_end_run = self._runs(block + (1 << BLOCK_BITS) - 1).astype(np.int32)
        # The best contents so far: group and frames freed at the most.
        self.best = np.empty((0, 2), np.int64)

    # -- pages alone ---------------------------------------------------------------------------

    def _codes(self, word: U64) -> I64:
        """What the flags of each page alone say."""
        bits = (word >> FLAG_SHIFT).astype(np.int64) & ((1 << FLAG_BITS) - 1)
        return np.asarray(self.table[bits])

    def by_word(self) -> None:
        """Count all pages by their flags; what a content's other pages decide is moved later."""
        frames = self.pages.frames
        for at in range(0, len(frames), CHUNK_PAGES):
            code = self._codes(frames[at : at + CHUNK_PAGES])
            low = int(np.searchsorted(self.first, at, "right")) - 1
            high = int(np.searchsorted(self.first, at + len(code), "left"))
            begin = np.maximum(self.first[low:high], at)
            length = np.diff(begin, append=at + len(code))
            key = np.repeat(np.arange(high - low, dtype=np.int64) * len(End), length) + code
            found = np.bincount(key, minlength=(high - low) * len(End))
            np.add.at(self.counts, self.region[low:high], found.reshape(-1, len(End)))

    def _runs(self, index: Index) -> I64:
        return np.asarray(np.searchsorted(self.first, index, "right") - 1)

    def _regions(self, index: Index) -> I64:
        """The region of each page; a search only where its block lies in several runs."""
        block = index >> BLOCK_BITS
        run = self.block_run[block].astype(np.int64)
        several = np.flatnonzero(run != self.block_end_run[block])
        run[several] = self._runs(index[several])
        return np.asarray(self.region[run])

    def _move(self, index: Index, word: U64, to: End) -> None:
        """Count these pages as something else than their flags say."""
        if not len(index):
            return
        place = self._regions(index) * len(End)
        flat = self.counts.reshape(-1)
        np.subtract.at(flat, place + self._codes(word), 1)
        np.add.at(flat, place + to, 1)

    # -- contents ------------------------------------------------------------------------------

    def by_content(self) -> None:
        """Go through all contents: which of their pages stay, which share a frame already."""
        for low, high in self.groups.batches(CHUNK_PAGES):
            at, end = self.groups.offsets[[low, high]].tolist()
            if end - at > CHUNK_PAGES:
                self._note(np.array([low]), np.array([self._one(low, mark=True).freed[1]]))
            else:
                self._batch(low, self.groups.order[at:end], self.groups.offsets[low : high + 1])

    def _note(self, group: I64, freed: I64) -> None:
        """Remember the contents that free the most."""
        if not self.top:
            return
        some = freed > 0
        found = np.concatenate((self.best, np.stack((group[some], freed[some]), axis=1)))
        self.best = found[np.lexsort((found[:, 0], -found[:, 1]))[: self.top]]

    def _batch(self, first_group: int, index: Index, offsets: I64) -> None:
        """Groups at once; the one of all-zero pages by itself."""
        word = self.pages.frames[index]
        starts, sizes = offsets[:-1] - offsets[0], np.diff(offsets)
        some, every = np.bitwise_or.reduceat(word, starts), np.bitwise_and.reduceat(word, starts)
        number = first_group + np.arange(len(sizes))
        zero = (every & Flag.ZERO) != 0
        for g in np.flatnonzero(zero).tolist():
            self._note(
                number[g : g + 1], np.array([self._one(first_group + g, mark=True).freed[1]])
            )
        merged = (every & Flag.KSM) != 0
        unmerged = ((some & Flag.KSM) == 0) & ~zero
        alone = unmerged & ((every & Flag.EXCLUSIVE) != 0)
        one_frame = unmerged & ~alone & ((some & Flag.HIDDEN) == 0)
        one_frame &= ((some ^ every) & FRAME_MASK) == 0
        freed = np.zeros(len(sizes), np.int64)
        # Each page on a frame of its own.
        nodes, left = closed_form(sizes, self.limit)
        keep = np.where(alone, nodes + left, 0)
        freed[alone] = (sizes - keep)[alone]
        kept = starts[alone]
        for g in np.flatnonzero(keep > 1).tolist():
            kept = np.concatenate((kept, np.arange(starts[g] + 1, starts[g] + keep[g])))
        self._move(index[kept], word[kept], End.KEPT)
        # All on one frame.
        which = np.repeat(one_frame, sizes)
        self._move(index[which], word[which], End.FORK)
        rest = ~(zero | merged | alone | one_frame)
        if rest.any():
            which = np.repeat(rest, sizes)
            group = np.repeat(np.cumsum(rest) - 1, sizes)[which]
            freed[rest] = self._mixed(index[which], word[which], group, int(rest.sum()))
        self._note(number[~zero], freed[~zero])

    def _mixed(self, index: Index, word: U64, group: I64, groups: int) -> I64:
        """Contents with frames shared by fork, KSM pages or hidden frames; gives what they free."""
        kind = _Kinds(word)
        own = kind.alone.copy()
        own[kind.shared] = _firsts(group[kind.shared], word[kind.shared])
        extra = kind.shared & ~own
        self._move(index[extra], word[extra], End.FORK)
        ksm_first = _firsts(group[kind.ksm], word[kind.ksm])
        ksm_frames = np.bincount(group[kind.ksm][ksm_first], minlength=groups)
        frames = np.bincount(group[own], minlength=groups)
        hidden = np.bincount(group[kind.hidden], minlength=groups)
        keep = self._staying(
            np.bincount(group[kind.new], minlength=groups) + hidden,
            np.bincount(group[kind.ksm], minlength=groups),
            ksm_frames,
        )
        outside = own & ((word & Flag.OUTSIDE) != 0)
        kept = np.zeros(len(index), bool)
        at = np.flatnonzero(own)
        # Exclusive ones first; one that others map too stays anyhow, so it is the last choice.
        at = at[np.lexsort((outside[at], ~kind.alone[at], group[at]))]
        rank = np.arange(len(at)) - np.searchsorted(group[at], group[at])
        kept[at[rank < keep[group[at]]]] = True
        self._move(index[kept], word[kept], End.KEPT)
        lost = outside & ~kept
        self._move(index[lost], word[lost], End.OUTSIDE)
        surely = np.bincount(group[own & ~kept & ~lost], minlength=groups)
        return np.asarray(surely + np.where(frames > 0, hidden, np.maximum(0, hidden - keep)))

    def _staying(self, new: I64, ksm: I64, ksm_frames: I64) -> I64:
        """Frames that `new` mappings leave behind, beside KSM pages that take some of them."""
        room = np.maximum(0, ksm_frames * self.limit - ksm)
        nodes, left = closed_form(np.maximum(0, new - room), self.limit)
        return np.asarray(nodes + left)

    def _one(self, group: int, *, mark: bool) -> _Sum:
        """One content, piece by piece; `mark` counts its pages as what they are."""
        found = _Sum()
        others: list[I64] = []  # that share a frame, or may
        ksm_frames: list[I64] = []
        vanishing = outside = zero = 0
        for index in self._pieces(group):
            word = self.pages.frames[index]
            kind = _Kinds(word)
            found.mappings += len(index)
            found.new += int(np.count_nonzero(kind.new))
            found.hidden += int(np.count_nonzero(kind.hidden))
            found.ksm += int(np.count_nonzero(kind.ksm))
            ksm_frames.append(np.unique(word[kind.ksm] & FRAME_MASK).astype(np.int64))
            found.own += int(np.count_nonzero(kind.alone))
            vanish = self._vanishing(word)
            vanishing += int(np.count_nonzero(kind.new & vanish))
            found.own_staying += int(np.count_nonzero(kind.alone & ~vanish))
            others.append(index[kind.shared].astype(np.int64))
            zero |= int(len(word) > 0 and bool((word[0] & Flag.ZERO) != 0))
        found.ksm_frames = len(np.unique(np.concatenate(ksm_frames)))
        shared = np.concatenate(others)
        word = self.pages.frames[shared]
        own = _firsts(np.zeros(len(shared), np.int64), word)
        found.own += int(np.count_nonzero(own))
        vanish = self._vanishing(word)
        found.own_staying += int(np.count_nonzero(own & ~vanish))
        placed = bool(zero) and self.rules.use_zero_pages
        if found.own == 1 and not (found.ksm or found.hidden or placed):
            if mark:
                self._move(shared, word, End.FORK)
            return found
        small = np.array([found.new - vanishing + found.hidden])
        staying = self._staying(small, np.array([found.ksm]), np.array([found.ksm_frames]))
        # With use_zero_pages nothing stays: hidden mappings of all-zero pages go as well.
        keep = 0 if placed else int(staying[0])
        kept = min(keep, found.own_staying)
        of_shared = np.flatnonzero(own & ~vanish)
        out = (word[of_shared] & Flag.OUTSIDE) != 0
        from_alone = min(kept, found.own_staying - len(of_shared))
        of_shared = of_shared[np.argsort(out, kind="stable")][: kept - from_alone]
        lost = own & ((word & Flag.OUTSIDE) != 0)
        lost[of_shared] = False
        outside = int(np.count_nonzero(lost))
        if mark:
            self._move(shared[~own], word[~own], End.FORK)
            self._move(shared[of_shared], word[of_shared], End.KEPT)
            self._move(shared[lost], word[lost], End.OUTSIDE)
            self._keep_alone(group, from_alone)
        low = found.own - kept - outside
        more = found.hidden if found.own_staying else max(0, found.hidden - keep)
        found.freed = (low, low + more)
        return found

    def _pieces(self, group: int) -> Iterator[Index]:
        at, end = self.groups.offsets[[group, group + 1]].tolist()
        for begin in range(at, end, CHUNK_PAGES):
            yield self.groups.order[begin : min(end, begin + CHUNK_PAGES)]

    def _vanishing(self, word: U64) -> Bool:
        """All-zero pages that the shared zero page replaces: in huge pages that split, or all."""
        zero = (word & Flag.ZERO) != 0
        if self.rules.use_zero_pages:
            return np.asarray(zero)
        return np.asarray(zero & ((word & (Flag.THP | Flag.LOCKED)) == Flag.THP))

    def _keep_alone(self, group: int, keep: int) -> None:
        """Count the first `keep` exclusive pages of a content as those that stay."""
        for index in self._pieces(group):
            if not keep:
                return
            word = self.pages.frames[index]
            some = np.flatnonzero(_Kinds(word).alone & ~self._vanishing(word))[:keep]
            self._move(index[some], word[some], End.KEPT)
            keep -= len(some)

    # -- those that free the most --------------------------------------------------------------

    def contents(self) -> list[Content]:
        """The contents that free the most."""
        return [self._content(g) for g in self.best[:, 0].tolist()]

    def _content(self, group: int) -> Content:
        found = self._one(group, mark=False)
        in_region = np.zeros(len(self.pages.regions), np.int64)
        for index in self._pieces(group):
            in_region += np.bincount(self._regions(index), minlength=len(in_region))
        where = np.flatnonzero(in_region)
        where = where[np.argsort(-in_region[where], kind="stable")]
        at, end = self.groups.offsets[[group, group + 1]].tolist()
        places = np.unique(np.linspace(at, end - 1, SAMPLES).astype(np.int64))
        samples = self.groups.order[places]
        word = self.pages.frames[samples[0]]
        return Content(
            mappings=found.mappings,
            frames=found.frames,
            frames_freed=found.freed,
            zero=bool(word & Flag.ZERO),
            constant=bool(word & Flag.CONSTANT),
            regions=list(zip(where.tolist(), in_region[where].tolist(), strict=True)),
            samples=samples.tolist(),
        )


@dataclass(slots=True, init=False)
class _Kinds:
    """Pages of contents by what is known of their frames; each is one of these."""

    ksm: Bool
    hidden: Bool
    """Hidden and not exclusive: a frame of its own or not."""
    alone: Bool
    """The only mapping of its frame."""
    shared: Bool
    """One of several mappings of a frame, that is known."""

    def __init__(self, word: U64) -> None:
        self.ksm = (word & Flag.KSM) != 0
        exclusive = (word & Flag.EXCLUSIVE) != 0
        self.alone = exclusive & ~self.ksm
        self.hidden = ((word & Flag.HIDDEN) != 0) & ~exclusive & ~self.ksm
        self.shared = ~(self.ksm | self.alone | self.hidden)

    @property
    def new(self) -> Bool:
        return self.alone | self.shared


def _firsts(group: I64, word: U64) -> Bool:
    """The first mapping of each frame within its content."""
    frame = word & FRAME_MASK
    order = np.lexsort((frame, group))
    first = np.ones(len(order), bool)
    if len(order):
        g, f = group[order], frame[order]
        first[1:] = (g[1:] != g[:-1]) | (f[1:] != f[:-1])
    out = np.zeros(len(order), bool)
    out[order] = first
    return out


def _table(*, use_zero_pages: bool) -> I64:
    """What a page's flags alone say, for each set of flags; the later the weightier."""
    word = np.arange(1 << FLAG_BITS, dtype=np.uint64) << FLAG_SHIFT

    def has(flag: np.uint64) -> Bool:
        return np.asarray((word & flag) != 0)

    several = has(Flag.DUPLICATE)
    table = np.full(len(word), End.UNIQUE, np.int64)
    if use_zero_pages:
        # A single one goes to the shared zero page as well.
        table[has(Flag.ZERO)] = End.ZERO
    table[several] = End.DUPLICATE
    table[several & has(Flag.CONSTANT)] = End.CONSTANT
    table[several & has(Flag.ZERO)] = End.ZERO
    table[several & has(Flag.ZERO) & has(Flag.THP) & ~has(Flag.LOCKED)] = End.ZERO_IN_HUGE_PAGE
    table[several & has(Flag.HIDDEN) & ~has(Flag.EXCLUSIVE)] = End.HIDDEN
    table[has(Flag.KSM)] = End.KSM
    table[has(Flag.NEW)] = End.NEW
    table[has(Flag.VOLATILE)] = End.VOLATILE
    table[has(Flag.UNREAD)] = End.UNREAD
    table[has(Flag.GONE)] = End.GONE
    return table
