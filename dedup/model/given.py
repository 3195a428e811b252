"""What a prediction is made from: pages, their contents and the rules, and arrays of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dedup.model.copies import NOT_STABLE, Copies, starts
from dedup.model.numa import by_node
from dedup.pages import FRAME_MASK, Flag

if TYPE_CHECKING:
    from dedup.model.prediction import Rules
    from dedup.pages import I64, U64, Bool, Groups, Index, Owners, Pages


class Given:
    """Pages, their contents and the rules; nothing of it changes.

    Parameters
    ----------
    pages : Pages
        Marked by `dedup.grouping.group`.
    groups : Groups
        From the same call.
    rules : Rules
    """

    def __init__(self, pages: Pages, groups: Groups, rules: Rules) -> None:
        self.pages, self.groups, self.rules = pages, groups, rules
        self.census = groups.census
        self.limit = rules.max_page_sharing
        nodes = None if rules.merge_across_nodes else pages.nodes
        self.nodes = nodes if pages.frames_known else None
        """NUMA nodes that merge apart, where frames tell which page lies on which."""
        self.blind = 1 if nodes is None or pages.frames_known else len(nodes)
        """NUMA nodes between which hidden frames may be spread."""
        self.lonely: Index = np.empty(0, np.int64)
        """Pages whose copies are all on other nodes."""
        if self.nodes is not None:
            self.groups, self.lonely = by_node(pages, groups, self.nodes)
        self.pinned = sum(-(-p.pinned_bytes // pages.page_size) for p in pages.processes)
        """Pages that may be pinned."""
        self._owners: Owners | None = None
        self._apart: bool | None = None

    def owners(self) -> Owners:
        """The process of all pages, found once."""
        if self._owners is None:
            self._owners = self.pages.owners()
        return self._owners

    def process_of(self, index: Index) -> I64:
        """Process of each page."""
        if not len(index):
            return np.empty(0, np.int64)
        if len(self.pages.processes) == 1:
            return np.broadcast_to(np.int64(0), len(index))
        return self.owners().of(index)

    def copies(self, index: Index, group: I64, groups: int) -> Copies:
        """What is known of some pages, each of one of so many contents."""
        word = self.pages.frames[index]
        frame = (word & FRAME_MASK).astype(np.int64)
        hidden = (word & Flag.HIDDEN) != 0
        thp = (word & Flag.THP) != 0
        # Below 0: never a frame number.
        frame[hidden] = -1 - index[hidden].astype(np.int64)
        return Copies(
            groups=groups,
            processes=len(self.pages.processes),
            index=index,
            group=group,
            word=word,
            frame=frame,
            process=self.process_of(index),
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

    def frames_of(self, word: U64, mask: np.uint64, value: np.uint64) -> tuple[int, int, int]:
        """Frames of such words, mappings of one at the most, and frames mapped outside too."""
        frames = most = outside = 0
        for frame, index in self.groups.by_frame(word, mask, value):
            at = np.flatnonzero(starts(frame))
            frames += len(at)
            most = max(most, int(np.diff(at, append=len(frame)).max()))
            is_outside = (word[index] & Flag.OUTSIDE) != 0
            outside += int(np.count_nonzero(np.logical_or.reduceat(is_outside, at)))
        return frames, most, outside

    def copies_apart(self) -> bool:
        """Whether all pages with a copy have frames of their own, KSM pages and hidden ones aside.

        So it is in one process, but for what the kernel says of huge pages while they change.
        """
        if self._apart is None:
            flags = Flag.DUPLICATE | Flag.KSM | Flag.HIDDEN | NOT_STABLE
            self._apart = self.groups.passes.all_apart(self.pages.frames, flags, Flag.DUPLICATE)
        return self._apart
